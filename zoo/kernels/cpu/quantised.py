"""Codes of four and eight bits times a few rows of x on a CPU: a weight is read as it is stored, and widened in registers.

Four rows of codes (of AWQ, whose words have eight, eight) meet one row of x, some of their columns at a time; what a group of columns
comes to is multiplied by its scale once. The four lie a quarter of a thread's share apart, so that each begins where its last one ended:
four streams, which a CPU brings ahead by itself, where of four neighbours it would see none. An e4m3 code is moved to where fp16 has its parts, which every CPU here widens; a code of four
bits is the place of its value in a table of sixteen, which one instruction of AVX-512 looks up (elsewhere it is computed). Of four bits
each byte holds two neighbours: x is put into the order of their halves.

Where the CPU multiplies pairs of bf16 and x is bf16, codes become bf16 instead, exactly, by looking them up: sixteen values of four bits
in one table; of a code of eight the upper and the lower byte in two tables of its 128 magnitudes. Half as many instructions do it.

Groups of 32 and 16 are less than the 64 columns read at a time: then the scales of a chunk are spread over the lanes that have their
columns by one shuffle of the bytes that are stored. Zero points and biases cost nothing where codes are read: they are multiplied by
sums of x, sixteen groups at a time (`zoo.kernels.cpu.carried` has the formula).

Unusual: vectors have 512 bits in what is compiled, whatever the CPU has: LLVM cuts them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor

from zoo.kernels.cpu import biased, compiled, compiles_for, dots, grouped, widen
from zoo.kernels.cpu.carried import FOUR_BITS, Codes, Form
from zoo.kernels.cpu.carried import carried as carried
from zoo.kernels.cpu.codes import CODE, address, bits, narrow, numbers, wide
from zoo.kernels.cpu.shares import given, run, share, together
from zoo.kernels.cpu.vectors import (
    ADDRESS,
    FLOAT,
    FLOATS,
    PAIRS,
    WORD,
    addresses,
    at,
    call,
    everywhere,
    fetch,
    load,
    loop,
    number,
    or_last,
)
from zoo.system.scratch import scratch

FEW = 48
"""Rows of x up to which this is faster than widening all of the weight and multiplying that. (6144 x 4096 in four bits on one core: 48
rows 26 to 37 ms, where widening takes 25 and the product 13.)"""
LARGE = 1 << 18
"""Codes of a matrix from which it is: of fewer, a call costs more than it saves."""
BLOCK = 8  # rows of codes that a thread's share is a multiple of
AHEAD = 1024
"""Bytes of a stream that are asked for ahead, too: with both, one core of a Xeon reads 8.3 GB/s of four bits (by itself 7.0, and four
neighbours, asked for, 6.7) and 10.7 of eight (8.7, 8.5)."""
NOT_MOVED, BY_SCALE, BY_ZERO, BY_SHIFT = range(4)


class Kind(NamedTuple):
    """What `_block` is compiled for: codes of a `form`, as pairs of bf16 or not; scales of dtype widen.SCALES[scale], `each` to a chunk
    (0: groups are of several); and whether groups are moved, and by what."""

    form: int
    paired: int
    scale: int
    each: int
    moved: int


_DIGITS = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16)
_OF_TYPE = {np.dtype(d).name: i for i, d in enumerate(_DIGITS)}


def mark_of(*numbers: int) -> tuple[Any, ...]:
    """Numbers below six as numba tells them from others, which is by type: each is one."""
    return tuple(_DIGITS[i](0) for i in numbers)


def kind_of(mark: Any) -> list[int]:
    """The numbers of a mark's types."""
    return [_OF_TYPE[t.name] for t in mark]


