"""Products of bf16 on a CPU with AMX, for up to a few hundred rows.

AMX multiplies two tiles of 16 rows of 64 bytes: a row of the first holds 32 numbers of one row of a matrix, a row of the
second one pair of numbers of each of 16 rows of the other, transposed. The weight is the first: its tiles are read from
where it lies, once, at the rate of memory. x, small, is the second and brought into pairs beforehand. oneDNN, which torch
asks, brings the weight into pairs, at every call. So results come out transposed, and are turned back in registers.

Unusual: rows are taken by 32; where there are fewer, the last one stands in for what is missing, and its results are
written again. Each product of two numbers is exact and they are summed in fp32, as oneDNN does it; numbers too small for
a normal fp32 are zero. What follows in the weight is fetched by hand while tiles are multiplied, or memory rests while
they are: 64 experts of 2048 x 768 with some 32 rows each 10.1 ms, 12.3 without.

Margin on 2 cores of a Xeon with AMX, of 64 experts, against torch's own, 1536 x 2048: 1 row 251 and 381 us, 16 rows 260
and 405, 32 rows 269 and 459, 64 rows 395 and 770, 128 rows 666 and 893; one at a time 128 rows 880, 256 rows 1410 and
1550. Up to 32 rows it reads 23-25 GB/s, all that there are. Where x no longer stays in a core's second cache, torch is
faster: 2048 x 6144 at 192 rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange
from numba.extending import intrinsic
from torch import Tensor

from zoo.kernels.cpu import compiled, compiles_for, grouped, offsets, taken, threads
from zoo.kernels.cpu.vectors import (
    BYTE,
    FLOAT,
    FLOATS,
    WORDS,
    addresses,
    at,
    call,
    everywhere,
    fetch,
    load,
    number,
    or_last,
    rounded,
    row_of,
    shuffled,
    store,
)
from zoo.system.scratch import scratch

ROWS, PAIRED = 256, 1 << 19
"""Rows, and numbers of x, up to which this is faster."""
BLOCK = 32  # rows of x, rows of the weight and numbers along K taken at a time: two by two tiles
_SHAPES = np.zeros(64, np.uint8)  # "palette 1": of each of eight tiles, bytes in a row and rows
_SHAPES[0] = 1
_SHAPES[16:32].view(np.uint16)[:] = 64
_SHAPES[48:56] = 16


def available() -> bool:
    """Whether this CPU has AMX and the system lets this process use it."""
    ask = getattr(torch.cpu, "_init_amx", None)
    return ask is not None and compiles_for("amx-tile", "amx-bf16") and bool(ask())


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
    tokens: Tensor | None = None,
) -> Tensor:
    """x [M, K] times weight [N, K], transposed, plus bias [N]: [M, N]. Or, of a stack [E, N, K] with bias [E, N]: the first
    `counts[0]` rows of x times the weight of `experts[0]`, and so on (int64 [G]); the rows x[tokens] (int64) in place of x,
    where given. All bf16, N and K multiples of 32, the weight contiguous."""
    k, n = x.shape[-1], weight.shape[-2]
    m = len(x if tokens is None else tokens)
    which, sizes = grouped(experts, counts, m)
    x = x if x.is_contiguous() else x.contiguous()
    pairs = scratch("pairs", (m // BLOCK + len(which)) * BLOCK * k * 2 + 64)
    out = torch.empty(m, n, dtype=x.dtype)
    with threads() as t:
        _grouped(
            weight.data_ptr(), x.data_ptr(), taken(tokens, m), n, k, which, sizes, offsets(bias, n), pairs, _SHAPES, out.data_ptr(), t,
        )  # fmt: skip
    return out


# Tiles 0 to 3 hold sums, two by two; 4 and 5 rows of the weight, 6 and 7 pairs of x.


def _amx(builder: Any, name: str, *args: Any) -> None:
    args = tuple(ir.Constant(BYTE, a) if isinstance(a, int) else a for a in args)
    call(builder, f"llvm.x86.{name}", ir.VoidType(), args)


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16: bit by bit, the number of the row and the number in the row change places."""
    for bit in (8, 4, 2, 1):
        upper = [i + 16 - bit if i & bit else i for i in range(16)]
        lower = [i + 16 if i & bit else i + bit for i in range(16)]
        for i in range(16):
            if not i & bit:
                pair = rows[i], rows[i + bit]
                rows[i], rows[i + bit] = (shuffled(builder, *pair, lanes) for lanes in (upper, lower))
    return rows


