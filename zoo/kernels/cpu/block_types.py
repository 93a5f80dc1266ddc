"""ggml's blocks in a CPU's registers: what each type's bytes are, as vectors of sixteen numbers of fp32.

A code of four bits is the place of its value in a table of sixteen, which one instruction of AVX-512 looks up (elsewhere it is computed).
Of the types with 256 columns to a block, words of eight codes are only shifted, not taken apart: then a vector has every fourth column,
and x is put into the same order (`Kind.order`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from zoo.kernels.cpu import compiles_for
from zoo.kernels.cpu.vectors import BYTE, FLOAT, FLOATS, WORD, WORDS, at, call, everywhere, load, shuffled

_HALF = ir.HalfType()
_SIXTEEN = ir.VectorType(BYTE, 16)
_MASK = ir.VectorType(ir.IntType(1), 16)


class Group(NamedTuple):
    """Some columns of a block: `codes` times `scale` (and `least` more, where there is such): vectors. They are those from the
    `first` vector of x on."""

    first: int
    codes: list[Any]
    scale: Any
    least: Any = None


class Kind(NamedTuple):
    """A type. `begin(b, row)`: what all groups of the block at the address `row` need. `groups(b, row, begun, least)`: these; `least`:
    whether they are to have theirs. `moved(b, row, begun, sums, total)`: total plus all that groups are moved by, times the sums of x at
    the address `sums`; None where they are not. `order`: which column of a block is the i-th of x. `sums`: numbers of sums for a block.
    `middle`: what codes that are moved are taken less, unless they are to have theirs: then what a group is moved by is small, too, and
    nothing is lost where the two meet."""

    type: str
    begin: Callable[..., Any]
    groups: Callable[..., Iterator[Group]]
    moved: Callable[..., Any] | None
    order: tuple[int, ...]
    sums: int
    middle: float = 0.0


def fma(b: Any, x: Any, y: Any, total: Any) -> Any:
    return b.fadd(total, b.fmul(x, y, flags=("contract",)), flags=("contract",))


def _read(b: Any, address: Any, offset: int, type: Any) -> Any:
    value = b.load(at(b, address, offset, type))
    value.align = 1
    return value


def _constant(type: Any, values: Sequence[Any]) -> Any:
    return ir.Constant(type, [ir.Constant(type.element, v) for v in values])


def _all(type: Any, value: Any) -> Any:
    return _constant(type, [value] * type.count)


def _half(b: Any, address: Any, offset: int) -> Any:
    """16 times the fp16 at a byte, in fp32."""
    return everywhere(b, b.fpext(_read(b, address, offset, _HALF), FLOAT))


def _shifted(b: Any, words: Any, by: int) -> Any:
    return b.lshr(words, _all(WORDS, by)) if by else words


def _looked_up(b: Any, words: Any, first: float, step: float = 1.0, bits: int = 4) -> Any:
    """first + step times the low `bits` (at most four) of each word, in fp32."""
    if compiles_for("avx512f"):
        table = _constant(FLOATS, [first + step * (i % (1 << bits)) for i in range(16)])
        return call(b, "llvm.x86.avx512.permvar.sf.512", FLOATS, [table, words])
    number = b.sitofp(b.and_(words, _all(WORDS, (1 << bits) - 1)), FLOATS)
    number = number if step == 1.0 else b.fmul(number, _all(FLOATS, step))
    return b.fadd(number, _all(FLOATS, first)) if first else number


def _with_fifth(b: Any, value: Any, bit: Any) -> Any:
    """16 more where a bit is set."""
    return b.select(bit, b.fadd(value, _all(FLOATS, 16.0)), value)


def _nothing(b: Any, row: Any) -> None:
    return None


def _q8_0(b: Any, row: Any, begun: Any, least: bool) -> Iterator[Group]:
    codes = [b.sitofp(b.sext(_read(b, row, 2 + 16 * i, _SIXTEEN), WORDS), FLOATS) for i in (0, 1)]
    yield Group(0, codes, _half(b, row, 0))


def _small(type: str, first: float, offset: int, fifth: int = 0, moved: int = 0) -> Kind:
    """A type of 32 codes, the least of value `first`, whose bytes are from `offset` on, fifth bits from `fifth` on, and what is added, in
    fp16, from `moved` on (0: no such)."""
    middle = (16.0 if fifth else 8.0) if moved else 0.0

    def groups(b: Any, row: Any, begun: Any, least: bool) -> Iterator[Group]:
        words = b.zext(_read(b, row, offset, _SIXTEEN), WORDS)
        codes = [_looked_up(b, _shifted(b, words, 4 * i), first - (0 if least else middle)) for i in (0, 1)]
        if fifth:
            bits = _read(b, row, fifth, WORD)
            of_each = [b.trunc(x, ir.IntType(16)) for x in (bits, b.lshr(bits, ir.Constant(WORD, 16)))]
            codes = [_with_fifth(b, c, b.bitcast(m, _MASK)) for c, m in zip(codes, of_each, strict=True)]
        yield Group(0, codes, _half(b, row, 0), _half(b, row, moved) if moved and least else None)

    def plus_moved(b: Any, row: Any, begun: Any, sums: Any, total: Any) -> Any:
        by = fma(b, _half(b, row, 0), _all(FLOATS, middle), _half(b, row, moved))
        return fma(b, by, everywhere(b, b.load(at(b, sums, 0, FLOAT))), total)

    return Kind(
        type, _nothing, groups, plus_moved if moved else None, tuple(range(32)), int(bool(moved)), middle
    )


def _six_bits(b: Any, row: Any) -> Any:
    """Of a block of 256: d times its 8 scales, then e times its 8 mins, less than 0."""
    four = ir.VectorType(WORD, 4)
    read = _read(b, row, 0, four)  # d and e, then the 12 bytes
    low = b.lshr(shuffled(b, read, read, [1, 3, 2, 3]), _constant(four, [0, 0, 0, 4]))
    low = b.and_(low, _constant(four, [0x3F3F3F3F, 0x0F0F0F0F, 0x3F3F3F3F, 0x0F0F0F0F]))
    high = b.lshr(shuffled(b, read, read, [1, 1, 2, 2]), _all(four, 2))
    high = b.and_(high, _constant(four, [0, 0x30303030, 0, 0x30303030]))
    factors = b.sitofp(b.zext(b.bitcast(b.or_(low, high), _SIXTEEN), WORDS), FLOATS)
    two = b.fpext(_read(b, row, 0, ir.VectorType(_HALF, 2)), ir.VectorType(FLOAT, 2))
    two = b.fmul(two, _constant(ir.VectorType(FLOAT, 2), [1.0, -1.0]))
    return b.fmul(factors, shuffled(b, two, two, [0] * 8 + [1] * 8))


def _twice(b: Any, row: Any, offset: int) -> Any:
    """The 32 bytes there, twice, as words."""
    eight = _read(b, row, offset, ir.VectorType(WORD, 8))
    return shuffled(b, eight, eight, [*range(8)] * 2)


def _large(type: str, offset: int, fifth: int = 0) -> Kind:
    """Q4_K and Q5_K: codes from `offset` on, fifth bits from `fifth` on (0: none)."""
    middle = 16.0 if fifth else 8.0

    def groups(b: Any, row: Any, begun: Any, least: bool) -> Iterator[Group]:
        bits = _twice(b, row, fifth) if fifth else None
        for piece in (0, 1):
            words = _read(b, row, offset + 64 * piece, WORDS)
            for side in (0, 1):
                group = [4 * piece + 2 * (j // 8) + side for j in range(16)]
                first = 0.0 if least else -middle
                codes = [_looked_up(b, _shifted(b, words, 8 * r + 4 * side), first) for r in range(4)]
                if fifth:
                    masks = [_constant(WORDS, [1 << (8 * r + g) for g in group]) for r in range(4)]
                    there = [b.icmp_unsigned("!=", b.and_(bits, m), _all(WORDS, 0)) for m in masks]
                    codes = [_with_fifth(b, c, t) for c, t in zip(codes, there, strict=True)]
                by = shuffled(b, begun, begun, [8 + g for g in group]) if least else None
                yield Group(8 * piece + 4 * side, codes, shuffled(b, begun, begun, group), by)

    def plus_moved(b: Any, row: Any, begun: Any, sums: Any, total: Any) -> Any:
        return fma(b, begun, load(b, at(b, sums, 0, FLOATS)), total)

    order = (
        64 * (2 * piece + j // 8) + 32 * side + 4 * (j % 8) + r
        for piece in (0, 1) for side in (0, 1) for r in range(4) for j in range(16)
    )  # fmt: skip
    return Kind(type, _six_bits, groups, plus_moved, tuple(order), 16, middle)


def _sixteen_scales(b: Any, row: Any) -> Any:
    scales = b.sitofp(b.sext(_read(b, row, 192, _SIXTEEN), WORDS), FLOATS)
    return b.fmul(scales, _half(b, row, 208))


def _q6_k(b: Any, row: Any, begun: Any, least: bool) -> Iterator[Group]:
    for piece in (0, 1):
        words, upper = _read(b, row, 64 * piece, WORDS), _twice(b, row, 128 + 32 * piece)
        for side in (0, 1):
            codes = []
            for r in range(4):
                by = _constant(WORDS, [8 * r + 4 * side + 2 * (j // 8) for j in range(16)])
                two = _looked_up(b, b.lshr(upper, by), -32.0, 16.0, bits=2)
                codes.append(b.fadd(_looked_up(b, _shifted(b, words, 8 * r + 4 * side), 0.0), two))
            group = [8 * piece + 4 * side + j // 4 for j in range(16)]
            yield Group(8 * piece + 4 * side, codes, shuffled(b, begun, begun, group))


_SIXES = tuple(
    128 * piece + 64 * side + 4 * j + r
    for piece in (0, 1) for side in (0, 1) for r in range(4) for j in range(16)
)  # fmt: skip
KINDS = (
    Kind("q8_0", _nothing, _q8_0, None, tuple(range(32)), 0),
    _small("q4_0", -8.0, 2),
    _small("q4_1", 0.0, 4, moved=2),
    _small("q5_0", -16.0, 6, fifth=2),
    _small("q5_1", 0.0, 8, fifth=4, moved=2),
    _large("q4_k", 16),
    _large("q5_k", 48, fifth=16),
    Kind("q6_k", _sixteen_scales, _q6_k, None, _SIXES, 0),
)
NAMES = [kind.type for kind in KINDS]
