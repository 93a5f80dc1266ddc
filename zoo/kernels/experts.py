"""The experts of a mixture: for each token the weighted sum of its `top_k` experts' MLPs.

Few tokens: see `zoo.kernels.few`. Many tokens: pairs (token, expert) are sorted by expert and two grouped
matrix products run over the sorted rows, gathered as they are read, the activation between gate and up
inside the first.

Unusual: nothing here waits for the host to learn how many tokens an expert has; the grid is the most there
could be, and programs without a tile return. Weights are plain, fp8, mxfp4 or integers; plain ones are fetched by the
copy engine where there is one, codes are widened by `zoo.kernels.codes` where that is faster.

Margin on an H100, 2048 tokens, bf16, sorting and summing included, against torch's `_grouped_mm` with the
gathering around it: 128 experts of 768 x 2048, top 8: 576 and 1061 us; 32 of 2880 x 2880, top 4: 1024 and
1264; 16 of 8192 x 5120, top 1: 1740 and 2259; 256 of 2048 x 7168, top 8: 8020 and 9690 (reading the weights
once takes 7490). Programs that read the same rows of x run one after the other: the other way round, x came from
memory once for each, and the last of these took 9230. An expert's last tile is half as high where that holds what
is left: on an H200 the products of the first take 408 us instead of 432, of the second 765 instead of 816. Nor do tiles of one expert follow each other column by column: up to
eight of them are multiplied by the same columns first, or an expert of more than 128 tokens is read again for the next (16
of 8192 x 5120, top 1: its products take 1590 us, 1900 before). One token: all of its experts' down rows are read at once, which
takes 24 layers of the first from 1.67 to 1.64 ms in bf16 and, with tiles of 8 x 512, to 1.42 in fp8.

Of codes on an H200, widened in fp32 on their way through shared memory and in the registers of tensor cores, for 1, 16 and 2048
tokens (`benchmarks/gpu_codes.py`): the first in int4 32 and 12, 200 and 111, 966 and 527 us, in fp8 with blocks 23 and 18, 189 and 136,
720 and 622; the second in mxfp4 57 and 33, 349 and 240, 1982 and 1265. Of fp8 the sums are multiplied by the scales, not the codes:
nearer to exact ones than weights rounded to bf16 are (errors of 0.34 and 0.44 % of an expert's output). Codes of prompts on Hopper are
`zoo.kernels.grouped`.

Tried and not faster there: asking for a row's bytes in L2 before x exists (by bulk copies; all of a step took 13 to 35 % longer), tiles
of 128 rows of x in prompts (mxfp4 1440 us by eight warps), or of 256 rows of codes, more scales in flight than one tile's (Triton copies nothing asynchronously then).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import codes, grouped
from zoo.kernels.few import few_tokens
from zoo.kernels.gated import code, gated_reference
from zoo.kernels.launch import Kernel, ceil_div, has_triton, hopper, power_of_2, triton
from zoo.kernels.weights import MXFP4, PLAIN, SCALED, Weight
from zoo.spec import MLP

GROUP = 8
"""Tiles of an expert's rows that are multiplied by the same columns of its weight one after the other."""