@intrinsic
def _configure(context: Any, shapes: Any) -> Any:
    def code(b: Any, shapes: Any) -> None:
        _amx(b, "ldtilecfg", at(b, shapes, 0))

    return addresses(1, code)


@intrinsic
def _release(context: Any) -> Any:
    return addresses(0, lambda b: _amx(b, "tilerelease"))


@intrinsic
def _clear(context: Any) -> Any:
    def code(b: Any) -> None:
        for tile in range(4):
            _amx(b, "tilezero", tile)

    return addresses(0, code)


@intrinsic
def _fetch(context: Any, address: Any) -> Any:
    """Half of what `_add_32` reads at a step, 1 KiB."""
    return addresses(1, lambda b, address: fetch(b, address, 16))


def _multiply(wide: bool) -> Any:
    @intrinsic
    def add(context: Any, weight: Any, stride: Any, pairs: Any) -> Any:
        """32 rows of the weight, `stride` bytes apart, times 16 rows of x, or 32: of 32 numbers each."""

        def code(b: Any, weight: Any, stride: Any, pairs: Any) -> None:
            below = b.mul(stride, number(16))
            _amx(b, "tileloadd64", 6, at(b, pairs, 0), number(64))
            _amx(b, "tileloadd64", 4, at(b, weight, 0), stride)
            _amx(b, "tdpbf16ps", 0, 4, 6)
            if wide:
                _amx(b, "tileloadd64", 7, at(b, pairs, 1024), number(64))
                _amx(b, "tdpbf16ps", 1, 4, 7)
            _amx(b, "tileloadd64", 5, at(b, weight, below), stride)
            _amx(b, "tdpbf16ps", 2, 5, 6)
            if wide:
                _amx(b, "tdpbf16ps", 3, 5, 7)

        return addresses(3, code)

    return add


_add_16, _add_32 = _multiply(wide=False), _multiply(wide=True)


@intrinsic
def _sums(context: Any, sums: Any) -> Any:
    """The four tiles of sums, written one after the other."""

    def code(b: Any, sums: Any) -> None:
        for tile in range(4):
            _amx(b, "tilestored64", tile, at(b, sums, 1024 * tile), number(64))

    return addresses(1, code)


@intrinsic
def _pair(context: Any, x: Any, stride: Any, tokens: Any, row: Any, last: Any, pairs: Any) -> Any:
    """32 numbers of each of 16 rows of x, two by two: a tile's second factor. `tokens` says which row of x is which."""

    def code(b: Any, x: Any, stride: Any, tokens: Any, row: Any, last: Any, pairs: Any) -> None:
        which = [row_of(b, x, stride, tokens, or_last(b, row, i, last)) for i in range(16)]
        for i, r in enumerate(_transposed(b, [load(b, at(b, address, 0, WORDS)) for address in which])):
            store(b, r, at(b, pairs, 64 * i, WORDS))

    return addresses(6, code)


