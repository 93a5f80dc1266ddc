"""Vectors of 512 bits in what numba compiles: how intrinsics load, store, shuffle and round them.

All take LLVM's builder first, and addresses as integers (see `zoo.kernels.cpu.codes`); nothing need be aligned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import types


class _BFloat(ir.Type):  # type: ignore[misc]  # which llvmlite does not have
    def _to_string(self) -> str:
        return "bfloat"


BYTE, HALF, WORD, ADDRESS = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT, BFLOAT = ir.FloatType(), _BFloat()
WORDS, FLOATS, BFLOATS, HALVES = (ir.VectorType(t, 16) for t in (WORD, FLOAT, BFLOAT, HALF))
PAIRS = ir.VectorType(BFLOAT, 32)


def addresses(n: int, code: Callable[..., None], *marks: Any) -> tuple[Any, Callable[..., Any]]:
    """What a numba intrinsic of `n` addresses or integers returns, which is nothing, when `code(builder, *args)` writes it. Before
    them are arguments of the types `marks`, which tell kinds apart by type alone."""

    def write(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code(builder, *args[len(marks) :])
        return context.get_dummy_value()

    return types.void(*marks, *[types.intp] * n), write


def number(i: int) -> Any:
    return ir.Constant(ADDRESS, i)


def at(builder: Any, address: Any, offset: Any, type: Any = BYTE) -> Any:
    """A pointer to what lies `offset` bytes behind an address."""
    offset = number(offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, offset), type.as_pointer())


def load(builder: Any, where: Any) -> Any:
    value = builder.load(where)
    value.align = 2
    return value


def store(builder: Any, value: Any, where: Any) -> None:
    builder.store(value, where).align = 2


def or_last(builder: Any, row: Any, i: Any, last: Any) -> Any:
    """row + i, or the last row."""
    row = builder.add(row, number(i) if isinstance(i, int) else i)
    return builder.select(builder.icmp_signed("<", row, last), row, last)


def row_of(builder: Any, x: Any, stride: Any, tokens: Any, row: Any) -> Any:
    """The address of the row tokens[row] of x, whose rows are `stride` bytes apart."""
    token = builder.load(at(builder, tokens, builder.mul(row, number(8)), ADDRESS))
    return builder.add(x, builder.mul(token, stride))


def shuffled(builder: Any, a: Any, b: Any, lanes: Sequence[int]) -> Any:
    """The numbers of a and b side by side at `lanes`."""
    mask = ir.Constant(ir.VectorType(WORD, len(lanes)), [ir.Constant(WORD, i) for i in lanes])
    return builder.shuffle_vector(a, b, mask)


def everywhere(builder: Any, value: Any) -> Any:
    """16 times a number of fp32."""
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(WORD, 0))
    return shuffled(builder, one, one, [0] * 16)


def rounded(builder: Any, y: Any) -> Any:
    """16 numbers of fp32 as those of bf16 next to them."""
    return builder.bitcast(builder.fptrunc(y, BFLOATS), HALVES)


def call(builder: Any, name: str, result: Any, args: Sequence[Any]) -> Any:
    """What LLVM's `name` returns, which is no method of the builder."""
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def fetch(builder: Any, address: Any, lines: int) -> None:
    """Has `lines` lines of 64 bytes brought into the second cache, from an address on."""
    pointer = BYTE.as_pointer()
    prefetch = builder.module.declare_intrinsic(
        "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, WORD, WORD, WORD])
    )
    read, second_cache, data = (ir.Constant(WORD, i) for i in (0, 2, 1))
    for line in range(lines):
        builder.call(prefetch, (at(builder, address, 64 * line), read, second_cache, data))


def loop(
    builder: Any, first: Any, end: Any, step: Any, initial: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]]
) -> list[Any]:  # fmt: skip
    """body(i, values) for i = first, first + step, ... below `end`: what it returns are the values of the next, those of the first are
    `initial`. The last values."""
    before = builder.block
    head, inside, after = (builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    phis = [builder.phi(v.type) for v in (first, *initial)]
    i, *values = phis
    builder.cbranch(builder.icmp_signed("<", i, end), inside, after)
    builder.position_at_end(inside)
    following = [None, *body(i, values)]
    following[0] = builder.add(i, step)
    for phi, start, then in zip(phis, (first, *initial), following, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(then, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values
