"""Products of bf16 on a CPU with AMX, for up to a few hundred rows.

AMX multiplies two tiles of 16 rows of 64 bytes: a row of the first holds 32 numbers of one row of a matrix, a row of the
second one pair of numbers of each of 16 rows of the other, transposed. The weight is the first: its tiles are read from
where it lies, once, at the rate of memory. x, small, is the second and brought into pairs beforehand. oneDNN, which torch
asks, brings the weight into pairs, at every call. So results come out transposed, and are turned back in registers.

Unusual: rows are taken by 32; where there are fewer, the last one stands in for what is missing, and its results are
written again. Each product of two numbers is exact and they are summed in fp32, as oneDNN does it; numbers too small for
a normal fp32 are zero.

Margin on 2 cores of a Xeon with AMX, of 64 experts, against torch's own, 1536 x 2048: 1 row 276 and 461 us, 16 rows 278
and 515, 32 rows 310 and 557, 64 rows 406 and 889, 128 rows 741 and 1006, 256 rows 1512 and 1679; up to 16 rows it reads
23 GB/s, all that there are. Where x no longer stays in a core's second cache, torch is faster: 2048 x 6144 at 192 rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from zoo.kernels.compiled import compiled, groups, threads
from zoo.scratch import scratch

ROWS, PAIRED = 256, 1 << 19
"""Rows, and numbers of x, up to which this is faster."""
BLOCK = 32  # rows of x, rows of the weight and numbers along K taken at a time: two by two tiles
_NO_BIAS = torch.zeros(1, 1)
_SHAPES = np.zeros(64, np.uint8)  # "palette 1": of each of eight tiles, bytes in a row and rows
_SHAPES[0] = 1
_SHAPES[16:32].view(np.uint16)[:] = 64
_SHAPES[48:56] = 16


def available() -> bool:
    """Whether this CPU has AMX and the system lets this process use it."""
    ask = getattr(torch.cpu, "_init_amx", None)
    return ask is not None and bool(ask())


def fits(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether `rows` rows of x and a weight [.., N, K], both bf16, are for `times`."""
    n, k = weight.shape[-2:]
    return rows <= ROWS and rows * k <= PAIRED and not (n % BLOCK or k % BLOCK)


def times(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    experts: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """x [M, K] times weight [N, K], transposed, plus bias [N]: [M, N]. Or, of a stack [E, N, K] with bias [E, N]: the first
    `counts[0]` rows of x times the weight of `experts[0]`, and so on (int64 [G]). All bf16, N and K multiples of 32, the
    weight contiguous."""
    (m, k), n = x.shape, weight.shape[-2]
    out = torch.empty(m, n, dtype=x.dtype)
    which, sizes = groups(m, experts, counts)
    ends = sizes.cumsum()
    blocks = (-(-sizes // BLOCK)).cumsum()
    pairs = scratch("pairs", int(blocks[-1]) * BLOCK * k * 2 + 64)
    pairs = pairs[-pairs.ctypes.data % 64 :]  # a tile's row is one line of the cache
    bias = (_NO_BIAS.expand(1, n) if bias is None else bias).float().view(-1, n).contiguous()
    with threads() as t:
        _grouped(
            weight.detach().view(torch.uint16).view(-1, n, k).numpy(),
            x.contiguous().view(torch.uint16).numpy(), which, ends, blocks, bias.numpy(),
            pairs, _SHAPES, out.view(torch.uint16).numpy(), t,
        )  # fmt: skip
    return out


class _BFloat(ir.Type):  # type: ignore[misc]  # which llvmlite does not have
    def _to_string(self) -> str:
        return "bfloat"


BYTE, WORD, ADDRESS, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
WORDS, FLOATS, BFLOATS = (ir.VectorType(t, 16) for t in (WORD, FLOAT, _BFloat()))
HALVES = ir.VectorType(ir.IntType(16), 16)
# Tiles 0 to 3 hold sums, two by two; 4 and 5 rows of the weight, 6 and 7 pairs of x.


def _at(builder: Any, address: Any, offset: Any, type: Any = BYTE) -> Any:
    offset = ir.Constant(ADDRESS, offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, offset), type.as_pointer())


def _amx(builder: Any, name: str, *args: Any) -> None:
    args = tuple(ir.Constant(BYTE, a) if isinstance(a, int) else a for a in args)
    name = f"llvm.x86.{name}"
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [a.type for a in args]), name)
    builder.call(function, args)


