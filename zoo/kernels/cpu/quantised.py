"""Codes of four and eight bits times a few rows of x on a CPU: a weight is read as it is stored, and widened in registers.

Four rows of codes meet one row of x, sixteen of their numbers at a time; what a group of columns comes to is multiplied by its
scale once. An e4m3 code is moved to where fp16 has its parts, which every CPU here widens; a code of four bits is the place of
its value in a table of sixteen, which one instruction of AVX-512 looks up (elsewhere it is computed). Of four bits each byte
holds two neighbours: x is put into the order of their halves.

Where the CPU multiplies pairs of bf16 and x is bf16, codes become bf16 instead, exactly, by looking them up: sixteen values of four bits in one
table; of an e4m3 code the upper and the lower byte in two tables of its 128 magnitudes. Half as many instructions do it.

Unusual: vectors have 512 bits in what is compiled, whatever the CPU has: LLVM cuts them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from zoo.kernels.cpu import compiled, compiles_for, dots, grouped, threads
from zoo.kernels.cpu.vectors import (
    ADDRESS,
    BYTE,
    FLOAT,
    FLOATS,
    HALF,
    HALVES,
    PAIRS,
    WORD,
    WORDS,
    addresses,
    at,
    call,
    everywhere,
    fetch,
    load,
    number,
    or_last,
    shuffled,
)
from zoo.kernels.weights import FP8, FP8_ROWS, INT4, MXFP4, SCALE_ROWS, Weight
from zoo.quant.fp4 import VALUES

FEW = 16
"""Rows of x up to which this is faster than widening all of the weight and multiplying that."""
LARGE = 1 << 18
"""Codes of a matrix from which it is: of fewer, a call costs more than it saves."""
BLOCK = 4  # rows of codes taken at a time
BYTES, SHORTS = ir.VectorType(BYTE, 64), ir.VectorType(HALF, 32)
_TABLES = {MXFP4: np.array(VALUES, np.float32), INT4: np.arange(-8, 8, dtype=np.float32)}
_NO_TABLE = np.zeros(16, np.float32)
_MARKS = {FP8: np.int8(0), FP8_ROWS: np.int8(0), INT4: np.int16(0), MXFP4: np.int32(0)}
_PAIRED = {FP8: np.uint8(0), FP8_ROWS: np.uint8(0), INT4: np.uint16(0), MXFP4: np.uint32(0)}
"""Kinds as numba tells them apart: by type; `_PAIRED`: in pairs of bf16."""
_KINDS = {
    types.int8: (FP8, False), types.int16: (INT4, False), types.int32: (MXFP4, False),
    types.uint8: (FP8, True), types.uint16: (INT4, True), types.uint32: (MXFP4, True),
}  # fmt: skip


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
    paired, two = _pairs(x, w), w.kind in _TABLES
    step = 64 if paired else 32 if two else 16
    if two:  # the low halves of bytes, then the high ones
        ordered = x.reshape(m, w.k // step, step // 2, 2).transpose(2, 3)
    elif paired:  # as `_looked_up_bytes` gives them
        ordered = x.reshape(m, w.k // step, 4, 2, 8).transpose(2, 3)
    else:
        ordered = x
    ordered = (ordered if paired else ordered.float()).contiguous()
    scale, begins = _scales(w)
    out = torch.empty(m, w.n)
    table = _paired_table(w.kind) if paired else _TABLES.get(w.kind, _NO_TABLE)
    with threads() as t:
        _grouped(
            (_PAIRED if paired else _MARKS)[w.kind], w.codes.data_ptr(), ordered.data_ptr(), scale.data_ptr(), begins, out.data_ptr(),
            w.n, w.k * ordered.element_size(), w.k // step, step // (1 + two), max(1, min(w.columns, w.k) // step),
            scale.shape[-2] * scale.shape[-1] * scale.element_size(), table.ctypes.data, which, sizes, t,
        )  # fmt: skip
    if not two and not paired:
        out *= 256  # see `_e4m3`
    if bias is not None:
        of_rows = bias if experts is None or counts is None else bias[experts].repeat_interleave(counts, 0)
        out += of_rows.float()
    return out.to(x.dtype)


def _pairs(x: Tensor, w: Weight) -> bool:
    """Whether x and codes can be multiplied as pairs of bf16, 64 columns at a time."""
    if x.dtype != torch.bfloat16 or w.k % 64 or not dots.available():
        return False
    whole = w.columns >= w.k or w.columns % 64 == 0
    # Words are looked up of four bits, bytes of e4m3.
    return (whole or w.kind == MXFP4) and compiles_for("avx512bw" if w.kind in _TABLES else "avx512vbmi")


@functools.cache
def _paired_table(kind: int) -> NDArray[np.uint8]:
    """What codes are as bf16: of four bits the sixteen, twice; of e4m3 the upper bytes of the magnitudes, then the lower."""
    if kind in _TABLES:
        values = torch.from_numpy(_TABLES[kind]).bfloat16().view(torch.uint8)
        return torch.cat([values, values]).numpy()
    magnitudes = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).bfloat16()
    return magnitudes.view(torch.uint8).view(128, 2).flip(1).T.contiguous().numpy()


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


def _looked_up_pairs(b: Any, codes: Any, table: Any) -> list[Any]:
    """64 codes of four bits as bf16, the low halves of bytes and the high ones. Of the place the low five bits count, and the table has its values
    twice."""
    low = b.zext(codes, SHORTS)
    high = b.lshr(low, _all(SHORTS, 4))
    of = b.bitcast(table, SHORTS)
    return [b.bitcast(call(b, "llvm.x86.avx512.permvar.hi.512", SHORTS, [of, i]), PAIRS) for i in (low, high)]


def _looked_up_bytes(b: Any, codes: Any, table: Any) -> list[Any]:
    """64 e4m3 codes as bf16: of each sixteen the first eight, and the last eight. Of the place the low seven bits count; the eighth is the
    sign."""
    upper, lower = (
        call(b, "llvm.x86.avx512.vpermi2var.qi.512", BYTES, [table[i], codes, table[i + 1]]) for i in (0, 2)
    )
    upper = b.or_(upper, b.and_(codes, _all(BYTES, 0x80)))
    halves = []
    for first in (0, 8):
        places = [lane * 16 + first + j + 64 * side for lane in range(4) for j in range(8) for side in (0, 1)]
        halves.append(b.bitcast(shuffled(b, lower, upper, places), PAIRS))
    return halves


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


def _values(kind: int, paired: bool) -> Any:
    if paired:
        return _looked_up_pairs if kind in _TABLES else _looked_up_bytes
    if kind in (FP8, FP8_ROWS):
        return _e4m3
    if compiles_for("avx512f"):
        return _looked_up
    return _int4 if kind == INT4 else _e2m1


def _fp32(b: Any, where: Any, index: Any) -> Any:
    """The scale at `index` of a row."""
    return b.load(at(b, where, b.mul(index, number(4)), FLOAT))


def _two_e8m0(b: Any, where: Any, index: Any) -> Any:
    """The scales of two groups, each eight times."""
    two = b.load(at(b, where, b.mul(index, number(2)), ir.VectorType(BYTE, 2)))
    two.align = 1
    words = ir.VectorType(WORD, 2)
    two = b.bitcast(b.shl(b.zext(two, words), _all(words, 23)), ir.VectorType(FLOAT, 2))
    return shuffled(b, two, two, [0] * 8 + [1] * 8)


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
    """The rows row .. row + 3, `last` at most, of codes, each `stride` bytes and as many as `chunks` vectors, times
    one row of x; `group` vectors share a scale, of which each row's begin `begins[row]` bytes behind `scale`."""

    of, paired = _KINDS[kind]
    four_bits = of in _TABLES
    values, vectors = _values(of, paired), 2 if four_bits or paired else 1
    read_as = ir.VectorType(BYTE, (32 if four_bits else 64) if paired else 16)
    x_as = PAIRS if paired else FLOATS

    def code(
        b: Any, codes: Any, stride: Any, row: Any, last: Any, x: Any, scale: Any, begins: Any, chunks: Any, group: Any,
        table: Any, out: Any,
    ) -> None:  # fmt: skip
        which = [or_last(b, row, r, last) for r in range(BLOCK)]
        of_codes = [b.add(codes, b.mul(stride, r)) for r in which]
        of_scales = [b.add(scale, b.load(at(b, begins, b.mul(r, number(8)), ADDRESS))) for r in which]
        looked_up = load(b, at(b, table, 0, FLOATS))
        if paired and not four_bits:
            looked_up = [load(b, at(b, table, 64 * i, BYTES)) for i in range(4)]
        ahead = b.mul(stride, number(BLOCK))
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
        ys = [load(b, at(b, x, b.add(of_x, number(64 * v)), x_as)) for v in range(vectors)]
        added = []
        of_chunk = b.mul(i, number(read_as.count))
        for address, sum in zip(of_codes, sums, strict=True):
            # Rows are too short for a CPU to find out by itself what comes: the same of the rows after these.
            fetch(b, b.add(address, b.add(ahead, of_chunk)), 1)
            read = b.load(at(b, address, of_chunk, read_as))
            read.align = 1
            for value, y in zip(values(b, read, looked_up), ys, strict=True):
                if paired:
                    sum = call(b, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [sum, value, y])
                else:
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
            if of != MXFP4:
                s = everywhere(b, _fp32(b, where, g))
            else:  # of 32 columns: one vector has two
                s = _two_e8m0(b, where, g) if paired else everywhere(b, _e8m0(b, where, g))
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

    return addresses(11, code, kind)  # what codes mean is told by the type of `kind`, which is no number


@compiled(parallel=True)
def _grouped(
    kind,
    codes,
    x,
    scale,
    begins,
    out,
    n,
    x_row,
    chunks,
    chunk,
    group,
    scales_of_one,
    table,
    experts,
    counts,
    threads,
):
    """Each thread computes its share of the results of every group. codes, x, scale, table and out: where they lie; a row of x is
    `x_row` bytes, one of codes `chunks` vectors of `chunk` bytes."""
    stride, step = chunks * chunk, -(-n // (BLOCK * threads)) * BLOCK
    for t in prange(threads):
        first, last, start = t * step, min(n, (t + 1) * step), 0
        for g in range(len(experts)):
            of_codes, of_scales = codes + experts[g] * n * stride, scale + experts[g] * scales_of_one
            for i in range(first, last, BLOCK):
                for row in range(start, start + counts[g]):
                    _block(
                        kind, of_codes, stride, i, last - 1, x + row * x_row, of_scales, begins.ctypes.data, chunks, group, table,
                        out + row * n * 4,
                    )  # fmt: skip
            start += counts[g]
