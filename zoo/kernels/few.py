"""The experts of few tokens: one kernel reads the gate and up rows of just the chosen experts, one their down rows, joined in
the kernel over a token's experts (see `zoo.kernels.experts`).

Unusual: all of a token's experts' down rows are read at once, so that none waits for another's; and which these are is read before
what the kernel before gives is there (`zoo.kernels.launch.in_turn`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import codes, stream
from zoo.kernels.gated import code
from zoo.kernels.launch import Kernel, ceil_div, overlap, power_of_2, triton
from zoo.kernels.linear import tile
from zoo.kernels.weights import FOUR_BITS, PLAIN, Weight
from zoo.spec import MLP

if triton is not None:
    import triton.language as tl

    from zoo.kernels.codes import codes_times, own_columns
    from zoo.kernels.gated import activate
    from zoo.kernels.launch import in_turn
    from zoo.kernels.linear import gate_and_up_rows, one_row_of_codes
    from zoo.kernels.weights import rows_times, scale_row


def few_tokens(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Weight,
    down: Weight,
    spec: MLP,
    weight_input: bool,
    shared: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """`zoo.kernels.experts.experts` of few tokens."""
    (n, k), f = chosen.shape, down.k
    if not weight_input and stream.serves_experts(x, chosen, weights, up, down, spec):
        return stream.experts(x, chosen, weights, up, down, spec, shared, residual)
    h = x.new_empty(n * k, f)
    out = torch.empty_like(x)
    read, sharing = x, k  # so many pairs read one row
    if weight_input:
        read, sharing = x[:, None] * weights.to(x.dtype)[..., None], 1
    together = power_of_2(k)
    if codes.pays(x, up) and codes.pays(x, down):
        how = codes.constants(up)
        _few_up_codes[(ceil_div(up.n, how["R"] // how["M"]), n * k)](
            read, chosen, *up.pointers, h, sharing, f, up.n, up.k, *up.n_scales, spec.limit or 0.0, spec.alpha,
            KIND=up.kind, ACT=code(spec), GATED=spec.gated, HAS_BIAS=up.bias is not None, **how, **overlap(x),
        )  # fmt: skip
        how = codes.constants(down, together)
        _few_down_codes[(ceil_div(down.n, how["R"] // how["M"]), n)](
            h, chosen, weights, *down.pointers, shared, residual, out, k, f, down.n, *down.n_scales,
            KIND=down.kind, HAS_BIAS=down.bias is not None, WEIGHTED=not weight_input, EXPERTS=together, **how, **overlap(x),
        )  # fmt: skip
        return out
    rows, block, warps = up_tile(k, up, spec.gated)
    _few_up[(ceil_div(up.n, rows), n * k)](
        read, chosen, *up.pointers, h, sharing, f, up.n, up.k, *up.n_scales, up.columns,
        spec.limit or 0.0, spec.alpha,
        KIND=up.kind, ACT=code(spec), GATED=spec.gated, HAS_BIAS=up.bias is not None,
        ROWS=rows, BLOCK=block, num_warps=warps, **overlap(x),
    )  # fmt: skip
    rows, block, warps = down_tile(together, down)
    _few_down[(ceil_div(down.n, rows // together), n)](
        h, chosen, weights, *down.pointers, shared, residual, out, k, f, down.n, *down.n_scales, down.columns,
        KIND=down.kind, HAS_BIAS=down.bias is not None, WEIGHTED=not weight_input, EXPERTS=together,
        ROWS=rows, BLOCK=block, num_warps=warps, **overlap(x),
    )  # fmt: skip
    return out


def up_tile(experts: int, w: Weight, gated: bool) -> tuple[int, int, int]:
    """Rows and channels of a tile of a chosen expert's gate and up weights, and its warps. Measured on an H100."""
    if w.kind != PLAIN and w.kind not in FOUR_BITS:
        return 8, min(512, power_of_2(w.k, w.group)), 2
    return tile(w.n * experts, w, gated)


