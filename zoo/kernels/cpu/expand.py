"""Codes of four and eight bits as numbers of bf16, fp16 or fp32 on a CPU, for as many rows of x as are worth it: what
`zoo.quant.dequantise` makes of them, to the bit.

As `zoo.kernels.cpu.quantised` reads codes, but all that is computed is the number itself, in the order in which the scheme's formula
has it: nothing is contracted.

Margin on one core of an EPYC with AVX-512, 6144 x 4096 to bf16, against torch: int4 in groups of 128 28 and 46 ms, AWQ 26 and 178, MLX's 8
bits 29 and 153, NVFP4 25 and 235; most of it is that new memory is first touched. Of e4m3 torch takes no longer, and is left to it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor

from zoo.kernels.cpu import widen
from zoo.kernels.cpu.carried import FOUR_BITS, Codes, Form
from zoo.kernels.cpu.quantised import (
    BLOCK,
    BY_SCALE,
    BY_SHIFT,
    BY_ZERO,
    LARGE,
    Kind,
    each_of,
    kind_of,
    mark_of,
    ready,
)
from zoo.kernels.cpu.shares import given, share, together
from zoo.kernels.cpu.vectors import (
    ADDRESS,
    FLOAT,
    HALVES,
    WORD,
    WORDS,
    addresses,
    at,
    everywhere,
    loop,
    number,
    or_last,
    shuffled,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def widens(w: Codes, dtype: torch.dtype) -> bool:
    """Whether `expanded` makes such numbers of these codes."""
    each = each_of(w, False)
    known = each in (0, 1) or (each == 2 and w.zero is w.shift)  # neither
    return dtype in DTYPES and w.n * w.k >= LARGE and known and w.exact and w.form != Form.E4M3


def expanded(w: Codes, dtype: torch.dtype, expert: int | None = None) -> Tensor:
    """The weight [N, K] or [E, N, K] in `dtype`, or that of an expert."""
    if expert is None and w.scale.ndim > 2:
        return torch.stack([expanded(w, dtype, e) for e in range(len(w.scale))])
    r = ready(w, False)
    out = torch.empty(w.n, w.k, dtype=dtype)
    together(
        _expanding(r.kind, DTYPES.index(dtype)),
        *r.told,
        expert or 0,
        out.data_ptr(),
        w.k * out.element_size(),
    )
    return out


@intrinsic
def _rows(
    context: Any, mark: Any, codes: Any, stride: Any, row: Any, last: Any, scale: Any, begins: Any, moved: Any, factor: Any, chunks: Any,
    group: Any, groups: Any, move: Any, table: Any, out: Any, across: Any,
) -> Any:  # fmt: skip
    """The rows row .. row + 3 (of `Form.ROWS4` + 7), `last` at most, of codes, to rows of `out`, which are `across` bytes long; the rest as
    `zoo.kernels.cpu.quantised._block`."""
    *of, to = kind_of(mark)
    kind = Kind(*of)
    form, dtype = Form(kind.form), DTYPES[to]
    rows, step = 8 if form == Form.ROWS4 else 4, widen.columns(form, False)
    size = widen.chunk_bytes(form, False)

    def code(
        b: Any, codes: Any, stride: Any, row: Any, last: Any, scale: Any, begins: Any, moved: Any, factor: Any, chunks: Any,
        group: Any, groups: Any, move: Any, table: Any, out: Any, across: Any,
    ) -> None:  # fmt: skip
        which = [or_last(b, row, r, last) for r in range(rows)]
        if rows == 8:
            of_codes = [b.add(codes, b.mul(stride, b.lshr(row, number(3))))]
        else:
            of_codes = [b.add(codes, b.mul(stride, r)) for r in which]
        of_scales = [b.add(scale, b.load(at(b, begins, b.mul(r, number(8)), ADDRESS))) for r in which]
        of_moved = [
            b.add(
                moved,
                b.mul(b.mul(r, groups), number(widen.SIZES[kind.scale] if kind.moved == BY_SHIFT else 2)),
            )
            for r in which
        ]
        of_out = [b.add(out, b.mul(r, across)) for r in which]
        factors = [everywhere(b, b.load(at(b, factor, b.mul(r, number(4)), FLOAT))) for r in which]
        constant = everywhere(b, b.bitcast(b.trunc(move, WORD), FLOAT))
        looked_up = widen.looked_up(b, form, False, table)

        def write(i: Any, found: list[tuple[Any, Any, Any]]) -> list[Any]:
            """The i-th chunk of each row, of which are known scale, zero point and shift."""
            for to_row, (s, zero, shift), values in zip(
                of_out,
                found,
                widen.chunk(b, form, False, of_codes, b.mul(i, number(size)), looked_up),
                strict=True,
            ):
                numbers = []
                for value in values:
                    value = b.fmul(b.fadd(value, zero) if zero is not None else value, s)
                    numbers.append(b.fadd(value, shift) if shift is not None else value)
                if form in FOUR_BITS:  # neighbours are apart
                    low, high = numbers
                    lanes = [[side * 16 + first + j for j in range(8) for side in (0, 1)] for first in (0, 8)]
                    numbers = [shuffled(b, low, high, of_half) for of_half in lanes]
                for v, y in enumerate(numbers):
                    offset = b.add(b.mul(i, number(step * dtype.itemsize)), number(v * 16 * dtype.itemsize))
                    store(b, y, dtype, to_row, offset)
            return []

        def of_group(g: Any) -> list[tuple[Any, Any, Any]]:
            found = []
            for s_at, m_at, f in zip(of_scales, of_moved, factors, strict=True):
                s = b.fmul(widen.spread(b, kind.scale, kind.each or 1, s_at, g), f)
                zero = shift = None
                if kind.moved in (BY_SCALE, BY_SHIFT):
                    zero = constant
                if kind.moved == BY_ZERO:
                    zero = everywhere(b, widen.halves(b, m_at, g, 1))
                if kind.moved == BY_SHIFT:
                    shift = everywhere(b, widen.scale(b, kind.scale, m_at, g))
                found.append((s, zero, shift))
            return found

        def whole_group(first: Any, values: list[Any]) -> list[Any]:
            (g,) = values
            end = b.add(first, group)
            end = b.select(b.icmp_signed("<", end, chunks), end, chunks)
            found = of_group(g)
            loop(b, first, end, number(1), [], lambda i, _: write(i, found))
            return [b.add(g, number(1))]

        if kind.each:
            loop(b, number(0), chunks, number(1), [], lambda i, _: write(i, of_group(i)))
        else:
            loop(b, number(0), chunks, group, [number(0)], whole_group)

    return addresses(15, code, mark)


def store(b: Any, y: Any, dtype: torch.dtype, row: Any, offset: Any) -> None:
    """16 numbers, rounded to the nearest, to even where two are."""
    if dtype == torch.float32:
        stored = y
    elif dtype == torch.float16:
        stored = b.bitcast(b.fptrunc(y, widen.HALF_FLOATS), HALVES)
    else:  # by whole numbers: the CPU's own instruction takes the smallest for 0
        bits = b.bitcast(y, WORDS)
        odd = b.and_(b.lshr(bits, _words(16)), _words(1))
        upper = b.lshr(b.add(b.add(bits, _words(0x7FFF)), odd), _words(16))
        upper = b.select(b.fcmp_unordered("uno", y, y), _words(0x7FC0), upper)
        stored = b.trunc(upper, HALVES)
    b.store(stored, at(b, row, offset, stored.type)).align = 1


def _words(value: int) -> Any:
    return ir.Constant(WORDS, [ir.Constant(WORD, value)] * 16)


@functools.cache
def _expanding(kind: Kind, dtype: int) -> int:
    """The rows of a matrix, or of that of an expert, as numbers of DTYPES[dtype] (see `zoo.kernels.cpu.quantised._Ready`)."""
    mark = mark_of(*kind, dtype)

    def expanding(told, thread, threads):
        (
            codes, scale, begins, moved, factor, table, n, at_once, stride, chunks, group, groups, move, scales, moves, factors, e, out, across,
        ) = given(told, 19)  # fmt: skip
        step, block = -(-n // (BLOCK * threads)) * BLOCK, max(4, at_once)
        last = min(n, (thread + 1) * step)
        for i in range(thread * step, last, block):
            _rows(
                mark, codes + e * n // at_once * stride, stride, i, last - 1, scale + e * scales, begins, moved + e * moves,
                factor + e * factors, chunks, group, groups, move, table, out, across,
            )  # fmt: skip

    return share(expanding, fastmath=False)
