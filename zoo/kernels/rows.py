"""Products of a few rows on a CPU, where reading the weight is nearly all there is.

Torch reads a weight in bf16 row after row; a core then waits for memory at each. Here eight long rows are read side by
side, and for several rows of x six, each number widened to fp32 in a register. Compiled by numba when first used, and kept in
its cache; without numba torch multiplies (see `zoo.kernels.product`).

Unusual: the compiler may change the order of sums, and fuse a product with its sum, but not assume that numbers are
finite.

Margin, 2048 x 6144 in bf16, against torch's own, 2 cores. An EPYC with AVX2: 1 row 1.2 and 2.0 ms, 2 rows 1.4 and 3.2,
4 rows 2.2 and 5.7, 8 rows 3.5 and 10.5, 16 rows 6.6 and 20.3 (8.2 as `product` widens); one row reads 21 GB/s of the 22
that there are, torch 12. A Xeon with AMX: 1 row 1.0 and 1.9, 2 rows 1.2 and 1.9, 4 rows 1.6 and 1.8, then torch is faster.
fp32 there: 1 to 3 rows the same, 4 rows 2.5 and 3.7, 16 rows 6.0 and 5.2; on the EPYC 2.6 and 3.3, 3.9 and 11.4, 7.8 and
10.4. Rows of 1024, one after the other: 6144 x 1024 16 GB/s, eight side by side 13, torch 12.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from zoo.kernels.compiled import compiled, groups, threads

CODES = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""The dtypes of weights, and how numba, which knows neither of the narrow ones, is told them apart."""
SHORT = 2048  # numbers in a row of the weight, below which rows are read one after the other


def times(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    experts: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """x [M, K] times weight [N, K], transposed, plus bias [N]: [M, N]. Or, of a stack [E, N, K] with bias [E, N]: the first
    `counts[0]` rows of x times the weight of `experts[0]`, and so on (int64 [G]). All of one dtype (see `CODES`), the
    weight contiguous."""
    (m, k), n = x.shape, weight.shape[-2]
    out = torch.empty(m, n)
    stack = weight.detach().view(CODES[weight.dtype]).view(-1, n, k).numpy()
    with threads() as t:
        _grouped(stack, x.float().contiguous().numpy(), *groups(m, experts, counts), out.numpy(), t)
    if bias is not None:
        out += bias if experts is None or counts is None else bias[experts].repeat_interleave(counts, 0)
    return out.to(x.dtype)


@intrinsic
def wide(context: Any, code: Any) -> Any:
    """A weight's number in fp32: of bf16 its upper half."""

    def bf16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        upper = builder.shl(builder.zext(args[0], word), ir.Constant(word, 16))
        return builder.bitcast(upper, ir.FloatType())

    def fp16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    def fp32(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return types.float32(code), {types.uint16: bf16, types.int16: fp16, types.float32: fp32}[code]


@compiled()
def _row(w, x, out, first, last):
    """Of one row of x, the results first .. last."""
    i = first
    while i + 8 <= last and w.shape[1] >= SHORT:
        a = b = c = d = e = f = g = h = np.float32(0)
        for j in range(w.shape[1]):
            y = x[0, j]
            a += wide(w[i, j]) * y
            b += wide(w[i + 1, j]) * y
            c += wide(w[i + 2, j]) * y
            d += wide(w[i + 3, j]) * y
            e += wide(w[i + 4, j]) * y
            f += wide(w[i + 5, j]) * y
            g += wide(w[i + 6, j]) * y
            h += wide(w[i + 7, j]) * y
        out[0, i], out[0, i + 1], out[0, i + 2], out[0, i + 3] = a, b, c, d
        out[0, i + 4], out[0, i + 5], out[0, i + 6], out[0, i + 7] = e, f, g, h
        i += 8
    while i < last:
        a = np.float32(0)
        for j in range(w.shape[1]):
            a += wide(w[i, j]) * x[0, j]
        out[0, i] = a
        i += 1


@compiled()
def _rows(w, x, out, first, last):
    """Of a few rows of x, the results first .. last: six by two at a time. What is over is computed again."""
    m, end = x.shape[0], last - 1
    for i in range(first, last, 6):
        i1, i2, i3 = min(i + 1, end), min(i + 2, end), min(i + 3, end)
        i4, i5 = min(i + 4, end), min(i + 5, end)
        for m0 in range(0, m, 2):
            m1 = min(m0 + 1, m - 1)
            a0 = b0 = c0 = d0 = e0 = f0 = a1 = b1 = c1 = d1 = e1 = f1 = np.float32(0)
            for j in range(w.shape[1]):
                y0, y1 = x[m0, j], x[m1, j]
                a, b, c = wide(w[i, j]), wide(w[i1, j]), wide(w[i2, j])
                d, e, f = wide(w[i3, j]), wide(w[i4, j]), wide(w[i5, j])
                a0 += a * y0
                b0 += b * y0
                c0 += c * y0
                d0 += d * y0
                e0 += e * y0
                f0 += f * y0
                a1 += a * y1
                b1 += b * y1
                c1 += c * y1
                d1 += d * y1
                e1 += e * y1
                f1 += f * y1
            out[m0, i], out[m0, i1], out[m0, i2] = a0, b0, c0
            out[m0, i3], out[m0, i4], out[m0, i5] = d0, e0, f0
            out[m1, i], out[m1, i1], out[m1, i2] = a1, b1, c1
            out[m1, i3], out[m1, i4], out[m1, i5] = d1, e1, f1


@compiled(parallel=True)
def _grouped(w, x, experts, counts, out, threads):
    """Each thread computes its share of the results of every group."""
    n = w.shape[1]
    step = -(-n // (8 * threads)) * 8
    for t in prange(threads):
        first, last, start = t * step, min(n, (t + 1) * step), 0
        for g in range(len(experts)):
            end = start + counts[g]
            if counts[g] == 1:
                _row(w[experts[g]], x[start:end], out[start:end], first, last)
            else:
                _rows(w[experts[g]], x[start:end], out[start:end], first, last)
            start = end
