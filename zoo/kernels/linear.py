"""Linear maps of few rows (decode), where reading the weight is all the time there is.

`y = x W^T + b`, with the residual added, or with the gate's activation between gate and up, in the same
kernel. Weights are plain, fp8, mxfp4 or integers. Several rows go to cuBLAS or, of codes, to `zoo.kernels.codes`, as
one row does where that, or on Hopper `zoo.kernels.stream`, is faster.

Unusual: with programmatic launch the first tile of the weight is on its way before x exists.

Margin, bf16 on an H100, of the copy's bandwidth (3.0 TB/s), here and by cuBLAS: 3072 x 2048 78 % and 56 %;
2048 x 2048 72 and 43; 2 x 8192 x 2048 with the gate 93 and 84 (without it); 4096 x 4096 about 84 and 66;
2 x 14336 x 4096 99 and 93; 128256 x 2048 103 and 92. Without programmatic launch the first is 61 %. Of a
step of an 8B model in fp8 on an H200, 67 us a layer, its products take 54 (4.0 TB/s, see `zoo.kernels.stream`) and what stands
between them 13, before norms were made on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import codes, stream
from zoo.kernels.gated import code, gated_reference
from zoo.kernels.launch import Kernel, ceil_div, has_triton, overlap, power_of_2, triton
from zoo.kernels.weights import FOUR_BITS, MXFP4, PLAIN, Weight, ordered
from zoo.spec import MLP

MOST = 64
"""Rows of x up to which the time that codes take is that of reading them."""

if triton is not None:
    import triton.language as tl

    from zoo.kernels.codes import codes_times, own_columns
    from zoo.kernels.gated import activate
    from zoo.kernels.launch import after_previous
    from zoo.kernels.weights import rows_times, scale_row


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x [.., K] @ weight [N, K]^T + bias, rounded; then + residual [.., N]."""
    y = F.linear(x, weight, bias)
    return y if residual is None else residual + y


def gated_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, spec: MLP) -> Tensor:
    """x [.., K], weight [2 F, K] (gate rows | up rows) -> act(gate) * up [.., F]."""
    return gated_reference(F.linear(x, weight, bias), spec)


def one_row(x: Tensor, w: Weight) -> bool:
    """Whether the kernels here serve x [.., K] and the weight: one row, on a GPU."""
    rows = x.numel() // x.shape[-1]
    same = w.codes.dtype == x.dtype or (
        x.dtype == torch.float32 and w.codes.dtype in (torch.bfloat16, torch.float16)
    )
    fits = w.whole if w.kind != PLAIN else same and w.codes.is_contiguous()
    return rows == 1 and has_triton(x) and fits and x.dtype != torch.float64 and x.is_contiguous()


def few_rows(x: Tensor, w: Weight) -> bool:
    """Whether `linear` serves x [.., K] and the weight: one row, or several of which each reads the same codes."""
    several = x.numel() <= MOST * x.shape[-1] and x.is_contiguous() and codes.serves(x, w)
    return several or one_row(x, w)


def takes_norm(x: Tensor, w: Weight | None, norm: stream.Before, gated: bool = False) -> bool:
    """Whether `linear` or `gated_linear` makes a norm of one row x on its way."""
    return w is not None and one_row(x, w) and stream.serves(x, w, gated, norm)


def linear(
    x: Tensor,
    w: Weight,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    norm: stream.Before | None = None,
) -> Tensor:
    """`linear_reference` of few rows (see `few_rows`). `dtype`: of the result. `norm`: of x, see `takes_norm`."""
    out = torch.empty(*x.shape[:-1], w.n, dtype=dtype or x.dtype, device=x.device)
    x = ordered(x, w)
    if x.numel() > x.shape[-1]:
        _several(x, w, residual, out)
        return out
    if norm is not None or (out.dtype == x.dtype and stream.serves(x, w)):
        stream.times(x, w, residual, out, norm)
        return out
    if codes.pays(x, w):
        how = codes.constants(w)
        _linear_codes[(ceil_div(w.n * how["M"], how["R"]),)](
            x, *w.pointers, residual, out, w.n, w.k, w.n_scales[1],
            KIND=w.kind, HAS_BIAS=w.bias is not None, HAS_RESIDUAL=residual is not None,
            **how, **overlap(x),
        )  # fmt: skip
        return out
    rows, block, warps = tile(w.n, w)
    _linear[(ceil_div(w.n, rows),)](
        x, *w.pointers, residual, out, w.n, w.k, w.n_scales[1], w.columns,
        KIND=w.kind, HAS_BIAS=w.bias is not None, HAS_RESIDUAL=residual is not None,
        ROWS=rows, BLOCK=block, num_warps=warps, **overlap(x),
    )  # fmt: skip
    return out


