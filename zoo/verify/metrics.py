"""Metrics: how far two runs are apart, accumulated batch by batch in memory that does not grow with them.

Of a large vocabulary every few columns count towards the quantiles of the logit error, and each token's largest
error always does; all other figures are of all logits.

Quantiles come from a histogram over the floats' own exponent and first mantissa bits: one bucket is 0.8 %
wide, the upper edge is reported, so a quantile is never understated and is exact to 0.8 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SHIFT = 16  # keeps 8 exponent bits and 7 mantissa bits
_BUCKETS = 1 << (32 - _SHIFT)


class Quantiles:
    """A running histogram of non-negative numbers."""

    def __init__(self) -> None:
        self.counts = torch.zeros(_BUCKETS, dtype=torch.int64)
        self.max = 0.0
        self.sum = 0.0

    def add(self, x: Tensor) -> None:
        """Add numbers >= 0 (fp32)."""
        if not x.numel():
            return
        x = x.contiguous()
        self.max = max(self.max, _worst(x))
        self.sum += float(x.sum())
        self.counts += _counted(x)

    @property
    def n(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return self.sum / self.n if self.n else 0.0

    def at(self, q: float) -> float:
        """The q-quantile, rounded up by at most 0.8 %."""
        if not self.n:
            return 0.0
        rank = max(1, math.ceil(q * self.n))
        bucket = int(torch.searchsorted(self.counts.cumsum(0), rank))
        edge = torch.tensor([min((bucket + 1) << _SHIFT, 0x7F800000)], dtype=torch.int32).view(torch.float32)
        return min(float(edge), self.max)

    def summary(self) -> dict[str, float]:
        return {
            "max": self.max,
            "p50": self.at(0.5),
            "p99": self.at(0.99),
            "p99.9": self.at(0.999),
            "mean": self.mean,
        }

    def histogram(self, bins: int = 60) -> dict[str, list[float]]:
        """Counts over equal steps of log10, for a picture: `edges` has one more entry than `counts`."""
        used = self.counts.nonzero().flatten()
        used = used[used > 0]
        if not used.numel():
            return {"edges": [], "counts": []}
        centre = ((used << _SHIFT) + (1 << (_SHIFT - 1))).to(torch.int32).view(torch.float32).double().log10()
        low, high = float(centre.min()), float(centre.max())
        high = max(high, low + 1e-3)
        at = ((centre - low) / (high - low) * bins).long().clamp(0, bins - 1)
        counts = torch.zeros(bins, dtype=torch.int64).index_add_(0, at, self.counts[used])
        return {"edges": [low + (high - low) * i / bins for i in range(bins + 1)], "counts": counts.tolist()}


def _counted(x: Tensor) -> Tensor:
    """How many of the numbers are in each bucket, on the CPU."""
    if x.device.type != "cpu":
        return torch.bincount(x.view(torch.int32).flatten() >> _SHIFT, minlength=_BUCKETS).cpu()
    upper = x.flatten().numpy().view(np.uint16)[1::2]  # the upper half of each float, little-endian
    return torch.from_numpy(np.bincount(upper, minlength=_BUCKETS))


def _worst(x: Tensor) -> float:
    worst = float(x.max())
    return math.inf if math.isnan(worst) else worst  # a NaN is a failure, not an unknown


CHUNK = {
    "cpu": 1 << 21,
    "cuda": 1 << 24,
}  # logits worked on at a time: what stays in a cache; what fills a GPU
COLUMNS = 8192  # at most so many logits of a token (and its largest error) count towards the quantiles


class Reference:
    """What several comparisons need of the oracle's logits [N, V]: computed once."""

    def __init__(self, logits: Tensor, following: Tensor, scratch: Tensor | None = None) -> None:
        """`scratch`: memory of the logits' size and dtype to use."""
        self.logits, self.following = logits, following
        peak = logits.amax(-1, keepdim=True)
        self.weights = torch.sub(logits, peak, out=scratch).exp_()  # softmax, not yet divided by its sum
        self.sums = self.weights.sum(-1)  # [N]
        self.lse = peak[:, 0] + self.sums.log()
        self.best = best_ids(logits, 5)
        self.largest = max(_worst(peak), -float(logits.amin()))

    def __getitem__(self, rows: Tensor) -> Reference:
        """The reference of some rows [N] bool."""
        if bool(rows.all()):
            return self
        part = object.__new__(Reference)
        for name in ("logits", "following", "weights", "sums", "lse", "best"):
            setattr(part, name, getattr(self, name)[rows])
        part.largest = self.largest
        return part


