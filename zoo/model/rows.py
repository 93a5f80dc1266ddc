"""A prompt that ranks share by rows: between matrices each rank has the residual and the norms of a run of its tokens.

A matrix whose outputs are shared out is given a rank's rows and makes its part of all rows (`spread`); one whose inputs are
shared out is given all rows, and what it makes is added up for each rank's own (`sum`). As much is sent as for sums on all
ranks, and each row is normed once (arXiv 2205.05198 has it for training).

Unusual: GPUs of one host multiply in pieces, and their copy engines carry one piece while the next is multiplied, which
takes no multiprocessor from the products. First the rows that others wait for, last the own; of rows that come, the own are
multiplied first, by as much of the matrix as keeps the GPU busy for one round of tiles.

Margin: 2048 tokens of Llama 3.1 8B on two H200, captured, take 31 to 32 ms with NCCL's sums and 27.2 so (33.5 by NCCL's
reduce-scatter and all-gather). Launched one by one it is the host that takes longer (79 ms, and 44 with sums), so only
passes that are captured go by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.kernels.near import add_up, add_up_norm, add_up_norm_reference, arrive, norms_sum
from zoo.spec import Norm

LEAST = 256
"""Rows of a rank from which it is worth sharing them out; and rows of which logits are made and sent at once."""
MOST = 1 << 28
"""Bytes of a place, up to which GPUs write into each other's memory."""
HIGH, WIDE = 128, 256
"""Rows and columns of results that a multiprocessor has at once in a matrix product of 16-bit numbers on Hopper."""
SHORT = 4096
"""Columns of a matrix, below which its product takes less time than to carry it: then it is carried in two pieces."""
RING = 4
"""Runs of logits that are under way: a rank that sends one knows by what came that the one four before was read."""
SUM, SPREAD, WHOLE, DONE, LOGITS = range(5)
"""What is sent; each has a place, and a flag for each rank; logits as many as are under way."""


class Matrix(Protocol):
    """A linear map, as `zoo.model.linear.Weights` is one."""

    def dense(self, dtype: torch.dtype) -> Tensor: ...
    def offset(self, dtype: torch.dtype) -> Tensor | None: ...


class Normer(Protocol):
    """A norm, as `zoo.model.norm.Norm` is one."""

    spec: Norm

    @property
    def weight(self) -> Tensor | None: ...


