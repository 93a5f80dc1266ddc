"""ggml's block types: how many bytes they take, and their values in fp32, as the `gguf` package decodes them.

A row is a sequence of blocks, each with its own scale(s). `dequantise` takes any number of whole rows and
goes through them a cache's worth at a time. Importing this module does not import `gguf`: it costs half a
second, and only files of that format need it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError
from zoo.quant.floats import to_fp32
from zoo.system.scratch import scratch

CHUNK = 1 << 18  # elements at a time: what is made of them stays in a core's cache
TYPES = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
"""The types that can be decoded."""


def is_block_type(dtype: str) -> bool:
    """Whether `dtype` names a type whose elements have no bytes of their own (so no safetensors dtype)."""
    return dtype in TYPES


def nbytes(type_name: str, shape: tuple[int, ...], who: str = "tensor") -> int:
    """Bytes of a tensor of logical `shape`. Raises ZooError for a type that can't be decoded, or rows that
    are not whole blocks."""
    _, block, size = _block(type_name, who)
    if shape and shape[-1] % block:
        raise ZooError(
            f"{who}: {type_name} needs rows of a multiple of {block} elements, found {list(shape)}: "
            "the file is damaged, or of a newer format"
        )
    return math.prod(shape) // block * size


def dequantise(
    raw: NDArray[np.uint8] | bytes | memoryview, type_name: str, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """fp32 values of `shape` (whole rows, [..., in]) from their bytes.

    Raises ZooError for an unknown type, and if the bytes are not those of the shape.
    """
    from gguf.quants import dequantize

    flat = raw.reshape(-1) if isinstance(raw, np.ndarray) else np.frombuffer(raw, dtype=np.uint8)
    if flat.size != (want := nbytes(type_name, shape)):
        raise ZooError(f"{type_name} of {list(shape)} needs {want} bytes, found {flat.size}")
    kind, block, size = _block(type_name, "tensor")
    blocks = flat.reshape(-1, size)
    out = np.empty((len(blocks), block), dtype=np.float32)
    step = CHUNK // block
    with np.errstate(over="ignore", invalid="ignore"):  # what a damaged scale gives shows as inf or NaN
        for at in range(0, len(blocks), step):
            # As one row: `gguf` takes 16 rows per call of numpy, which would be 16 blocks.
            row = blocks[at : at + step].reshape(1, -1)
            out[at : at + step] = dequantize(row, kind).reshape(-1, block)
    return out.reshape(shape)


def q8_0(x: NDArray[Any], dtype: str = "F32") -> NDArray[np.uint8]:
    """Blocks [n, 34] of the elements in their order, a multiple of 32: the largest magnitude of each 32 over 127, in fp16; then each
    element over that (in fp32) as a whole number, halves away from zero. (llama.cpp's quantize_row_q8_0_ref.) `x`: bit patterns of
    `dtype`, or numbers of fp32.

    The bytes that `gguf.quants.quantize` makes of numbers, several times as fast: what it takes stays in a core's cache and is used again."""
    x = x.reshape(-1)
    out = np.empty((x.size // 32, 34), np.uint8)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for at in range(0, x.size, _Q8):
            _q8_0(x[at : at + _Q8], dtype, out[at // 32 : (at + _Q8) // 32].view(np.uint16))
    return out


_Q8 = 1 << 16  # elements at a time
_SIGN, _HALF = np.array([0x80000000, 0x3EFFFFFF], np.uint32)
"""A whole half would round up the number below a half."""


def _q8_0(raw: NDArray[Any], dtype: str, out: NDArray[np.uint16]) -> None:
    """`out` [n / 32, 17]: bytes two by two."""
    n = raw.size
    x, a, b = scratch("q8", (3, n), np.float32)
    if dtype == "BF16":  # without their signs its bits have the order of magnitudes, and half the size
        np.left_shift(raw, np.uint32(16), out=x.view(np.uint32))
        sizes, other = a.view(np.uint16)[:n], b.view(np.uint16)[:n]
        np.bitwise_and(raw, np.uint16(0x7FFF), out=sizes)
    else:
        np.copyto(x, to_fp32(raw, dtype))
        sizes, other = a, b
        np.abs(x, out=sizes)
    # The largest of each and its next, of the next two, four, ...: along short rows numpy's own takes three times as long.
    left = n
    for k in (1, 2, 4, 8, 16):
        np.maximum(sizes[: left - k], sizes[k:left], out=other[: left - k])
        left, (sizes, other) = left - k, (other, sizes)
    largest = sizes[:n:32]
    scale = (to_fp32(largest, dtype) if dtype == "BF16" else largest) / np.float32(127)
    out[:, 0] = scale.astype(np.float16).view(np.uint16)
    inverse = np.where(scale == 0, np.float32(0), 1 / scale)
    np.multiply(x.reshape(-1, 32), inverse[:, None], out=a.reshape(-1, 32))
    half = b.view(np.uint32)  # of the same sign: then it is cut towards zero
    np.bitwise_and(a.view(np.uint32), _SIGN, out=half)
    np.bitwise_or(half, _HALF, out=half)
    np.add(a, b, out=a)
    codes = x.view(np.int8)[:n]
    np.copyto(codes, a, casting="unsafe")
    out[:, 1:] = codes.view(np.uint16).reshape(-1, 16)


def _block(type_name: str, who: str) -> tuple[Any, int, int]:
    """The type as `gguf` knows it, elements in a block, bytes of a block."""
    if type_name not in TYPES:
        raise ZooError(f"{who}: GGUF type {type_name} is not supported; supported: {', '.join(TYPES)}")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[type_name]
    return kind, *GGML_QUANT_SIZES[kind]