def references(logits: Tensor, following: Tensor) -> Iterator[tuple[slice, Reference]]:
    """Logits [N, V] in pieces, each good until the next. `following` [N]: the token that came next in the text, or -1."""
    step = max(1, CHUNK[logits.device.type] // max(1, logits.shape[-1]))
    following = following.to(logits.device)
    # One piece of memory for all: fresh pages cost more than what is written to them.
    scratch = logits.new_empty(min(step, len(logits)), logits.shape[-1], dtype=torch.float32)
    for i in range(0, len(logits), step):
        at = slice(i, i + step)
        piece = logits[at].float()
        yield at, Reference(piece, following[at], scratch[: len(piece)])


@dataclass
class LogitMetrics:
    """One run's logits against the oracle's, over all real positions. `five`: whether top-5 agreement is wanted."""

    five: bool = True

    error: Quantiles = field(default_factory=Quantiles)
    kl: Quantiles = field(default_factory=Quantiles)
    n: int = 0
    top1: int = 0
    top5: float = 0.0
    largest: float = 0.0
    nll_ours: float = 0.0
    nll_theirs: float = 0.0
    n_next: int = 0
    scatter: list[tuple[float, float]] = field(default_factory=list)
    _scratch: Tensor | None = field(default=None, repr=False, compare=False)

    def add(self, ours: Tensor, theirs: Reference) -> None:
        """ours [N, V] against the same rows of the oracle's."""
        if not len(ours):
            return
        ours = ours.float()
        if self._scratch is None or self._scratch.shape != ours.shape or self._scratch.device != ours.device:
            self._scratch = torch.empty_like(ours)
        d = torch.sub(ours, theirs.logits, out=self._scratch)  # [N, V]
        worst = torch.maximum(d.amax(-1), -d.amin(-1)).abs()  # of equal rows it is 0, not -0
        if not bool(worst.isfinite().all()):  # what is no number is infinitely wrong
            d = torch.nan_to_num(d, nan=math.inf, posinf=math.inf, neginf=-math.inf)
            worst = d.abs().amax(-1)
        self.error.add(d[:, :: max(1, d.shape[1] // COLUMNS)].abs())
        self.error.add(worst)
        at = theirs.following.clamp(min=0)[:, None]
        next_apart = d.gather(1, at)[:, 0]
        mean, kl = _kl(d, float(worst.max()), theirs)
        self.kl.add(kl)
        self._next(theirs, at, mean + kl - next_apart)
        self.largest = max(self.largest, theirs.largest)
        best = best_ids(ours, 5 if self.five else 1)
        self.top1 += int((best[:, 0] == theirs.best[:, 0]).sum())
        if self.five:
            self.top5 += float((best[:, :, None] == theirs.best[:, None, :]).any(-1).float().mean(-1).sum())
        self.n += len(ours)

    def _next(self, theirs: Reference, at: Tensor, apart: Tensor) -> None:
        """What text came next, `at` [N, 1], is less likely by `apart` [N] (of the log) in ours: ln sum e^ours is theirs, and
        what E[d] and the divergence add up to, since the latter is ln E[e^d] - E[d]."""
        real = theirs.following >= 0
        if not real.any():
            return
        nll_theirs = (theirs.lse - theirs.logits.gather(1, at)[:, 0])[real].double().sum()
        self.nll_theirs += float(nll_theirs)
        self.nll_ours += float(nll_theirs + apart[real].double().sum())
        self.n_next += int(real.sum())

    def sample(self, ours: Tensor, theirs: Tensor) -> None:
        """A few hundred (theirs, ours) pairs for the scatter plot: the top of each token, and a stride."""
        if len(self.scatter) > 4000:
            return
        flat = torch.arange(0, theirs.numel(), max(1, theirs.numel() // 60), device=theirs.device)
        top = (
            best_ids(theirs, 1)[:, 0] + torch.arange(theirs.shape[0], device=theirs.device) * theirs.shape[1]
        )
        at = torch.cat([flat, top])
        self.scatter += list(zip(theirs.flatten()[at].tolist(), ours.flatten()[at].tolist(), strict=True))

    @property
    def perplexities(self) -> tuple[float, float]:
        """(ours, theirs) on the text inputs; 0 where there was no text."""
        if not self.n_next:
            return 0.0, 0.0
        return math.exp(min(self.nll_ours / self.n_next, 700)), math.exp(
            min(self.nll_theirs / self.n_next, 700)
        )

    def summary(self) -> dict[str, Any]:
        ours, theirs = self.perplexities
        return {
            "tokens": self.n,
            "largest_logit": self.largest,
            "error": self.error.summary(),
            "kl": self.kl.summary(),
            "top1_agreement": self.top1 / max(1, self.n),
            "top5_agreement": self.top5 / max(1, self.n),
            "perplexity": {"ours": ours, "oracle": theirs, "difference": ours - theirs}
            if self.n_next
            else None,
        }


class Columns:
    """Of each id, how far its logits are off beside the other ids' of the same token: |error| over the root mean square of
    that token's errors, a mean over tokens. About 1 for all where rounding alone is at work, also where a token chose other experts;
    many times that for an id whose row of the head is another's.

    `ulp`: rounding of the dtype. Errors of a token count as no less than that of its logits, so that where two runs are
    almost the same a few roundings are not taken for much."""

    def __init__(self, ulp: float) -> None:
        self.ulp, self.n, self.sum = ulp, 0, torch.zeros(0)

    def add(self, ours: Tensor, theirs: Reference) -> None:
        """ours [N, V] against the same rows of the oracle's. What is not finite fails elsewhere, and is left out."""
        error = (ours.float() - theirs.logits).abs_()
        size, least = (x.square().mean(-1).sqrt() for x in (error, theirs.logits))
        fine = size.isfinite() & (least > 0)
        if not bool(fine.all()):
            error, size, least = error[fine], size[fine], least[fine]
        if len(error):
            found = error.T @ torch.maximum(size, self.ulp * least).reciprocal()
            self.sum = self.sum + found if self.n else found
            self.n += len(error)

    @property
    def mean(self) -> Tensor:
        """[V] on the CPU, or [0] where there was no token."""
        return self.sum.cpu() / max(1, self.n)


def _kl(d: Tensor, worst: float, theirs: Reference) -> tuple[Tensor, Tensor]:
    """E[d] and KL(theirs || ours) per token [N], d = ours - theirs: ln E[e^d] - E[d] under theirs' softmax. `d` is used up.

    Where all |d| are small, half the variance of d: exact to third order, and without the cancellation that
    would drown it in fp32. Beyond that ln(1 + E[e^d - 1]) with d centred: fp32 has each e^d - 1 to its last place, so what is lost is
    2^-23 of E|d|, where the divergence is of the order of its square; only what would overflow is summed in float64.
    """
    mean = torch.linalg.vecdot(theirs.weights, d) / theirs.sums
    d.sub_(mean[:, None])
    if worst < 1e-2:
        variance: Tensor = torch.linalg.vecdot(theirs.weights, d.square_()) / theirs.sums
        return mean, variance / 2
    if worst < 40:
        grown = torch.linalg.vecdot(theirs.weights, d.expm1_()) / theirs.sums
    else:
        grown = torch.linalg.vecdot(theirs.weights.double(), d.double().expm1_()) / theirs.sums.double()
    return mean, torch.nan_to_num(grown.log1p().float().clamp(min=0), nan=math.inf, posinf=math.inf)


BLOCK = 128  # columns whose largest is looked at before they are


def best_ids(logits: Tensor, k: int) -> Tensor:
    """The k best ids of each row of [N, V], best first: the k best of the blocks that have the k largest maxima. (Of 262,144
    ids torch's own top-k takes ten times as long on a CPU.) Of equal ones any, as torch's."""
    n, V = logits.shape
    k = min(k, V)
    blocks = V // BLOCK
    if blocks <= 4 * k:
        return logits.topk(k).indices
    whole = logits[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    found = whole.amax(-1).topk(k).indices  # [N, k]
    values = whole.gather(1, found[..., None].expand(-1, -1, BLOCK)).flatten(1)
    ids = (found[..., None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    rest = torch.arange(blocks * BLOCK, V, device=logits.device).expand(n, -1)
    values, ids = torch.cat([values, logits[:, blocks * BLOCK :]], 1), torch.cat([ids, rest], 1)
    return ids.gather(1, values.topk(k).indices)


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """|ours - theirs| / |theirs| for each token: [N, D], [N, D] -> [N]. Infinite where that is NaN, or theirs is zero
    and ours is not."""
    a, b = ours.double(), theirs.double()
    apart = (a - b).norm(dim=-1)
    r = torch.where(apart == 0, 0.0, apart / b.norm(dim=-1))
    return torch.nan_to_num(r, nan=math.inf, posinf=math.inf)


def quantile(values: Sequence[float] | Tensor, q: float) -> float:
    """The q-quantile of a few numbers (nearest rank)."""
    v = sorted(values.tolist() if isinstance(values, Tensor) else values)
    return v[min(len(v) - 1, max(0, math.ceil(q * len(v)) - 1))] if v else 0.0