def _of_row(builder: Any, base: Any, row: Any, i: int, last: Any, stride: Any, type: Any) -> Any:
    """Where row + i lies, or the last row."""
    at = builder.add(row, ir.Constant(ADDRESS, i))
    at = builder.select(builder.icmp_signed("<", at, last), at, last)
    return _at(builder, base, builder.mul(at, stride), type)


def _load(builder: Any, where: Any) -> Any:
    value = builder.load(where)
    value.align = 2
    return value


def _store(builder: Any, value: Any, where: Any) -> None:
    builder.store(value, where).align = 2


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16: bit by bit, the number of the row and the number in the row change places."""
    for bit in (8, 4, 2, 1):
        upper = [i + 16 - bit if i & bit else i for i in range(16)]
        lower = [i + 16 if i & bit else i + bit for i in range(16)]
        masks = [ir.Constant(WORDS, [ir.Constant(WORD, i) for i in mask]) for mask in (upper, lower)]
        for i in range(16):
            if not i & bit:
                pair = rows[i], rows[i + bit]
                rows[i], rows[i + bit] = (builder.shuffle_vector(*pair, mask) for mask in masks)
    return rows


@intrinsic
def _configure(context: Any, shapes: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _amx(builder, "ldtilecfg", _at(builder, args[0], 0))
        return context.get_dummy_value()

    return types.void(types.intp), code


@intrinsic
def _release(context: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _amx(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def _clear(context: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for tile in range(4):
            _amx(builder, "tilezero", tile)
        return context.get_dummy_value()

    return types.void(), code


def _multiply(wide: bool) -> Any:
    @intrinsic
    def add(context: Any, weight: Any, stride: Any, pairs: Any) -> Any:
        """32 rows of the weight, `stride` bytes apart, times 16 rows of x, or 32: of 32 numbers each."""

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            weight, stride, pairs = args
            below = builder.mul(stride, ir.Constant(ADDRESS, 16))
            line = ir.Constant(ADDRESS, 64)
            _amx(builder, "tileloadd64", 6, _at(builder, pairs, 0), line)
            _amx(builder, "tileloadd64", 4, _at(builder, weight, 0), stride)
            _amx(builder, "tdpbf16ps", 0, 4, 6)
            if wide:
                _amx(builder, "tileloadd64", 7, _at(builder, pairs, 1024), line)
                _amx(builder, "tdpbf16ps", 1, 4, 7)
            _amx(builder, "tileloadd64", 5, _at(builder, weight, below), stride)
            _amx(builder, "tdpbf16ps", 2, 5, 6)
            if wide:
                _amx(builder, "tdpbf16ps", 3, 5, 7)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp), code

    return add


_add_16, _add_32 = _multiply(wide=False), _multiply(wide=True)


@intrinsic
def _sums(context: Any, sums: Any) -> Any:
    """The four tiles of sums, written one after the other."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for tile in range(4):
            where = _at(builder, args[0], 1024 * tile)
            _amx(builder, "tilestored64", tile, where, ir.Constant(ADDRESS, 64))
        return context.get_dummy_value()

    return types.void(types.intp), code


