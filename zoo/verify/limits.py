"""How wide a bound may be and still judge: a wider one is met by whatever there is to compare.

`zoo.verify.tolerance` makes the bounds: `FACTOR` times how far upstream's own two runs are apart, or a floor. Two runs whose logits
are at most L large are at most 2 L apart, their divergence at most 4 L (the range of the difference), and so is the mean of what
a token's likelihood changes by. Where the two are as far apart as that, upstream says nothing of what is right.

Here, and in no module that needs torch, since whoever reads a certificate asks it of every check.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FACTOR = 2.0
APART = 4.0
"""An id whose logits are off by this many times what the other ids' are, upstream's own spread of it taken into account, has
another's row. Right ones reach 1.3 in all families (131 ids, 232 tokens), wrong ones start at 8.6, and grow with the vocabulary."""
COARSE = 0.5
"""Of types that llama.cpp alone makes, how large the difference may be, in the root mean square, against the tensor: 1.4 is a
tensor in another's place, 1 is zeros, and 0.3 what two bits leave."""
FEW_TIES = 0.05
"""Of tokens in fp32, the share that may be at a near tie."""
_LARGEST = 65504.0
"""The largest |logit| that a bound may go by: fp16's largest number. Those of releases are below a thousand; where there are larger
ones (a vocabulary that is masked by the least float), any error is small beside them."""


@dataclass(frozen=True)
class Limit:
    """The widest bound of checks whose names begin so, in units of the check's scale. `at_least`: they are shares, of
    which the bound is the least: above 0."""

    begins: str
    widest: float
    at_least: bool = False


LIMITS = (
    # Logits of zeros are off by two thirds of a standard deviation, those of another model by more: a seventh of the largest of
    # 100,000. Rounding in bf16 makes a hundredth of that at most.
    Limit("|logit error| p50", 1 / 8),
    Limit("cached against uncached |logit error| p50", 1 / 8),
    Limit("|logit error| ", 2 * FACTOR),
    Limit("cached against uncached |logit error| ", 2 * FACTOR),
    Limit("KL divergence ", 4 * FACTOR**2),
    Limit("|ln perplexity difference|", 4 * FACTOR),
    Limit("logits of one id beside those of others", 3 * APART),  # of one token
    Limit("relative error of the hidden state", 0.5),  # zeros are off by 1
    Limit("share of tokens set apart at near ties", FEW_TIES),
    Limit("furthest element of a block", 1.0),
    Limit("difference of a tensor against its size", COARSE),
    Limit("top-1 agreement", 0.0, at_least=True),
    Limit("greedy tokens alike or within a tie", 0.0, at_least=True),
)
"""All others count what differs: their bound is 0."""
FIRST = {
    "plan": ("layout tensors missing",),
    "bytes": ("elements ", "furthest element of a block", "difference of a tensor"),
    "layers": ("relative error of the hidden state",),
    "logits": ("|logit error| p50",),
    "decode": ("cached against uncached |logit error|",),
}
"""What a level is not judged without: a check whose name begins so."""


def blind(
    name: str, value: float, bound: float, at_least: bool, scale: float, compared: int | None
) -> str | None:
    """Why a check says nothing, whatever its value is; None if it can judge. `scale`: the largest |logit| of those compared, or
    1; `compared`: of how many things the value is, None where that is not said."""
    if compared is None:
        return "it does not say how many things it compared: verify again"
    if compared < 1:
        return "it compared nothing"
    if not (math.isfinite(bound) and math.isfinite(scale) and scale <= _LARGEST):
        return f"its bound is none: what it is made of is not finite, or logits beyond {_LARGEST:g}"
    limit = next((x for x in LIMITS if name.startswith(x.begins)), None)
    if at_least != (limit is not None and limit.at_least):
        return f"its bound is the {'least' if at_least else 'most'} that it may be, and of this check it is the other"
    if value < 0 or (at_least and value > 1):
        return f"its value, {value:.3g}, is none that can be measured"
    if limit is None:
        return None if bound == 0 else f"it counts what differs, and {bound:.3g} may"
    if at_least:
        return None if limit.widest < bound <= 1 else f"any share is at least {bound:.3g}"
    if not 0 <= bound <= (most := limit.widest * max(1.0, scale)):
        return f"its bound is wider than {most:.3g}, where it says nothing of what is right"
    return None
