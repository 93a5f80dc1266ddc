"""Quantised weights to bit patterns, in numpy: the way of a conversion, which should not wait seconds for torch.

The arithmetic is that of the scheme's own module, to the bit. Everything goes in pieces that stay in a core's
cache, and each call of numpy is over a whole piece: threads wait for each other between calls.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError
from zoo.quant import fp4
from zoo.quant.base import Scheme, check_shape
from zoo.quant.floats import bits, exponents, from_float, round_to_bf16
from zoo.quant.schemes import block_size, scheme
from zoo.system.scratch import scratch

Array = NDArray[Any]
CHUNK = 1 << 19  # elements at a time: measured on two threads, between waiting for each other and for memory
GROUP = 32  # of mxfp4
_E4M3_MASK = np.int32(-0x78100000)  # sign, and seven bits below the fourth: 0x87F00000
_E4M3_FACTOR = np.float32(2.0**120)  # e4m3's exponent bias is 7, fp32's 127


def dequantise(name: str, components: dict[str, Array], dtype: str, who: str) -> Array:
    """Bit patterns [out, in] of `dtype` of whole rows of one released weight quantised by scheme `name`.

    components: "weight" (codes: uint8 [out, in] for fp8, [out, in / 32, 16] for mxfp4, int32 [out, in / 8] for
    int4), "scale" (uint8 exponents for mxfp4, else fp32 values), as `zoo.quant.dequantise` takes them. `who`: the
    tensor's name, for errors. Valid until this thread's next call. Raises ZooError if codes and scales do not fit
    together, and for what overflows fp16.
    """
    scheme(name)  # an unknown one is refused here
    codes, scale = components["weight"], components["scale"]
    rows = codes.shape[0]
    kind = name.split("-")[0]
    columns = {"fp8": 1, "mxfp4": GROUP, "int4": 8}[kind] * codes.shape[1]
    block = block_size(name)
    want = (math.ceil(rows / block[0]) if block[0] else 1, math.ceil(columns / block[1]) if block[1] else 1)
    if scale.size != math.prod(want) or (any(block) and scale.shape != want):
        raise ZooError(
            f"{who}: {rows} rows and {columns} columns of {name} need scales {list(want)}, found {list(scale.shape)}"
        )
    if (shape := components.get("shape")) is not None:
        check_shape(shape, (rows,), columns, f"{who}: ")
    out = scratch("dequantised", (rows, columns), bits(dtype))
    if kind == "mxfp4":
        _mxfp4(codes, scale, dtype, out)
        if dtype == "F16" and np.isinf(out.view(np.float16)).any():
            raise ZooError(f"{who}: has values beyond fp16 (65504); convert with --dtype bf16 or fp32")
        return out
    pieces: Callable[..., Iterator[tuple[int, Array, bool]]] = _fp8 if kind == "fp8" else _int4
    for at, values, nan in pieces(codes, scale.reshape(want), block):
        if dtype == "BF16":
            round_to_bf16(values, out[at : at + len(values)], nan=nan)
        else:
            out[at : at + len(values)] = from_float(values, dtype, who)
    return out


def by_formula(s: Scheme, components: dict[str, Array], dtype: str, who: str, i: int, at: int) -> Array:
    """Bit patterns of `dtype` of a piece of one released weight, with the axis `i` of inputs; see `zoo.quant`."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            values = importlib.import_module(f"zoo.quant.{s.module}").values(components, s, i, at)
    except ZooError as e:
        raise ZooError(f"{who}: {e}") from None
    return from_float(np.ascontiguousarray(values), dtype, who)


@functools.cache
def e4m3() -> Array:
    """[256]: the fp32 values of e4m3 codes."""
    codes = np.arange(256, dtype=np.uint8)[None]
    ((_, values, _),) = _fp8(codes, np.ones((1, 1), np.float32), (1, 0))
    return values[0].copy()