def down_tile(experts: int, w: Weight) -> tuple[int, int, int]:
    """Rows, a multiple of `experts`, and channels of a tile of the down weights of a token's experts, and its warps.
    Measured on an H100."""
    if w.kind in FOUR_BITS:
        rows, block, warps = max(experts, 16), 1024, 8
    else:
        rows = max(experts, 16 if w.k <= 1024 else 2)
        block, warps = max(128, min(1024, 4096 // rows)), 4
    return rows, min(block, power_of_2(w.k, w.group)), warps


if triton is not None:

    @Kernel
    def _few_up(
        x_ptr, chosen_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, h_ptr, sharing, F, N, K, s_rows, s_columns, columns,
        limit, alpha,
        KIND: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        pair = tl.program_id(1).to(tl.int64)
        in_turn(OVERLAP)
        e = tl.load(chosen_ptr + pair).to(tl.int64)
        n, mask = rows_of(tl.arange(0, ROWS), F, GATED, ROWS)
        bytes_: tl.constexpr = 2 if KIND >= 3 else 1
        w_ptr += e * N * (K // bytes_)
        if KIND != 0:
            s_ptr += e * s_rows * s_columns
        x_ptr += pair // sharing * K
        y = rows_times(
            x_ptr, 0, w_ptr, s_ptr, scale_row(rows_ptr, n, mask, KIND), n, mask, K, s_columns, columns,
            KIND, ROWS, BLOCK, False, OVERLAP, False,
        )  # fmt: skip
        finish_up(y, n, mask, e, pair, b_ptr, h_ptr, F, N, limit, alpha, ACT, GATED, HAS_BIAS, ROWS)

    @triton.jit
    def finish_up(
        y, n, mask, e, pair, b_ptr, h_ptr, F, N, limit, alpha,
        ACT: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        dtype = h_ptr.dtype.element_ty
        if HAS_BIAS:
            y += tl.load(b_ptr + e * N + n, mask=mask, other=0.0).to(tl.float32)
        y = y.to(dtype).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.reshape(y, (ROWS // 2, 2)))
            f = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
            y = activate(gate, up, limit, alpha, ACT, True, dtype)
            tl.store(h_ptr + pair * F + f, y.to(dtype), mask=f < F)
        else:
            y = activate(y, y, limit, alpha, ACT, False, dtype)
            tl.store(h_ptr + pair * F + n, y.to(dtype), mask=mask)

    @Kernel
    def _few_up_codes(
        x_ptr, chosen_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, h_ptr, sharing, F, N, K, s_rows, s_columns,
        limit, alpha,
        KIND: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
        COLUMNS: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        pair = tl.program_id(1).to(tl.int64)
        in_turn(OVERLAP)
        e = tl.load(chosen_ptr + pair).to(tl.int64)
        w_ptr += e * N * (K // (2 if KIND >= 3 else 1))
        s_ptr += e * s_rows * s_columns
        n, mask = rows_of(tl.arange(0, R) // M, F, GATED, R // M)
        y = one_row_of_codes(
            x_ptr + pair // sharing * K, w_ptr, s_ptr, rows_ptr, n, mask, K, s_columns,
            KIND, COLUMNS, R, M, BLOCK, AHEAD, EVEN, OVERLAP, False,
        )  # fmt: skip
        n, mask = rows_of(tl.arange(0, R // M), F, GATED, R // M)
        finish_up(y, n, mask, e, pair, b_ptr, h_ptr, F, N, limit, alpha, ACT, GATED, HAS_BIAS, R // M)

    @triton.jit
    def rows_of(r, F, GATED: tl.constexpr, ROWS: tl.constexpr):
        """Rows r of a program's tile of ROWS of the up weight. (rows, mask)."""
        if GATED:
            n, mask = gate_and_up_rows(tl.program_id(0), r, F, ROWS)
        else:
            n = tl.program_id(0) * ROWS + r
            mask = n < F
        return n, mask

    @Kernel
    def _few_down(
        h_ptr, chosen_ptr, weights_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, shared_ptr, residual_ptr, out_ptr,
        top_k, F, N, s_rows, s_columns, columns,
        KIND: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, EXPERTS: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        # A tile holds the rows of all of a token's experts, so that none waits for another's.
        token = tl.program_id(1).to(tl.int64)
        row, mask, pair, e = pairs_of(token, tl.arange(0, ROWS), chosen_ptr, top_k, N, EXPERTS, ROWS)
        n = e * N + row
        s_row = e * s_rows + scale_row(rows_ptr, row, mask, KIND)
        y = rows_times(
            h_ptr, pair * F, w_ptr, s_ptr, s_row, n, mask, F, s_columns, columns,
            KIND, ROWS, BLOCK, True, OVERLAP, True,
        )  # fmt: skip
        finish_down(
            y, token, row, mask, e, pair, b_ptr, weights_ptr, shared_ptr, residual_ptr, out_ptr, N,
            HAS_BIAS, WEIGHTED, EXPERTS, ROWS,
        )  # fmt: skip

    @triton.jit
    def weighted(
        y, row, mask, e, pair, b_ptr, weights_ptr, N, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr
    ):  # fmt: skip
        """Sums of an expert's rows, plus its bias, and times its weight."""
        if HAS_BIAS:
            y += tl.load(b_ptr + e * N + row, mask=mask, other=0.0).to(tl.float32)
        y = y.to(DTYPE).to(tl.float32)
        if WEIGHTED:
            a = tl.load(weights_ptr + pair, mask=mask, other=0.0)
            y = y * a.to(tl.float32)
            if a.dtype == DTYPE:
                y = y.to(DTYPE).to(tl.float32)
        return y

    @triton.jit
    def finish_down(
        y, token, row, mask, e, pair, b_ptr, weights_ptr, shared_ptr, residual_ptr, out_ptr, N,
        HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        dtype = out_ptr.dtype.element_ty
        y = weighted(y, row, mask, e, pair, b_ptr, weights_ptr, N, HAS_BIAS, WEIGHTED, dtype)
        total = tl.sum(tl.reshape(tl.where(mask, y, 0.0), (ROWS // EXPERTS, EXPERTS)), 1)
        row = tl.program_id(0) * (ROWS // EXPERTS) + tl.arange(0, ROWS // EXPERTS)
        at = token * N + row
        total = with_others(total, shared_ptr, residual_ptr, at, row < N, dtype)
        tl.store(out_ptr + at, total.to(dtype), mask=row < N)

    @triton.jit
    def pairs_of(token, r, chosen_ptr, top_k, N, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
        """Rows r of a program's tile of ROWS, of all experts of a token in turn. (row of the weight, whether there is one, pair,
        expert)."""
        j, row = r % EXPERTS, tl.program_id(0) * (ROWS // EXPERTS) + r // EXPERTS
        mask = (j < top_k) & (row < N)
        pair = token * top_k + j
        return (
            row,
            mask,
            pair,
            tl.load(chosen_ptr + pair, mask=mask, other=0, cache_modifier=".cg").to(tl.int64),
        )

    @Kernel
    def _few_down_codes(
        h_ptr, chosen_ptr, weights_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, shared_ptr, residual_ptr, out_ptr,
        top_k, F, N, s_rows, s_columns,
        KIND: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, EXPERTS: tl.constexpr,
        COLUMNS: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        # Columns of x are pieces of h of a token's experts.
        token = tl.program_id(1).to(tl.int64)
        S: tl.constexpr = M // EXPERTS
        ROWS: tl.constexpr = R // S
        r, m = tl.arange(0, R), tl.arange(0, M)
        row, mask, pair, e = pairs_of(token, r // S, chosen_ptr, top_k, N, EXPERTS, ROWS)
        n = tl.where(mask, e * N + row, 0)
        s_row = tl.where(mask, e * s_rows + scale_row(rows_ptr, row, mask, KIND), 0)
        x_row = (token * top_k + tl.minimum(m // S, top_k - 1)) * F
        acc = codes_times(
            h_ptr, x_row, m % S * BLOCK, w_ptr, n, r % S * BLOCK, s_ptr, s_row, F, s_columns,
            KIND, COLUMNS, R, M, BLOCK, S * BLOCK, AHEAD, EVEN, OVERLAP, True,
        )  # fmt: skip
        y = own_columns(acc, R, M, S)
        row, mask, pair, e = pairs_of(token, tl.arange(0, ROWS), chosen_ptr, top_k, N, EXPERTS, ROWS)
        finish_down(
            y, token, row, mask, e, pair, b_ptr, weights_ptr, shared_ptr, residual_ptr, out_ptr, N,
            HAS_BIAS, WEIGHTED, EXPERTS, ROWS,
        )  # fmt: skip

    @triton.jit
    def with_others(y, shared_ptr, residual_ptr, at, mask, DTYPE: tl.constexpr):
        """y plus what is at `at` behind the pointers that are not None, rounded after each sum."""
        if shared_ptr is not None:
            y = y.to(DTYPE).to(tl.float32) + tl.load(shared_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            y = y.to(DTYPE).to(tl.float32) + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        return y
