"""RMSNorm on a CPU: a row is read, measured, and written while it is in the first cache.

Unusual: what takes torch seven passes over fresh memory rounds here at the same places, but for the sum of squares, which is taken in
fp64: a row's scale is the exact one's nearest neighbour, or the next, whatever the width.

Margin on 2 cores of a Xeon with AVX-512, bf16, against those passes: 256 x 2048 150 and 500 us, 256 x 24 x 128 200 and
800, one row of 2048 13 and 35 (66 and 90 between products, which leave nothing but weights in the caches).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import prange
from torch import Tensor

from zoo.kernels.cpu import MANY, Numbers, compiled, threads
from zoo.kernels.cpu.codes import CODE, address, bits, narrow, number, numbers, rows_of, wide
from zoo.kernels.cpu.shares import given, share, together


def fits(x: Tensor, onto: Tensor | None, weight: Tensor | None) -> bool:
    """Whether `rms_norm` serves them."""
    if x.dtype not in CODE or x.stride(-1) != 1:
        return False
    if weight is not None and (
        weight.dtype not in CODE or weight.shape != x.shape[-1:] or weight.stride(0) != 1
    ):
        return False
    return onto is None or (onto.dtype == x.dtype and onto.shape == x.shape)


def rms_norm(
    x: Tensor, onto: Tensor | None, weight: Tensor | None, plus_one: bool, early: bool, eps: float
) -> Tensor:
    """x / rms(x) times the weight (or one and the weight), rounded, plus `onto`. x and onto [.., D], weight [D]. `early`:
    rounded before it is multiplied, too."""
    d, rows = x.shape[-1], x.numel() // x.shape[-1]
    starts = _evenly(rows, d) if x.is_contiguous() else rows_of(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    onto = None if onto is None else onto.contiguous()
    if rows * d < MANY:
        together(
            0, x.data_ptr(), starts, address(weight), address(onto), out.data_ptr(), d, plus_one, early, bits(eps), rows,
            first=_alone(x.dtype, x.dtype if weight is None else weight.dtype),
        )  # fmt: skip
        return out
    where = x.data_ptr(), starts, address(weight), address(onto), out.data_ptr()
    how = CODE[x.dtype], CODE[x.dtype if weight is None else weight.dtype], d, plus_one, early, eps
    with threads() as t:
        _all(*where, *how, rows, t)
    return out


@functools.cache
def _alone(dtype: torch.dtype, weight_dtype: torch.dtype) -> int:
    """All rows, by one thread."""
    code, weight_code = CODE[dtype], CODE[weight_dtype]

    def alone(told, thread, threads):
        x, starts_at, weight, onto, out, d, plus_one, early, eps, rows = given(told, 10)
        starts = numbers(starts_at, 0, rows, np.int64(0))
        _some(x, starts, weight, onto, out, code, weight_code, d, plus_one, early, number(eps), 0, rows)

    return share(alone)


@functools.lru_cache(64)
def _evenly(rows: int, d: int) -> Numbers:
    return np.arange(rows) * d


@compiled()
def _scale(x, eps):
    total = 0.0
    for j in range(len(x)):
        y = np.float64(wide(x[j]))
        total += y * y
    return np.float32(1 / np.sqrt(total / len(x) + eps))


@compiled(fastmath=False)  # each product is rounded as written
def _divided(x, scale, out):
    for j in range(len(x)):
        out[j] = narrow(wide(x[j]) * scale, x[j])


@compiled(fastmath=False)
def _early(x, scale, weight, plus, out):
    for j in range(len(x)):
        w = wide(narrow(plus + wide(weight[j]), x[j]))
        out[j] = narrow(wide(narrow(wide(x[j]) * scale, x[j])) * w, x[j])


@compiled(fastmath=False)
def _late(x, scale, weight, plus, out):
    for j in range(len(x)):
        out[j] = narrow(wide(x[j]) * scale * (plus + wide(weight[j])), x[j])


@compiled()
def _some(x, starts, weight, onto, out, code, weight_code, d, plus_one, early, eps, first, last):
    """The rows first .. last. x, weight, onto and out: where they lie, or zero; starts: of the rows in x."""
    eps, plus = np.float32(eps), np.float32(1 if plus_one else 0)
    for i in range(first, last):
        row, result = numbers(x, starts[i], d, code), numbers(out, i * d, d, code)
        scale = _scale(row, eps)
        if weight == 0:
            _divided(row, scale, result)
        elif early:
            _early(row, scale, numbers(weight, 0, d, weight_code), plus, result)
        else:
            _late(row, scale, numbers(weight, 0, d, weight_code), plus, result)
        if onto:
            more = numbers(onto, i * d, d, code)
            for j in range(d):
                result[j] = narrow(wide(more[j]) + wide(result[j]), result[j])


@compiled(parallel=True)
def _all(x, starts, weight, onto, out, code, weight_code, d, plus_one, early, eps, n, threads):
    for t in prange(threads):
        _some(
            x, starts, weight, onto, out, code, weight_code, d, plus_one, early, eps,
            n * t // threads, n * (t + 1) // threads,
        )  # fmt: skip
