"""What a GGUF holds in place of a weight w: 1 + w of a norm, -exp(w) of the logarithm of a state's decay.

llama.cpp's converter computes both in fp32, and its graphs use them as they are. Back to w:

- "1 +": exact, or refused. Where (x - 1) + 1 is another number than x, no w in fp32 gives x.
- "-exp": several w in fp32 have one exponential where |w| < 1, and two libraries' exponentials differ in the last bit. So w
  is the logarithm in the fewest bits that give x again: in bf16 if that is within a last bit of x, else in fp32. What was
  released in bf16 comes back to the bit, if it is no smaller than 1e-4; what was in fp32, as a w with the same decay.
"""

from __future__ import annotations

import numpy as np

from zoo.mapping.rules import Change
from zoo.quant.floats import Array, from_float, to_fp32


def stored(w: Array, change: Change) -> Array:
    """What is stored of the weights `w`. Both in fp32."""
    if change == "-exp":
        return _minus_exp(w)
    return w + np.float32(1) if change else w


def weights(x: Array, change: Change) -> Array:
    """The weights of which `x` is stored. Both in fp32; NaN where there are none."""
    if change == "-exp":
        return _logarithm(x)
    return x - np.float32(1) if change else x


def unsound(x: Array, w: Array, change: Change) -> Array:
    """Which of `x` are not what would be stored of `w`, which was made of them: indices. A NaN that is stored is one of w."""
    if change == "-exp":
        return np.flatnonzero(np.isnan(w) & ~np.isnan(x))
    return np.flatnonzero((stored(w, change) != x) & ~np.isnan(x))


def _minus_exp(w: Array) -> Array:
    with np.errstate(over="ignore"):
        return -np.exp(w.astype(np.float64)).astype(np.float32)


def _logarithm(x: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        w = np.where(x < 0, np.log(-x.astype(np.float64)), np.nan).astype(np.float32)
    short = to_fp32(from_float(w, "BF16", ""), "BF16").astype(np.float32, copy=False)
    with np.errstate(invalid="ignore"):  # of infinities
        near = np.abs(_minus_exp(short) - x) <= np.spacing(np.abs(x))
    out: Array = np.where(near, short, w)
    return out