if triton is not None:
    import triton.language as tl

    from zoo.kernels.codes import affine, channel, finished, scales_tile, settled, widened
    from zoo.kernels.few import with_others
    from zoo.kernels.gated import activate
    from zoo.kernels.weights import WHOLE, scale_row, weight_tile


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
    same = all(
        w.whole if w.kind != PLAIN else w.codes.dtype == x.dtype and w.codes.is_contiguous()
        for w in (up, down)
    )
    return has_triton(x) and same and x.dtype != torch.float64 and x.is_contiguous()


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Weight,
    down: Weight,
    spec: MLP,
    weight_input: bool = False,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`experts_reference` by kernels (see `fits`). x [N, D], chosen and weights [N, k] -> [N, D], added to `shared`, and
    that to `residual`."""
    pairs, n_experts = chosen.numel(), up.codes.shape[0]
    chosen = chosen.contiguous()
    if x.shape[0] <= 2 or pairs <= n_experts // 4:
        return few_tokens(x, chosen, weights, up, down, spec, weight_input, shared, residual)
    return _many(x, chosen, weights, up, down, spec, weight_input, shared, residual)


def sort_by_expert(chosen: Tensor, n_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """chosen [N, k] -> the pairs in order of their expert [N k], equal ones in order; and the tiles of at most `rows` of
    them, of one expert each: [4, T], expert, its first pair, how many it has (0: no tile), which of its tiles. int32.
    A counting sort: blocks count, then place, their pairs, each adding up the counts itself."""
    pairs, e = chosen.numel(), power_of_2(n_experts)
    # More pairs to a block where there are many blocks, since each reads all counts; as many as registers hold.
    block = max(16, min(128 if pairs <= 1 << 16 else 256, 32768 // e))
    blocks, n_tiles = ceil_div(pairs, block), ceil_div(pairs, rows) + min(n_experts, pairs)
    counts = torch.empty(blocks, n_experts, dtype=torch.int32, device=chosen.device)
    tiles = torch.empty(4, n_tiles, dtype=torch.int32, device=chosen.device)
    order = torch.empty(pairs, dtype=torch.int32, device=chosen.device)
    warps = 4 if e <= 128 else 8
    _count[(blocks,)](chosen, counts, pairs, n_experts, E=e, BLOCK=block, num_warps=warps)
    share = 8  # tiles that a block writes down
    _place_pairs[(max(blocks, ceil_div(n_tiles, share)),)](
        chosen, counts, order, tiles, pairs, n_experts, blocks, n_tiles,
        E=e, BLOCK=block, COUNTS=max(1, 16384 // e), TILES=share, ROWS=rows, num_warps=warps,
    )  # fmt: skip
    return order, tiles


def sort_by_expert_reference(chosen: Tensor, n_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """`sort_by_expert` by torch, with the tiles that there are only."""
    flat = chosen.flatten()
    counts = (flat[None] == torch.arange(n_experts, device=flat.device)[:, None]).sum(1).tolist()
    tiles, first = [], 0
    for e, count in enumerate(counts):
        tiles += [(e, first, count, tile) for tile in range(ceil_div(count, rows))]
        first += count
    return flat.argsort(stable=True).to(torch.int32), torch.tensor(tiles, dtype=torch.int32).T


def grouped_tile(average: float, kind: int, exact: bool) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a tile of the grouped products, warps and stages, when an expert has `average`
    rows; rows are the same for both products. Measured on an H100."""
    if exact:
        return 16, 32, 32, 4, 3
    if average <= 32:
        return 16 if average <= 16 else 32, 128, 64, 4, 3
    if kind != PLAIN:
        return 128, 128, 64, 4, 3
    return (128, 256, 64, 8, 4) if average > 96 else (128, 128, 128, 8, 3)


def _bulk(x: Tensor, w: Weight) -> bool:
    """Whether tiles of the weight can be fetched by the copy engine (Hopper)."""
    aligned = w.codes.data_ptr() % 16 == 0 and w.k * w.codes.element_size() % 16 == 0
    return w.kind == PLAIN and x.dtype != torch.float32 and aligned and hopper(x)


def _tiny(x: Tensor, w: Weight) -> bool:
    """Whether tiles of the weight are 2^-60 of it (see `tiny_fp4`)."""
    return w.kind == MXFP4 and x.dtype == torch.bfloat16


def _tiles(w: Weight, rows: int, columns: int) -> Any:
    """The weights of all experts, one below the other, as tiles for the copy engine. A tile that reaches into
    the next expert is harmless: what comes of those rows is not stored."""
    key = rows, columns, w.codes.data_ptr()
    if key not in w.tiles:
        from triton.tools.tensor_descriptor import TensorDescriptor

        w.tiles[key] = TensorDescriptor.from_tensor(w.codes.view(-1, w.k), [rows, columns])
    return w.tiles[key]


