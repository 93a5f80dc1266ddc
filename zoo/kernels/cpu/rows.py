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

import numpy as np
import torch
from numba import prange
from torch import Tensor

from zoo.kernels.cpu import compiled, grouped, threads
from zoo.kernels.cpu.codes import CODE, address, narrow, numbers, wide
from zoo.system.scratch import scratch

SHORT = 2048  # numbers in a row of the weight, below which rows are read one after the other


def times(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    experts: Tensor | None = None,
    counts: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """x [M, K] times weight [N, K], transposed, plus bias [N]: [M, N]. Or, of a stack [E, N, K] with bias [E, N]: the first
    `counts[0]` rows of x times the weight of `experts[0]`, and so on (int64 [G]); the rows x[tokens] (int64) in place of x, where
    given. All of one dtype (see `zoo.kernels.cpu.codes`), the weight contiguous."""
    x = x if tokens is None else x[tokens]
    (m, k), n = x.shape, weight.shape[-2]
    which, sizes = grouped(experts, counts, m)
    x = x if x.is_contiguous() else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty(m, n, dtype=x.dtype)
    with threads() as t:
        _grouped(
            weight.data_ptr(), x.data_ptr(), address(bias), out.data_ptr(), CODE[x.dtype],
            scratch("wide x", (m, k), np.float32), n, which, sizes, t,
        )  # fmt: skip
    return out


@compiled()
def _put(out, bias, m, i, y):
    out[m, i] = narrow(y + wide(bias[i]) if len(bias) else y, out[m, i])


@compiled()
def _row(w, x, bias, out, first, last):
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
        for j, y in enumerate((a, b, c, d, e, f, g, h)):
            _put(out, bias, 0, i + j, y)
        i += 8
    while i < last:
        a = np.float32(0)
        for j in range(w.shape[1]):
            a += wide(w[i, j]) * x[0, j]
        _put(out, bias, 0, i, a)
        i += 1


@compiled()
def _rows(w, x, bias, out, first, last):
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
            for j, y0, y1 in (
                (i, a0, a1),
                (i1, b0, b1),
                (i2, c0, c1),
                (i3, d0, d1),
                (i4, e0, e1),
                (i5, f0, f1),
            ):
                _put(out, bias, m0, j, y0)
                _put(out, bias, m1, j, y1)


@compiled(parallel=True)
def _grouped(weight, x, bias, out, code, wide_x, n, experts, counts, threads):
    """Each thread computes its share of the results of every group. weight, x, bias and out: where they lie, or zero."""
    m, k = wide_x.shape
    narrow_x = numbers(x, 0, (m, k), code)
    for i in range(m):
        for j in range(k):
            wide_x[i, j] = wide(narrow_x[i, j])
    step = -(-n // (8 * threads)) * 8
    for t in prange(threads):
        first, last, start = t * step, min(n, (t + 1) * step), 0
        for g in range(len(experts)):
            end = start + counts[g]
            w = numbers(weight, experts[g] * n * k, (n, k), code)
            b = numbers(bias, experts[g] * n, n if bias else 0, code)
            rows, results = wide_x[start:end], numbers(out, start * n, (counts[g], n), code)
            if counts[g] == 1:
                _row(w, rows, b, results, first, last)
            else:
                _rows(w, rows, b, results, first, last)
            start = end
