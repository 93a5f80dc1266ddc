"""Whether two results differ by rounding alone, on whatever CPU this is."""

from __future__ import annotations

from torch import Tensor

from zoo.model import Decoder
from zoo.verify.float64 import logits_of
from zoo.verify.tolerance import FACTOR, FLOOR_FP32


def agree(made: Tensor, other: Tensor, model: Decoder, ids: Tensor) -> bool:
    """Whether logits [B, T, V] are another's but for rounding. Which sums a CPU's instructions take first moves both: what
    is apart by more than the floor is right if it is as near to float64 as the other, whose own distance is measured here."""
    if far(made, other) <= FLOOR_FP32:
        return True
    exact = logits_of(model, ids)
    assert exact is not None
    return far(made, exact) <= FACTOR * far(other, exact) <= FACTOR * FACTOR * FLOOR_FP32


def far(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