def _fp8(codes: Array, scale: Array, block: tuple[int, int]) -> Iterator[tuple[int, Array, bool]]:
    """(first row, fp32 values of some rows, whether some may be NaN).

    An e4m3 number seen as bits of fp32 is the same number times 2^-120, subnormals included."""
    rows, columns = codes.shape
    # Rows for which one row of scales stands; all of them where each row has its own.
    height = block[0] if block[0] > 1 else rows
    finite = bool(np.isfinite(scale).all())
    small = bool((np.abs(scale) < 128).all())  # then times 2^120 is exact
    with np.errstate(over="ignore", invalid="ignore"):
        scale = scale * _E4M3_FACTOR if small else scale
        for top in range(0, rows, height):
            end = min(rows, top + height)
            factor = scale if block[0] == 1 else scale[top // height : top // height + 1]
            if block[1] > 1:
                factor = np.repeat(factor, block[1], axis=1)[:, :columns]
            step = max(1, CHUNK // columns)
            for at in range(top, end, step):
                n = min(step, end - at)
                raw = codes[at : at + n].view(np.int8)
                word = scratch("values", (n, columns), np.int32)
                np.left_shift(raw, 20, out=word, dtype=np.int32, casting="unsafe")  # the sign is extended
                np.bitwise_and(word, _E4M3_MASK, out=word)
                values = word.view(np.float32)
                if not small:
                    values *= _E4M3_FACTOR
                np.multiply(values, factor[at : at + n] if block[0] == 1 else factor, out=values)
                magnitude = scratch("magnitude", raw.shape, np.uint8)
                np.bitwise_and(codes[at : at + n], 127, out=magnitude)
                nan = bool(magnitude.max(initial=0) == 127)  # e4m3 has no infinity; all ones is NaN
                if nan:
                    values[magnitude == 127] = np.nan
                yield at, values, nan or not finite


def _int4(codes: Array, scale: Array, block: tuple[int, int]) -> Iterator[tuple[int, Array, bool]]:
    """As `_fp8`."""
    packed = np.ascontiguousarray(codes).view(np.uint8)
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    step = max(1, CHUNK // columns)
    finite = bool(np.isfinite(scale).all())
    with np.errstate(over="ignore", invalid="ignore"):
        for at in range(0, rows, step):
            values = _looked_up(_int4_pairs(), packed[at : at + step]).view(np.float32)
            n = len(values)
            if columns % block[1]:
                values *= np.repeat(scale[at : at + n], block[1], axis=1)[:, :columns]
            else:
                values.reshape(n, -1, block[1])[...] *= scale[at : at + n, :, None]
            yield at, values, not finite


def _mxfp4(codes: Array, scale: Array, dtype: str, out: Array) -> None:
    """Both values of a byte at once, looked up by the byte and the exponent."""
    pairs = _mxfp4_pairs(dtype)
    groups, powers = codes.reshape(-1, GROUP // 2), scale.reshape(-1, 1)
    flat = out.reshape(-1, GROUP)
    step = 2 * CHUNK // GROUP
    for at in range(0, len(groups), step):
        found = _looked_up(pairs, groups[at : at + step], powers[at : at + step])
        flat[at : at + step] = found.view(out.dtype)


def _looked_up(table: Array, low: Array, high: Array | None = None) -> Array:
    """table[low + 256 high] for bytes [N, B] (and [N, 1])."""
    index = scratch("index", low.shape, np.intp)
    index[...] = low
    if high is not None:
        np.add(index, high.astype(np.intp) << 8, out=index)
    found = scratch("found", low.shape, table.dtype)
    np.take(table, index, out=found, mode="clip")  # no index is outside; "raise" would copy once more
    return found


@functools.cache
def _int4_pairs() -> Array:
    """[256]: both fp32 values of a byte, the low half first."""
    one = np.arange(-8, 8, dtype=np.float32)
    byte = np.arange(256)
    return np.stack([one[byte & 15], one[byte >> 4]], axis=1).view(np.uint64).reshape(256)


@functools.cache
def _mxfp4_pairs(dtype: str) -> Array:
    """[65536]: both values, as bits, of byte n % 256 with exponent n // 256."""
    power = exponents(np.arange(256, dtype=np.uint8))[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.array(fp4.VALUES, np.float32) * power  # [exponent, code]
        one = values.astype(np.float16).view(np.uint16) if dtype == "F16" else from_float(values, dtype, "")
    byte = np.arange(256)
    both = np.ascontiguousarray(np.stack([one[:, byte & 15], one[:, byte >> 4]], axis=-1))
    return both.view({2: np.uint32, 4: np.uint64}[one.itemsize]).reshape(-1)
