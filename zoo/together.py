"""What the ranks of torch.distributed tell each other, but for tensors."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def of_first(value: T, group: dist.ProcessGroup | None = None) -> T:
    """The first rank's value, on all of the group (None: the default one). What the others give is not looked at."""
    source = 0 if group is None else dist.get_global_rank(group, 0)
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def first_said(value: T | None) -> T | None:
    """Of the default group, on all ranks: the value of the first rank that has one."""
    told: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return next((x for x in told if x is not None), None)
