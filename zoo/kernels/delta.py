"""Gated delta rule: linear attention with a state per head that forgets and is corrected.

    S = decay * S;  S += k (beta (v - S^T k))^T;  o = S^T q                  S [K, V]

Gated DeltaNet (arXiv 2412.06464) decays a head by one number, KDA (arXiv 2510.26692) each key channel by its own. Not
`corrected`, S += k (beta v)^T, it is the state space of Mamba-2 (arXiv 2405.21060), whose B, C and dt are k, q and beta.

Few tokens go one after the other, many in chunks. With G the decay accumulated within a chunk (in logs), S the state
before it, and A_tj = sum_c k_tc k_jc e^(G_tc - G_jc) for j < t, the corrections of a chunk, u_t = beta_t (v_t - S_t^T k_t),
solve (1 + beta A) U = beta (V - (e^G k) S). Where corrected, queries and keys are L2-normalised.

Unusual: everything is fp32, and exponents are of what lies between two tokens only, so that nothing overflows and strong
decay loses no small differences: the plain version takes differences of sums in fp64, the kernels add up what lies between.
Tensor cores multiply fp32 in parts: for a model in bf16 two of bf16 (to 2^-16), else two of tf32 (to 2^-22).

A prompt takes three kernels. `_chunks`, of all chunks at once: the inverse of each system, the weights between a chunk's own
tokens, and decays. `_states`: the state from chunk to chunk, and what is added to it; a program per head and 16 of its columns.
`_outputs`, of all chunks again. `_steps` is the recurrence itself.

Where a kernel has two warps it is to keep it from Hopper's asynchronous products: with four, and more of them in a loop than
uniform registers hold, what ptxas 12.8 (of Triton 3.6) makes of `_states` reads outside of shared memory, or is wrong by half;
ptxas 13.0 is right.

Margin on an H100, 2048 tokens in bf16, 32 heads of 128 x 128: 0.41 ms where the plain version takes 2.4 (both as a CUDA graph); by
channel 1.21 and 10.9 ms. One token: 5 us, and 58.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.launch import Kernel, ceil_div, has_triton, is_recorded, overlap, power_of_2, triton

if triton is not None:
    import triton.language as tl

    from zoo.kernels.gated import sigmoid
    from zoo.kernels.launch import after_previous

FEW = 16  # tokens, up to which one after the other is faster than a chunk
CHUNK, BLOCK = 64, 16  # tokens of a chunk; and of a block, whose rows are eliminated one by one
SEGMENT = 4096  # tokens at a time: what lies between the kernels takes 66-115 KB per token of 32 heads


def gates_reference(
    dt: Tensor, beta: Tensor | None, A_log: Tensor, dt_bias: Tensor, least: float = 0.0
) -> tuple[Tensor, Tensor]:
    """dt [B, T, H, 1 or K], beta [B, T, H], A_log [H], dt_bias of as many as dt's last two: the log of the decay,
    -e^A softplus(dt + dt_bias), and beta's sigmoid. Without beta, as Mamba-2 has it, softplus is in the dtype of dt and
    at least `least`, and the second is that [B, T, H]. Both in fp32."""
    A, bias = -A_log.float().exp()[:, None], dt_bias.view(dt.shape[-2:])
    if beta is not None:
        return A * F.softplus(dt.float() + bias.float()), beta.sigmoid().float()
    dt = F.softplus(dt + bias.to(dt.dtype)).clamp(min=least).float()
    return A * dt, dt.squeeze(-1)


def mix_reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, corrected: bool = True
) -> Tensor:
    """q, k [B, T, G, K], v [B, T, H, V], each of the G keys for H / G heads; log_decay [B, T, H, 1 or K] and
    beta [B, T, H] in fp32; `state` [B, H, K, V], fp32, is updated in place. Where corrected, q and k are L2-normalised, q
    is divided by sqrt(K), and the result is in the dtype of v. Returns [B, T, H, V]."""
    dtype, repeat = v.dtype if corrected else torch.float32, v.shape[2] // k.shape[2]
    q, k, v, log_decay = (x.float().transpose(1, 2) for x in (q, k, v, log_decay))
    beta = beta.transpose(1, 2).unsqueeze(-1)
    if corrected:
        q, k = unit(q) * q.shape[-1] ** -0.5, unit(k)
    if repeat > 1:
        q, k = q.repeat_interleave(repeat, 1), k.repeat_interleave(repeat, 1)
    if q.shape[2] == 1:
        q, k, v, log_decay, beta = (x.squeeze(2) for x in (q, k, v, log_decay, beta))
        y = step(q, k, v, log_decay, beta, state, corrected).unsqueeze(2)
    else:
        y = scan(q, k, v, log_decay, beta, state, corrected)
    return y.transpose(1, 2).to(dtype)


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, corrected: bool = True
) -> Tensor:
    """One token. q, k [B, H, K], v [B, H, V], log_decay [B, H, K or 1], beta [B, H, 1]; `state`
    [B, H, K, V] is updated in place. Returns [B, H, V]. All fp32."""
    in_place = not is_recorded(v)  # where gradients are, no cache has the state, and each is needed again
    decay = log_decay.exp().unsqueeze(-1)
    state = state.mul_(decay) if in_place else state * decay
    u = beta * (v - torch.einsum("bhkv,bhk->bhv", state, k) if corrected else v)
    added = k.unsqueeze(-1) * u.unsqueeze(-2)
    state = state.add_(added) if in_place else state + added
    return torch.einsum("bhkv,bhk->bhv", state, q)


def scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, corrected: bool = True
) -> Tensor:
    """Many tokens, in chunks. q, k [B, H, T, K], v [B, H, T, V], log_decay [B, H, T, K or 1], beta
    [B, H, T, 1]; `state` [B, H, K, V] is updated in place. Returns [B, H, T, V]. All fp32."""
    size = (
        BLOCK if log_decay.shape[-1] > 1 else CHUNK
    )  # per channel, the pairs of a chunk are [size, size, K]
    T = q.shape[2]
    q, k, v, log_decay, beta = (
        F.pad(x, (0, 0, 0, -T % size)).unflatten(2, (-1, size)) for x in (q, k, v, log_decay, beta)
    )  # [B, H, N, C, ...]
    G = log_decay.double().cumsum(-2)
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    M = _pairs(q, k, G, lower)  # [B, H, N, C, C]
    grown, last = G.float().exp(), G[..., -1:, :]
    U, W = beta * v, None  # what is added because of the chunk, and because of the state before
    if corrected:
        system = beta * _pairs(k, k, G, lower).tril(-1)  # the unit diagonal is implied
        rhs = torch.cat((U, beta * grown * k), -1)
        solved = torch.linalg.solve_triangular(system, rhs, upper=False, unitriangular=True)
        U, W = solved.split((v.shape[-1], k.shape[-1]), -1)
    q, k = q * grown, k * (last - G).float().exp()
    kept = last.float().exp().transpose(-1, -2)  # [B, H, N, K or 1, 1]
    in_place = not is_recorded(v)
    out = []
    for n in range(q.shape[2]):
        u = U[:, :, n] if W is None else U[:, :, n] - W[:, :, n] @ state  # [B, H, C, V]
        out.append(q[:, :, n] @ state + M[:, :, n] @ u)
        decay, added = kept[:, :, n], k[:, :, n].transpose(-1, -2) @ u
        state = state.mul_(decay).add_(added) if in_place else state * decay + added
    return torch.cat(out, 2)[:, :, :T]


def _pairs(a: Tensor, b: Tensor, G: Tensor, lower: Tensor) -> Tensor:
    """sum_c a_tc b_jc e^(G_tc - G_jc) for j <= t, else 0. [..., C, K] -> [..., C, C]"""
    if G.shape[-1] == 1:
        decay = (G - G.transpose(-1, -2)).float().masked_fill(~lower, -torch.inf).exp()
        return (a @ b.transpose(-1, -2)) * decay
    diff = (G.unsqueeze(-2) - G.unsqueeze(-3)).float()  # [..., C, C, K]
    diff = diff.masked_fill_(~lower.unsqueeze(-1), -torch.inf)
    return torch.einsum("...tk,...tjk,...jk->...tj", a, diff.exp_(), b)


def gates(
    dt: Tensor, beta: Tensor | None, A_log: Tensor, dt_bias: Tensor, least: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`gates_reference`, as one kernel where Triton runs."""
    b, t, h, width = dt.shape
    inner = dt.stride(-2) == width and (width == 1 or dt.stride(-1) == 1)
    if (
        not has_triton(dt)
        or dt.dtype == torch.float64
        or not inner
        or (beta is not None and beta.stride(-1) != 1)
    ):
        return gates_reference(dt, beta, A_log, dt_bias, least)
    log_decay = dt.new_empty(b, t, h, width, dtype=torch.float32)
    second = dt.new_empty(b, t, h, dtype=torch.float32)
    block = min(1024, power_of_2(h * width))
    _gates[(t, ceil_div(h * width, block), b)](
        dt, beta, A_log, dt_bias, log_decay, second, h, width, least, *dt.stride()[:2],
        *((0, 0) if beta is None else beta.stride()[:2]), DELTA=beta is not None, BLOCK=block, num_warps=4, **overlap(dt),
    )  # fmt: skip
    return log_decay, second


