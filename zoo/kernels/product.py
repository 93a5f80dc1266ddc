"""Matrix products, where torch's own are not the best there is.

On a CPU few rows go to `zoo.kernels.rows`. Of more, bf16 and fp16 are multiplied by torch one number after the other where
the CPU has no instructions for them: here rows of the weight are widened to fp32, as many as stay in cache, and multiplied
by the BLAS of fp32; results are rounded once, so nothing but the order of sums differs. The rows of the weight come first
in the product: the other way round takes up to twice as long for few rows of x.

Margin on 2 cores of an EPYC without AVX-512, 6144 x 2048 in bf16, against torch's own: 64 rows 22 and 83 ms, 256 rows
60 and 330. Without numba, 8 rows 8 and 12, 16 rows 7 and 21.

On a GPU a product of bf16 or fp16 that is asked for in fp32 needs no fp32 units: each product is exact in fp32, and
tensor cores sum in it. DeepSeek-V3's router, 2048 rows of 7168 by 256, takes 27 us on an H100, and 218 us widened first;
results are 8e-6 and 2e-7 of their norm from exact ones, where rounding them to bf16 is 2e-3.
"""

from __future__ import annotations

import functools
import os
import platform
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.scratch import scratch

FEW, NATIVE_FEW = 16, 2  # rows, up to which our kernel is faster; where the CPU multiplies the dtype itself
FEWER = 4  # rows, up to which torch's own product is as fast as one that widens
LARGE = {torch.float32: 1 << 18, torch.bfloat16: 1 << 20, torch.float16: 1 << 20}
"""Elements of a weight from which our kernel is faster. Fewer of fp32, which torch multiplies with threads of its own that
keep ours waiting: all of SmolLM2's products by ours are 1.5 times as fast as all by torch's, the larger half only 1.2."""
WIDE = 1 << 20  # elements of the weight widened at a time


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., K] times weight [N, K], transposed, plus bias [N]: [.., N] in the dtype of x."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    (n, k), lead = weight.shape, x.shape[:-1]
    rows = lead.numel()
    if few_fit(x, weight, rows):
        return _rounded(_times()(x.reshape(rows, k), weight), bias, x.dtype).view(*lead, n)
    if rows <= FEWER or _native(x.dtype):
        return F.linear(x, weight, bias)
    columns = x.reshape(-1, k).float().T
    out = torch.empty(rows, n, dtype=x.dtype)
    step = max(1, min(n, WIDE // k))
    wide = torch.from_numpy(scratch("wide", (step, k), np.float32))
    for at in range(0, n, step):
        part = wide[: min(step, n - at)]
        part.copy_(weight[at : at + step])
        out[:, at : at + step] = _rounded(
            (part @ columns).T, None if bias is None else bias[at : at + step], x.dtype
        )
    return out.view(*lead, n)


def grouped_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, counts: Tensor
) -> Tensor:
    """The first `counts[0]` rows of x [M, K] times the weight of `experts[0]`, and so on; weight [E, N, K], bias [E, N],
    int64 experts and counts [G] -> [M, N] in the dtype of x. Where `few_fit` says so of the largest group."""
    per_row = None if bias is None else bias[experts].repeat_interleave(counts, 0)
    return _rounded(_times()(x, weight, experts, counts), per_row, x.dtype)


def few_fit(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether `rows` rows of x, at most, and a weight [.., N, K] are for `zoo.kernels.rows`."""
    if x.device.type != "cpu" or not 0 < rows <= FEW or x.dtype != weight.dtype or not weight.is_contiguous():
        return False
    if x.dtype not in LARGE or weight.shape[-2] * weight.shape[-1] < LARGE[x.dtype]:
        return False
    narrow_native = x.dtype != torch.float32 and _native(x.dtype)
    return rows <= (NATIVE_FEW if narrow_native else FEW) and _times() is not None


def _rounded(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y + bias).to(dtype)


@functools.cache
def _times() -> Any:
    if _forked:
        return None
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return None  # without AVX2 an x86 has nothing to widen fp16 with
    try:
        from zoo.kernels.rows import times
    except (ImportError, OSError):  # no numba, or one that does not go with this numpy or this system
        return None
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)
    return times


_forked = False


def _after_fork() -> None:
    """OpenMP ends a child of a process that used it, when the child uses it too: there torch multiplies."""
    global _forked
    _forked = True
    _times.cache_clear()


@functools.cache
def _native(dtype: torch.dtype) -> bool:
    """Whether this CPU's matrix products are made for the dtype, as oneDNN says; a torch without it decides itself."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    supported = getattr(torch.ops.mkldnn, known[dtype], None) if dtype in known else None
    return supported is None or bool(supported())


def wide_fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `wide_product` serves them: several rows on a GPU, of one narrow dtype."""
    narrow = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and narrow and x.numel() > x.shape[-1]


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, K] times weight [M, K], transposed: [N, M] in fp32 (see `wide_fits`)."""
    return torch.mm(x, weight.T, out_dtype=torch.float32)