def _several(x: Tensor, w: Weight, residual: Tensor | None, out: Tensor) -> None:
    """Several rows of x times codes, each fetched once, into out. Where a weight has few rows, programs share its columns, and
    their sums are added up afterwards."""
    t = x.numel() // w.k
    rows, block, ahead, warps, stages, split = codes.shares(w)
    n_blocks = ceil_div(w.n, rows)
    parts = out if split == 1 else torch.empty(split, t, w.n, dtype=torch.float32, device=x.device)
    last = split == 1
    _linear_several[(n_blocks, split)](
        x, *w.pointers[:3], w.bias if last else None, residual if last else None, parts, t, w.n, w.k, w.n_scales[1],
        KIND=w.kind, HAS_BIAS=last and w.bias is not None, HAS_RESIDUAL=last and residual is not None,
        COLUMNS=codes.sharing(w), R=rows, M=power_of_2(t, codes.COLUMNS), BLOCK=block, AHEAD=ahead, EVEN=codes.even(w, split * block, ahead), SPLIT=split,
        num_warps=warps, num_stages=stages, **overlap(x),
    )  # fmt: skip
    if not last:
        block = 256
        _sum_parts[(ceil_div(w.n, block), t)](
            parts, w.bias, residual, out, t, w.n,
            HAS_BIAS=w.bias is not None, HAS_RESIDUAL=residual is not None, SPLIT=split, BLOCK=block, num_warps=4, **overlap(x),
        )  # fmt: skip