@intrinsic
def _turn(context: Any, sums: Any, bias: Any, out: Any, stride: Any, row: Any, last: Any) -> Any:
    """Two tiles of sums, one of 16 rows of the weight and one of the next 16, plus the bias of these rows, rounded: 32
    numbers of each of 16 rows of the result."""

    def code(b: Any, sums: Any, bias: Any, out: Any, stride: Any, row: Any, last: Any) -> None:
        def of_row(i: int) -> Any:
            y = load(b, at(b, sums, 64 * i + (1024 if i >= 16 else 0), FLOATS))
            offset = load(b, at(b, bias, 4 * i, FLOAT))
            return rounded(b, b.fadd(y, everywhere(b, offset)))

        in_turn = [i // 2 + i % 2 * 16 for i in range(32)]
        two = [shuffled(b, of_row(i), of_row(i + 1), in_turn) for i in range(0, 32, 2)]
        for i, r in enumerate(_transposed(b, [b.bitcast(t, WORDS) for t in two])):
            store(b, r, at(b, out, b.mul(or_last(b, row, i, last), stride), WORDS))

    return addresses(6, code)


@compiled()
def _paired(x, tokens, row, last, k, pairs):
    """32 rows of x[tokens] from `row` on, `last` being the last there is, as second factors: [K / 32][two tiles]."""
    for j in range(0, k, 32):
        _pair(x + 2 * j, 2 * k, tokens, row, last, pairs + 64 * j)
        if row + 16 <= last:
            _pair(x + 2 * j, 2 * k, tokens, row + 16, last, pairs + 64 * j + 1024)


@compiled()
def _panel(weight, following, k, pairs, sums, bias, out, stride, first, last):
    """32 rows of the weight times the rows first .. last of x. Meanwhile the 32 rows `following` are fetched, one half
    during the first 32 rows of x and one during the next: as evenly as memory delivers."""
    half = 32 * k
    for row in range(first, last + 1, 32):
        _clear()
        for j in range(0, k, 32):
            if row < first + 64:
                _fetch(following + 32 * j)
            if last < first + 32:
                _fetch(following + half + 32 * j)
            if row + 16 <= last:
                _add_32(weight + 2 * j, 2 * k, pairs + 64 * j)
            else:
                _add_16(weight + 2 * j, 2 * k, pairs + 64 * j)
        _sums(sums)
        if row + 16 <= last:
            _turn(sums + 1024, bias, out, stride, row + 16, last)
        _turn(sums, bias, out, stride, row, last)
        pairs += 64 * k
        following += half


@compiled(parallel=True)
def _grouped(weight, x, tokens, n, k, experts, counts, bias, pairs, shapes, out, threads):
    """Each thread computes its share of the results of every group. weight, x and out: where they lie."""
    to = (pairs.ctypes.data + 63) // 64 * 64  # a tile's row is one line of the cache
    ends, blocks = np.empty_like(counts), np.empty_like(counts)  # of groups: in rows of x, and in pairs
    rows = pairs_of = 0
    for g in range(len(counts)):
        rows += counts[g]
        pairs_of += (counts[g] + 31) // 32
        ends[g], blocks[g] = rows, pairs_of
    if blocks[-1] == 1:
        _paired(x, tokens.ctypes.data, 0, ends[0] - 1, k, to)
    else:
        for block in prange(blocks[-1]):
            g = np.searchsorted(blocks, block, side="right")
            first, start = (blocks[g - 1], ends[g - 1]) if g else (0, 0)
            row = start + (block - first) * 32
            _paired(x, tokens.ctypes.data, row, ends[g] - 1, k, to + block * 64 * k)
    for t in prange(threads):
        sums = np.empty(1024 + 16, np.float32)
        at = (sums.ctypes.data + 63) // 64 * 64
        low, high = n // 32 * t // threads * 32, n // 32 * (t + 1) // threads * 32
        _configure(shapes.ctypes.data)
        for g in range(len(experts)):
            start, block = (ends[g - 1], blocks[g - 1]) if g else (0, 0)
            of = experts[g] if len(bias) > 1 else 0
            for i in range(low, high, 32):
                panel = weight + 2 * k * (experts[g] * n + i)
                following = panel + 64 * k
                if i + 32 == high:  # the next expert's, or, of the last, what is there already
                    following = weight + 2 * k * (experts[g + 1] * n + low) if g + 1 < len(experts) else panel
                _panel(
                    panel, following, k, to + block * 64 * k, at, bias[of, i:].ctypes.data, out + 2 * i, 2 * n,
                    start, ends[g] - 1,
                )  # fmt: skip
        _release()