def mix(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, corrected: bool = True
) -> Tensor:
    """`mix_reference`, by kernels where Triton runs."""
    if not _fits(q, k, v, state):
        return mix_reference(q, k, v, log_decay, beta, state, corrected)
    (b, t, h, width), keys = v.shape, k.shape[-1]
    if t > SEGMENT:
        pieces = zip(*(x.split(SEGMENT, 1) for x in (q, k, v, log_decay, beta)), strict=True)
        return torch.cat([mix(q, k, v, decay, beta, state, corrected) for q, k, v, decay, beta in pieces], 1)
    log_decay, beta = log_decay.contiguous(), beta.contiguous()
    out = v.new_empty(b, t, h, width, dtype=v.dtype if corrected else torch.float32)
    scale = keys**-0.5 if corrected else 1.0
    by_channel = log_decay.shape[-1] > 1
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    shape = (t, h, h // k.shape[2], keys, width, scale, *strides)
    kind: dict[str, Any] = dict(
        K=power_of_2(keys, 16), CORRECT=corrected, BY_CHANNEL=by_channel, **overlap(v)
    )
    if t <= FEW:
        columns = min(16, power_of_2(width))
        _steps[(ceil_div(width, columns), h, b)](
            q, k, v, log_decay, beta, state, out, *shape, COLUMNS=columns, num_warps=4, **kind
        )
        return out
    n, split = ceil_div(t, CHUNK), v.dtype == torch.bfloat16
    kind |= dict(CHUNK=CHUNK, SPLIT=split, num_stages=1)
    parts, dtype = (2, torch.bfloat16) if split else (1, torch.float32)
    within = v.new_empty(parts, b, h, n, CHUNK, CHUNK, dtype=dtype)
    inverse = torch.empty_like(within) if corrected else None
    decayed = v.new_empty(3, parts, b, h, n, CHUNK, keys, dtype=dtype) if by_channel else None
    factors = v.new_empty(3, b, h, n, CHUNK, dtype=torch.float32)
    kept = v.new_empty(b, h, n, log_decay.shape[-1], dtype=torch.float32)
    states = v.new_empty(parts, b, h, n, keys, width, dtype=dtype)
    added = v.new_empty(parts, b, h, n, CHUNK, width, dtype=dtype)
    _chunks[(n, h, b)](
        q, k, log_decay, beta, inverse, within, decayed, factors, kept, *shape,
        BLOCK=BLOCK, SLICE=min(32, kind["K"]), num_warps=4 if split else 2, **kind,
    )  # fmt: skip
    columns = 16
    _states[(ceil_div(width, columns), h, b)](
        k, v, beta, inverse, decayed, factors, kept, state, states, added, *shape,
        COLUMNS=columns, num_warps=2, **kind,
    )  # fmt: skip
    columns = min(64 if split else 32, power_of_2(width, 16))
    _outputs[(ceil_div(width, columns) * n, h, b)](
        q, within, decayed, factors, states, added, out, n, *shape, COLUMNS=columns, num_warps=4, **kind
    )
    return out


def _fits(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> bool:
    unit = q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    whole = state.is_contiguous() and state.dtype == torch.float32
    return has_triton(v) and unit and whole and k.shape[-1] <= 128 and v.dtype != torch.float64


if triton is not None:

    @triton.jit
    def stored_rows(ptr, first, rows, columns, stride, n_rows, n_columns):
        """Rows `first` + rows [rows, columns], 0 outside. (Only the first row's place needs 64 bits.)"""
        mask = (first + rows < n_rows)[:, None] & (columns < n_columns)[None, :]
        ptr += tl.cast(first, tl.int64) * stride
        return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)

    @triton.jit
    def rows_of(ptr, first, rows, columns, stride, n_rows, n_columns):
        """The same, in fp32."""
        return stored_rows(ptr, first, rows, columns, stride, n_rows, n_columns).to(tl.float32)

    @triton.jit
    def softplus(x):
        e = tl.exp(tl.minimum(x, 20.0))
        one = 1.0 + e  # log(1 + e) e / ((1 + e) - 1) is exact where 1 + e is not
        small = tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))
        return tl.where(x > 20.0, x, small)

    @Kernel
    def _gates(
        dt_ptr, beta_ptr, A_ptr, bias_ptr, decay_ptr, second_ptr, H, width, least, dt_b, dt_t, beta_b, beta_t,
        DELTA: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        t, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask, row = i < H * width, b * tl.num_programs(0) + t
        A = -tl.exp(tl.load(A_ptr + i // width, mask=mask, other=0.0).to(tl.float32))
        bias = tl.load(bias_ptr + i, mask=mask, other=0.0)
        after_previous(OVERLAP)
        dt = tl.load(dt_ptr + b * dt_b + t * dt_t + i, mask=mask, other=0.0)
        if DELTA:
            x = softplus(dt.to(tl.float32) + bias.to(tl.float32))
            beta = tl.load(beta_ptr + b * beta_b + t * beta_t + i, mask=i < H, other=0.0)
            second = sigmoid(beta.to(tl.float32)).to(beta.dtype).to(tl.float32)
        else:
            x = (dt.to(tl.float32) + bias.to(dt.dtype).to(tl.float32)).to(dt.dtype).to(tl.float32)
            x = tl.maximum(softplus(x).to(dt.dtype).to(tl.float32), least)
            second = x
        tl.store(decay_ptr + row * H * width + i, A * x, mask=mask)
        tl.store(second_ptr + row * H + i, second, mask=i < H)

    @triton.jit
    def times(a, b, SPLIT: tl.constexpr):
        """Products of fp32 by tensor cores, in three parts: to 2^-16 of exact by bf16 (SPLIT), 2^-22 by tf32."""
        if SPLIT:
            a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
            a_low, b_low = (
                (a - a_high.to(tl.float32)).to(tl.bfloat16),
                (b - b_high.to(tl.float32)).to(tl.bfloat16),
            )
            y = tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high)))
        else:
            y = tl.dot(a, b, input_precision="tf32x3")
        return y

    @triton.jit
    def both(b):
        """b [K, N] as two bf16 whose sum it is, side by side: [K, 2 N]."""
        high = b.to(tl.bfloat16)
        return tl.reshape(
            tl.join(high, (b - high.to(tl.float32)).to(tl.bfloat16)), (b.shape[0], 2 * b.shape[1])
        )

    @triton.jit
    def summed(y):
        """What a product with `both` is: [M, 2 N] -> [M, N]."""
        return tl.sum(tl.reshape(y, (y.shape[0], y.shape[1] // 2, 2)), 2)

    @triton.jit
    def times_as_it_is(a, b, SPLIT: tl.constexpr):
        """`times`, of an `a` in the model's dtype: bf16 has no second part."""
        if SPLIT:
            y = summed(tl.dot(a, both(b)))
        else:
            y = tl.dot(a.to(tl.float32), b, input_precision="tf32x3")
        return y

    @triton.jit
    def stored_times(ptr, at, mask, apart, b, TRANSPOSED: tl.constexpr, SPLIT: tl.constexpr):
        """`times`, of what `store` has written, or that transposed."""
        a = tl.load(ptr + at, mask=mask, other=0.0)
        if TRANSPOSED:
            a = tl.trans(a)
        if SPLIT:
            low = tl.load(ptr + apart + at, mask=mask, other=0.0)
            if TRANSPOSED:
                low = tl.trans(low)
            parts = both(b)
            y = summed(tl.dot(a, parts, tl.dot(low, parts)))
        else:
            y = tl.dot(a, b, input_precision="tf32x3")
        return y

    @triton.jit
    def times_stored(a, ptr, at, mask, apart, y, SPLIT: tl.constexpr):
        """y, to which a product with what `store` has written is added; of an `a` in the model's dtype."""
        b = tl.load(ptr + at, mask=mask, other=0.0)
        if SPLIT:
            y = tl.dot(a, b, tl.dot(a, tl.load(ptr + apart + at, mask=mask, other=0.0), y))
        else:
            y = tl.dot(a.to(tl.float32), b, y, input_precision="tf32x3")
        return y

    @triton.jit
    def store(ptr, at, mask, apart, x, SPLIT: tl.constexpr):
        """x in fp32, or as two bf16 that lie `apart`."""
        high = x.to(ptr.dtype.element_ty)
        tl.store(ptr + at, high, mask=mask)
        if SPLIT:
            tl.store(ptr + apart + at, (x - high.to(tl.float32)).to(tl.bfloat16), mask=mask)

    @triton.jit
    def in_blocks(x, REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr):
        """Running sums of rows [CHUNK, K], from the start or the end of each block."""
        blocks = tl.reshape(x, (CHUNK // BLOCK, BLOCK, K))
        return tl.reshape(tl.cumsum(blocks, 1, reverse=REVERSE), (CHUNK, K))

    @triton.jit
    def inverse_of(lower, CHUNK: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
        """(1 + lower)^-1 of a strictly lower [CHUNK, CHUNK]: blocks of the diagonal by elimination, all at once; then,
        with N what is left of it, in blocks, (1 + N)^-1 = (1 - N) (1 + N^2), since N^4 = 0."""
        i = tl.arange(0, CHUNK)
        first = i // BLOCK * BLOCK
        same = first[:, None] == first[None, :]
        x = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
        for r in range(BLOCK - 1):
            row = tl.sum(tl.where(i[:, None] == (first + r)[None, :], x, 0.0), 0)  # of each column's block
            factor = tl.sum(tl.where(i[None, :] == (first + r)[:, None], lower, 0.0), 1)
            x -= tl.where(same, factor[:, None] * row[None, :], 0.0)
        n = times(x, tl.where(same, 0.0, lower), SPLIT)
        x += times(times(n, n, SPLIT), x, SPLIT)
        return x - times(n, x, SPLIT)

    @Kernel
    def _chunks(
        q_ptr, k_ptr, decay_ptr, beta_ptr, inverse_ptr, within_ptr, decayed_ptr, factors_ptr, kept_ptr,
        T, H, repeat, n_k, n_v, scale, q_b, q_t, q_g, k_b, k_t, k_g, v_b, v_t, v_h,
        K: tl.constexpr, CORRECT: tl.constexpr, BY_CHANNEL: tl.constexpr,
        CHUNK: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr, SPLIT: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        n, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        i = tl.arange(0, CHUNK)
        first, chunk = n * CHUNK, (b * H + h) * tl.num_programs(0) + n
        apart = tl.num_programs(2) * H * tl.num_programs(0) * CHUNK  # rows of all heads
        block = i // BLOCK * BLOCK
        last = block + BLOCK - 1
        after_previous(OVERLAP)
        k_ptr += b * k_b + h // repeat * k_g
        q_ptr += b * q_b + h // repeat * q_g
        m = tl.zeros((CHUNK, CHUNK), tl.float32)
        a = tl.zeros((CHUNK, CHUNK), tl.float32)
        of_q, of_k = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
        if BY_CHANNEL:
            decay_ptr += (b * T * H + h) * n_k
            decayed_ptr += chunk * CHUNK * n_k
        for start in range(0, K, SLICE):  # some channels at a time, for want of registers
            c = start + tl.arange(0, SLICE)
            stored_q = stored_rows(q_ptr, first, i, c, q_t, T, n_k)
            stored_k = stored_rows(k_ptr, first, i, c, k_t, T, n_k)
            q, k = stored_q.to(tl.float32), stored_k.to(tl.float32)
            if CORRECT:
                of_q += tl.sum(q * q, 1)
                of_k += tl.sum(k * k, 1)
            if BY_CHANNEL:
                decay = rows_of(decay_ptr, first, i, c, H * n_k, T, n_k)
                after = rows_of(decay_ptr, first, tl.where(i < last, i + 1, T), c, H * n_k, T, n_k)
                since = in_blocks(decay, False, CHUNK, BLOCK, SLICE)  # from a block's start
                until = in_blocks(after, True, CHUNK, BLOCK, SLICE)  # to its end
                q_since, k_since = q * tl.exp(since), k * tl.exp(since)
                # A block, and all before it: by way of the decay up to its start.
                for at in range(BLOCK, CHUNK, BLOCK):
                    before = tl.trans(tl.where((i < at)[:, None], k * tl.exp(until), 0.0))
                    inside = (block == at)[:, None]
                    m += times(tl.where(inside, q_since, 0.0), before, SPLIT)
                    if CORRECT:
                        a += times(tl.where(inside, k_since, 0.0), before, SPLIT)
                    whole = tl.sum(tl.where(inside, decay, 0.0), 0)[None, :]
                    until += tl.where((i < at)[:, None], whole, 0.0)
                    whole = tl.sum(tl.where((block == at - BLOCK)[:, None], decay, 0.0), 0)[None, :]
                    since += tl.where((i >= at)[:, None], whole, 0.0)
                between = tl.zeros((CHUNK, SLICE), tl.float32)
                for back in range(BLOCK):  # pairs within a block, from the last column to the first
                    j = last - back
                    key = rows_of(k_ptr, first, j, c, k_t, T, n_k)
                    key = tl.where((i >= j)[:, None], key * tl.exp(between), 0.0)
                    here = i[None, :] == j[:, None]
                    m += tl.where(here, tl.sum(q * key, 1)[:, None], 0.0)
                    if CORRECT:
                        a += tl.where(here, tl.sum(k * key, 1)[:, None], 0.0)
                    own = rows_of(decay_ptr, first, j, c, H * n_k, T, n_k)
                    between += tl.where((i >= j)[:, None], own, 0.0)
                place, mask = i[:, None] * n_k + c[None, :], (c < n_k)[None, :]
                far = (2 if SPLIT else 1) * apart * n_k
                store(decayed_ptr, place, mask, apart * n_k, q * tl.exp(since), SPLIT)
                store(decayed_ptr + far, place, mask, apart * n_k, k * tl.exp(since), SPLIT)
                store(decayed_ptr + 2 * far, place, mask, apart * n_k, k * tl.exp(until), SPLIT)
                tl.store(kept_ptr + chunk * n_k + c, tl.exp(tl.sum(decay, 0)), mask=c < n_k)
            else:
                # Products of bf16 and fp16 are exact.
                m = tl.dot(stored_q, tl.trans(stored_k), m, input_precision="tf32x3")
                if CORRECT:
                    a = tl.dot(stored_k, tl.trans(stored_k), a, input_precision="tf32x3")
        if CORRECT:  # what rows are multiplied by: 1 over their norm
            of_q, of_k = tl.rsqrt(of_q + 1e-6) * scale, tl.rsqrt(of_k + 1e-6)
        else:
            of_q, of_k = of_q + scale, of_k + 1.0
        m *= of_q[:, None] * of_k[None, :]
        since, until = of_k, of_k
        if not BY_CHANNEL:
            decay_ptr += b * T * H + h
            decay = tl.load(decay_ptr + (first + i) * H, mask=first + i < T, other=0.0)
            after = (i < CHUNK - 1) & (first + i + 1 < T)
            after = tl.load(decay_ptr + (first + i + 1) * H, mask=after, other=0.0)
            between = tl.cumsum(tl.where(i[:, None] > i[None, :], decay[:, None], 0.0), 0)
            between = tl.where(i[:, None] >= i[None, :], tl.exp(between), 0.0)
            m, a = m * between, a * between
            since = tl.exp(tl.cumsum(decay, 0))
            until = tl.exp(tl.cumsum(after, 0, reverse=True)) * of_k
            of_q, since = of_q * since, of_k * since
            tl.store(kept_ptr + chunk, tl.exp(tl.sum(decay, 0)))
        factors_ptr += chunk * CHUNK + i
        tl.store(factors_ptr, of_q)
        tl.store(factors_ptr + apart, since)
        tl.store(factors_ptr + 2 * apart, until)
        square, whole = i[:, None] * CHUNK + i[None, :], i[:, None] < CHUNK
        store(within_ptr + chunk * CHUNK * CHUNK, square, whole, apart * CHUNK, m, SPLIT)
        if CORRECT:
            beta = tl.load(beta_ptr + (b * T + first + i) * H + h, mask=first + i < T, other=0.0)
            a *= (of_k * beta)[:, None] * of_k[None, :]
            x = inverse_of(tl.where(i[:, None] > i[None, :], a, 0.0), CHUNK, BLOCK, SPLIT) * beta[None, :]
            store(inverse_ptr + chunk * CHUNK * CHUNK, square, whole, apart * CHUNK, x, SPLIT)

    @Kernel
    def _states(
        k_ptr, v_ptr, beta_ptr, inverse_ptr, decayed_ptr, factors_ptr, kept_ptr, state_ptr, states_ptr, added_ptr,
        T, H, repeat, n_k, n_v, scale, q_b, q_t, q_g, k_b, k_t, k_g, v_b, v_t, v_h,
        K: tl.constexpr, CORRECT: tl.constexpr, BY_CHANNEL: tl.constexpr,
        COLUMNS: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        i, c, v_c = tl.arange(0, CHUNK), tl.arange(0, K), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        chunks = tl.cdiv(T, CHUNK)
        apart = tl.num_programs(2) * H * chunks  # chunks of all heads
        far = (2 if SPLIT else 1) * apart * CHUNK * n_k
        square, whole = i[:, None] * CHUNK + i[None, :], i[:, None] < CHUNK
        tile, in_k, in_v = i[:, None] * n_k + c[None, :], (c < n_k)[None, :], (v_c < n_v)[None, :]
        place, inside = c[:, None] * n_v + v_c[None, :], (c < n_k)[:, None] & in_v
        after_previous(OVERLAP)
        state_ptr += (b * H + h) * n_k * n_v
        state = tl.load(state_ptr + place, mask=inside, other=0.0)
        k_ptr += b * k_b + h // repeat * k_g
        v_ptr += b * v_b + h * v_h
        for n in range(chunks):
            first, chunk = n * CHUNK, (b * H + h) * chunks + n
            store(states_ptr + chunk * n_k * n_v, place, inside, apart * n_k * n_v, state, SPLIT)
            u = rows_of(v_ptr, first, i, v_c, v_t, T, n_v)
            factors, decayed = factors_ptr + chunk * CHUNK + i, decayed_ptr
            if BY_CHANNEL:
                decayed += chunk * CHUNK * n_k
                kept = tl.load(kept_ptr + chunk * n_k + c, mask=c < n_k, other=0.0)[:, None]
            else:
                k = stored_rows(k_ptr, first, i, c, k_t, T, n_k)
                kept = tl.load(kept_ptr + chunk)
            if CORRECT:
                if BY_CHANNEL:
                    x = stored_times(decayed + far, tile, in_k, apart * CHUNK * n_k, state, False, SPLIT)
                else:
                    x = times_as_it_is(k, state, SPLIT)
                u -= x * tl.load(factors + apart * CHUNK)[:, None]
                inverse = inverse_ptr + chunk * CHUNK * CHUNK
                u = stored_times(inverse, square, whole, apart * CHUNK * CHUNK, u, False, SPLIT)
            else:
                u *= tl.load(beta_ptr + (b * T + first + i) * H + h, mask=first + i < T, other=0.0)[:, None]
            at = i[:, None] * n_v + v_c[None, :]
            store(added_ptr + chunk * CHUNK * n_v, at, whole & in_v, apart * CHUNK * n_v, u, SPLIT)
            u *= tl.load(factors + 2 * apart * CHUNK)[:, None]
            if BY_CHANNEL:
                more = stored_times(decayed + 2 * far, tile, in_k, apart * CHUNK * n_k, u, True, SPLIT)
            else:
                more = times_as_it_is(tl.trans(k), u, SPLIT)
            state = state * kept + more
        tl.store(state_ptr + place, state, mask=inside)

    @Kernel
    def _outputs(
        q_ptr, within_ptr, decayed_ptr, factors_ptr, states_ptr, added_ptr, out_ptr, chunks,
        T, H, repeat, n_k, n_v, scale, q_b, q_t, q_g, k_b, k_t, k_g, v_b, v_t, v_h,
        K: tl.constexpr, CORRECT: tl.constexpr, BY_CHANNEL: tl.constexpr,
        COLUMNS: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        n = tl.program_id(0) % chunks
        i, c, v_c = (
            tl.arange(0, CHUNK),
            tl.arange(0, K),
            tl.program_id(0) // chunks * COLUMNS + tl.arange(0, COLUMNS),
        )
        first, chunk = n * CHUNK, (b * H + h) * chunks + n
        apart = tl.num_programs(2) * H * chunks
        in_v = (v_c < n_v)[None, :]
        place, inside = c[:, None] * n_v + v_c[None, :], (c < n_k)[:, None] & in_v
        after_previous(OVERLAP)
        y = tl.zeros((CHUNK, COLUMNS), tl.float32)
        states_ptr += chunk * n_k * n_v
        if BY_CHANNEL:
            tile, in_k = i[:, None] * n_k + c[None, :], (c < n_k)[None, :]
            decayed_ptr += chunk * CHUNK * n_k
            q = tl.load(decayed_ptr + tile, mask=in_k, other=0.0)
            y = times_stored(q, states_ptr, place, inside, apart * n_k * n_v, y, SPLIT)
            if SPLIT:
                low = tl.load(decayed_ptr + apart * CHUNK * n_k + tile, mask=in_k, other=0.0)
                y = tl.dot(low, tl.load(states_ptr + place, mask=inside, other=0.0), y)
        else:
            q = stored_rows(q_ptr + b * q_b + h // repeat * q_g, first, i, c, q_t, T, n_k)
            y = times_stored(q, states_ptr, place, inside, apart * n_k * n_v, y, SPLIT)
        y *= tl.load(factors_ptr + chunk * CHUNK + i)[:, None]
        square, at = i[:, None] * CHUNK + i[None, :], i[:, None] * n_v + v_c[None, :]
        within_ptr += chunk * CHUNK * CHUNK
        added_ptr += chunk * CHUNK * n_v
        within, added = tl.load(within_ptr + square), apart * CHUNK * n_v
        y = times_stored(within, added_ptr, at, in_v & (i < CHUNK)[:, None], added, y, SPLIT)
        if SPLIT:
            low = tl.load(within_ptr + apart * CHUNK * CHUNK + square)
            y = tl.dot(low, tl.load(added_ptr + at, mask=in_v & (i < CHUNK)[:, None], other=0.0), y)
        mask = (first + i < T)[:, None] & in_v
        out_ptr += ((b * T + first) * H + h) * n_v
        tl.store(out_ptr + i[:, None] * (H * n_v) + v_c[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)

    @Kernel
    def _steps(
        q_ptr, k_ptr, v_ptr, decay_ptr, beta_ptr, state_ptr, out_ptr, T, H, repeat, n_k, n_v, scale,
        q_b, q_t, q_g, k_b, k_t, k_g, v_b, v_t, v_h,
        K: tl.constexpr, CORRECT: tl.constexpr, BY_CHANNEL: tl.constexpr,
        COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        c, v_c = tl.arange(0, K), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        in_k, in_v = c < n_k, v_c < n_v
        after_previous(OVERLAP)
        state_at = state_ptr + ((b * H + h) * n_k + c[:, None]) * n_v + v_c[None, :]
        state = tl.load(state_at, mask=in_k[:, None] & in_v[None, :], other=0.0)
        q_ptr += b * q_b + h // repeat * q_g + c
        k_ptr += b * k_b + h // repeat * k_g + c
        for t in range(T):
            q = tl.load(q_ptr + t * q_t, mask=in_k, other=0.0).to(tl.float32)
            k = tl.load(k_ptr + t * k_t, mask=in_k, other=0.0).to(tl.float32)
            v = tl.load(v_ptr + b * v_b + t * v_t + h * v_h + v_c, mask=in_v, other=0.0).to(tl.float32)
            at = (b * T + t) * H + h
            if BY_CHANNEL:
                state *= tl.exp(tl.load(decay_ptr + at * n_k + c, mask=in_k, other=0.0))[:, None]
            else:
                state *= tl.exp(tl.load(decay_ptr + at))
            beta = tl.load(beta_ptr + at)
            if CORRECT:
                q = q * tl.rsqrt(tl.sum(q * q, 0) + 1e-6)
                k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
                v -= tl.sum(state * k[:, None], 0)
            state += k[:, None] * (beta * v)[None, :]
            y = tl.sum(state * (q * scale)[:, None], 0)
            tl.store(out_ptr + at * n_v + v_c, y.to(out_ptr.dtype.element_ty), mask=in_v)
        tl.store(state_at, state, mask=in_k[:, None] & in_v[None, :])
