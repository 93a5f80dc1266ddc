"""The memory of GPUs of one host that can write into each other's: torch's symmetric memory, for `zoo.kernels.near`."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.kernels.launch import triton
from zoo.kernels.near import BLOCK, near, room, words_of

MOST = 1 << 16
"""Words of four bytes of a rank: beyond, NCCL is faster. Each travels with its flag, to each rank."""


class Near:
    """Sums over the ranks of `group`, and their numbers side by side. All ranks ask for the same in the same order, each on one
    stream."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.rank, self.ranks = group.rank(), group.size()
        self.memory = symmetric.empty(room(self.ranks, MOST), dtype=torch.int64, device=device).zero_()
        shared = symmetric.rendezvous(self.memory, group.group_name)
        self.buffers = torch.tensor(shared.buffer_ptrs, dtype=torch.int64, device=device)
        self.calls = torch.zeros(MOST // BLOCK, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody writes before all have zeroed theirs

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Near | None:
        """None where the ranks are not all on this host, or their GPUs see each other's memory only by way of the host."""
        n, device = group.size(), torch.device("cuda", torch.cuda.current_device())
        if (
            n < 2
            or str(n) != os.environ.get("LOCAL_WORLD_SIZE")
            or torch.cuda.device_count() < n
            or triton is None
        ):
            return None
        if not all(torch.cuda.can_device_access_peer(a, b) for a in range(n) for b in range(n) if a != b):
            return None
        made, worked = None, torch.ones(1, device=device)
        try:
            made = cls(group, device)
        except RuntimeError:  # no descriptors may be handed around, as in some containers
            worked.zero_()
        dist.all_reduce(worked, dist.ReduceOp.MIN, group)
        return made if worked.item() else None

    def sum(self, x: Tensor, onto: Tensor | None = None) -> Tensor | None:
        """The ranks' x, added up, and to `onto`; None where that is not for here."""
        if x.dtype not in (torch.float32, torch.bfloat16) or x.nbytes % 4:
            return None
        if onto is not None and (onto.dtype != x.dtype or onto.shape != x.shape or not onto.is_contiguous()):
            return None
        return self._all(x, True, onto)

    def gather(self, x: Tensor) -> Tensor | None:
        """The ranks' x [..., n], one after the other: [..., ranks n]; None where that is not for here."""
        if x.shape[-1] * x.element_size() % 4:
            return None
        return self._all(x, False)

    def _all(self, x: Tensor, add: bool, onto: Tensor | None = None) -> Tensor | None:
        if not 0 < words_of(x) <= MOST:
            return None
        return near(x, self.buffers, self.calls, self.rank, self.ranks, MOST, add, onto)
