"""The experts of a mixture: for each token the weighted sum of its `top_k` experts' MLPs.

Few tokens: one kernel reads the gate and up rows of just the chosen experts, one their down rows, joined in
the kernel over a token's experts. Many tokens: pairs (token, expert) are sorted by expert and two grouped
matrix products run over the sorted rows, gathered as they are read, the activation between gate and up
inside the first.

Unusual: nothing here waits for the host to learn how many tokens an expert has; the grid is the most there
could be, and programs without a tile return. Weights are plain, fp8 or mxfp4; plain ones are fetched by the
copy engine where there is one.

Margin on an H100, 2048 tokens, bf16, sorting and summing included, against torch's `_grouped_mm` with the
gathering around it: 128 experts of 768 x 2048, top 8: 576 and 1061 us; 32 of 2880 x 2880, top 4: 1024 and
1264; 16 of 8192 x 5120, top 1: 1740 and 2259; 256 of 2048 x 7168, top 8: 8080 and 9690 (reading the weights
once takes 7490). Programs that read the same rows of x run one after the other: the other way round, x came from
memory once for each, and the last of these took 9230.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.gated import ACTIVATIONS, gated_reference
from zoo.kernels.launch import ceil_div, has_triton, overlap, power_of_2, triton
from zoo.kernels.linear import tile
from zoo.kernels.weights import PLAIN, Weight
from zoo.spec import MLP

if triton is not None:
    import triton.language as tl

    from zoo.kernels.gated import activate
    from zoo.kernels.launch import after_previous
    from zoo.kernels.linear import gate_and_up_rows
    from zoo.kernels.weights import rows_times, weight_tile


def experts_reference(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    spec: MLP,
    weight_input: bool = False,
) -> Tensor:
    """x [N, D], chosen and weights [N, k]; up ([E, 2 F, D], bias), down ([E, D, F], bias) -> [N, D].

    `weight_input`: the weight multiplies what the expert reads, not what it gives."""
    (n, k), out = chosen.shape, []
    for i in range(n):
        rows = []
        for j in range(k):
            e = int(chosen[i, j])
            xi = x[i] * weights[i, j].to(x.dtype) if weight_input else x[i]
            h = gated_reference(F.linear(xi, up[0][e], None if up[1] is None else up[1][e]), spec)
            rows.append(F.linear(h, down[0][e], None if down[1] is None else down[1][e]))
        y = torch.stack(rows)
        out.append(y.sum(0) if weight_input else (y * weights[i, :, None]).sum(0).to(x.dtype))
    return torch.stack(out)


def fits(x: Tensor, up: Weight | None, down: Weight | None) -> bool:
    """Whether the kernels serve x and these weights."""
    if up is None or down is None:
        return False
    plain = all(w.kind != PLAIN or (w.codes.dtype == x.dtype and w.codes.is_contiguous()) for w in (up, down))
    return has_triton(x) and plain and x.dtype != torch.float64 and x.is_contiguous()


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Weight,
    down: Weight,
    spec: MLP,
    weight_input: bool = False,
    onto: Tensor | None = None,
) -> Tensor:
    """`experts_reference` by kernels (see `fits`). x [N, D], chosen and weights [N, k] -> [N, D], added to `onto`."""
    pairs, n_experts = chosen.numel(), up.codes.shape[0]
    chosen = chosen.contiguous()
    if x.shape[0] <= 2 or pairs <= n_experts // 4:
        return _few(x, chosen, weights, up, down, spec, weight_input, onto)
    return _many(x, chosen, weights, up, down, spec, weight_input, onto)


def _few(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Weight,
    down: Weight,
    spec: MLP,
    weight_input: bool,
    onto: Tensor | None,
) -> Tensor:
    (n, k), f = chosen.shape, down.k
    h = x.new_empty(n * k, f)
    out = torch.empty_like(x)
    rows, block, warps = tile(up.n * k, up, spec.gated)
    _few_up[(ceil_div(up.n, rows), n * k)](
        x, chosen, weights, *up.pointers, h, k, f, up.n, up.k, *up.n_scales, up.columns,
        spec.limit or 0.0, spec.alpha,
        KIND=up.kind, ACT=ACTIVATIONS[spec.act], GATED=spec.gated, HAS_BIAS=up.bias is not None,
        WEIGHT_INPUT=weight_input, ROWS=rows, BLOCK=block, num_warps=warps, **overlap(x),
    )  # fmt: skip
    rows, block, warps = tile(down.n, down)
    _few_down[(ceil_div(down.n, rows), n)](
        h, chosen, weights, *down.pointers, onto, out, f, down.n, *down.n_scales, down.columns,
        KIND=down.kind, HAS_BIAS=down.bias is not None, WEIGHTED=not weight_input, ONTO=onto is not None, TOP_K=k,
        ROWS=rows, BLOCK=block, num_warps=warps, **overlap(x),
    )  # fmt: skip
    return out


def sort_by_expert(chosen: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """chosen [N, k] -> the pairs in order of their expert [N k], equal ones in order; and how many each expert
    has [E]. int32. A counting sort: blocks count, then place, their pairs, each adding up the counts itself."""
    pairs, e = chosen.numel(), power_of_2(n_experts)
    # More pairs to a block where there are many blocks, since each reads all counts; as many as registers hold.
    block = max(16, min(128 if pairs <= 1 << 16 else 256, 32768 // e))
    blocks = ceil_div(pairs, block)
    counts = torch.empty(blocks, n_experts, dtype=torch.int32, device=chosen.device)
    totals = torch.empty(n_experts, dtype=torch.int32, device=chosen.device)
    order = torch.empty(pairs, dtype=torch.int32, device=chosen.device)
    warps = 4 if e <= 128 else 8
    _count[(blocks,)](chosen, counts, pairs, n_experts, E=e, BLOCK=block, num_warps=warps)
    _place_pairs[(blocks,)](
        chosen, counts, order, totals, pairs, n_experts, blocks,
        E=e, BLOCK=block, COUNTS=max(1, 16384 // e), num_warps=warps,
    )  # fmt: skip
    return order, totals


def sort_by_expert_reference(chosen: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """`sort_by_expert` by torch."""
    flat = chosen.flatten()
    counts = (flat[None] == torch.arange(n_experts, device=flat.device)[:, None]).sum(1)
    return flat.argsort(stable=True).to(torch.int32), counts.to(torch.int32)


def grouped_tile(average: float, kind: int, exact: bool) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a tile of the grouped products, warps and stages, when an expert has `average`
    rows. Measured on an H100."""
    if exact:
        return 16, 32, 32, 4, 3
    if average <= 32:
        return 16 if average <= 16 else 32, 128, 64, 4, 3
    if kind != PLAIN:
        return 128, 128, 64, 8, 3
    return (128, 256, 64, 8, 4) if average > 96 else (128, 128, 128, 8, 3)


