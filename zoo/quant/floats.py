"""Bit patterns of float dtypes and the fp32 values they stand for: numpy has no bf16.

Casts round to nearest, ties to even; what overflows fp16 is refused rather than made infinite.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError
from zoo.formats.base import ITEMSIZE
from zoo.system.scratch import scratch

Array = NDArray[Any]
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits(dtype: str) -> Any:
    """numpy dtype for the bit patterns of a safetensors dtype."""
    return _BITS[ITEMSIZE[dtype]]


def to_fp32(x: Array, dtype: str) -> Array:
    """Bit patterns of a float dtype -> fp32 values (fp64 stays fp64)."""
    if dtype == "BF16":
        wide = x.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype == "F16":
        return x.view(np.float16).astype(np.float32)
    if dtype in ("F32", "F64"):
        return x.view(np.float32 if dtype == "F32" else np.float64)
    raise ZooError(f"{dtype} cannot be converted to a float dtype")


def exponents(codes: Array) -> Array:
    """fp32 values of e8m0 scales, held as bytes: 2^(code - 127); 255 is NaN."""
    word = codes.astype(np.uint32) << 23
    word[codes == 0] = 1 << 22  # 2^-127 is subnormal
    word[codes == 255] = 0x7FC00000
    return word.view(np.float32)


def from_float(x: Array, dtype: str, name: str) -> Array:
    """fp32 (or fp64) values -> bit patterns of `dtype`, rounded to nearest even. `name`: of the tensor."""
    if dtype == "F64":
        return x.astype(np.float64).view(np.uint64)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            half = x.astype(np.float16)
        if (over := np.isinf(half) & np.isfinite(x)).any():
            worst = float(np.abs(x[over]).max())
            raise ZooError(f"{name}: {worst:g} is beyond fp16 (65504); convert with --dtype bf16 or fp32")
        return half.view(np.uint16)
    if x.dtype == np.float64:
        x = x.astype(np.float32)
    if dtype == "F32":
        return x.view(np.uint32)
    assert dtype == "BF16"
    out = np.empty(x.shape, np.uint16)
    round_to_bf16(x, out)
    return out


def round_to_bf16(x: Array, out: Array, nan: bool = True) -> None:
    """Bit patterns of fp32 values `x`, rounded to nearest even, into `out` (uint16). `nan`: there may be some."""
    u = x.view(np.uint32)
    t = scratch("rounding", x.shape, np.uint32)
    np.right_shift(u, 16, out=t)
    np.bitwise_and(t, 1, out=t)
    np.add(t, 0x7FFF, out=t)
    np.add(t, u, out=t)
    out[...] = t.view(np.uint16).reshape(*x.shape, 2)[..., _HIGH]
    if not nan:
        return
    where = scratch("nan", x.shape, np.bool_)
    if np.isnan(x, out=where).any():  # rounding up could carry a NaN into infinity: cut it, and keep it a NaN
        cut = (u[where] >> 16).astype(np.uint16)
        out[where] = cut | np.where(u[where] & 0x7F0000, 0, 0x40).astype(np.uint16)


_HIGH = int(np.array([1], np.uint32).view(np.uint16)[0] == 1)  # which half of a word is the upper one
