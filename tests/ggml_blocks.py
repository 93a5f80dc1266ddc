"""ggml's block types decoded by a second implementation, written from the format's description.

Source: ggml-common.h and ggml-quants.c of llama.cpp. What `zoo.quant.ggml` makes of a file is held to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class BlockType(NamedTuple):
    """`block` elements are stored in `nbytes` bytes."""

    block: int
    nbytes: int
    decode: Callable[[Bytes], Floats]  # [n_blocks, nbytes] -> [n_blocks, block]


def _half(b: Bytes) -> Floats:
    """[N, 2] bytes -> [N, 1] fp16 scales as fp32."""
    return np.ascontiguousarray(b).view("<f2").astype(np.float32)


def _nibbles(b: Bytes) -> Bytes:
    """[..., n] bytes -> [..., 2n] codes: all the low nibbles, then all the high ones."""
    return np.concatenate([b & 15, b >> 4], axis=-1)


def _q8_0(b: Bytes) -> Floats:
    return _half(b[:, :2]) * b[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(b: Bytes) -> Floats:
    return _half(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Bytes) -> Floats:
    return _half(b[:, :2]) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b[:, 2:4])


def _fifth_bit(b: Bytes) -> Bytes:
    """[N, 4] bytes -> [N, 32]: bit j of the little-endian word belongs to element j, worth 16."""
    return np.unpackbits(b, axis=-1, bitorder="little") * np.uint8(16)


def _q5_0(b: Bytes) -> Floats:
    codes = _nibbles(b[:, 6:]) | _fifth_bit(b[:, 2:6])
    return _half(b[:, :2]) * (codes.astype(np.float32) - 16)


def _q5_1(b: Bytes) -> Floats:
    codes = _nibbles(b[:, 8:]) | _fifth_bit(b[:, 4:8])
    return _half(b[:, :2]) * codes.astype(np.float32) + _half(b[:, 2:4])


def _six_bit_pairs(s: Bytes) -> tuple[Floats, Floats]:
    """[N, 12] bytes -> 8 scales and 8 minima of 6 bits each, as [N, 8, 1]."""
    low, mid, high = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=-1)
    return scales.astype(np.float32)[..., None], minima.astype(np.float32)[..., None]


def _q4_k(b: Bytes) -> Floats:
    scale, least = _six_bit_pairs(b[:, 4:16])
    d, dmin = _half(b[:, 0:2])[..., None], _half(b[:, 2:4])[..., None]
    codes = _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (d * scale * codes - dmin * least).reshape(-1, 256)


def _q5_k(b: Bytes) -> Floats:
    scale, least = _six_bit_pairs(b[:, 4:16])
    d, dmin = _half(b[:, 0:2])[..., None], _half(b[:, 2:4])[..., None]
    codes = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    bits = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # bit j of byte l: sub-block j
    return (d * scale * (codes | bits << 4) - dmin * least).reshape(-1, 256)


def _q6_k(b: Bytes) -> Floats:
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = (low | high << 4).astype(np.float32) - 32
    scale = _half(b[:, 208:210]) * b[:, 192:208].view(np.int8).astype(np.float32)  # one for 16 elements
    return (scale[..., None] * codes.reshape(-1, 16, 16)).reshape(-1, 256)


# 4-bit floats (1 sign, 2 exponent, 1 mantissa), OCP Microscaling Formats v1.0
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


# Half of 2^(code - 127), so that all 256 are finite; ggml knows no NaN among exponents
_HALF_POWERS = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


def _mxfp4(b: Bytes) -> Floats:
    values: Floats = (2 * FP4).take(_nibbles(b[:, 1:])) * _HALF_POWERS.take(b[:, :1])
    return values


def _f16(b: Bytes) -> Floats:
    return _half(b)


def _bf16(b: Bytes) -> Floats:
    return (np.ascontiguousarray(b).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _f32(b: Bytes) -> Floats:
    return np.ascontiguousarray(b).view("<f4")


TYPES: dict[str, BlockType] = {
    "F32": BlockType(1, 4, _f32),
    "F16": BlockType(1, 2, _f16),
    "BF16": BlockType(1, 2, _bf16),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
    "MXFP4": BlockType(32, 17, _mxfp4),
}