def _bulk(x: Tensor, w: Weight) -> bool:
    """Whether tiles of the weight can be fetched by the copy engine (Hopper)."""
    aligned = w.codes.data_ptr() % 16 == 0 and w.k * w.codes.element_size() % 16 == 0
    return w.kind == PLAIN and x.dtype != torch.float32 and aligned and bool(overlap(x).get("launch_pdl"))


def _tiles(w: Weight, rows: int, columns: int) -> Any:
    """The weights of all experts, one below the other, as tiles for the copy engine. A tile that reaches into
    the next expert is harmless: what comes of those rows is not stored."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(w.codes.view(-1, w.k), [rows, columns])


def _many(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Weight,
    down: Weight,
    spec: MLP,
    weight_input: bool,
    onto: Tensor | None,
) -> Tensor:
    (n, k), f, n_experts = chosen.shape, down.k, up.codes.shape[0]
    pairs = n * k
    order, counts = sort_by_expert(chosen, n_experts)
    h, y = x.new_empty(pairs, f), x.new_empty(pairs, down.n)
    out = torch.empty_like(x)
    exact = x.dtype == torch.float32
    block_m, block_n, block_k, warps, stages = grouped_tile(pairs / n_experts, up.kind, exact)
    tiles = ceil_div(pairs, block_m) + min(n_experts, pairs)
    common = dict(
        BLOCK_M=block_m, BLOCK_K=block_k, E=power_of_2(n_experts), PRECISION="ieee" if exact else "tf32",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    half = block_n // 2 if spec.gated else block_n
    bulk = _bulk(x, up) and _bulk(x, down)
    _many_up[(tiles * ceil_div(f, half),)](
        _tiles(up, half, block_k) if bulk else x, x, order, counts, weights, *up.pointers, h, n_experts, k, f, up.n, up.k,
        *up.n_scales, up.columns, spec.limit or 0.0, spec.alpha,
        KIND=up.kind, ACT=ACTIVATIONS[spec.act], GATED=spec.gated, HAS_BIAS=up.bias is not None,
        WEIGHT_INPUT=weight_input, BULK=bulk, BLOCK_N=half, **common,
    )  # fmt: skip
    _many_down[(tiles * ceil_div(down.n, block_n),)](
        _tiles(down, block_n, block_k) if bulk else h, h, order, counts, *down.pointers, y, n_experts, f, down.n,
        *down.n_scales, down.columns, KIND=down.kind, HAS_BIAS=down.bias is not None, BULK=bulk, BLOCK_N=block_n, **common,
    )  # fmt: skip
    block = min(1024, power_of_2(down.n))
    _sum_experts[(n, ceil_div(down.n, block))](
        y, weights, onto, out, down.n,
        WEIGHTED=not weight_input, ONTO=onto is not None, TOP_K=k, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _few_up(
        x_ptr, chosen_ptr, weights_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, h_ptr, top_k, F, N, K, s_rows, s_columns, columns,
        limit, alpha,
        KIND: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
        WEIGHT_INPUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        pair = tl.program_id(1).to(tl.int64)
        after_previous(OVERLAP)
        e = tl.load(chosen_ptr + pair).to(tl.int64)
        if GATED:
            n, mask = gate_and_up_rows(tl.program_id(0), F, ROWS)
        else:
            n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
            mask = n < F
        bytes_: tl.constexpr = 2 if KIND == 2 else 1
        w_ptr += e * N * (K // bytes_)
        s_ptr += e * s_rows * s_columns
        x_ptr += pair // top_k * K
        dtype = h_ptr.dtype.element_ty
        if WEIGHT_INPUT:  # x times its weight, rounded: a scale of the sum, but for that rounding
            a = tl.load(weights_ptr + pair).to(dtype).to(tl.float32)
            y = scaled_rows_times(x_ptr, a, w_ptr, n, mask, K, ROWS, BLOCK, dtype)
        else:
            y = rows_times(
                x_ptr,
                w_ptr,
                s_ptr,
                rows_ptr,
                n,
                mask,
                K,
                s_columns,
                columns,
                KIND,
                ROWS,
                BLOCK,
                OVERLAP,
                False,
            )
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

    @triton.jit
    def scaled_rows_times(
        x_ptr, a, w_ptr, n, n_mask, K, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr
    ):
        """`rows_times` of a x, with a x rounded to `DTYPE`, for a plain W."""
        k = tl.arange(0, BLOCK)
        at = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
        total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        w = tl.load(at, mask=n_mask[:, None] & (k < K)[None, :], other=0.0)
        for start in range(0, K, BLOCK):
            x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            ahead = start + BLOCK
            w_next = tl.load(at + ahead, mask=n_mask[:, None] & (ahead + k < K)[None, :], other=0.0)
            total += w.to(tl.float32) * (a * x).to(DTYPE).to(tl.float32)[None, :]
            w = w_next
        return tl.sum(total, 1)

    @triton.jit
    def _few_down(
        h_ptr, chosen_ptr, weights_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, onto_ptr, out_ptr, F, N, s_rows, s_columns, columns,
        KIND: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, ONTO: tl.constexpr, TOP_K: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(1).to(tl.int64)
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        mask = n < N
        dtype = out_ptr.dtype.element_ty
        bytes_: tl.constexpr = 2 if KIND == 2 else 1
        after_previous(OVERLAP)
        total = tl.zeros([ROWS], dtype=tl.float32)
        for j in range(TOP_K):
            pair = token * TOP_K + j
            e = tl.load(chosen_ptr + pair).to(tl.int64)
            y = rows_times(
                h_ptr + pair * F, w_ptr + e * N * (F // bytes_), s_ptr + e * s_rows * s_columns, rows_ptr, n, mask, F,
                s_columns, columns, KIND, ROWS, BLOCK, OVERLAP, False,
            )  # fmt: skip
            if HAS_BIAS:
                y += tl.load(b_ptr + e * N + n, mask=mask, other=0.0).to(tl.float32)
            y = y.to(dtype).to(tl.float32)
            if WEIGHTED:
                a = tl.load(weights_ptr + pair)
                y = y * a.to(tl.float32)
                if a.dtype == dtype:
                    y = y.to(dtype).to(tl.float32)
            total += y
        if ONTO:
            total = total.to(dtype).to(tl.float32) + tl.load(
                onto_ptr + token * N + n, mask=mask, other=0.0
            ).to(tl.float32)
        tl.store(out_ptr + token * N + n, total.to(dtype), mask=mask)

    @triton.jit
    def _count(chosen_ptr, counts_ptr, n_pairs, n_experts, E: tl.constexpr, BLOCK: tl.constexpr):
        block = tl.program_id(0)
        p, e = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E)
        expert = tl.load(chosen_ptr + p, mask=p < n_pairs, other=-1).to(tl.int32)
        counts = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
        tl.store(counts_ptr + block * n_experts + e, counts, mask=e < n_experts)

    @triton.jit
    def _place_pairs(
        chosen_ptr, counts_ptr, order_ptr, totals_ptr, n_pairs, n_experts, n_blocks,
        E: tl.constexpr, BLOCK: tl.constexpr, COUNTS: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0)
        p, e, b = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E), tl.arange(0, COUNTS)
        real = e < n_experts
        totals, before = tl.zeros([E], dtype=tl.int32), tl.zeros([E], dtype=tl.int32)
        for first in range(0, n_blocks, COUNTS):
            at = first + b
            mask = (at < n_blocks)[:, None] & real[None, :]
            counts = tl.load(counts_ptr + at[:, None] * n_experts + e[None, :], mask=mask, other=0)
            totals += tl.sum(counts, 0)
            before += tl.sum(tl.where((at < block)[:, None], counts, 0), 0)
        if block == 0:
            tl.store(totals_ptr + e, totals, mask=real)
        start = tl.cumsum(totals, 0) - totals + before  # where this block's first pair of each expert goes
        expert = tl.load(chosen_ptr + p, mask=p < n_pairs, other=-1).to(tl.int32)
        mine = (expert[:, None] == e[None, :]).to(tl.int32)
        rank = tl.cumsum(mine, 0) - 1
        to = tl.sum(mine * (rank + start[None, :]), 1)
        tl.store(order_ptr + to, p, mask=p < n_pairs)

    @triton.jit
    def tile_of(
        pid, counts_ptr, n_experts, width, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
    ):  # fmt: skip
        """(expert, first sorted row, rows left, first column) of a program's tile, when each expert's rows are cut
        into BLOCK_M and the `width` of the result into BLOCK_N. Rows left <= 0: there is no such tile.

        Tiles of the same rows come one after the other: they find what they read in L2."""
        across = tl.cdiv(width, BLOCK_N)
        tile = pid // across
        e = tl.arange(0, E)
        counts = tl.load(counts_ptr + e, mask=e < n_experts, other=0)
        tiles = (counts + BLOCK_M - 1) // BLOCK_M
        ends = tl.cumsum(tiles, 0)
        expert = tl.sum((ends <= tile).to(tl.int32), 0)
        here = e == expert
        into = (tile - tl.sum(tl.where(here, ends - tiles, 0), 0)) * BLOCK_M
        first = tl.sum(tl.where(e < expert, counts, 0), 0) + into
        left = tl.sum(tl.where(here, counts, 0), 0) - into
        return expert, first, left, pid % across * BLOCK_N

    @triton.jit
    def expert_weights(
        w_tiles, row, w_ptr, s_ptr, rows_ptr, n, n_mask, start, K, s_columns, columns,
        BULK: tl.constexpr, KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
    ):  # fmt: skip
        """`weight_tile` of one expert; by the copy engine (`BULK`) from the row of all experts' weights."""
        if BULK:
            w = w_tiles.load([row, start])
        else:
            w = weight_tile(
                w_ptr, s_ptr, rows_ptr, n, n_mask, start, K, s_columns, columns, KIND, BLOCK_N, BLOCK_K, DTYPE
            )
        return w

    @triton.jit
    def _many_up(
        w_tiles, x_ptr, order_ptr, counts_ptr, weights_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, h_ptr,
        n_experts, top_k, F, N, K, s_rows, s_columns, columns, limit, alpha,
        KIND: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHT_INPUT: tl.constexpr, BULK: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        e, first, left, column = tile_of(tl.program_id(0), counts_ptr, n_experts, F, E, BLOCK_M, BLOCK_N)
        if left <= 0:
            return
        row = e * N + column  # of the weights of all experts, one below the other
        e = e.to(tl.int64)
        m = tl.arange(0, BLOCK_M)
        m_mask = m < left
        pair = tl.load(order_ptr + first + m, mask=m_mask, other=0).to(tl.int64)
        f = column + tl.arange(0, BLOCK_N)
        f_mask = f < F
        dtype = h_ptr.dtype.element_ty
        bytes_: tl.constexpr = 2 if KIND == 2 else 1
        w_ptr += e * N * (K // bytes_)
        s_ptr += e * s_rows * s_columns
        k = tl.arange(0, BLOCK_K)
        at = x_ptr + (pair // top_k)[:, None] * K + k[None, :]
        gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        if WEIGHT_INPUT:
            a = tl.load(weights_ptr + pair, mask=m_mask, other=0.0).to(dtype).to(tl.float32)
        for start in range(0, K, BLOCK_K):
            x = tl.load(at + start, mask=m_mask[:, None] & (start + k < K)[None, :], other=0.0)
            if WEIGHT_INPUT:
                x = (x.to(tl.float32) * a[:, None]).to(dtype)
            w = expert_weights(
                w_tiles, row, w_ptr, s_ptr, rows_ptr, f, f_mask, start, K, s_columns, columns,
                BULK, KIND, BLOCK_N, BLOCK_K, dtype,
            )  # fmt: skip
            gate = tl.dot(x, tl.trans(w), gate, input_precision=PRECISION)
            if GATED:
                w = expert_weights(
                    w_tiles, row + F, w_ptr, s_ptr, rows_ptr, f + F, f_mask, start, K, s_columns, columns,
                    BULK, KIND, BLOCK_N, BLOCK_K, dtype,
                )  # fmt: skip
                up = tl.dot(x, tl.trans(w), up, input_precision=PRECISION)
        if HAS_BIAS:
            gate += tl.load(b_ptr + e * N + f, mask=f_mask, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(b_ptr + e * N + F + f, mask=f_mask, other=0.0).to(tl.float32)[None, :]
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        y = activate(gate, up, limit, alpha, ACT, GATED, dtype)
        at = h_ptr + (first + m).to(tl.int64)[:, None] * F + f[None, :]
        tl.store(at, y.to(dtype), mask=m_mask[:, None] & f_mask[None, :])

    @triton.jit
    def _many_down(
        w_tiles, h_ptr, order_ptr, counts_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, y_ptr,
        n_experts, F, N, s_rows, s_columns, columns, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, BULK: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        e, first, left, column = tile_of(tl.program_id(0), counts_ptr, n_experts, N, E, BLOCK_M, BLOCK_N)
        if left <= 0:
            return
        row = e * N + column  # of the weights of all experts, one below the other
        e = e.to(tl.int64)
        m = tl.arange(0, BLOCK_M)
        m_mask = m < left
        n = column + tl.arange(0, BLOCK_N)
        n_mask = n < N
        dtype = y_ptr.dtype.element_ty
        bytes_: tl.constexpr = 2 if KIND == 2 else 1
        w_ptr += e * N * (F // bytes_)
        s_ptr += e * s_rows * s_columns
        k = tl.arange(0, BLOCK_K)
        at = h_ptr + (first + m).to(tl.int64)[:, None] * F + k[None, :]
        y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, F, BLOCK_K):
            h = tl.load(at + start, mask=m_mask[:, None] & (start + k < F)[None, :], other=0.0)
            w = expert_weights(
                w_tiles, row, w_ptr, s_ptr, rows_ptr, n, n_mask, start, F, s_columns, columns,
                BULK, KIND, BLOCK_N, BLOCK_K, dtype,
            )  # fmt: skip
            y = tl.dot(h, tl.trans(w), y, input_precision=PRECISION)
        if HAS_BIAS:
            y += tl.load(b_ptr + e * N + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        pair = tl.load(order_ptr + first + m, mask=m_mask, other=0).to(tl.int64)
        at = y_ptr + pair[:, None] * N + n[None, :]
        tl.store(at, y.to(dtype), mask=m_mask[:, None] & n_mask[None, :])

    @triton.jit
    def _sum_experts(
        y_ptr, weights_ptr, onto_ptr, out_ptr, N,
        WEIGHTED: tl.constexpr, ONTO: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        dtype = out_ptr.dtype.element_ty
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for j in range(TOP_K):
            y = tl.load(y_ptr + (token * TOP_K + j) * N + n, mask=n < N, other=0.0).to(tl.float32)
            if WEIGHTED:
                a = tl.load(weights_ptr + token * TOP_K + j)
                y = y * a.to(tl.float32)
                if a.dtype == dtype:
                    y = y.to(dtype).to(tl.float32)
            total += y
        if ONTO:
            total = total.to(dtype).to(tl.float32) + tl.load(
                onto_ptr + token * N + n, mask=n < N, other=0.0
            ).to(tl.float32)
        tl.store(out_ptr + token * N + n, total.to(dtype), mask=n < N)
