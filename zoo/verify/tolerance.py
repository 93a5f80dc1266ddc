"""Tolerances: bounds that are measured, not chosen.

The same upstream weights, run a second way (other attention kernel, other expert kernel, or one row at a
time), give the spread that the order of floating-point operations alone makes. Ours may depart from upstream
by twice that, since it is a third order of the same operations. Where upstream has only one way, or the
spread is next to nothing, a floor stands in: what rounding in that dtype makes of numbers of this size.

Tokens at a near tie are judged apart. Where two experts score alike to within the spread, either choice is
right, and the wrong one moves that token's logits far: no bound on all tokens could hold both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from zoo.verify.limits import APART, FACTOR
from zoo.verify.metrics import Columns, LogitMetrics

NEAR_TIE = 4.0
"""A router's choice is a near tie where its margin is below this many times the spread of its input."""
CALM = 0.05
"""A spread beyond this is no rounding: upstream's own runs chose other experts. It says nothing of what hangs by a hair."""
FLOOR_FP32 = 5e-5
"""Two correct fp32 implementations of a small model agree this well in every family (max over all logits)."""
FLOOR_LAYER = {"fp32": 2e-5, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Relative error of a hidden state that is always allowed, after the first layer."""
ULP = {"fp32": 2.0**-23, "bf16": 2.0**-8, "fp16": 2.0**-11}
KL_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


@dataclass
class Spread:
    """How far upstream is from itself, as numbers. `ways` names the two runs; None: there was only one."""

    ways: tuple[str, str] | None = None
    logits: dict[str, float] = field(default_factory=dict)  # quantile of |difference|
    kl: dict[str, float] = field(default_factory=dict)  # quantile of a token's divergence
    top1_agreement: float = 1.0
    tokens: int = 0  # that the share is of; 0: not recorded
    log_perplexity: float = 0.0
    layers: list[float] = field(default_factory=list)  # relative difference of a representative token
    columns: Tensor | None = field(default=None, compare=False)  # `Columns.mean` [V]; not recorded

    @property
    def why(self) -> str:
        return (
            f"upstream's own spread, {self.ways[0]} against {self.ways[1]}"
            if self.ways
            else "one way to run upstream"
        )

    @classmethod
    def of(
        cls,
        ways: tuple[str, str],
        logits: LogitMetrics,
        layers: Sequence[float],
        columns: Columns | None = None,
    ) -> Spread:
        a, b = logits.perplexities
        return cls(
            ways,
            {name: logits.error.at(q) for name, q in QUANTILES.items()},
            {name: logits.kl.at(q) for name, q in KL_QUANTILES.items()},
            logits.top1 / max(1, logits.n),
            logits.n,
            abs(math.log(a / b)) if a and b else 0.0,
            list(layers),
            columns.mean if columns is not None and columns.n else None,
        )

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "columns"}

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Spread:
        ways = tuple(d["ways"]) if d["ways"] else None
        return cls(**{**d, "ways": ways, "columns": None})


@dataclass(frozen=True)
class Bound:
    value: float
    why: str


def logit_bound(dtype: str, quantile: str, spread: Spread, largest: float) -> Bound:
    """The bound on a quantile of |logit error|; `largest` is the largest |logit|."""
    floor = (
        FLOOR_FP32
        if dtype == "fp32"
        else ULP[dtype] * max(1.0, largest) * (0.25 if quantile == "p50" else 1.0)
    )
    return _larger(FACTOR, spread.logits.get(quantile, 0.0), floor, spread, f"floor of {dtype}")


def columns_apart(columns: Columns, spread: Spread) -> tuple[Tensor, Bound]:
    """How far each id's logits are off beside the others' [V], and what the worst may be. A mean over few tokens varies more."""
    usual = spread.columns if spread.columns is not None and len(spread.columns) == len(columns.sum) else None
    share = columns.mean if usual is None else columns.mean / usual.clamp(min=0.5)
    why = f"{APART:g}, and more for few tokens; " + (
        spread.why if usual is not None else "upstream's own spread of each id is not known"
    )
    return share, Bound(APART * (1 + 2 / math.sqrt(max(1, columns.n))), why)


def kl_bound(dtype: str, spread: Spread) -> tuple[str, Bound]:
    """A quantile and its bound, of a token's KL divergence, which grows with the square of the error. In lower
    precision the highest of a few hundred tokens are those with a flipped expert: the 90 % quantile is judged."""
    quantile = "p99" if dtype == "fp32" else "p90"
    floor = {"fp32": 1e-8, "bf16": 1e-3, "fp16": 2e-5}[dtype]
    return quantile, _larger(FACTOR**2, spread.kl.get(quantile, 0.0), floor, spread, f"floor of {dtype}")


def perplexity_bound(dtype: str, spread: Spread) -> Bound:
    """The bound on |ln(perplexity) difference|."""
    floor = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}[dtype]
    return _larger(FACTOR, spread.log_perplexity, floor, spread, f"floor of {dtype}")


def layer_bound(dtype: str, layer: int, spread: Spread) -> Bound:
    """The bound on the relative error of a representative token's hidden state after `layer`."""
    floor = FLOOR_LAYER[dtype] * (1.0 if dtype == "fp32" else math.sqrt(layer + 2))
    measured = spread.layers[layer] if layer < len(spread.layers) else 0.0
    return _larger(FACTOR, measured, floor, spread, f"floor of {dtype}")


def hair(dtype: str, noise: float) -> float:
    """The margin below which a choice of experts hangs by rounding, where hidden states have this spread."""
    return NEAR_TIE * (FLOOR_LAYER["fp32"] if dtype == "fp32" and noise > CALM else noise)


def representative(dtype: str, tokens: Sequence[float]) -> float:
    """The token that stands for all: the worst in fp32, the median in bf16, where one flipped expert moves a
    single token far."""
    if not tokens:
        return 0.0
    return max(tokens) if dtype == "fp32" else sorted(tokens)[len(tokens) // 2]


def _larger(factor: float, spread: float, floor: float, source: Spread, by_floor: str) -> Bound:
    if factor * spread > floor:
        return Bound(factor * spread, f"{factor:g} x {source.why}")
    return Bound(
        floor, by_floor + (f" ({factor:g} x spread is {factor * spread:.2g})" if source.ways else "")
    )