def gated_linear(x: Tensor, w: Weight, spec: MLP, norm: stream.Before | None = None) -> Tensor:
    """`gated_linear_reference` of one row (see `one_row`), as one kernel. `norm`: of x, see `takes_norm`."""
    f = w.n // 2
    out, x = x.new_empty(*x.shape[:-1], f), ordered(x, w)
    if norm is not None or stream.serves(x, w, gated=True):
        stream.gated_times(x, w, spec, out, norm)
        return out
    if codes.pays(x, w):
        how = codes.constants(w)
        _gated_linear_codes[(ceil_div(w.n * how["M"], how["R"]),)](
            x, *w.pointers, out, f, w.k, w.n_scales[1], spec.limit or 0.0, spec.alpha,
            KIND=w.kind, ACT=code(spec), HAS_BIAS=w.bias is not None,
            **how, **overlap(x),
        )  # fmt: skip
        return out
    rows, block, warps = tile(w.n, w, gated=True)
    _gated_linear[(ceil_div(f, rows // 2),)](
        x, *w.pointers, out, f, w.k, w.n_scales[1], w.columns, spec.limit or 0.0, spec.alpha,
        KIND=w.kind, ACT=code(spec), HAS_BIAS=w.bias is not None,
        ROWS=rows, BLOCK=block, num_warps=warps, **overlap(x),
    )  # fmt: skip
    return out


def tile(n: int, w: Weight, gated: bool = False) -> tuple[int, int, int]:
    """Rows and channels of one tile of a weight of which `n` rows are read, and its warps.

    Small, so that the many loads in flight are spread over programs. Measured on an H100."""
    if w.kind == MXFP4:
        rows, block, warps = 16, 1024, 8
    elif w.kind in FOUR_BITS:
        rows, block, warps = 8 if gated else 4, 1024, 8
    elif w.kind != PLAIN:
        rows, block, warps = 4, 1024, 2
    elif gated:
        rows, block, warps = 2, 2048, 4
    else:
        rows, block, warps = 4 if 2048 < n <= 8192 and w.k <= 4096 else 2, 1024, 4
    return rows, min(block, power_of_2(w.k, w.group)), warps


if triton is not None:

    @Kernel
    def _linear(
        x_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, residual_ptr, out_ptr, N, K, s_columns, columns,
        KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        mask = n < N
        y = rows_times(
            x_ptr, 0, w_ptr, s_ptr, scale_row(rows_ptr, n, mask, KIND), n, mask, K, s_columns, columns,
            KIND, ROWS, BLOCK, False, OVERLAP, True,
        )  # fmt: skip
        finish_row(y, n, mask, b_ptr, residual_ptr, out_ptr, HAS_BIAS, HAS_RESIDUAL)

    @triton.jit
    def finish_row(
        y, n, mask, b_ptr, residual_ptr, out_ptr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr
    ):
        if HAS_BIAS:
            y += tl.load(b_ptr + n, mask=mask, other=0.0).to(tl.float32)
        y = y.to(out_ptr.dtype.element_ty)
        if HAS_RESIDUAL:
            y = (y.to(tl.float32) + tl.load(residual_ptr + n, mask=mask, other=0.0).to(tl.float32)).to(
                y.dtype
            )
        tl.store(out_ptr + n, y, mask=mask)

    @triton.jit
    def one_row_of_codes(
        x_ptr, w_ptr, s_ptr, rows_ptr, n, mask, K, s_columns,
        KIND: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
        WAIT: tl.constexpr,
    ):  # fmt: skip
        """W[n, :] . x for rows n [R] of codes, each M times in turn: fp32 [R / M]."""
        n = tl.where(mask, n, 0)  # some row, of which the sum is not stored
        part, m = tl.arange(0, R) % M * BLOCK, tl.arange(0, M)
        acc = codes_times(
            x_ptr, m * 0, m * BLOCK, w_ptr, n, part, s_ptr, scale_row(rows_ptr, n, mask, KIND), K, s_columns,
            KIND, COLUMNS, R, M, BLOCK, M * BLOCK, AHEAD, EVEN, OVERLAP, WAIT,
        )  # fmt: skip
        return own_columns(acc, R, M, M)

    @Kernel
    def _linear_codes(
        x_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, residual_ptr, out_ptr, N, K, s_columns,
        KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
        COLUMNS: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0) * (R // M) + tl.arange(0, R) // M
        y = one_row_of_codes(
            x_ptr, w_ptr, s_ptr, rows_ptr, n, n < N, K, s_columns, KIND, COLUMNS, R, M, BLOCK, AHEAD, EVEN, OVERLAP, True
        )  # fmt: skip
        n = tl.program_id(0) * (R // M) + tl.arange(0, R // M)
        finish_row(y, n, n < N, b_ptr, residual_ptr, out_ptr, HAS_BIAS, HAS_RESIDUAL)

    @Kernel
    def _linear_several(
        x_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, residual_ptr, out_ptr, T, N, K, s_columns,
        KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
        COLUMNS: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):  # fmt: skip
        n, t, part = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, M), tl.program_id(1)
        mask = n < N
        row = tl.where(mask, n, 0)  # some row, of which the sum is not stored
        acc = codes_times(
            x_ptr, tl.minimum(t, T - 1) * K, t * 0 + part * BLOCK, w_ptr, row, row * 0 + part * BLOCK,
            s_ptr, scale_row(rows_ptr, row, mask, KIND), K, s_columns,
            KIND, COLUMNS, R, M, BLOCK, SPLIT * BLOCK, AHEAD, EVEN, OVERLAP, True,
        )  # fmt: skip
        if HAS_BIAS:
            acc += tl.load(b_ptr + n, mask=mask, other=0.0).to(tl.float32)[:, None]
        at, there = (part * T + t)[None, :] * N + n[:, None], mask[:, None] & (t < T)[None, :]
        y = acc.to(out_ptr.dtype.element_ty)
        if HAS_RESIDUAL:
            y = (y.to(tl.float32) + tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)).to(
                y.dtype
            )
        tl.store(out_ptr + at, y, mask=there)

    @Kernel
    def _sum_parts(
        parts_ptr, b_ptr, residual_ptr, out_ptr, T, N,
        HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        n, t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
        mask = n < N
        y = tl.zeros([BLOCK], dtype=tl.float32)
        after_previous(OVERLAP)
        for part in tl.static_range(SPLIT):
            y += tl.load(parts_ptr + (part * T + t) * N + n, mask=mask, other=0.0)
        finish_row(
            y,
            n,
            mask,
            b_ptr,
            residual_ptr + t * N if HAS_RESIDUAL else residual_ptr,
            out_ptr + t * N,
            HAS_BIAS,
            HAS_RESIDUAL,
        )

    @triton.jit
    def gate_and_up_rows(pid, r, F, ROWS: tl.constexpr):
        """Rows of a [2 F, K] weight for ROWS / 2 outputs: gate and up rows in turn, of which r. (rows, mask)."""
        f = pid * (ROWS // 2) + r // 2
        return f + (r % 2) * F, f < F

    @Kernel
    def _gated_linear_codes(
        x_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, out_ptr, F, K, s_columns, limit, alpha,
        KIND: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
        COLUMNS: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        n, mask = gate_and_up_rows(tl.program_id(0), tl.arange(0, R) // M, F, R // M)
        y = one_row_of_codes(
            x_ptr, w_ptr, s_ptr, rows_ptr, n, mask, K, s_columns, KIND, COLUMNS, R, M, BLOCK, AHEAD, EVEN, OVERLAP, True
        )  # fmt: skip
        n, mask = gate_and_up_rows(tl.program_id(0), tl.arange(0, R // M), F, R // M)
        finish_gated(y, n, mask, b_ptr, out_ptr, F, limit, alpha, ACT, HAS_BIAS, R // M)

    @triton.jit
    def finish_gated(
        y, n, mask, b_ptr, out_ptr, F, limit, alpha, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr
    ):  # fmt: skip
        if HAS_BIAS:
            y += tl.load(b_ptr + n, mask=mask, other=0.0).to(tl.float32)
        dtype = out_ptr.dtype.element_ty
        gate, up = tl.split(tl.reshape(y.to(dtype).to(tl.float32), (ROWS // 2, 2)))
        f = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        h = activate(gate, up, limit, alpha, ACT, True, dtype)
        tl.store(out_ptr + f, h.to(dtype), mask=f < F)

    @Kernel
    def _gated_linear(
        x_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, out_ptr, F, K, s_columns, columns, limit, alpha,
        KIND: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        n, mask = gate_and_up_rows(tl.program_id(0), tl.arange(0, ROWS), F, ROWS)
        y = rows_times(
            x_ptr, 0, w_ptr, s_ptr, scale_row(rows_ptr, n, mask, KIND), n, mask, K, s_columns, columns,
            KIND, ROWS, BLOCK, False, OVERLAP, True,
        )  # fmt: skip
        finish_gated(y, n, mask, b_ptr, out_ptr, F, limit, alpha, ACT, HAS_BIAS, ROWS)
