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
from zoo.scratch import scratch

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


def q8_0(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Blocks [n, 34] of the elements in their order, a multiple of 32: the largest magnitude of each 32 over 127, in fp16; then each
    element over that (in fp32) as a whole number, halves away from zero. (llama.cpp's quantize_row_q8_0_ref.)

    The bytes that `gguf.quants.quantize` makes of numbers, several times as fast: what it takes stays in a core's cache and is used again."""
    x = x.reshape(-1)
    out = np.empty((x.size // 32, 34), np.uint8)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for at in range(0, x.size, _Q8):
            _q8_0(x[at : at + _Q8], out[at // 32 : (at + _Q8) // 32])
    return out


_Q8 = 1 << 15  # elements at a time


def _q8_0(x: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    n = x.size
    a, b = scratch("q8", (2, n), np.float32)
    np.abs(x, out=a)
    # The largest of each and its next, of the next two, four, ...: along short rows numpy's own takes three times as long.
    for k in (1, 2, 4, 8, 16):
        np.maximum(a[: n - k], a[k:n], out=b[: n - k])
        n, (a, b) = n - k, (b, a)
    scale = a[: len(x) : 32] / np.float32(127)
    out[:, :2] = scale.astype(np.float16)[:, None].view(np.uint8)
    a, b = scratch("q8", (2, x.size), np.float32)
    np.multiply(x, np.repeat(np.where(scale == 0, np.float32(0), 1 / scale), 32), out=a)
    # To be cut towards zero: with nearly a half of the same sign. A whole half would round up the number below a half.
    half = b.view(np.uint32)
    np.bitwise_and(a.view(np.uint32), np.uint32(0x80000000), out=half)
    np.bitwise_or(half, np.nextafter(np.float32(0.5), np.float32(0)).view(np.uint32), out=half)
    np.add(a, b, out=a)
    out[:, 2:] = a.astype(np.int8).view(np.uint8).reshape(-1, 32)


def _block(type_name: str, who: str) -> tuple[Any, int, int]:
    """The type as `gguf` knows it, elements in a block, bytes of a block."""
    if type_name not in TYPES:
        raise ZooError(f"{who}: GGUF type {type_name} is not supported; supported: {', '.join(TYPES)}")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[type_name]
    return kind, *GGML_QUANT_SIZES[kind]