def each_of(w: Codes, paired: bool) -> int | None:
    """Groups of a chunk; 0: they are of several. None: chunks do not go with groups, or with rows."""
    step = widen.columns(w.form, paired)
    if w.k % step:
        return None
    if w.group > step or w.group == w.k:
        return 0 if w.group == w.k or w.group % step == 0 else None
    each = step // w.group if step % w.group == 0 else 0
    return each if each == 1 or (each in (2, 4) and w.form != Form.ROWS4) else None


def fits(w: Codes, rows: int) -> bool:
    """Whether `rows` rows of x and codes on a CPU are for `times`."""
    return 0 < rows <= FEW and w.n * w.k >= LARGE and each_of(w, False) is not None


def _pairs(x: Tensor, w: Codes) -> bool:
    """Whether x and codes can be multiplied as pairs of bf16."""
    if x.dtype != torch.bfloat16 or not dots.available() or each_of(w, True) is None:
        return False
    # Words are looked up of four bits, bytes of eight.
    return compiles_for("avx512bw" if w.form in (*FOUR_BITS, Form.ROWS4) else "avx512vbmi")


def times(
    x: Tensor,
    w: Codes,
    bias: Tensor | None = None,
    experts: Tensor | None = None,
    counts: Tensor | None = None,
    tokens: Tensor | None = None,
    dtype: torch.dtype | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """x [M, K] times the weight [N, K] of these codes, transposed, plus bias [N]: [M, N] in `dtype` (None: that of x), added to `onto`. Or, of a stack [E,
    N, K] with bias [E, N]: the first `counts[0]` rows of x times the weight of `experts[0]`, and so on (int64 [G]); the rows x[tokens]
    (int64) in place of x, where given; a lone row of x times the weight of each of several experts."""
    x, dtype = (x if tokens is None else x[tokens]).contiguous(), dtype or x.dtype
    m = len(x)
    which, sizes = grouped(experts, counts, m)
    shared = m == 1 and len(which) > 1  # one row of x for all
    rows = len(which) if shared else m
    paired = _pairs(x, w)
    r = ready(w, paired)
    ordered = scratch("ordered x", (m, w.k), np.uint16 if paired else np.float32)
    sums = scratch("sums of x", (m, w.k // w.group if r.kind.moved else 1), np.float32)
    # What is left to do with results, each thread does with its own.
    ends = all(y is None or y.dtype == dtype for y in (bias, onto))
    more = [None if y is None or not ends else y.contiguous() for y in (bias, onto)]
    out = torch.empty(rows, w.n, dtype=dtype if ends else torch.float32)
    found = scratch("unrounded", (rows, w.n), np.float32) if ends else out.data_ptr()
    together(
        _times(r.kind), *r.told, sums, 0 if shared else sums[0].nbytes, ordered, 0 if shared else ordered[0].nbytes, found, which, sizes, len(which),
        x.data_ptr(), m, w.k, w.group if r.kind.moved else 0, *widen.order(w.form, paired),
        _ended(dtype) if ends else 0, *map(address, more), address(out), first=_ordered(x.dtype, paired),
    )  # fmt: skip
    if ends:
        return out
    biased(out, bias, experts, counts)
    out = out.to(dtype)
    return out if onto is None else onto + out


@dataclass(frozen=True)
class _Ready:
    """What a share is told of codes, the same at every call: in `told` where they lie, their scales, what each row's begin at, what moves
    them, the factors and the table, and then `sizes`: rows in all, and rows that are read at once, bytes of such a row; chunks of a row, and
    of a group; groups of a row; the bits of `Codes.move`; bytes of scales, of what moves and of factors from one expert to the next."""

    kind: Kind
    told: tuple[int, ...]
    kept: Tensor  # what is pointed to, and nobody else has


def ready(w: Codes, paired: bool) -> _Ready:
    found: _Ready | None = w.ready.get(paired)
    if found is None:
        found = w.ready[paired] = _ready(w, paired)
    return found


def _ready(w: Codes, paired: bool) -> _Ready:
    each = each_of(w, paired)
    assert each is not None
    moved = w.zero if w.shift is None else w.shift
    how = (
        BY_ZERO
        if w.zero is not None
        else BY_SHIFT
        if w.shift is not None
        else BY_SCALE
        if w.move
        else NOT_MOVED
    )
    kind = Kind(w.form, paired, widen.SCALES.index(w.scale.dtype), each, how)
    factor = w.factor * (256.0 if kind.scale == widen.E4M3 else 1.0)
    if w.form == Form.E4M3 and not paired:
        factor = factor * 256.0
    step, groups = widen.columns(w.form, paired), -(-w.k // w.group)
    chunks, at_once = w.k // step, 8 if w.form == Form.ROWS4 else 1
    factor = factor.contiguous()
    told = (
        w.codes.data_ptr(), w.scale.data_ptr(), w.begins.ctypes.data, 0 if moved is None else moved.data_ptr(), factor.data_ptr(),
        widen.table(w.form, paired).ctypes.data, w.n, at_once, chunks * widen.chunk_bytes(w.form, paired), chunks,
        chunks if each else min(w.group, w.k) // step, groups, bits(w.move),
        w.scale.shape[-2] * w.scale.shape[-1] * w.scale.element_size(), 0 if moved is None else w.n * groups * moved.element_size(),
        w.n * 4 if factor.ndim > 1 else 0,
    )  # fmt: skip
    return _Ready(kind, told, factor)


@intrinsic
def _block(
    context: Any, mark: Any, codes: Any, stride: Any, row: Any, apart: Any, last: Any, x: Any, sums: Any, scale: Any, begins: Any,
    moved: Any, factor: Any, chunks: Any, group: Any, groups: Any, move: Any, table: Any, out: Any,
) -> Any:  # fmt: skip
    """Four rows of codes from `row` on (of `Form.ROWS4` eight), so many `apart`, `last` at most, each `stride` bytes and `chunks` chunks,
    times one row of x, whose groups have these `sums`; `group` chunks share a scale, of which each row's begin `begins[row]` bytes behind `scale`."""
    kind = Kind(*kind_of(mark))
    form, paired = Form(kind.form), bool(kind.paired)
    rows, lines = (8, 1 + paired) if form == Form.ROWS4 else (4, 1)
    size, x_as = widen.chunk_bytes(form, paired), PAIRS if paired else FLOATS
    vectors = widen.columns(form, paired) * (2 if paired else 4) // 64

    def code(
        b: Any, codes: Any, stride: Any, row: Any, apart: Any, last: Any, x: Any, sums: Any, scale: Any, begins: Any, moved: Any,
        factor: Any, chunks: Any, group: Any, groups: Any, move: Any, table: Any, out: Any,
    ) -> None:  # fmt: skip
        which = [or_last(b, row, b.mul(apart, number(r)), last) for r in range(rows)]
        if rows == 8:
            of_codes = [b.add(codes, b.mul(stride, b.lshr(row, number(3))))]
        else:
            of_codes = [b.add(codes, b.mul(stride, r)) for r in which]
        of_scales = [b.add(scale, b.load(at(b, begins, b.mul(r, number(8)), ADDRESS))) for r in which]
        looked_up = widen.looked_up(b, form, paired, table)
        zeros = [ir.Constant(FLOATS, None)] * rows

        def plus_chunk(i: Any, sums: list[Any]) -> list[Any]:
            """Of each row its sum plus the i-th chunk times that of x."""
            ys = [
                load(b, at(b, x, b.add(b.mul(i, number(64 * vectors)), number(64 * v)), x_as))
                for v in range(vectors)
            ]
            offset = b.mul(i, number(size))
            for row_at in of_codes:
                fetch(b, b.add(row_at, b.add(offset, number(AHEAD))), lines)
            out = []
            for sum, values in zip(
                sums, widen.chunk(b, form, paired, of_codes, offset, looked_up), strict=True
            ):
                for value, y in zip(values, ys, strict=True):
                    if paired:
                        sum = call(b, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [sum, value, y])
                    else:
                        sum = _plus(b, sum, value, y)
                out.append(sum)
            return out

        def plus_spread(i: Any, totals: list[Any]) -> list[Any]:
            """The same where a chunk has several groups."""
            found = plus_chunk(i, zeros)
            factors = [widen.spread(b, kind.scale, kind.each, where, i) for where in of_scales]
            return [_plus(b, *of_row) for of_row in zip(totals, found, factors, strict=True)]

        def plus_group(first: Any, values: list[Any]) -> list[Any]:
            g, *totals = values
            end = b.add(first, group)
            end = b.select(b.icmp_signed("<", end, chunks), end, chunks)
            found = loop(b, first, end, number(1), zeros, plus_chunk)
            factors = [everywhere(b, widen.scale(b, kind.scale, where, g)) for where in of_scales]
            return [
                b.add(g, number(1)),
                *(_plus(b, *of_row) for of_row in zip(totals, found, factors, strict=True)),
            ]

        if kind.each:
            totals = loop(b, number(0), chunks, number(1), zeros, plus_spread)
        else:
            _, *totals = loop(b, number(0), chunks, group, [number(0), *zeros], plus_group)
        alone = [ir.Constant(FLOAT, 0.0)] * rows
        if kind.moved:
            of_moved = [b.add(moved, b.mul(b.mul(r, groups), number(_moved_size(kind)))) for r in which]
            constant = b.bitcast(b.trunc(move, WORD), FLOAT)

            def plus_moved(n: int) -> Any:
                def body(g: Any, totals: list[Any]) -> list[Any]:
                    """Totals plus what n groups from g on are moved by."""
                    of_x = load(b, at(b, sums, b.mul(g, number(4)), FLOAT if n == 1 else FLOATS))
                    out = []
                    for total, s_at, m_at in zip(totals, of_scales, of_moved, strict=True):
                        s = (widen.scale if n == 1 else widen.scales)(b, kind.scale, s_at, g)
                        of_scale = constant if n == 1 else everywhere(b, constant)
                        if kind.moved == BY_ZERO:
                            of_scale = widen.halves(b, m_at, g, n)
                        by = b.fmul(s, of_scale)
                        if kind.moved == BY_SHIFT:
                            by = b.fadd(by, (widen.scale if n == 1 else widen.scales)(b, kind.scale, m_at, g))
                        out.append(_plus(b, total, by, of_x))
                    return out

                return body

            whole = b.and_(groups, number(-16))
            totals = loop(b, number(0), whole, number(16), totals, plus_moved(16))
            alone = loop(b, whole, groups, number(1), alone, plus_moved(1))

        add_up = b.module.declare_intrinsic(
            "llvm.vector.reduce.fadd.v16f32", (), ir.FunctionType(FLOAT, [FLOAT, FLOATS])
        )
        for r, total, first in zip(which, totals, alone, strict=True):
            y = b.call(add_up, [first, total], fastmath=("reassoc",))
            of_row = b.mul(r, number(4))
            b.store(b.fmul(y, b.load(at(b, factor, of_row, FLOAT))), at(b, out, of_row, FLOAT))

    return addresses(17, code, mark)  # what codes mean is told by the types of `mark`, which is no numbers


def _plus(b: Any, total: Any, x: Any, y: Any) -> Any:
    return b.fadd(total, b.fmul(x, y, flags=("contract",)), flags=("contract",))


def _moved_size(kind: Kind) -> int:
    """Bytes of what moves a group."""
    return {BY_SCALE: 0, BY_ZERO: 2, BY_SHIFT: widen.SIZES[kind.scale]}[kind.moved]


@functools.cache
def _times(kind: Kind) -> int:
    """Results of every group of rows of x, of which each is `x_row` bytes and has these sums (see `_Ready`)."""
    mark = mark_of(*kind)

    def times(told, thread, threads):
        (
            codes, scale, begins, moved, factor, table, n, at_once, stride, chunks, group, groups, move, scales, moves, factors, sums, sums_row,
            x, x_row, out, experts_at, counts_at, many, _, _, _, _, _, _, _, end_of, _, _, _,
        ) = given(told, 35)  # fmt: skip
        experts, counts = numbers(experts_at, 0, many, np.int64(0)), numbers(counts_at, 0, many, np.int64(0))
        step = -(-n // (BLOCK * threads)) * BLOCK
        first, last, start = thread * step, min(n, (thread + 1) * step), 0
        apart = 1 if at_once > 1 else max(1, -(-(last - first) // 4))
        end = last if at_once > 1 else min(last, first + apart)
        for g in range(many):
            e = experts[g]
            of_codes, of_scales = codes + e * n // at_once * stride, scale + e * scales
            for i in range(first, end, at_once):
                for row in range(start, start + counts[g]):
                    _block(
                        mark, of_codes, stride, i, apart, last - 1, x + row * x_row, sums + row * sums_row, of_scales, begins, moved + e * moves,
                        factor + e * factors, chunks, group, groups, move, table, out + row * n * 4,
                    )  # fmt: skip
            start += counts[g]
        if end_of:
            run(end_of, told, first, last)

    return share(times)


@compiled()
def _as_it_is(number, to):
    return number


@compiled()
def _converted(number, to):
    return narrow(wide(number), to)


@functools.cache
def _ordered(dtype: torch.dtype, paired: bool) -> int:
    """Rows of x as chunks are multiplied by them, and the sums of their groups."""
    code, to = CODE[dtype], CODE[torch.bfloat16 if paired else torch.float32]
    put = _as_it_is if code is to else _converted

    def ordered(told, thread, threads):
        (
            _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, sums_at, _, ordered_at, _, _, _, _, _, x_at, m, k, group, outer, inner, some,
            _, _, _, _,
        ) = given(told, 35)  # fmt: skip
        x, y = numbers(x_at, 0, m * k, code), numbers(ordered_at, 0, m * k, to)
        for first in range(0, m * k, outer * inner * some):
            for i in range(outer):
                for j in range(inner):
                    for c in range(some):
                        y[first + (j * outer + i) * some + c] = put(x[first + (i * inner + j) * some + c], to)
        if group:
            sums = numbers(sums_at, 0, m * (k // group), np.float32(0))
            for g in range(len(sums)):
                total = np.float32(0)
                for i in range(g * group, (g + 1) * group):
                    total += wide(x[i])
                sums[g] = total

    return share(ordered)


@functools.cache
def _ended(dtype: torch.dtype) -> int:
    """Results first .. last of every row: plus the bias (of its expert), rounded, and added to what there is."""
    code = CODE[dtype]

    def ended(told, first, last):
        (
            _, _, _, _, _, _, n, _, _, _, _, _, _, _, _, _, _, _, _, _, found_at, experts_at, counts_at, many, _, _, _, _, _, _, _, _, bias_at,
            onto_at, out_at,
        ) = given(told, 35)  # fmt: skip
        experts, counts = numbers(experts_at, 0, many, np.int64(0)), numbers(counts_at, 0, many, np.int64(0))
        start = 0
        for g in range(many):
            bias = numbers(bias_at, experts[g] * n, n, code)
            for row in range(start, start + counts[g]):
                found, onto = numbers(found_at, row * n, n, np.float32(0)), numbers(onto_at, row * n, n, code)
                out = numbers(out_at, row * n, n, code)
                for i in range(first, last):
                    y = narrow(found[i] + wide(bias[i]) if bias_at else found[i], code)
                    out[i] = narrow(wide(onto[i]) + wide(y), code) if onto_at else y
            start += counts[g]

    return share(ended)
