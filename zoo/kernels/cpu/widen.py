"""Codes and scales in a CPU's registers: from what is stored to numbers of fp32, or to pairs of bf16.

Here is what each `Form` of `zoo.kernels.cpu.carried` means: `chunk` reads some columns of all rows that are taken at a time, and gives
of each row vectors that go with those of x, whose order is `order`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numpy.typing import NDArray

from zoo.kernels.cpu import compiles_for
from zoo.kernels.cpu.carried import FOUR_BITS, Form
from zoo.kernels.cpu.vectors import (
    BYTE,
    FLOAT,
    FLOATS,
    HALF,
    HALVES,
    PAIRS,
    WORD,
    WORDS,
    at,
    call,
    everywhere,
    load,
    number,
    shuffled,
)
from zoo.quant.awq import SHIFTS
from zoo.quant.fp4 import VALUES

BYTES, SHORTS = ir.VectorType(BYTE, 64), ir.VectorType(HALF, 32)
HALF_FLOATS = ir.VectorType(ir.HalfType(), 16)
_LESS_8 = np.arange(-8, 8, dtype=np.float32)
_TABLES = {Form.E2M1: np.array(VALUES, np.float32), Form.INT4: _LESS_8, Form.ROWS4: _LESS_8}

SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn)
"""Dtypes of scales; bytes are exponents (e8m0)."""
F32, BF16, F16, E8M0, E4M3 = range(5)
SIZES = (4, 2, 2, 1, 1)
"""And how many bytes they have."""


def columns(form: Form, paired: bool) -> int:
    """Columns of a chunk."""
    if form == Form.ROWS4:
        return 32 if paired else 16
    return 64 if paired else 32 if form in FOUR_BITS else 16


def order(form: Form, paired: bool) -> tuple[int, int, int]:
    """The columns of a chunk, [A, B, C], as those of x are to lie that it is multiplied by: [B, A, C]."""
    if form in FOUR_BITS:  # the low halves of bytes, then the high ones
        return columns(form, paired) // 2, 2, 1
    if not paired:
        return 1, 1, columns(form, paired)
    # Words of two sixteens of columns become one; bytes are as `_of_tables` gives them.
    return (2, 16, 1) if form == Form.ROWS4 else (4, 2, 8)


@functools.cache
def table(form: Form, paired: bool) -> NDArray[np.generic]:
    """What is looked up of codes. As bf16: of four bits the sixteen, twice; of eight the upper bytes of the magnitudes, then the
    lower."""
    if not paired:
        return _TABLES.get(form, np.zeros(16, np.float32))
    if form in _TABLES:
        values = torch.from_numpy(_TABLES[form]).bfloat16().view(torch.uint8)
        return torch.cat([values, values]).numpy()
    magnitudes = torch.arange(128, dtype=torch.uint8)
    if form == Form.E4M3:
        values = magnitudes.view(torch.float8_e4m3fn).bfloat16()
    else:
        values = (magnitudes + 0.5).bfloat16()
    return values.view(torch.uint8).view(128, 2).flip(1).T.contiguous().numpy()


def looked_up(b: Any, form: Form, paired: bool, where: Any) -> Any:
    """The table, in registers."""
    if paired and form not in _TABLES:
        return [load(b, at(b, where, 64 * i, BYTES)) for i in range(4)]
    return load(b, at(b, where, 0, FLOATS))


def chunk(
    b: Any, form: Form, paired: bool, of_rows: Sequence[Any], offset: Any, table: Any
) -> list[list[Any]]:
    """The chunk of each row that lies `offset` bytes behind where its codes begin."""
    if form == Form.ROWS4:
        return _rows4(b, paired, of_rows[0], offset, table)
    read_as = ir.VectorType(BYTE, columns(form, paired) // (2 if form in FOUR_BITS else 1))
    widened = (
        _paired[form]
        if paired
        else _by_table
        if form in FOUR_BITS and compiles_for("avx512f")
        else _wide[form]
    )
    out = []
    for row in of_rows:
        codes = b.load(at(b, row, offset, read_as))
        codes.align = 1
        out.append(widened(b, codes, table))
    return out


def chunk_bytes(form: Form, paired: bool) -> int:
    n = columns(form, paired)
    return n * 4 if form == Form.ROWS4 else n // 2 if form in FOUR_BITS else n


def _all(type: Any, value: int | float) -> Any:
    return ir.Constant(type, [ir.Constant(type.element, value)] * type.count)


# ------------------------------------------------------------------------------ codes to pairs of bf16


def _pairs_by_table(b: Any, codes: Any, table: Any) -> list[Any]:
    """64 codes of four bits, the low halves of bytes and the high ones. Of the place the low five bits count, and the table has its values
    twice."""
    low = b.zext(codes, SHORTS)
    return [_looked_up_pairs(b, i, table) for i in (low, b.lshr(low, _all(SHORTS, 4)))]


def _looked_up_pairs(b: Any, places: Any, table: Any) -> Any:
    return b.bitcast(
        call(b, "llvm.x86.avx512.permvar.hi.512", SHORTS, [b.bitcast(table, SHORTS), places]), PAIRS
    )


def _of_tables(b: Any, codes: Any, signs: Any, table: Any) -> list[Any]:
    """64 numbers: of each sixteen the first eight, and the last eight. Of the place the low seven bits count; of `signs` the eighth."""
    upper, lower = (
        call(b, "llvm.x86.avx512.vpermi2var.qi.512", BYTES, [table[i], codes, table[i + 1]]) for i in (0, 2)
    )
    upper = b.or_(upper, b.and_(signs, _all(BYTES, 0x80)))
    halves = []
    for first in (0, 8):
        places = [lane * 16 + first + j + 64 * side for lane in range(4) for j in range(8) for side in (0, 1)]
        halves.append(b.bitcast(shuffled(b, lower, upper, places), PAIRS))
    return halves


def _pairs_e4m3(b: Any, codes: Any, table: Any) -> list[Any]:
    return _of_tables(b, codes, codes, table)


def _pairs_int8(b: Any, codes: Any, table: Any) -> list[Any]:
    """c + 1/2: the magnitude of c and of -1 - c, which has all its bits turned, is that of the one which is not negative."""
    other = b.xor(codes, _all(BYTES, 0xFF))
    return _of_tables(b, b.select(b.icmp_signed(">", codes, other), codes, other), codes, table)


def _pairs_uint8(b: Any, codes: Any, table: Any) -> list[Any]:
    return _pairs_int8(b, b.xor(codes, _all(BYTES, 0x80)), table)


# --------------------------------------------------------------------------- codes to numbers of fp32


def _e4m3(b: Any, codes: Any, table: Any) -> list[Any]:
    """1/256 of the values: sign, exponent and fraction where fp16 has them, whose bias is 15 and not 7."""
    bits = b.and_(b.shl(b.sext(codes, HALVES), _all(HALVES, 7)), _all(HALVES, 0xBFFF))
    return [b.fpext(b.bitcast(bits, HALF_FLOATS), FLOATS)]


def _int8(b: Any, codes: Any, table: Any) -> list[Any]:
    return [b.fadd(b.sitofp(b.sext(codes, WORDS), FLOATS), _all(FLOATS, 0.5))]


def _uint8(b: Any, codes: Any, table: Any) -> list[Any]:
    return [b.fadd(b.sitofp(b.zext(codes, WORDS), FLOATS), _all(FLOATS, -127.5))]


def _by_table(b: Any, codes: Any, table: Any) -> list[Any]:
    """The values of the low and of the high halves; of the place only the low four bits count."""
    low = b.zext(codes, WORDS)
    return [_looked_up(b, i, table) for i in (low, b.lshr(low, _all(WORDS, 4)))]


def _looked_up(b: Any, places: Any, table: Any) -> Any:
    return call(b, "llvm.x86.avx512.permvar.sf.512", FLOATS, [table, places])


def _less_8(b: Any, codes: Any) -> Any:
    return b.sitofp(b.sub(b.and_(codes, _all(WORDS, 15)), _all(WORDS, 8)), FLOATS)


def _int4(b: Any, codes: Any, table: Any) -> list[Any]:
    low = b.zext(codes, WORDS)
    return [_less_8(b, i) for i in (low, b.lshr(low, _all(WORDS, 4)))]


def _e2m1(b: Any, codes: Any, table: Any) -> list[Any]:
    """Sign, exponent and fraction where fp16 has them, whose bias is 15 and not 1."""
    low = b.zext(codes, HALVES)
    out = []
    for i in (low, b.lshr(low, _all(HALVES, 4))):
        rest = b.shl(b.and_(i, _all(HALVES, 7)), _all(HALVES, 9))
        bits = b.or_(rest, b.shl(b.and_(i, _all(HALVES, 8)), _all(HALVES, 12)))
        out.append(b.fmul(b.fpext(b.bitcast(bits, HALF_FLOATS), FLOATS), _all(FLOATS, 2.0**14)))
    return out


_wide = {Form.E4M3: _e4m3, Form.INT8: _int8, Form.UINT8: _uint8, Form.INT4: _int4, Form.E2M1: _e2m1}
_paired = {
    Form.E4M3: _pairs_e4m3, Form.INT8: _pairs_int8, Form.UINT8: _pairs_uint8, Form.INT4: _pairs_by_table,
    Form.E2M1: _pairs_by_table,
}  # fmt: skip


def _rows4(b: Any, paired: bool, words: Any, offset: Any, table: Any) -> list[list[Any]]:
    """Of eight rows, whose codes a word has of one column. Words of two columns are put together as halves are looked up."""
    first = load(b, at(b, words, offset, WORDS))
    if not paired:
        by_table = compiles_for("avx512f")
        each = [b.lshr(first, _all(WORDS, shift)) for shift in SHIFTS]
        return [[_looked_up(b, i, table) if by_table else _less_8(b, i)] for i in each]
    second = load(b, at(b, words, b.add(offset, number(64)), WORDS))
    half = _all(WORDS, 16)
    low = b.or_(b.and_(first, _all(WORDS, 0xFFFF)), b.shl(second, half))
    high = b.or_(b.lshr(first, half), b.and_(second, _all(WORDS, 0xFFFF0000)))
    low, high = (b.bitcast(i, SHORTS) for i in (low, high))
    return [
        [_looked_up_pairs(b, b.lshr(high if shift >= 16 else low, _all(SHORTS, shift % 16)), table)]
        for shift in SHIFTS
    ]


# ---------------------------------------------------------------------------------------------- scales


def scale(b: Any, dtype: int, where: Any, index: Any) -> Any:
    """The scale at `index` of a row, in fp32 (e4m3: 1/256 of it)."""
    read_as = (FLOAT, HALF, ir.HalfType(), BYTE, BYTE)[dtype]
    s = b.load(at(b, where, b.mul(index, number(SIZES[dtype])), read_as))
    if dtype == F32:
        return s
    if dtype == F16:
        return b.fpext(s, FLOAT)
    if dtype == E4M3:
        bits = b.and_(b.shl(b.sext(s, HALF), ir.Constant(HALF, 7)), ir.Constant(HALF, 0xBFFF))
        return b.fpext(b.bitcast(bits, ir.HalfType()), FLOAT)
    # Bytes are exponents in fp32; 2^-127, which it has no exponent for, is 0.
    return b.bitcast(b.shl(b.zext(s, WORD), ir.Constant(WORD, 16 if dtype == BF16 else 23)), FLOAT)


def scales(b: Any, dtype: int, where: Any, index: Any) -> Any:
    """16 scales from `index` on."""
    read_as = (FLOATS, HALVES, HALF_FLOATS)[dtype]
    s = b.load(at(b, where, b.mul(index, number(SIZES[dtype])), read_as))
    s.align = 1
    if dtype == F32:
        return s
    return b.fpext(s, FLOATS) if dtype == F16 else b.bitcast(b.shl(b.zext(s, WORDS), _all(WORDS, 16)), FLOATS)


def spread(b: Any, dtype: int, each: int, where: Any, chunk: Any) -> Any:
    """The `each` scales (1, 2 or 4) of a chunk, every one in as many lanes: bytes are shuffled to where fp32, or fp16, has them."""
    if each == 1:
        return everywhere(b, scale(b, dtype, where, chunk))
    size = SIZES[dtype]
    bits = ir.IntType(8 * size * each)
    read = b.load(at(b, where, b.mul(chunk, number(size * each)), bits))
    read.align = 1
    lanes = [lane * each // 16 for lane in range(16)]
    if dtype == F32:
        few = b.bitcast(read, ir.VectorType(FLOAT, each))
        return shuffled(b, few, few, lanes)
    wide = 2 if dtype in (F16, E4M3) else 4  # bytes of a lane
    whole = _repeated(b, read, 16 * wide)
    first = wide - size if dtype != E8M0 else 2
    places = []
    for lane, j in enumerate(lanes):
        own = (
            lane * wide
        ) // 16 * 16 + j * size  # in its own 16 bytes, beyond which bytes are not shuffled at once
        places += [own + i - first if first <= i < first + size else 16 * wide for i in range(wide)]
    spread = shuffled(b, whole, ir.Constant(whole.type, None), places)
    if wide == 2:
        spread = b.bitcast(spread, HALVES)
        if dtype == E4M3:
            spread = b.and_(b.ashr(spread, _all(HALVES, 1)), _all(HALVES, 0xBFFF))
        return b.fpext(b.bitcast(spread, HALF_FLOATS), FLOATS)
    spread = b.bitcast(spread, WORDS)
    return b.bitcast(b.shl(spread, _all(WORDS, 7)) if dtype == E8M0 else spread, FLOATS)


def _repeated(b: Any, value: Any, size: int) -> Any:
    """`size` bytes: the value's, again and again."""
    n = size * 8 // value.type.width
    one = b.insert_element(
        ir.Constant(ir.VectorType(value.type, n), ir.Undefined), value, ir.Constant(WORD, 0)
    )
    return b.bitcast(shuffled(b, one, one, [0] * n), ir.VectorType(BYTE, size))


def halves(b: Any, where: Any, index: Any, n: int) -> Any:
    """One or 16 numbers of fp16 from `index` on, in fp32."""
    read_as = ir.HalfType() if n == 1 else HALF_FLOATS
    s = b.load(at(b, where, b.mul(index, number(2)), read_as))
    s.align = 1
    return b.fpext(s, FLOAT if n == 1 else FLOATS)


def broadcast(b: Any, value: float, n: int) -> Any:
    """A constant, once or 16 times."""
    return ir.Constant(FLOAT, value) if n == 1 else everywhere(b, value)
