"""The exponential of many numbers at a time in what numba compiles, which of libm has one at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from zoo.kernels.cpu.vectors import FLOAT, WORD


@intrinsic
def exp(context: Any, x: Any) -> Any:
    """e^x in fp32 for x <= 0, within 1.4 half units of the last place, and the least normal number for what is less (the polynomial of
    Cephes). Where sums may change their order it is wrong: what is added here to be subtracted again would not be."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        def of(value: float) -> Any:
            return ir.Constant(FLOAT, value)

        least, (x,) = of(float(np.float32(-87.33654))), args
        x = b.select(b.fcmp_ordered("<", x, least), least, x)
        shifted = b.fadd(
            b.fmul(x, of(float(np.float32(1.44269504)))), of(12582912.0)
        )  # 1.5 * 2^23: a whole number is left
        n = b.fsub(shifted, of(12582912.0))
        r = b.fsub(x, b.fmul(n, of(0.693359375)))
        r = b.fadd(r, b.fmul(n, of(float(np.float32(2.12194440e-4)))))
        y = of(float(np.float32(1.9875691500e-4)))
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            y = b.fadd(b.fmul(y, r), of(float(np.float32(c))))
        y = b.fadd(b.fadd(b.fmul(y, b.fmul(r, r)), r), of(1.0))
        power = b.sub(b.bitcast(shifted, WORD), ir.Constant(WORD, 0x4B400000 - 127))
        return b.fmul(y, b.bitcast(b.shl(power, ir.Constant(WORD, 23)), FLOAT))

    return types.float32(types.float32), code
