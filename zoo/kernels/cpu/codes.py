"""Tensors in numba, which knows neither bf16 nor fp16: it is told where they lie and takes their numbers for integers, which
these widen and narrow.

Unusual: addresses, where numba would take arrays. A product of one row leaves nothing but its weight in the caches, and a
line of Python between two of them takes microseconds: making arrays of tensors 50 to 80 us of a product's 400.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

CODE = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0), torch.float16: np.int16(0)}
"""The dtypes of tensors, and one of what numba takes for their numbers."""
WORD, FLOAT = ir.IntType(32), ir.FloatType()


def address(x: Tensor | None) -> int:
    """Where a tensor lies; zero if there is none."""
    return 0 if x is None else x.data_ptr()


def bits(x: float) -> int:
    """An fp32 number as the integer of its bits: see `number`."""
    return int(np.float32(x).view(np.int32))


def rows_of(x: Tensor) -> NDArray[np.int64]:
    """Where each row of D numbers, side by side, of x [.., D] begins."""
    starts = np.zeros(1, np.int64)
    for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        starts = (starts[:, None] + np.arange(n) * s).ravel()
    return starts


@intrinsic
def _pointer(context: Any, address: Any, first: Any, code: Any) -> Any:
    def cast(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to_code = context.get_value_type(types.CPointer(code))
        return builder.gep(
            builder.inttoptr(args[0], to_code), [args[1]], source_etype=context.get_value_type(code)
        )

    return types.CPointer(code)(types.intp, types.intp, code), cast


@njit(inline="always")
def numbers(address, first, shape, code):
    """An array of what lies at a tensor's `data_ptr()`, from its number `first` on, of the kind of `code`."""
    return carray(_pointer(address, first, code), shape)


@intrinsic
def number(context: Any, bits: Any) -> Any:
    """The fp32 number of these bits."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], WORD), FLOAT)

    return types.float32(types.intp), code


@intrinsic
def wide(context: Any, code: Any) -> Any:
    """A number in fp32: of bf16 its upper half."""

    def bf16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        upper = builder.shl(builder.zext(args[0], WORD), ir.Constant(WORD, 16))
        return builder.bitcast(upper, FLOAT)

    def fp16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), FLOAT)

    def fp32(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return types.float32(code), {types.uint16: bf16, types.int16: fp16, types.float32: fp32}[code]


@intrinsic
def narrow(context: Any, number: Any, like: Any) -> Any:
    """An fp32 number, rounded to nearest, ties to even, to what `like` is a number of."""

    def bf16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], WORD)
        upper = builder.lshr(bits, ir.Constant(WORD, 16))
        even = builder.and_(upper, ir.Constant(WORD, 1))
        rounded = builder.add(bits, builder.add(even, ir.Constant(WORD, 0x7FFF)))
        rounded = builder.lshr(rounded, ir.Constant(WORD, 16))
        nan = builder.fcmp_unordered("uno", args[0], args[0])  # rounded, one could become infinite
        rounded = builder.select(nan, ir.Constant(WORD, 0x7FC0), rounded)
        return builder.trunc(rounded, ir.IntType(16))

    def fp16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    def fp32(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return like(types.float32, like), {types.uint16: bf16, types.int16: fp16, types.float32: fp32}[like]
