"""Matrix products, where torch's own are not the best there is.

On a CPU few rows go to `zoo.kernels.cpu.rows`, and in bf16 up to some hundred to `zoo.kernels.cpu.tiles` where there is
AMX, to `zoo.kernels.cpu.dots` where there is AVX-512's bf16. Of more, bf16 and fp16 are multiplied by torch one number
after the other where the CPU has no instructions for them: here rows of the weight are widened to fp32, as many as stay in
cache, and multiplied by the BLAS of fp32; results are rounded once, so nothing but the order of sums differs. The rows of
the weight come first in the product: the other way round takes up to twice as long for few rows of x.

Margin on 2 cores of an EPYC without AVX-512, 6144 x 2048 in bf16, against torch's own: 64 rows 22 and 83 ms, 256 rows
60 and 330. Without numba, 8 rows 8 and 12, 16 rows 7 and 21.

On a GPU a product of bf16 or fp16 that is asked for in fp32 needs no fp32 units: each product is exact in fp32, and
tensor cores sum in it. DeepSeek-V3's router, 2048 rows of 7168 by 256, takes 27 us on an H100, and 218 us widened first;
results are 8e-6 and 2e-7 of their norm from exact ones, where rounding them to bf16 is 2e-3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.cpu import kernels
from zoo.kernels.launch import is_recorded
from zoo.system.scratch import scratch

FEW, NATIVE_FEW = 16, 2  # rows, up to which our kernel is faster; where the CPU multiplies the dtype itself
FEWER = 4  # rows, up to which torch's own product is as fast as one that widens
LARGE = {torch.float32: 1 << 18, torch.bfloat16: 1 << 20, torch.float16: 1 << 20}
"""Elements of a weight from which our kernel is faster. Fewer of fp32, which torch multiplies with threads of its own that
keep ours waiting: all of SmolLM2's products by ours are 1.5 times as fast as all by torch's, the larger half only 1.2."""
WIDE = 1 << 20  # elements of the weight widened at a time
Times = Callable[..., Tensor]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., K] times weight [N, K], transposed, plus bias [N]: [.., N] in the dtype of x."""
    if x.device.type != "cpu" or is_recorded(x):
        return F.linear(x, weight, bias)
    (n, k), lead = weight.shape, x.shape[:-1]
    rows = lead.numel()
    if times := kernel(x, weight, rows):
        return times(x.reshape(rows, k), weight, bias).view(*lead, n)
    if rows <= FEWER or _native(x.dtype):
        return F.linear(x, weight, bias)
    return _widened(x, weight, bias, x.dtype)


def unrounded(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` on a CPU, in fp32: of narrower numbers as it is summed, for sums that go on."""
    return _widened(x, weight, bias, torch.float32)


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Some rows of the weight after the other, in fp32; rounded to `dtype`."""
    (n, k), lead = weight.shape, x.shape[:-1]
    columns = x.reshape(-1, k).float().T
    out = torch.empty(lead.numel(), n, dtype=dtype)
    step = max(1, min(n, WIDE // k))
    wide = torch.from_numpy(scratch("wide", (step, k), np.float32))
    for at in range(0, n, step):
        part = wide[: min(step, n - at)]
        part.copy_(weight[at : at + step])
        out[:, at : at + step] = _rounded(
            (part @ columns).T, None if bias is None else bias[at : at + step], dtype
        )
    return out.view(*lead, n)


def kernel(x: Tensor, weight: Tensor, rows: int) -> Times | None:
    """Our kernel for `rows` rows of x and a weight [.., N, K] on a CPU, where it is faster than torch; also for groups of
    rows, up to `rows` to a group, and a stack of weights [E, N, K]: see `zoo.kernels.cpu.rows.times`."""
    if (
        x.device.type != "cpu"
        or is_recorded(x)
        or rows <= 0
        or x.dtype != weight.dtype
        or not weight.is_contiguous()
    ):
        return None
    if x.dtype not in LARGE or weight.shape[-2] * weight.shape[-1] < LARGE[x.dtype]:
        return None
    few = kernels("rows")
    if few is None:
        return None
    alone = rows == 1 and weight.shape[-1] >= few.SHORT
    if x.dtype == torch.bfloat16 and not alone:
        made_for = _made_for_bf16()
        if made_for is not None and made_for.fits(x, weight, rows):
            return made_for.times  # type: ignore[no-any-return]
    most = NATIVE_FEW if x.dtype != torch.float32 and _native(x.dtype) else FEW
    return few.times if rows <= most else None


def _rounded(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y + bias).to(dtype)


@functools.cache
def _made_for_bf16() -> Any:
    """The module of our kernel for what this CPU has to multiply bf16 with; None if it has nothing."""
    for module in (kernels("tiles"), kernels("dots")):
        if module is not None and module.available():
            return module
    return None


@functools.cache
def _native(dtype: torch.dtype) -> bool:
    """Whether this CPU's matrix products are made for the dtype, as oneDNN says; a torch without it decides itself."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    supported = getattr(torch.ops.mkldnn, known[dtype], None) if dtype in known else None
    return supported is None or bool(supported())


def wide_fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `wide_product` serves them: several rows on a GPU, of one narrow dtype."""
    narrow = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and narrow and x.numel() > x.shape[-1] and not is_recorded(x)


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, K] times weight [M, K], transposed: [N, M] in fp32 (see `wide_fits`)."""
    return torch.mm(x, weight.T, out_dtype=torch.float32)
