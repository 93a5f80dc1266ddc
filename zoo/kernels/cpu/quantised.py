"""Codes of four and eight bits times a few rows of x on a CPU: a weight is read as it is stored, and widened in registers.

Four rows of codes meet one row of x, sixteen of their numbers at a time; what a group of columns comes to is multiplied by its
scale once. An e4m3 code is moved to where fp16 has its parts, which every CPU here widens; a code of four bits is the place of
its value in a table of sixteen, which one instruction of AVX-512 looks up (elsewhere it is computed). Of four bits each byte
holds two neighbours: x is put into the order of their halves.

Unusual: vectors have 512 bits in what is compiled, whatever the CPU has: LLVM cuts them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from zoo.kernels.cpu import compiled, compiles_for, grouped, threads
from zoo.kernels.cpu.vectors import (
    ADDRESS,
    BYTE,
    FLOAT,
    FLOATS,
    HALVES,
    WORD,
    WORDS,
    at,
    call,
    load,
    number,
    or_last,
)
from zoo.kernels.weights import FP8, FP8_ROWS, INT4, MXFP4, SCALE_ROWS, Weight

FEW = 16
"""Rows of x up to which this is faster than widening all of the weight and multiplying that."""
LARGE = 1 << 18
"""Codes of a matrix from which it is: of fewer, a call costs more than it saves."""
BLOCK = 4  # rows of codes taken at a time
CODES = ir.VectorType(BYTE, 16)
# What e2m1 codes stand for.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_TABLES = {MXFP4: np.array(E2M1, np.float32), INT4: np.arange(-8, 8, dtype=np.float32)}
_NO_TABLE = np.zeros(16, np.float32)
_MARKS = {FP8: np.int8(0), FP8_ROWS: np.int8(0), INT4: np.int16(0), MXFP4: np.int32(0)}
"""Kinds as numba tells them apart: by type."""
_KINDS = {types.int8: FP8, types.int16: INT4, types.int32: MXFP4}


def fits(w: Weight, rows: int) -> bool:
    """Whether `rows` rows of x and codes on a CPU are for `times`."""
    if (
        w.kind not in (FP8, FP8_ROWS, MXFP4, INT4)
        or w.scale is None
        or not 0 < rows <= FEW
        or w.n * w.k < LARGE
    ):
        return False
    step = 32 if w.kind in _TABLES else 16
    whole = w.k % step == 0 and (w.columns >= w.k or w.columns % step == 0)
    return whole and w.words and not (w.kind == MXFP4 and _has_nan(w, w.scale))


def _has_nan(w: Weight, exponents: Tensor) -> bool:
    """Whether an e8m0 exponent is no number, which only damaged weights have."""
    if () not in w.tiles:
        w.tiles[()] = bool((exponents == 255).any())
    return bool(w.tiles[()])


def times(
    x: Tensor,
    w: Weight,
    bias: Tensor | None = None,
    experts: Tensor | None = None,
    counts: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """x [M, K] times the weight [N, K] of these codes, transposed, plus bias [N]: [M, N] in the dtype of x. Or, of a stack [E, N, K] with
    bias [E, N]: the first `counts[0]` rows of x times the weight of `experts[0]`, and so on (int64 [G]); the rows x[tokens]
    (int64) in place of x, where given."""
    x = x if tokens is None else x[tokens]
    m = len(x)
    which, sizes = grouped(experts, counts, m)
    wide = x.float()
    two = w.kind in _TABLES
    if two:
        wide = wide.view(m, w.k // 32, 16, 2).transpose(2, 3)
    wide = wide.contiguous()
    scale, begins = _scales(w)
    out = torch.empty(m, w.n)
    step = 16 * (1 + two)
    with threads() as t:
        _grouped(
            _MARKS[w.kind], w.codes.data_ptr(), wide.data_ptr(), scale.data_ptr(), begins, out.data_ptr(), w.n, w.k, w.k // step,
            min(w.columns, w.k) // step, scale.shape[-2] * scale.shape[-1] * scale.element_size(),
            _TABLES.get(w.kind, _NO_TABLE).ctypes.data, which, sizes, t,
        )  # fmt: skip
    if w.kind not in _TABLES:
        out *= 256  # see `_e4m3`
    if bias is not None:
        of_rows = bias if experts is None or counts is None else bias[experts].repeat_interleave(counts, 0)
        out += of_rows.float()
    return out.to(x.dtype)


def _scales(w: Weight) -> tuple[Tensor, NDArray[np.int64]]:
    """The scales as they are read, in fp32 or of mxfp4 as stored, and where those of each row of the weight begin, in bytes."""
    found = w.tiles.get((w.n,))
    if found is None:
        assert w.scale is not None
        scale = w.scale if w.kind == MXFP4 else w.scale.float()
        if w.rows is not None:
            rows = w.rows.numpy().astype(np.int64)
        else:
            rows = np.arange(w.n) // (1 if w.kind in _TABLES else SCALE_ROWS)
        found = w.tiles[w.n,] = scale, rows * (scale.shape[-1] * scale.element_size())
    return found


# ----------------------------------------------------------------------- from codes to numbers of fp32


def _all(type: Any, value: int | float) -> Any:
    return ir.Constant(type, [ir.Constant(type.element, value)] * type.count)


def _e4m3(b: Any, codes: Any, table: Any) -> list[Any]:
    """1/256 of the values: sign, exponent and fraction where fp16 has them, whose bias is 15 and not 7."""
    bits = b.and_(b.shl(b.sext(codes, HALVES), _all(HALVES, 7)), _all(HALVES, 0xBFFF))
    return [b.fpext(b.bitcast(bits, ir.VectorType(ir.HalfType(), 16)), FLOATS)]


def _looked_up(b: Any, codes: Any, table: Any) -> list[Any]:
    """The values of the low and of the high halves; of the place only the low four bits count."""
    low = b.zext(codes, WORDS)
    high = b.lshr(low, _all(WORDS, 4))
    return [call(b, "llvm.x86.avx512.permvar.sf.512", FLOATS, [table, i]) for i in (low, high)]


def _int4(b: Any, codes: Any, table: Any) -> list[Any]:
    low = b.zext(codes, WORDS)
    halves = b.and_(low, _all(WORDS, 15)), b.lshr(low, _all(WORDS, 4))
    return [b.sitofp(b.sub(i, _all(WORDS, 8)), FLOATS) for i in halves]


def _e2m1(b: Any, codes: Any, table: Any) -> list[Any]:
    """Sign, exponent and fraction where fp16 has them, whose bias is 15 and not 1."""
    low = b.zext(codes, HALVES)
    out = []
    for i in (low, b.lshr(low, _all(HALVES, 4))):
        rest = b.shl(b.and_(i, _all(HALVES, 7)), _all(HALVES, 9))
        bits = b.or_(rest, b.shl(b.and_(i, _all(HALVES, 8)), _all(HALVES, 12)))
        y = b.fpext(b.bitcast(bits, ir.VectorType(ir.HalfType(), 16)), FLOATS)
        out.append(b.fmul(y, _all(FLOATS, 2.0**14)))
    return out


def _values(kind: int) -> Any:
    if kind in (FP8, FP8_ROWS):
        return _e4m3
    if compiles_for("avx512f"):
        return _looked_up
    return _int4 if kind == INT4 else _e2m1


def _fp32(b: Any, where: Any, index: Any) -> Any:
    """The scale at `index` of a row."""
    return b.load(at(b, where, b.mul(index, number(4)), FLOAT))


def _e8m0(b: Any, where: Any, index: Any) -> Any:
    """The same of a byte that is its exponent in fp32. 2^-127, which fp32 has no exponent for, is 0."""
    word = b.zext(b.load(at(b, where, index, BYTE)), WORD)
    return b.bitcast(b.shl(word, ir.Constant(WORD, 23)), FLOAT)


# ------------------------------------------------------------------------------------------- products


@intrinsic
def _block(
    context: Any, kind: Any, codes: Any, stride: Any, row: Any, last: Any, x: Any, scale: Any, begins: Any, chunks: Any, group: Any,
    table: Any, out: Any,
) -> Any:  # fmt: skip
    """The rows row .. row + 3, `last` at most, of codes, each `stride` bytes and as many as `chunks` vectors of sixteen bytes, times
    one row of x; `group` vectors share a scale, of which each row's begin `begins[row]` bytes behind `scale`."""

    of = _KINDS[kind]
    values, vectors, scale_at = _values(of), 2 if of in _TABLES else 1, _e8m0 if of == MXFP4 else _fp32

    def code(
        b: Any, codes: Any, stride: Any, row: Any, last: Any, x: Any, scale: Any, begins: Any, chunks: Any, group: Any,
        table: Any, out: Any,
    ) -> None:  # fmt: skip
        which = [or_last(b, row, r, last) for r in range(BLOCK)]
        of_codes = [b.add(codes, b.mul(stride, r)) for r in which]
        of_scales = [b.add(scale, b.load(at(b, begins, b.mul(r, number(8)), ADDRESS))) for r in which]
        looked_up = load(b, at(b, table, 0, FLOATS))
        before = b.block
        next_group, inner, end_of_group, after = (b.append_basic_block() for _ in range(4))
        b.branch(next_group)

        b.position_at_end(next_group)
        g, done = b.phi(ADDRESS), b.phi(ADDRESS)
        totals = [b.phi(FLOATS) for _ in which]
        end = b.add(done, group)
        end = b.select(b.icmp_signed("<", end, chunks), end, chunks)
        b.branch(inner)

        b.position_at_end(inner)
        zeros = ir.Constant(FLOATS, None)
        lone = of == MXFP4  # a group is one vector: nothing to count
        i = done if lone else b.phi(ADDRESS)
        sums = [zeros if lone else b.phi(FLOATS) for _ in which]
        of_x = b.mul(i, number(64 * vectors))
        ys = [load(b, at(b, x, b.add(of_x, number(64 * v)), FLOATS)) for v in range(vectors)]
        added = []
        for address, sum in zip(of_codes, sums, strict=True):
            read = b.load(at(b, address, b.mul(i, number(16)), CODES))
            read.align = 1
            for value, y in zip(values(b, read, looked_up), ys, strict=True):
                sum = b.fadd(sum, b.fmul(value, y, flags=("contract",)), flags=("contract",))
            added.append(sum)
        if lone:
            b.branch(end_of_group)
        else:
            following = b.add(i, number(1))
            for phi, first, then in (
                (i, done, following),
                *((s, zeros, a) for s, a in zip(sums, added, strict=True)),
            ):
                phi.add_incoming(first, next_group)
                phi.add_incoming(then, inner)
            b.cbranch(b.icmp_signed("<", following, end), inner, end_of_group)

        b.position_at_end(end_of_group)
        grown = []
        for where, total, sum in zip(of_scales, totals, added, strict=True):
            s = b.insert_element(
                ir.Constant(FLOATS, ir.Undefined), scale_at(b, where, g), ir.Constant(WORD, 0)
            )
            s = b.shuffle_vector(s, s, ir.Constant(WORDS, None))
            grown.append(b.fadd(total, b.fmul(sum, s, flags=("contract",)), flags=("contract",)))
        for phi, first, then in (
            (g, number(0), b.add(g, number(1))),
            (done, number(0), end),
            *((t, zeros, n) for t, n in zip(totals, grown, strict=True)),
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(then, end_of_group)
        b.cbranch(b.icmp_signed("<", end, chunks), next_group, after)

        b.position_at_end(after)
        add_up = b.module.declare_intrinsic(
            "llvm.vector.reduce.fadd.v16f32", (), ir.FunctionType(FLOAT, [FLOAT, FLOATS])
        )
        for r, total in zip(which, grown, strict=True):
            y = b.call(add_up, [ir.Constant(FLOAT, 0.0), total], fastmath=("reassoc",))
            b.store(y, at(b, out, b.mul(r, number(4)), FLOAT))

    # What codes mean is told by the type of `kind`, which is no number.
    result = types.void(kind, *[types.intp] * 11)

    def write(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code(builder, *args[1:])
        return context.get_dummy_value()

    return result, write


@compiled(parallel=True)
def _grouped(
    kind, codes, x, scale, begins, out, n, k, chunks, group, scales_of_one, table, experts, counts, threads
):
    """Each thread computes its share of the results of every group. codes, x, scale, table and out: where they lie."""
    stride, step = chunks * 16, -(-n // (BLOCK * threads)) * BLOCK
    for t in prange(threads):
        first, last, start = t * step, min(n, (t + 1) * step), 0
        for g in range(len(experts)):
            of_codes, of_scales = codes + experts[g] * n * stride, scale + experts[g] * scales_of_one
            for i in range(first, last, BLOCK):
                for row in range(start, start + counts[g]):
                    _block(
                        kind, of_codes, stride, i, last - 1, x + row * k * 4, of_scales, begins.ctypes.data, chunks, group, table,
                        out + row * n * 4,
                    )  # fmt: skip
            start += counts[g]
