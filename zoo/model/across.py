"""What the ranks of a model say to each other: all of it torch.distributed's.

Unusual: nothing here says in which layer. Every rank runs the same layers on the same ids, so that the collectives meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from zoo.errors import ZooError
from zoo.kernels.near import near_gather_reference
from zoo.kernels.norm import factor
from zoo.model.near import Near
from zoo.model.rows import LEAST, Lanes, Normer, Rows
from zoo.spec import Norm

APIECE = 64
"""Tokens, up to which ranks of GPUs do not count those that chose their experts, so that a step can be captured."""


class Across:
    """The ranks of a mesh of one axis. Raises ZooError for a mesh of more."""

    def __init__(self, mesh: DeviceMesh) -> None:
        if mesh.ndim != 1:
            raise ZooError(f"a model is split over a mesh of one axis; found one of {mesh.ndim}")
        self.group = mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.capturable = dist.get_backend(self.group) == "nccl"
        """Whether a CUDA graph can hold what is said."""
        self.near: Near | None = None
        self.lanes: Lanes | None = None  # as `near`, of prompts; made when the first is captured
        self.captured = False
        self.rows: Rows | None = None
        """Of a pass that is under way, in which each rank has its rows between matrices."""

    def meet(self) -> None:
        """Share memory with the other ranks, where they are GPUs of one host. All do this together, before they say more."""
        self.near = Near.of(self.group) if self.capturable else None

    def sum(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """The ranks' x, added up, and to `onto`; x may be overwritten. The same bits on all of them."""
        x = x.contiguous()
        if self.near is not None and (total := self.near.sum(x, onto)) is not None:
            return total
        dist.all_reduce(x, group=self.group)
        return x if onto is None else onto + x

    def mean(self, x: Tensor, share: int, shares: int) -> Tensor:
        """The mean of x over the ranks that have the same one of `shares` shares; `share` is this rank's."""
        each = x.new_zeros(shares, *x.shape)
        each[share] = x
        return self.sum(each)[share] / (self.size // shares)

    def gather(self, x: Tensor) -> Tensor:
        """The ranks' x [..., n], one after the other: [..., ranks n]."""
        x = x.contiguous()
        if self.near is not None and (found := self.near.gather(x)) is not None:
            return found
        each = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(each.unbind(0)), x, group=self.group)
        return near_gather_reference(each)

    def beside(self, times: Callable[[Tensor], Tensor], x: Tensor, n: int) -> Tensor:
        """`gather` of times(x) [..., T, n], x [..., T, d]."""
        rows = x.flatten(0, -2)
        if self.lanes is not None and self.captured and len(rows) > LEAST:
            found = self.lanes.columns(times, rows, n)
            if found is not None:
                return found.view(*x.shape[:-1], -1)
        return self.gather(times(x))

    def by_rows(self, layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """layers(x) of x [B, T, d]; in a pass that is captured each rank has its rows of what is between matrices."""
        self.rows = Rows.fit(self.lanes, x) if self.lanes is not None and self.captured else None
        if self.rows is None:
            return layers(x)
        try:
            return self.rows.whole(layers(self.rows.own(x)))
        finally:
            self.rows = None

    def normed(self, x: Tensor, norm: Normer) -> Tensor | None:
        """The norm of x, where it was made along with x (see `Rows.sum`)."""
        return None if self.rows is None else self.rows.normed(x, norm)

    @contextmanager
    def to_be_captured(self) -> Iterator[None]:
        """Passes in here are captured, or make ready for that."""
        if self.near is not None and self.lanes is None:
            self.lanes = Lanes(self.group, torch.device("cuda", torch.cuda.current_device()))
        self.captured = True
        try:
            yield
        finally:
            self.captured = False

    def agreed(self, x: Tensor) -> Tensor:
        """The first rank's x, on all."""
        first = dist.get_global_rank(self.group, 0)
        dist.broadcast(x, src=first, group=self.group)
        return x


class Spread:
    """A norm over channels of which each rank has some: its mean square (and, of a layer norm, its mean) is taken over all.

    `share` of `shares`: the group of channels that the norm is over, where there are several."""

    def __init__(self, across: Across, share: int = 0, shares: int = 1) -> None:
        self.across, self.share, self.shares = across, share, shares

    def mean(self, x: Tensor) -> Tensor:
        return self.across.mean(x.mean(-1, keepdim=True), self.share, self.shares)

    def __call__(self, x: Tensor, weight: Tensor | None, norm: Norm, bias: Tensor | None = None) -> Tensor:
        """x [..., channels of this rank], normed; see `zoo.kernels.norm.rms_norm_reference` and `zoo.model.norm.layer_norm`."""
        y = x.to(torch.promote_types(x.dtype, torch.float32)) if norm.kind == "layer" else x.float()
        if norm.kind == "layer":
            y = y - self.mean(y)
        y = y * torch.rsqrt(self.mean(y.square()) + norm.eps)
        if norm.kind == "rms" and norm.rounding == "first":
            y = y.to(x.dtype)
        if weight is not None:
            wide = norm.kind == "rms" and norm.rounding == "last"
            y = y * factor(weight.to(y.dtype) if wide else weight, norm).to(y.dtype if wide else x.dtype)
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y.to(x.dtype)
