"""Matrix products of several rows, where torch's own are not the best there is.

On a CPU that has no instructions for bf16 or fp16 torch multiplies such numbers one by one. Here rows of the weight are
widened to fp32, as many as stay in cache, and multiplied by the BLAS of fp32; results are rounded once, so nothing but
the order of sums differs. The rows of the weight come first in the product: the other way round takes up to twice as
long for few rows of x.

Margin on 2 cores of an EPYC without AVX-512, 6144 x 2048 in bf16, against torch's own: 8 rows 8 and 12 ms, 16 rows
7 and 21, 64 rows 22 and 83, 256 rows 60 and 330. Up to 4 rows reading the weight takes the time, and torch is as fast.

On a GPU a product of bf16 or fp16 that is asked for in fp32 needs no fp32 units: each product is exact in fp32, and
tensor cores sum in it. DeepSeek-V3's router, 2048 rows of 7168 by 256, takes 27 us on an H100, and 218 us widened first;
results are 8e-6 and 2e-7 of their norm from exact ones, where rounding them to bf16 is 2e-3.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.scratch import scratch

FEW = 4  # rows, up to which torch's own product is as fast
WIDE = 1 << 20  # elements of the weight widened at a time


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., K] times weight [N, K], transposed, plus bias [N]: [.., N] in the dtype of x."""
    if x.device.type != "cpu" or x.numel() <= FEW * x.shape[-1] or _native(x.dtype):
        return F.linear(x, weight, bias)
    n, k = weight.shape
    columns = x.reshape(-1, k).float().T
    out = torch.empty(columns.shape[1], n, dtype=x.dtype)
    step = max(1, min(n, WIDE // k))
    wide = torch.from_numpy(scratch("wide", (step, k), np.float32))
    for at in range(0, n, step):
        part = wide[: min(step, n - at)]
        part.copy_(weight[at : at + step])
        y = (part @ columns).T
        out[:, at : at + step] = y if bias is None else y + bias[at : at + step]
    return out.view(*x.shape[:-1], n)


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