class Lanes:
    """Memory of GPUs of one host that each can write into.

    A flag follows what was sent, on the same stream, and who waited for it takes it down. Nothing is written over that is
    still read: ranks send for `spread` and for `sum` by turns, and none sends before it has what was last sent to it, which a
    rank sends when it is through with what it got before.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device, self.rank, self.ranks = group, device, group.rank(), group.size()
        self.others = [(self.rank + i) % self.ranks for i in range(1, self.ranks)]
        """First the next, so that not all send to the same one."""
        self.kept: list[Tensor] = []  # what passes that were captured may write to
        self.flags = self.shared((LOGITS + RING, self.ranks), torch.int32)
        self.up = torch.ones(1, dtype=torch.int32, device=device)
        self.seen = torch.zeros(1, dtype=torch.int32, device=device)  # for `add_up_norm`
        self.sent: list[Tensor] = []  # what is under way, or was when that was last waited for
        self.places: dict[int, list[Tensor]] = {}  # of a kind, by rank
        self.round = 0
        if device.type == "cuda":
            self.side = torch.cuda.Stream(device)
            self.round = torch.cuda.get_device_properties(device).multi_processor_count * HIGH * WIDE

    def shared(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """A tensor on each rank, zero, as this one reaches it. All ranks ask together."""
        import torch.distributed._symmetric_memory as symmetric

        with torch.inference_mode(False):
            own = symmetric.empty(shape, dtype=dtype, device=self.device).zero_()
            shared = symmetric.rendezvous(own, self.group.group_name)
            self.kept.append(own)
            torch.cuda.synchronize(self.device)
            dist.barrier(self.group)  # nobody writes before all have zeroed theirs
            return [shared.get_buffer(r, shape, dtype) for r in range(self.ranks)]

    def room(self, nbytes: int, *kinds: int) -> bool:
        """Whether there is, or was made, a place of so many bytes for each kind."""
        if nbytes > MOST:
            return False
        for kind in kinds:
            if kind not in self.places or self.places[kind][0].nbytes < nbytes:
                self.places[kind] = self.shared((1 << (nbytes - 1).bit_length(),), torch.uint8)
        return True

    def place(self, kind: int, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A rank's place for a kind."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self.places[kind][rank][:nbytes].view(dtype).view(shape)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is sent here waits for what was asked of the GPU before, and nothing for it until `arrived`."""
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            yield

    def flag(self, kind: int, to: int) -> None:
        self.flags[to][kind, self.rank : self.rank + 1].copy_(self.up)

    def arrived(self, kind: int) -> None:
        """What is asked of the GPU from here on waits until all was sent, and is here."""
        torch.cuda.current_stream().wait_stream(self.side)
        self.sent.clear()
        arrive(self.flags[self.rank][kind], self.rank)

    def added(self, kind: int, parts: Tensor, onto: Tensor, norm: Normer, normed: Tensor) -> Tensor:
        """parts [ranks, n, d] of a kind, once they are here, added up, and to `onto` [n, d]: that, and its norm into `normed`."""
        if norms_sum(parts, norm.weight, norm.spec):
            # It waits itself; what was sent from here, and is kept until then, is waited for when the next kind has arrived.
            flags = self.flags[self.rank][kind]
            return add_up_norm(parts, onto, norm.weight, norm.spec, normed, flags, self.seen, self.rank)
        self.arrived(kind)
        total, y = add_up_norm_reference(parts, onto, norm.weight, norm.spec)
        normed.copy_(y)
        return total

    def columns(self, times: Callable[[Tensor], Tensor], x: Tensor, n: int) -> Tensor | None:
        """times(x) [rows, n] of all ranks, x [rows, d], side by side: [rows, ranks n]; None if too large."""
        runs = x.split(LEAST)
        if not self.room(RING * self.ranks * LEAST * n * x.element_size(), LOGITS):
            return None
        ring = (RING, self.ranks, LEAST, n)
        out = x.new_empty(len(x), self.ranks, n)

        def take(i: int) -> None:
            self.arrived(LOGITS + i % RING)
            came, there = self.place(LOGITS, self.rank, ring, x.dtype)[i % RING], out[i * LEAST :][:LEAST]
            for r in self.others:
                wide(there[:, r]).copy_(wide(came[r, : len(there)]))

        made: list[Tensor] = []
        for i, run in enumerate(runs):
            made = [*made[-1:], times(run)]  # until it was sent
            if i:  # before the next is sent, which would be waited for, too: 70 us a run
                take(i - 1)
            with self.beside():
                for r in self.others:
                    self.place(LOGITS, r, ring, x.dtype)[i % RING, self.rank, : len(run)].copy_(made[-1])
                    self.flag(LOGITS + i % RING, r)
            wide(out[i * LEAST :][:LEAST, self.rank]).copy_(wide(made[-1]))
        take(len(runs) - 1)
        with self.beside():
            for r in self.others:
                self.flag(DONE, r)
        self.arrived(DONE)
        return out.flatten(1)