def _many(
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
    if not weight_input and grouped.serves(x, up, down, spec) and grouped.pays(chosen, up, down):
        return _many_grouped(x, chosen, weights, up, down, spec, shared, residual)
    if not weight_input and _as_codes(x, up) and _as_codes(x, down):
        return _many_codes(x, chosen, weights, up, down, spec, shared, residual)
    (n, k), f, n_experts = chosen.shape, down.k, up.codes.shape[0]
    pairs = n * k
    h, y = x.new_empty(pairs, f), x.new_empty(pairs, down.n)
    out = torch.empty_like(x)
    exact = x.dtype == torch.float32
    block_m, block_n, block_k, warps, stages = grouped_tile(pairs / n_experts, up.kind, exact)
    order, tiles = sort_by_expert(chosen, n_experts, block_m)
    n_tiles = tiles.shape[1]
    bulk = _bulk(x, up) and _bulk(x, down)
    least = block_m // 2 if bulk and block_m > 64 else block_m
    common = dict(BULK=bulk, BLOCK_M=block_m, LEAST=least, GROUP=GROUP, PRECISION="ieee" if exact else "tf32")
    half = block_n // 2 if spec.gated else block_n
    _many_up[(n_tiles * ceil_div(f, half),)](
        _tiles(up, half, block_k) if bulk else x, x, order, tiles, weights, *up.pointers, h, n_tiles, k, f, up.n, up.k,
        *up.n_scales, up.columns, spec.limit or 0.0, spec.alpha,
        KIND=up.kind, TINY=_tiny(x, up), ACT=code(spec), GATED=spec.gated,
        HAS_BIAS=up.bias is not None, WEIGHT_INPUT=weight_input, BLOCK_N=half, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        **common,
    )  # fmt: skip
    _many_down[(n_tiles * ceil_div(down.n, block_n),)](
        _tiles(down, block_n, block_k) if bulk else h, h, order, tiles, *down.pointers, y, n_tiles, f, down.n,
        *down.n_scales, down.columns,
        KIND=down.kind, TINY=_tiny(x, down), HAS_BIAS=down.bias is not None, BLOCK_N=block_n,
        BLOCK_K=block_k, num_warps=warps, num_stages=stages, **common,
    )  # fmt: skip
    _sum(y, weights, shared, residual, out, k, weighted=not weight_input)
    return out


def _many_grouped(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Weight,
    down: Weight,
    spec: MLP,
    shared: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """`_many` by `zoo.kernels.grouped`."""
    out, top_k = torch.empty_like(x), chosen.shape[1]
    order, tiles = sort_by_expert(chosen, up.codes.shape[0], grouped.MOST)
    h = grouped.up_rows(x, order, tiles, up, down, spec, top_k)
    y = grouped.down_rows(h, order, tiles, down)
    _sum(y, weights, shared, residual, out, top_k, weighted=True)
    return out


def _many_codes(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Weight,
    down: Weight,
    spec: MLP,
    shared: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """`_many` by `zoo.kernels.codes`."""
    (n, k), f, n_experts = chosen.shape, down.k, up.codes.shape[0]
    h, y = x.new_empty(n * k, f), x.new_empty(n * k, down.n)
    out = torch.empty_like(x)
    block_m, block_n, block_k, warps, stages = codes.grouped_tile(n * k / n_experts, up, down)
    order, tiles = sort_by_expert(chosen, n_experts, block_m)
    n_tiles = tiles.shape[1]
    common: dict[str, Any] = dict(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP=GROUP,
        num_warps=warps,
        num_stages=stages,
        **codes.grouped_registers(n * k / n_experts, up, down),
    )
    _many_up_codes[(n_tiles * ceil_div(f, block_n // 2 if spec.gated else block_n),)](
        codes.in_order(x, up), order, tiles, *up.pointers, h, n_tiles, k, f, up.n, up.k, *up.n_scales,
        spec.limit or 0.0, spec.alpha,
        KIND=up.kind, COLUMNS=codes.sharing(up), NEXT=down.kind, ACT=code(spec), GATED=spec.gated, HAS_BIAS=up.bias is not None, **common,
    )  # fmt: skip
    _many_down_codes[(n_tiles * ceil_div(down.n, block_n),)](
        h, order, tiles, *down.pointers, y, n_tiles, f, down.n, *down.n_scales,
        KIND=down.kind, COLUMNS=codes.sharing(down), HAS_BIAS=down.bias is not None, **common,
    )  # fmt: skip
    _sum(y, weights, shared, residual, out, k, weighted=True)
    return out


def _as_codes(x: Tensor, w: Weight) -> bool:
    """Whether grouped products widen the codes of w in registers: rows of whole tiles."""
    return codes.serves(x, w) and w.k % 64 == 0 and (w.kind in SCALED or w.columns % 64 == 0)


def _sum(
    y: Tensor,
    weights: Tensor,
    shared: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    k: int,
    weighted: bool,
) -> None:
    """Adds up what a token's experts gave, y [N k, D], and the others, into out [N, D]."""
    n, d = out.shape
    block = min(1024, power_of_2(d))
    _sum_experts[(n, ceil_div(d, block))](
        y, weights, shared, residual, out, d,
        WEIGHTED=weighted, TOP_K=k, BLOCK=block, num_warps=4,
    )  # fmt: skip


if triton is not None:

    @Kernel
    def _count(chosen_ptr, counts_ptr, n_pairs, n_experts, E: tl.constexpr, BLOCK: tl.constexpr):
        block = tl.program_id(0)
        p, e = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E)
        expert = tl.load(chosen_ptr + p, mask=p < n_pairs, other=-1).to(tl.int32)
        counts = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
        tl.store(counts_ptr + block * n_experts + e, counts, mask=e < n_experts)

    @Kernel
    def _place_pairs(
        chosen_ptr, counts_ptr, order_ptr, tiles_ptr, n_pairs, n_experts, n_blocks, n_tiles,
        E: tl.constexpr, BLOCK: tl.constexpr, COUNTS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
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
        begins = tl.cumsum(totals, 0) - totals
        expert = tl.load(chosen_ptr + p, mask=p < n_pairs, other=-1).to(tl.int32)
        mine = (expert[:, None] == e[None, :]).to(tl.int32)
        rank = tl.cumsum(mine, 0) - 1
        to = tl.sum(mine * (rank + (begins + before)[None, :]), 1)
        tl.store(order_ptr + to, p, mask=p < n_pairs)
        # This block's share of the table of tiles.
        t = block * TILES + tl.arange(0, TILES)
        tiles = (totals + ROWS - 1) // ROWS
        ends = tl.cumsum(tiles, 0)
        expert = tl.sum((ends[None, :] <= t[:, None]).to(tl.int32), 1)
        here = e[None, :] == expert[:, None]
        at = tiles_ptr + t
        tl.store(at, expert, mask=t < n_tiles)
        tl.store(at + n_tiles, tl.sum(tl.where(here, begins[None, :], 0), 1), mask=t < n_tiles)
        tl.store(at + 2 * n_tiles, tl.sum(tl.where(here, totals[None, :], 0), 1), mask=t < n_tiles)
        tile = t - tl.sum(tl.where(here, (ends - tiles)[None, :], 0), 1)
        tl.store(at + 3 * n_tiles, tile, mask=t < n_tiles)

    @triton.jit
    def tile_of(
        pid, tiles_ptr, n_tiles, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
    ):
        """(expert, first sorted row, rows left, first column) of a program's tile, when the `width` of the result is
        cut into BLOCK_N. Programs that run together find what they read in L2: GROUP tiles of an expert's rows are
        multiplied by the same columns of its weight before the next columns are."""
        across = tl.cdiv(width, BLOCK_N)
        at = tiles_ptr + pid // across
        expert, first, count = tl.load(at), tl.load(at + n_tiles), tl.load(at + 2 * n_tiles)
        tile = tl.load(at + 3 * n_tiles)
        group = tile // GROUP * GROUP
        together = tl.maximum(tl.minimum(GROUP, tl.cdiv(count, BLOCK_M) - group), 1)
        i = (tile - group) * across + pid % across  # of the group's programs
        into = (group + i % together) * BLOCK_M
        return expert, first + into, count - into, i // together * BLOCK_N

    @triton.jit
    def expert_weights(
        w_tiles, row, w_ptr, s_ptr, rows_ptr, n, n_mask, start, K, s_columns, columns,
        BULK: tl.constexpr, KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
        TINY: tl.constexpr,
    ):  # fmt: skip
        """`weight_tile` of one expert; by the copy engine (`BULK`) from the row of all experts' weights."""
        if BULK:
            w = w_tiles.load([row, start])
        else:
            w = weight_tile(
                w_ptr, s_ptr, rows_ptr, n, n_mask, start, K, s_columns, columns,
                KIND, BLOCK_N, BLOCK_K, DTYPE, TINY,
            )  # fmt: skip
        return w

    @triton.jit
    def up_rows(
        w_tiles, x_ptr, order_ptr, weights_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, h_ptr,
        e, first, left, column, top_k, F, N, K, s_rows, s_columns, columns, limit, alpha,
        KIND: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHT_INPUT: tl.constexpr, BULK: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TINY: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_N columns of h for the (at most BLOCK_M) rows left of expert e from its pair `first` on."""
        row = e * N + column  # of the weights of all experts, one below the other
        e = e.to(tl.int64)
        m = tl.arange(0, BLOCK_M)
        m_mask = m < left
        pair = tl.load(order_ptr + first + m, mask=m_mask, other=0).to(tl.int64)
        f = column + tl.arange(0, BLOCK_N)
        f_mask = f < F
        dtype = h_ptr.dtype.element_ty
        bytes_: tl.constexpr = 2 if KIND >= 3 else 1
        w_ptr += e * N * (K // bytes_)
        if KIND != 0:
            s_ptr += e * s_rows * s_columns
        k = tl.arange(0, BLOCK_K)
        at = x_ptr + (pair // top_k)[:, None] * K + k[None, :]
        gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        up = gate
        if WEIGHT_INPUT:
            a = tl.load(weights_ptr + pair, mask=m_mask, other=0.0).to(dtype).to(tl.float32)
        for start in range(0, K, BLOCK_K):
            x = tl.load(at + start, mask=m_mask[:, None] & (start + k < K)[None, :], other=0.0)
            if WEIGHT_INPUT:
                x = (x.to(tl.float32) * a[:, None]).to(dtype)
            w = expert_weights(
                w_tiles, row, w_ptr, s_ptr, rows_ptr, f, f_mask, start, K, s_columns, columns,
                BULK, KIND, BLOCK_N, BLOCK_K, dtype, TINY,
            )  # fmt: skip
            gate = tl.dot(x, tl.trans(w), gate, input_precision=PRECISION)
            if GATED:
                w = expert_weights(
                    w_tiles, row + F, w_ptr, s_ptr, rows_ptr, f + F, f_mask, start, K, s_columns, columns,
                    BULK, KIND, BLOCK_N, BLOCK_K, dtype, TINY,
                )  # fmt: skip
                up = tl.dot(x, tl.trans(w), up, input_precision=PRECISION)
        if TINY:
            gate, up = gate * WHOLE, up * WHOLE
        if HAS_BIAS:
            gate += tl.load(b_ptr + e * N + f, mask=f_mask, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(b_ptr + e * N + F + f, mask=f_mask, other=0.0).to(tl.float32)[None, :]
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        y = activate(gate, up, limit, alpha, ACT, GATED, dtype)
        at = h_ptr + (first + m).to(tl.int64)[:, None] * F + f[None, :]
        tl.store(at, y.to(dtype), mask=m_mask[:, None] & f_mask[None, :])

    @Kernel
    def _many_up(
        w_tiles, x_ptr, order_ptr, tiles_ptr, weights_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, h_ptr,
        n_tiles, top_k, F, N, K, s_rows, s_columns, columns, limit, alpha,
        KIND: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHT_INPUT: tl.constexpr, BULK: tl.constexpr,
        BLOCK_M: tl.constexpr, LEAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
        TINY: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        e, first, left, column = tile_of(tl.program_id(0), tiles_ptr, n_tiles, F, BLOCK_M, BLOCK_N, GROUP)
        if left <= 0:
            return
        if left > BLOCK_M - LEAST:
            up_rows(
                w_tiles, x_ptr, order_ptr, weights_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, h_ptr,
                e, first, left, column, top_k, F, N, K, s_rows, s_columns, columns, limit, alpha,
                KIND, ACT, GATED, HAS_BIAS, WEIGHT_INPUT, BULK, BLOCK_M, BLOCK_N, BLOCK_K, TINY, PRECISION,
            )  # fmt: skip
        elif LEAST < BLOCK_M:
            up_rows(
                w_tiles, x_ptr, order_ptr, weights_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, h_ptr,
                e, first, left, column, top_k, F, N, K, s_rows, s_columns, columns, limit, alpha,
                KIND, ACT, GATED, HAS_BIAS, WEIGHT_INPUT, BULK, LEAST, BLOCK_N, BLOCK_K, TINY, PRECISION,
            )  # fmt: skip

    @triton.jit
    def down_rows(
        w_tiles, h_ptr, order_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, y_ptr,
        e, first, left, column, F, N, s_rows, s_columns, columns, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, BULK: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TINY: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """As `up_rows`, of y."""
        row = e * N + column  # of the weights of all experts, one below the other
        e = e.to(tl.int64)
        m = tl.arange(0, BLOCK_M)
        m_mask = m < left
        n = column + tl.arange(0, BLOCK_N)
        n_mask = n < N
        dtype = y_ptr.dtype.element_ty
        bytes_: tl.constexpr = 2 if KIND >= 3 else 1
        w_ptr += e * N * (F // bytes_)
        if KIND != 0:
            s_ptr += e * s_rows * s_columns
        k = tl.arange(0, BLOCK_K)
        at = h_ptr + (first + m).to(tl.int64)[:, None] * F + k[None, :]
        y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, F, BLOCK_K):
            h = tl.load(at + start, mask=m_mask[:, None] & (start + k < F)[None, :], other=0.0)
            w = expert_weights(
                w_tiles, row, w_ptr, s_ptr, rows_ptr, n, n_mask, start, F, s_columns, columns,
                BULK, KIND, BLOCK_N, BLOCK_K, dtype, TINY,
            )  # fmt: skip
            y = tl.dot(h, tl.trans(w), y, input_precision=PRECISION)
        if TINY:
            y *= WHOLE
        if HAS_BIAS:
            y += tl.load(b_ptr + e * N + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        pair = tl.load(order_ptr + first + m, mask=m_mask, other=0).to(tl.int64)
        at = y_ptr + pair[:, None] * N + n[None, :]
        tl.store(at, y.to(dtype), mask=m_mask[:, None] & n_mask[None, :])

    @Kernel
    def _many_down(
        w_tiles, h_ptr, order_ptr, tiles_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, y_ptr,
        n_tiles, F, N, s_rows, s_columns, columns, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, BULK: tl.constexpr,
        BLOCK_M: tl.constexpr, LEAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
        TINY: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        e, first, left, column = tile_of(tl.program_id(0), tiles_ptr, n_tiles, N, BLOCK_M, BLOCK_N, GROUP)
        if left <= 0:
            return
        if left > BLOCK_M - LEAST:
            down_rows(
                w_tiles, h_ptr, order_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, y_ptr,
                e, first, left, column, F, N, s_rows, s_columns, columns,
                KIND, HAS_BIAS, BULK, BLOCK_M, BLOCK_N, BLOCK_K, TINY, PRECISION,
            )  # fmt: skip
        elif LEAST < BLOCK_M:
            down_rows(
                w_tiles, h_ptr, order_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, y_ptr,
                e, first, left, column, F, N, s_rows, s_columns, columns,
                KIND, HAS_BIAS, BULK, LEAST, BLOCK_N, BLOCK_K, TINY, PRECISION,
            )  # fmt: skip

    @triton.jit
    def grouped_times(
        x_at, w_ptr, n, s_ptr, s_row, K, s_columns,
        KIND: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """Rows n [BLOCK_N] of codes times the rows of x that begin at x_at [BLOCK_M], channels `codes.in_order`: fp32."""
        CODES: tl.constexpr = 8 if KIND >= 3 else 4
        words = K // 64 * (64 // CODES)
        k, word = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // CODES)
        at = w_ptr.to(tl.pointer_type(tl.uint32)) + n.to(tl.int64)[:, None] * words + word[None, :]
        s_at = s_ptr + s_row.to(tl.int64) * s_columns
        x_at, first = x_at[:, None] + k[None, :], s_row * 0
        dtype: tl.constexpr = x_at.dtype.element_ty
        REST: tl.constexpr = s_ptr.dtype.element_ty != dtype
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        s = scales_tile(s_at, first, K, COLUMNS, KIND, BLOCK_K)
        for start in range(0, K, BLOCK_K):
            w, x = tl.load(at + start // CODES), tl.load(x_at + start)
            if KIND == 3 or KIND == 6 or KIND == -3:  # see `codes_times`
                s = scales_tile(s_at, first + start, K, COLUMNS, KIND, BLOCK_K)
                s_next = s
            else:
                s_next = scales_tile(s_at, first + start + BLOCK_K, K, COLUMNS, KIND, BLOCK_K)
            a = widened(w, s, BLOCK_N, BLOCK_K, 16 // CODES, KIND, dtype)
            if KIND == 2:
                acc += tl.dot(a, tl.trans(x), input_precision="ieee") * s.to(tl.float32)[:, None]
            elif KIND == 5 or KIND == -2:
                acc = affine(
                    acc, tl.dot(a, tl.trans(x), input_precision="ieee"), s, tl.sum(x.to(tl.float32), 1)
                )
            else:
                if KIND == 4:  # rounded once, as if s were whole: what is left of it counts before
                    whole = s.to(dtype)
                    rest = (s.to(tl.float32) - whole.to(tl.float32)).to(dtype)
                    a = a * whole[:, None] + a * rest[:, None] if REST else a * whole[:, None]
                acc = settled(tl.dot(a, tl.trans(x), acc, input_precision="ieee"), dtype)
            s = s_next
        return finished(acc, s_at, KIND)

    @Kernel
    def _many_up_codes(
        x_ptr, order_ptr, tiles_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, h_ptr,
        n_tiles, top_k, F, N, K, s_rows, s_columns, limit, alpha,
        KIND: tl.constexpr, COLUMNS: tl.constexpr, NEXT: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
        tl.static_assert(WIDTH % 64 == 0)
        e, first, left, column = tile_of(tl.program_id(0), tiles_ptr, n_tiles, F, BLOCK_M, WIDTH, GROUP)
        if left <= 0:
            return
        e = e.to(tl.int64)
        m = tl.arange(0, BLOCK_M)
        m_mask = m < left
        pair = tl.load(order_ptr + first + m, mask=m_mask, other=0).to(tl.int64)
        # Rows of gate, then of up, as codes of the next product are widened.
        r = tl.arange(0, BLOCK_N)
        f = column + channel(r % WIDTH, NEXT)
        n = tl.where(f < F, f + r // WIDTH * F, 0)
        w_ptr += e * N * (K // (2 if KIND >= 3 else 1))
        s_ptr += e * s_rows * s_columns
        y = grouped_times(
            x_ptr + pair // top_k * K, w_ptr, n, s_ptr, scale_row(rows_ptr, n, n < N, KIND), K, s_columns,
            KIND, COLUMNS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        dtype = h_ptr.dtype.element_ty
        if HAS_BIAS:
            y += tl.load(b_ptr + e * N + n).to(tl.float32)[:, None]
        y = y.to(dtype).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(y, (2, WIDTH, BLOCK_M)), (1, 2, 0)))
            y = activate(gate, up, limit, alpha, ACT, True, dtype)
        else:
            y = activate(y, y, limit, alpha, ACT, False, dtype)
        f = column + tl.arange(0, WIDTH)
        at = h_ptr + (first + m).to(tl.int64)[None, :] * F + f[:, None]
        tl.store(at, y.to(dtype), mask=m_mask[None, :] & (f < F)[:, None])

    @Kernel
    def _many_down_codes(
        h_ptr, order_ptr, tiles_ptr, w_ptr, s_ptr, rows_ptr, b_ptr, y_ptr, n_tiles, F, N, s_rows, s_columns,
        KIND: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        e, first, left, column = tile_of(tl.program_id(0), tiles_ptr, n_tiles, N, BLOCK_M, BLOCK_N, GROUP)
        if left <= 0:
            return
        e = e.to(tl.int64)
        m = tl.arange(0, BLOCK_M)
        m_mask = m < left
        n = column + tl.arange(0, BLOCK_N)
        n_mask = n < N
        row = tl.where(n_mask, n, 0)
        w_ptr += e * N * (F // (2 if KIND >= 3 else 1))
        s_ptr += e * s_rows * s_columns
        y = grouped_times(
            h_ptr + (first + tl.minimum(m, left - 1)).to(tl.int64) * F, w_ptr, row, s_ptr, scale_row(rows_ptr, row, n_mask, KIND),
            F, s_columns, KIND, COLUMNS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if HAS_BIAS:
            y += tl.load(b_ptr + e * N + row).to(tl.float32)[:, None]
        pair = tl.load(order_ptr + first + m, mask=m_mask, other=0).to(tl.int64)
        at = y_ptr + pair[None, :] * N + n[:, None]
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=m_mask[None, :] & n_mask[:, None])

    @Kernel
    def _sum_experts(
        y_ptr, weights_ptr, shared_ptr, residual_ptr, out_ptr, N,
        WEIGHTED: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
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
        at = token * N + n
        total = with_others(total, shared_ptr, residual_ptr, at, n < N, dtype)
        tl.store(out_ptr + at, total.to(dtype), mask=n < N)
