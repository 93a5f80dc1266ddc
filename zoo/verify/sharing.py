"""Ranks that stream one model together.

Each has a share of the texts, which it takes through whole layers; on GPUs it reads an equal part of each weight, and the parts
are put together where the layers are computed (on a CPU each reads all, from one page cache). So a weight crosses from the files to the devices once, however many ranks there are, and
nothing is added up in another order than by one process: the numbers are its own, to the bit. (Layers dealt out would wait for one
another, as each needs the states that the one before leaves; tensor-parallel layers round otherwise, and upstream's classes
are not cut.)

What ranks say to each other is said in turn by their main threads, over gloo; weights go by the mesh's own group, in which
nothing else is said meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from zoo.together import of_first

T = TypeVar("T")
WHOLE = 1 << 20
"""Bytes up to which every rank reads all of a weight: a norm's are sooner read than sent."""
ALIGNED = 512
"""Bytes that the parts of a weight begin at multiples of."""


class Sharing:
    """The ranks of a mesh with one axis, as one of them sees them. Made by all of them at once."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group()
        members = dist.get_process_group_ranks(self.group)
        self.rank, self.n = mesh.get_local_rank(), mesh.size()
        # The others wait here while the first judges alone: NCCL would end them after ten minutes, gloo after thirty.
        self.words = dist.new_group(
            members, backend="gloo", timeout=timedelta(days=7), use_local_synchronization=True
        )

    @property
    def first(self) -> bool:
        return self.rank == 0

    def all(self, value: T) -> list[T]:
        """What each rank says, in their order."""
        said: list[T | None] = [None] * self.n
        dist.all_gather_object(said, value, group=self.words)
        return said  # type: ignore[return-value]

    def mine(self, sizes: Sequence[int]) -> list[int]:
        """Which of things of these sizes are this rank's: the largest first, each to the rank that has least."""
        loads, own = [0] * self.n, []
        for size, k in sorted(((s, k) for k, s in enumerate(sizes)), key=lambda x: (-x[0], x[1])):
            rank = loads.index(min(loads))
            loads[rank] += size
            own += [k] if rank == self.rank else []
        return sorted(own)

    def room_for(self, nbytes: int) -> int:
        """Bytes that a weight takes where ranks put it together: equal parts."""
        return nbytes if nbytes <= WHOLE else self.n * self._part(nbytes)

    def own(self, nbytes: int) -> slice:
        """The part of a weight's bytes that this rank reads."""
        if nbytes <= WHOLE:
            return slice(0, nbytes)
        part = self._part(nbytes)
        return slice(min(self.rank * part, nbytes), min((self.rank + 1) * part, nbytes))

    def complete(self, whole: Tensor, nbytes: int) -> None:
        """Put the ranks' parts of a weight together: uint8 [`room_for(nbytes)`], of which each has filled `own(nbytes)`."""
        if nbytes > WHOLE:
            part = self._part(nbytes)
            own = whole[self.rank * part : (self.rank + 1) * part]
            dist.all_gather_into_tensor(whole, own, group=self.group)

    def of_first(self, value: T) -> T:
        """What the first rank says, on all."""
        return of_first(value, self.words)

    def _part(self, nbytes: int) -> int:
        return -(-nbytes // (self.n * ALIGNED)) * ALIGNED