class Rows:
    """One pass by rows, of x [B, T, d], of which each rank has `each` but the last. All ranks ask for the same in the same
    order: `spread` and `sum` by turns, and `whole` at the end."""

    def __init__(self, lanes: Lanes, x: Tensor) -> None:
        self.lanes, self.lead, self.d, self.dtype = lanes, x.shape[:-1], x.shape[-1], x.dtype
        self.n = self.lead.numel()
        self.each = -(-self.n // lanes.ranks)
        self.here = self.of(lanes.rank)
        self.made: tuple[Tensor, Normer, Tensor] | None = None
        """What was last added up, the norm that comes next, and what that makes of it."""

    @classmethod
    def fit(cls, lanes: Lanes, x: Tensor) -> Rows | None:
        """The pass of x; None where it has too few rows, or they are too large."""
        rows = cls(lanes, x)
        nbytes = lanes.ranks * rows.each * rows.d * x.element_size()
        enough = rows.n >= LEAST * lanes.ranks
        return rows if enough and lanes.room(nbytes, SUM, SPREAD, WHOLE) else None

    def of(self, rank: int) -> slice:
        return slice(min(rank * self.each, self.n), min((rank + 1) * self.each, self.n))

    def own(self, x: Tensor) -> Tensor:
        """x [B, T, d] -> this rank's rows [rows, d]."""
        return x.flatten(0, -2)[self.here]

    def whole(self, own: Tensor) -> Tensor:
        """The ranks' rows -> [B, T, d]."""
        x = self._deal(WHOLE, own.contiguous())
        self.lanes.arrived(WHOLE)
        x[self.here] = own
        return x.clone().view(*self.lead, self.d)

    def sum(self, x: Tensor, weights: Matrix, onto: Tensor | None, norm: Normer | None = None) -> Tensor:
        """x [B, T, in] times this rank's part of a matrix, added up over ranks, and to `onto`: its rows of that [rows, d].
        `norm`: what is asked for next of the sum; it is made along with it (see `normed`)."""
        x, lanes = x.flatten(0, -2), self.lanes
        w, bias = weights.dense(x.dtype), weights.offset(x.dtype)
        pieces = 2 if x.shape[-1] < SHORT and self.each >= 2 * LEAST else 1
        for r in lanes.others:
            rows, place = x[self.of(r)], self._place(SUM, r)[lanes.rank]
            for some, there in zip(rows.chunk(pieces), place[: len(rows)].chunk(pieces), strict=True):
                part = _times(some, w, bias)
                lanes.sent.append(part)
                with lanes.beside():
                    there.copy_(part)
            with lanes.beside():
                lanes.flag(SUM, r)
        parts = self._place(SUM, lanes.rank)[:, : self.here.stop - self.here.start]
        _times(x[self.here], w, bias, parts[lanes.rank])
        if norm is None or onto is None:
            lanes.arrived(SUM)
            return add_up(parts, onto)
        normed = self._place(SPREAD, lanes.rank)[lanes.rank, : parts.shape[1]]
        total = lanes.added(SUM, parts, onto, norm, normed)
        self.made = total, norm, normed
        return total

    def normed(self, x: Tensor, norm: Normer) -> Tensor | None:
        """The norm of x [rows, d], if that was last added up and this was to come next: where `spread` has it from."""
        made, self.made = self.made, None
        return made[2] if made is not None and made[0] is x and made[1] is norm else None

    def spread(self, own: Tensor, weights: Matrix) -> Tensor:
        """The ranks' rows [rows, d] times this rank's part of a matrix: [B, T, out]."""
        own = own.contiguous()
        w, bias = weights.dense(own.dtype), weights.offset(own.dtype)
        x, out = self._deal(SPREAD, own), own.new_empty(self.n, len(w))
        first = max(1, self.lanes.round // self.each // WIDE) * WIDE
        now = w[:first], None if bias is None else bias[:first]
        _times(own, *now, out[self.here, :first])
        if first < len(w) and own.data_ptr() != x[self.here].data_ptr():
            # A copy within a GPU takes multiprocessors: it would wait beside a product, and all behind it.
            x[self.here].copy_(own)
        self.lanes.arrived(SPREAD)
        for there in (slice(0, self.here.start), slice(self.here.stop, self.n)):
            if there.start < there.stop:
                _times(x[there], *now, out[there, :first])
        if first < len(w):
            _times(x, w[first:], None if bias is None else bias[first:], out[:, first:])
        return out.view(*self.lead, len(w))

    def _place(self, kind: int, rank: int) -> Tensor:
        """[ranks, each, d]"""
        return self.lanes.place(kind, rank, (self.lanes.ranks, self.each, self.d), self.dtype)

    def _deal(self, kind: int, own: Tensor) -> Tensor:
        """Own rows to the others, beside what the GPU is asked: where theirs will be, [rows, d]."""
        lanes = self.lanes
        with lanes.beside():
            for r in lanes.others:
                self._place(kind, r)[lanes.rank, : len(own)].copy_(own)
                lanes.flag(kind, r)
        return self._place(kind, lanes.rank).flatten(0, 1)[: self.n]


def _times(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x [n, in] times w [out, in], transposed, plus bias [out], into `out`."""
    return torch.mm(x, w.T, out=out) if bias is None else torch.addmm(bias, x, w.T, out=out)


def wide(x: Tensor) -> Tensor:
    """x, eight bytes to an element if its rows have whole ones: as fast as it is copied."""
    whole = x.shape[-1] * x.element_size() % 8 == 0 and x.element_size() < 8
    return x.view(torch.int64) if whole else x
