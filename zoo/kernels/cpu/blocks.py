"""ggml's blocks times a few rows of x on a CPU: a weight is read as a GGUF has it, and widened in registers (`block_types`).

Four rows of blocks, a quarter of a thread's share apart (`quantised` says why), meet one row of x, a block at a time. What a group of columns is moved by, its min, is multiplied by the sum of x over
the group, and costs nothing where codes are read. x stays in fp32: llama.cpp rounds it to eight bits, which makes products of bytes of
them, and logits that are percents beside these.

For many rows of x a weight is widened first: to what `zoo.quant.dequantise` makes of it, to the bit.

Margin: docs/performance.md.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from zoo.kernels.cpu import biased, grouped
from zoo.kernels.cpu.block_types import KINDS, NAMES, Group, fma
from zoo.kernels.cpu.codes import numbers
from zoo.kernels.cpu.expand import DTYPES, store
from zoo.kernels.cpu.quantised import AHEAD, BLOCK, FEW, LARGE, kind_of, mark_of
from zoo.kernels.cpu.shares import given, share, together
from zoo.kernels.cpu.vectors import FLOAT, FLOATS, addresses, at, fetch, load, loop, number, or_last, shuffled
from zoo.quant import blocks
from zoo.quant.base import grid
from zoo.quant.schemes import scheme as named
from zoo.system.scratch import scratch

ROWS = 4  # of blocks, taken at a time


@dataclass(frozen=True)
class Run:
    """Rows of one type: `codes` [.., rows, bytes], whose rows are those from `first` on of the weight. `told`: what a share is told of
    them, the same at every call."""

    kind: int
    codes: Tensor
    first: int
    rows: int
    told: tuple[Any, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        kind, codes = KINDS[self.kind], self.codes
        stack = codes.stride(0) if codes.ndim > 2 else 0
        n_blocks = codes.shape[-1] // blocks.TYPES[kind.type].nbytes
        order = _order(self.kind)
        told = (
            codes.data_ptr(), codes.shape[-1], stack, order.ctypes.data, len(order), kind.sums, int(kind.middle), self.rows, n_blocks,
        )  # fmt: skip
        object.__setattr__(self, "told", told)


@functools.cache
def _order(kind: int) -> NDArray[np.int64]:
    return np.array(KINDS[kind].order)


@dataclass(frozen=True)
class Carried:
    """A weight [N, K] or [E, N, K] in blocks: of each matrix these `runs` of rows, in order."""

    runs: tuple[Run, ...]
    n: int
    k: int


def carried(scheme: str, components: dict[str, Tensor], parts: tuple[int, ...]) -> Carried | None:
    """The weight of these components; None where the kernel does not know them."""
    s = named(scheme)
    if any(not c.is_contiguous() for c in components.values()):
        return None
    found, k = [], 0  # first row of the weight, kind, codes, first row of these, rows
    for part in s.components:
        kind, codes = blocks.type_of(s, part.name), components[part.name]
        block = blocks.TYPES[kind]
        k = codes.shape[-1] // block.nbytes * block.columns
        begin = 0
        for p, count in enumerate(grid(part, parts, k)[0]):
            if count:
                found.append((sum(parts[:p]), NAMES.index(kind), codes, begin, count))
                begin += count
    found.sort(key=lambda f: f[0])
    runs = []
    for of_kind, same in itertools.groupby(found, key=lambda f: f[1]):  # neighbours of one type are one run
        some = list(same)
        first, _, codes, begin, _ = some[0]
        rows = sum(f[4] for f in some)
        runs.append(Run(of_kind, codes[..., begin : begin + rows, :], first, rows))
    return Carried(tuple(runs), sum(parts), k)


def fits(w: Carried, rows: int) -> bool:
    """Whether `rows` rows of x and blocks on a CPU are for `times`."""
    return 0 < rows <= FEW and w.n * w.k >= LARGE


def times(
    x: Tensor,
    w: Carried,
    bias: Tensor | None = None,
    experts: Tensor | None = None,
    counts: Tensor | None = None,
    tokens: Tensor | None = None,
    dtype: torch.dtype | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """x [M, K] times the weight [N, K] in blocks, transposed, plus bias [N]: [M, N] in `dtype` (None: that of x), added to `onto`. Or, of a stack [E, N, K]
    with bias [E, N]: the first `counts[0]` rows of x times the weight of `experts[0]`, and so on (int64 [G]); the rows x[tokens] (int64) in
    place of x, where given."""
    dtype = dtype or x.dtype
    x = (x if tokens is None else x[tokens]).float().contiguous()
    m = len(x)
    which, sizes = grouped(experts, counts, m)
    out = torch.empty(m, w.n)
    ordered = scratch("ordered x", (m, w.k), np.float32)
    of_groups = scratch("sums of x", (m, max(1, w.k // 16)), np.float32)
    adds = dtype == torch.float32 and experts is None  # what is left to add, each thread to its share
    more = [None if y is None or not adds else y.float().contiguous() for y in (bias, onto)]
    of_bias, of_onto = (0 if y is None else y.data_ptr() for y in more)
    for run in w.runs:
        at = 4 * run.first
        together(
            _times(run.kind), *run.told, x.data_ptr(), ordered, of_groups, of_groups.shape[1], m, w.k,
            out.data_ptr() + at, w.n * 4, which, sizes, len(which), of_bias and of_bias + at, of_onto and of_onto + at,
            first=_ordering(),
        )  # fmt: skip
    if adds:
        return out
    biased(out, bias, experts, counts)
    y = out.to(dtype)
    return y if onto is None else onto + y


def _plus(b: Any, group: Group, vector: Callable[[int], Any], total: Any) -> Any:
    """total plus the products of a group of columns."""
    first, *others = group.codes
    product = b.fmul(first, vector(group.first))
    for i, codes in enumerate(others):
        product = fma(b, codes, vector(group.first + 1 + i), product)
    return fma(b, product, group.scale, total)


@intrinsic
def _block(
    context: Any,
    mark: Any,
    codes: Any,
    stride: Any,
    row: Any,
    apart: Any,
    last: Any,
    x: Any,
    sums: Any,
    n_blocks: Any,
    out: Any,
) -> Any:
    """Four rows of blocks from `row` on, so many `apart`, `last` at most, each `stride` bytes and `n_blocks` blocks, times one row of x in its order, whose
    sums lie at `sums`; results to `out`."""
    high, low = kind_of(mark)
    kind = KINDS[6 * high + low]
    size, columns = blocks.TYPES[kind.type].nbytes, len(kind.order)

    def code(
        b: Any, codes: Any, stride: Any, row: Any, apart: Any, last: Any, x: Any, sums: Any, n_blocks: Any, out: Any
    ) -> None:  # fmt: skip
        which = [or_last(b, row, b.mul(apart, number(r)), last) for r in range(ROWS)]
        of_codes = [b.add(codes, b.mul(stride, r)) for r in which]

        def plus_block(i: Any, totals: list[Any]) -> list[Any]:
            offset, x_at = b.mul(i, number(size)), b.add(x, b.mul(i, number(4 * columns)))
            here = [b.add(address, offset) for address in of_codes]
            for address in here:
                fetch(b, b.add(address, number(AHEAD)), -(-size // 64))
            vector = functools.cache(lambda v: load(b, at(b, x_at, 64 * v, FLOATS)))
            begun = [kind.begin(b, row) for row in here]
            if kind.moved is not None:
                of_x = b.add(sums, b.mul(i, number(4 * kind.sums)))
                totals = [
                    kind.moved(b, *of_row, of_x, t) for *of_row, t in zip(here, begun, totals, strict=True)
                ]
            groups = [kind.groups(b, row, of_row, False) for row, of_row in zip(here, begun, strict=True)]
            for of_rows in zip(*groups, strict=True):
                totals = [_plus(b, group, vector, t) for group, t in zip(of_rows, totals, strict=True)]
            return totals

        totals = loop(b, number(0), n_blocks, number(1), [ir.Constant(FLOATS, None)] * ROWS, plus_block)
        add_up = b.module.declare_intrinsic(
            "llvm.vector.reduce.fadd.v16f32", (), ir.FunctionType(FLOAT, [FLOAT, FLOATS])
        )
        for r, total in zip(which, totals, strict=True):
            y = b.call(add_up, [ir.Constant(FLOAT, 0.0), total], fastmath=("reassoc",))
            b.store(y, at(b, out, b.mul(r, number(4)), FLOAT))

    return addresses(9, code, mark)


@functools.cache
def _ordering() -> int:
    """Rows of x in the order of a type's columns, and their sums: one to a block of 32; 16 to one of 256, those of its groups times what
    codes are taken less, and once more."""

    def ordered(told, thread, threads):
        _, _, _, order_at, columns, sums, middle, _, _, x_at, ordered_at, sums_at, groups, m, k = given(
            told, 15
        )
        order = numbers(order_at, 0, columns, np.int64(0))
        x, ordered = numbers(x_at, 0, (m, k), np.float32(0)), numbers(ordered_at, 0, (m, k), np.float32(0))
        of_groups = numbers(sums_at, 0, (m, groups), np.float32(0))
        for row in range(m):
            for first in range(0, k, columns):
                for i in range(columns):
                    ordered[row, first + i] = x[row, first + order[i]]
                if sums == 1:
                    total = np.float32(0)
                    for i in range(columns):
                        total += x[row, first + i]
                    of_groups[row, first // columns] = total / np.float32(16)  # each lane has a part of it
                elif sums == 16:
                    to = first // columns * 16
                    for g in range(8):
                        total = np.float32(0)
                        for i in range(32):
                            total += x[row, first + 32 * g + i]
                        of_groups[row, to + g], of_groups[row, to + 8 + g] = np.float32(middle) * total, total

    return share(ordered)


@functools.cache
def _times(kind: int) -> int:
    """Results of every group. A matrix of a stack is `stack` bytes, a row of blocks `stride`, a row of out `across`."""
    mark = mark_of(*divmod(kind, 6))

    def times(told, thread, threads):
        (
            codes, stride, stack, _, _, _, _, n, n_blocks, _, x, sums, groups, m, k, out, across, experts_at, counts_at, many, bias_at, onto_at,
        ) = given(told, 22)  # fmt: skip
        experts, counts = numbers(experts_at, 0, many, np.int64(0)), numbers(counts_at, 0, many, np.int64(0))
        step = -(-n // (BLOCK * threads)) * BLOCK
        begin, last, start = thread * step, min(n, (thread + 1) * step), 0
        apart = max(1, -(-(last - begin) // ROWS))
        for g in range(many):
            matrix = codes + experts[g] * stack
            for i in range(begin, min(last, begin + apart)):
                for row in range(start, start + counts[g]):
                    _block(
                        mark, matrix, stride, i, apart, last - 1, x + row * k * 4, sums + row * groups * 4, n_blocks, out + row * across,
                    )  # fmt: skip
            start += counts[g]
        bias = numbers(bias_at, 0, n, np.float32(0))
        for row in range(m):
            result = numbers(out, row * across // 4, n, np.float32(0))
            onto = numbers(onto_at, row * across // 4, n, np.float32(0))
            if bias_at:
                for i in range(begin, last):
                    result[i] += bias[i]
            if onto_at:
                for i in range(begin, last):
                    result[i] += onto[i]

    return share(times)


# ------------------------------------------------------------------------------ widened


def widens(w: Carried, dtype: torch.dtype) -> bool:
    """Whether `expanded` makes such numbers of these blocks."""
    return dtype in DTYPES and w.n * w.k >= LARGE


def expanded(w: Carried, dtype: torch.dtype, expert: int | None = None) -> Tensor:
    """The weight [N, K] or [E, N, K] in `dtype`, or that of an expert."""
    first = w.runs[0].codes
    if expert is None and first.ndim > 2:
        return torch.stack([expanded(w, dtype, e) for e in range(len(first))])
    out = torch.empty(w.n, w.k, dtype=dtype)
    row = w.k * out.element_size()
    for run in w.runs:
        codes = run.codes if expert is None else run.codes[expert]
        together(
            _expanding(run.kind, DTYPES.index(dtype)), codes.data_ptr(), codes.shape[-1], out.data_ptr() + row * run.first, row, run.rows,
            w.k // len(KINDS[run.kind].order),
        )  # fmt: skip
    return out


@intrinsic
def _row(context: Any, mark: Any, codes: Any, n_blocks: Any, out: Any) -> Any:
    """A row of blocks as numbers, to `out`."""
    high, low, to = kind_of(mark)
    kind, dtype = KINDS[6 * high + low], DTYPES[to]
    size = blocks.TYPES[kind.type].nbytes

    def code(b: Any, codes: Any, n_blocks: Any, out: Any) -> None:
        def write(i: Any, _: list[Any]) -> list[Any]:
            row, to = b.add(codes, b.mul(i, number(size))), b.mul(i, number(len(kind.order) * dtype.itemsize))
            for group in kind.groups(b, row, kind.begin(b, row), True):
                values = [b.fmul(v, group.scale) for v in group.codes]
                if group.least is not None:
                    values = [b.fadd(v, group.least) for v in values]
                for first, vector in _side_by_side(b, values, kind.order[16 * group.first :]):
                    store(b, vector, dtype, out, b.add(to, number(first * dtype.itemsize)))
            return []

        loop(b, number(0), n_blocks, number(1), [], write)

    return addresses(3, code, mark)


def _side_by_side(b: Any, vectors: list[Any], order: Sequence[int]) -> list[tuple[int, Any]]:
    """(first column, 16 columns) of vectors whose columns are `order`, all of one vector's or four vectors' by turns."""
    if order[1] == order[0] + 1:
        return [(order[16 * i], v) for i, v in enumerate(vectors)]
    out = []
    for q in range(0, 16, 4):
        pairs = [lane for j in range(q, q + 4) for lane in (j, 16 + j)] * 2
        low, high = (shuffled(b, vectors[i], vectors[i + 1], pairs) for i in (0, 2))
        by_turns = [lane for j in range(4) for lane in (2 * j, 2 * j + 1, 16 + 2 * j, 17 + 2 * j)]
        out.append((order[q], shuffled(b, low, high, by_turns)))
    return out


@functools.cache
def _expanding(kind: int, dtype: int) -> int:
    """The rows of a run as numbers of DTYPES[dtype]."""
    mark = mark_of(*divmod(kind, 6), dtype)

    def expanding(told, thread, threads):
        codes, stride, out, across, n, n_blocks = given(told, 6)
        step = -(-n // threads)
        for row in range(thread * step, min(n, (thread + 1) * step)):
            _row(mark, codes + row * stride, n_blocks, out + row * across)

    return share(expanding, fastmath=False)