@intrinsic
def _pair(context: Any, x: Any, stride: Any, row: Any, last: Any, pairs: Any) -> Any:
    """32 numbers of each of 16 rows of x, two by two: a tile's second factor."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, stride, row, last, pairs = args
        places = [_of_row(builder, x, row, i, last, stride, WORDS) for i in range(16)]
        rows = _transposed(builder, [_load(builder, p) for p in places])
        for i, r in enumerate(rows):
            _store(builder, r, _at(builder, pairs, 64 * i, WORDS))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), code


@intrinsic
def _turn(context: Any, sums: Any, bias: Any, out: Any, stride: Any, row: Any, last: Any) -> Any:
    """Two tiles of sums, one of 16 rows of the weight and one of the next 16, plus the bias of these rows, rounded: 32
    numbers of each of 16 rows of the result."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, bias, out, stride, row, last = args

        def rounded(i: int) -> Any:
            y = _load(builder, _at(builder, sums, 64 * i + (1024 if i >= 16 else 0), FLOATS))
            offset = _load(builder, _at(builder, bias, 4 * i, FLOAT))
            offset = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), offset, ir.Constant(WORD, 0))
            offset = builder.shuffle_vector(offset, offset, ir.Constant(WORDS, None))
            return builder.bitcast(builder.fptrunc(builder.fadd(y, offset), BFLOATS), HALVES)

        both = ir.Constant(
            ir.VectorType(WORD, 32), [ir.Constant(WORD, i // 2 + i % 2 * 16) for i in range(32)]
        )
        two = [builder.shuffle_vector(rounded(i), rounded(i + 1), both) for i in range(0, 32, 2)]
        for i, r in enumerate(_transposed(builder, [builder.bitcast(t, WORDS) for t in two])):
            _store(builder, r, _of_row(builder, out, row, i, last, stride, WORDS))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), code


@compiled()
def _paired(x, first, last, k, pairs):
    """The rows first .. last of x, as second factors: [blocks of 32 rows][K / 32][two tiles]."""
    for row in range(first, last + 1, 32):
        for j in range(0, k, 32):
            _pair(x + 2 * j, 2 * k, row, last, pairs)
            if row + 16 <= last:
                _pair(x + 2 * j, 2 * k, row + 16, last, pairs + 1024)
            pairs += 2048


@compiled()
def _panel(weight, k, pairs, sums, bias, out, stride, first, last):
    """32 rows of the weight times the rows first .. last of x."""
    for row in range(first, last + 1, 32):
        _clear()
        if row + 16 <= last:
            for j in range(0, k, 32):
                _add_32(weight + 2 * j, 2 * k, pairs + 64 * j)
            _sums(sums)
            _turn(sums + 1024, bias, out, stride, row + 16, last)
        else:
            for j in range(0, k, 32):
                _add_16(weight + 2 * j, 2 * k, pairs + 64 * j)
            _sums(sums)
        _turn(sums, bias, out, stride, row, last)
        pairs += 64 * k


@compiled(parallel=True)
def _grouped(w, x, experts, ends, blocks, bias, pairs, shapes, out, threads):
    """Each thread computes its share of the results of every group. `ends`: of groups, in rows of x; `blocks` in pairs."""
    n, k = w.shape[1], w.shape[2]
    for g in prange(len(experts)):
        start, block = (ends[g - 1], blocks[g - 1]) if g else (0, 0)
        _paired(x.ctypes.data, start, ends[g] - 1, k, pairs.ctypes.data + block * 64 * k)
    for t in prange(threads):
        sums = np.empty(1024 + 16, np.float32)
        at = (sums.ctypes.data + 63) // 64 * 64
        _configure(shapes.ctypes.data)
        for g in range(len(experts)):
            start, block = (ends[g - 1], blocks[g - 1]) if g else (0, 0)
            of = experts[g] if len(bias) > 1 else 0
            for i in range(n // 32 * t // threads * 32, n // 32 * (t + 1) // threads * 32, 32):
                _panel(
                    w[experts[g], i:].ctypes.data, k, pairs.ctypes.data + block * 64 * k, at, bias[of, i:].ctypes.data,
                    out.ctypes.data + 2 * i, 2 * n, start, ends[g] - 1,
                )  # fmt: skip
        _release()
