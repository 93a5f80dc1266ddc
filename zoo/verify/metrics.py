"""Metrics: how far two runs are apart, accumulated batch by batch in memory that does not grow with them.

Quantiles come from a histogram over the floats' own exponent and first mantissa bits: one bucket is 0.8 %
wide, the upper edge is reported, so a quantile is never understated and is exact to 0.8 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
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
        x = x.detach().float().flatten().contiguous()
        if not x.numel():
            return
        self.max = max(self.max, _worst(x))
        self.sum += float(x.double().sum()) if x.numel() < 1 << 20 else float(x.sum())
        self.counts += torch.bincount(x.abs_().view(torch.int32) >> _SHIFT, minlength=_BUCKETS)[:_BUCKETS]

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
        return {"max": self.max, "p50": self.at(0.5), "p99": self.at(0.99), "p99.9": self.at(0.999), "mean": self.mean}

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


def _worst(x: Tensor) -> float:
    worst = float(x.max())
    return math.inf if math.isnan(worst) else worst  # a NaN is a failure, not an unknown


@dataclass
class LogitMetrics:
    """Ours against theirs over all real positions. `tokens` are per-token summaries, in input order."""

    error: Quantiles = field(default_factory=Quantiles)
    kl: Quantiles = field(default_factory=Quantiles)
    n: int = 0
    top1: int = 0
    top5: float = 0.0
    largest: float = 0.0
    nll_ours: float = 0.0
    nll_theirs: float = 0.0
    n_next: int = 0
    token_max: list[float] = field(default_factory=list)
    token_p50: list[float] = field(default_factory=list)
    token_kl: list[float] = field(default_factory=list)
    scatter: list[tuple[float, float]] = field(default_factory=list)

    def add(self, ours: Tensor, theirs: Tensor, following: Tensor) -> None:
        """ours, theirs: [N, V]; following: [N] the token that came next in the text, or -1."""
        for a, b, nxt in zip(ours.split(256), theirs.split(256), following.split(256), strict=True):
            self._add(a.float(), b.float(), nxt)

    def _add(self, ours: Tensor, theirs: Tensor, following: Tensor) -> None:
        error = (ours - theirs).abs_()  # [N, V]
        error = torch.nan_to_num_(error, nan=math.inf)
        per_token = error.amax(-1)
        self.token_max += per_token.tolist()
        self.token_p50 += error[:, :: max(1, error.shape[1] // 4096)].median(-1).values.tolist()
        self.largest = max(self.largest, _worst(theirs.abs().amax(-1)))
        self._sample(ours, theirs)
        best_ours, best_theirs = ours.topk(min(5, ours.shape[1])).indices, theirs.topk(min(5, ours.shape[1])).indices
        self.top1 += int((best_ours[:, 0] == best_theirs[:, 0]).sum())
        shared = (best_ours[:, :, None] == best_theirs[:, None, :]).any(-1).float().mean(-1)
        self.top5 += float(shared.sum())
        self.error.add(error)
        lp, lq = F.log_softmax(theirs, -1), F.log_softmax(ours, -1)
        if (real := following >= 0).any():
            at = following.clamp(min=0)[:, None]
            self.nll_theirs -= float(lp.gather(1, at)[:, 0][real].double().sum())
            self.nll_ours -= float(lq.gather(1, at)[:, 0][real].double().sum())
            self.n_next += int(real.sum())
        d = lp - lq
        # sum p d, with sum q - sum p = 0 added: no term is negative, and nothing cancels.
        kl = torch.nan_to_num_((lp.exp() * (torch.expm1(-d) + d)).sum(-1).clamp_(min=0), nan=math.inf)  # [N]
        self.kl.add(kl)
        self.token_kl += kl.tolist()
        self.n += ours.shape[0]

    def _sample(self, ours: Tensor, theirs: Tensor) -> None:
        """A few hundred (theirs, ours) pairs for the scatter plot: the top of each token, and a stride."""
        if len(self.scatter) > 4000:
            return
        flat = torch.arange(0, theirs.numel(), max(1, theirs.numel() // 400))
        top = theirs.argmax(-1) + torch.arange(theirs.shape[0]) * theirs.shape[1]
        at = torch.cat([flat, top])
        self.scatter += list(zip(theirs.flatten()[at].tolist(), ours.flatten()[at].tolist(), strict=True))

    @property
    def perplexities(self) -> tuple[float, float]:
        """(ours, theirs) on the text inputs; 0 where there was no text."""
        if not self.n_next:
            return 0.0, 0.0
        return math.exp(min(self.nll_ours / self.n_next, 700)), math.exp(min(self.nll_theirs / self.n_next, 700))

    def summary(self) -> dict[str, Any]:
        ours, theirs = self.perplexities
        return {
            "tokens": self.n,
            "largest_logit": self.largest,
            "error": self.error.summary(),
            "kl": self.kl.summary(),
            "top1_agreement": self.top1 / max(1, self.n),
            "top5_agreement": self.top5 / max(1, self.n),
            "perplexity": {"ours": ours, "oracle": theirs, "difference": ours - theirs} if self.n_next else None,
        }


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """|ours - theirs| / |theirs| for each token: [N, D], [N, D] -> [N]. NaN counts as infinite."""
    a, b = ours.double(), theirs.double()
    r = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)
    return torch.nan_to_num(r, nan=math.inf)


def quantile(values: Sequence[float] | Tensor, q: float) -> float:
    """The q-quantile of a few numbers (nearest rank)."""
    v = sorted(values.tolist() if isinstance(values, Tensor) else values)
    return v[min(len(v) - 1, max(0, math.ceil(q * len(v)) - 1))] if v else 0.0
