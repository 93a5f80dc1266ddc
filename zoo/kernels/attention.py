"""Softmax attention over a key/value cache: a window, a chunk, sinks, a softcap; one query or many.

Prefill is a flash kernel (arXiv 2307.08691) that skips the key blocks which no query of its tile can see.
Decode splits the keys over programs and joins their results (split-K), so that one query fills the GPU; how
many keys there are is read from the device, so that a captured graph serves every length.

Unusual: the head dimension may come in two parts, q = [a | b] with keys of `b` shared by all heads (MLA), so
that no key need be assembled. Keys sit in `capacity` slots, in order of position modulo `capacity`.

Margin on an H100, bf16: where the mask is plainly causal torch's SDPA is used (cuDNN's kernel: 403 TFLOP/s at
2048 tokens, D = 128; this flash kernel 293, torch's own 208). With a window of 128 and sinks, which SDPA does
not have, 2048 tokens of 32 heads of 64 take 28 us where the whole causal triangle takes 77. MLA: 475 us here, 327
by cuDNN and 62 to assemble its keys (100 MB per layer), and 767 by torch's flash on padded ones. Decode reads a
cache of 32768 keys at 2.4 TB/s. Reading older keys while the newest is being
placed takes a step of an 8B model in fp8 from 2.96 to 2.87 ms on an H200 after 128 tokens.
On Hopper `zoo.kernels.attend` serves a token and caches that are not long.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.kernels.launch import Kernel, ceil_div, has_triton, hopper, overlap, power_of_2, triton

if triton is not None:
    import triton.language as tl

    from zoo.kernels.gated import tanh
    from zoo.kernels.launch import after_previous


def preferring_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """Within it SDPA takes cuDNN's kernel where it can: on an H100 1.9 times as fast as torch's flash kernel."""
    if device.type != "cuda":
        return nullcontext()
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


def cudnn_fits(q: Tensor) -> bool:
    """Whether cuDNN has a kernel for heads whose values are narrower than their keys (MLA's): bf16 and fp16 on Hopper and
    later."""
    return q.dtype in (torch.bfloat16, torch.float16) and hopper(q)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    start: int = 0,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q [B, T, H, D] at positions start .. start + T; k [B, S, K, D], v [B, S, K, V] at positions 0 .. S.

    `window`: keys visible to a query, itself included. `chunk`: only keys of the query's own block of that
    many positions. `sinks` [H]: a logit that joins the softmax and is dropped. Softmax in fp32. -> [B, T, H, V].
    """
    b, t, h, d = q.shape
    groups = h // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))  # [B, H, S, .]
    scores = (q.transpose(1, 2) @ k.mT).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query = torch.arange(start, start + t, device=q.device)[:, None]
    key = torch.arange(k.shape[2], device=q.device)[None]
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    if chunk is not None:
        visible &= key // chunk == query // chunk
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[:, None, None].expand(b, h, t, 1)), -1)
    p = scores.softmax(-1)[..., : k.shape[2]].to(q.dtype)
    return (p @ v).transpose(1, 2)


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    start: int = 0,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    q2: Tensor | None = None,
    k2: Tensor | None = None,
) -> Tensor:
    """`attention_reference` as a flash kernel; scores are q k + q2 k2 where q2 [B, T, H, E], k2 [B, S, E] are given."""
    b, t, h, d = q.shape
    s, kv = k.shape[1], k.shape[2]
    dv, d2 = v.shape[3], 0 if q2 is None else q2.shape[3]
    out = q.new_empty(b, t, h, dv)
    wide = max(power_of_2(d), power_of_2(dv)) > 128
    exact = q.dtype == torch.float32
    block_q = 16 if t <= 16 else 32 if exact or t <= 32 else 64 if wide or t <= 64 else 128
    block_k = 32 if wide or exact else 64
    # Triton 3.6 on Hopper sums wrongly, and reads where nothing is, if the rows of k lie at any number and a tile of v is
    # narrower than one of k (found by random shapes: 8 channels of v beside q and k in one projection).
    aligned = d % 16 == 0 and all(n % 16 == 0 for n in k.stride()[:3])
    v_tile = power_of_2(dv if aligned else max(dv, d), 16)
    q2_, k2_ = (q, k) if q2 is None or k2 is None else (q2, k2)
    _flash[(ceil_div(t, block_q), b * h)](
        q, k, v, q2_, k2_, sinks, out, t, s, start, window or 0, chunk or 0, h, h // kv, d, dv, d2,
        scale * 1.4426950408889634, softcap or 0.0,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *q2_.stride()[:3], *k2_.stride()[:2], *out.stride()[:3],
        D=power_of_2(d, 16), V=v_tile, D2=power_of_2(d2, 16) if d2 else 0,
        WINDOW=window is not None, CHUNK=chunk is not None, SINKS=sinks is not None, SOFTCAP=softcap is not None,
        BLOCK_Q=block_q, BLOCK_K=block_k, PRECISION="ieee" if exact else "tf32",
        num_warps=8 if block_q == 128 else 4, num_stages=2 if wide else 3,
    )  # fmt: skip
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    start: int = 0,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`attention_reference`, by the fastest kernel for the device: torch's own where the mask is plainly causal
    and there is nothing else to do, the flash kernel otherwise."""
    t, s = q.shape[1], k.shape[1]
    whole = (window is None or window >= s) and (chunk is None or chunk >= s)
    if (
        whole
        and sinks is None
        and softcap is None
        and (s == t or t == 1)
        and start == s - t
        and q.dtype != torch.float64
    ):
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=t > 1, scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
        return y.transpose(1, 2)
    kw = dict(scale=scale, start=start, window=window, chunk=chunk, sinks=sinks, softcap=softcap)
    if has_triton(q) and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.dtype != torch.float64:
        return flash(q, k, v, **kw)  # type: ignore[arg-type]
    return attention_reference(q, k, v, **kw)  # type: ignore[arg-type]


def decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One query per sequence: q [B, H, D] at `position` (a tensor of one int), against the cache k [B, C, K, D],
    v [B, C, K, V], whose slot of a position is position % C. -> [B, H, V]."""
    b, h, d = q.shape
    pos, c = int(position), k.shape[1]
    oldest = max(0, pos - c + 1)
    if window is not None:
        oldest = max(oldest, pos - window + 1)
    if chunk is not None:
        oldest = max(oldest, pos // chunk * chunk)
    slots = torch.arange(oldest, pos + 1, device=q.device) % c
    k, v = k[:, slots], v[:, slots]
    return attention_reference(
        q[:, None], k, v, scale=scale, start=len(slots) - 1, sinks=sinks, softcap=softcap
    )[:, 0]  # fmt: skip


JOINED = 32
"""Channels of a head that a program joins, of all splits at once."""


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    q2: Tensor | None = None,
    k2: Tensor | None = None,
    placed: bool = False,
) -> Tensor:
    """`decode_reference`, splitting the keys over programs. Scores are q k + q2 k2 where given (see `flash`).

    `v` may be `k` itself (MLA in absorbed form: the latent is both). `placed`: since the pass
    began only the newest key and value were written, by the kernel before this one. The others, and the position, are then read
    before that is done: `Context.begin` makes the positions by kernels of torch's, and nothing after those starts before they,
    and all before them, have ended."""
    b, h, d = q.shape
    c, kv = k.shape[1], k.shape[2]
    dv, d2 = v.shape[2 + 1], 0 if q2 is None else q2.shape[2]
    exact = q.dtype == torch.float32
    wide = power_of_2(d) > 256
    group = h // kv
    block_h = 16
    heads = ceil_div(group, block_h)
    block_k = 32 if wide else 64
    most = min(c, window or c, chunk or c)
    splits = power_of_2(min(ceil_div(most, block_k), max(1, 264 // (b * kv * heads)), 64) + 1) // 2
    part = torch.empty(b, h, splits, dv, dtype=torch.float32, device=q.device)
    stats = torch.empty(2, b, h, splits, dtype=torch.float32, device=q.device)
    out = q.new_empty(b, h, dv)
    q2_, k2_ = (q, k) if q2 is None or k2 is None else (q2, k2)
    same = v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and dv == d
    _decode[(b * kv * heads, splits)](
        q, k, v, q2_, k2_, part, stats, position, c, window or 0, chunk or 0, kv, group, d, dv, d2, splits, b * h * splits,
        scale * 1.4426950408889634, softcap or 0.0,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *q2_.stride()[:2], *k2_.stride()[:2],
        HEADS=heads, D=power_of_2(d, 16), V=power_of_2(dv, 16), D2=power_of_2(d2, 16) if d2 else 0, SAME=same,
        WINDOW=window is not None, CHUNK=chunk is not None, SOFTCAP=softcap is not None,
        PLACED=placed and not same and not d2, BLOCK_H=block_h, BLOCK_K=block_k, PRECISION="ieee" if exact else "tf32",
        num_warps=4, num_stages=2, **overlap(q),
    )  # fmt: skip
    width = min(JOINED, power_of_2(dv))
    _join[(b * h, ceil_div(dv, width))](
        part, stats, sinks, out, h, dv, splits, b * h * splits,
        SINKS=sinks is not None, V=width, SPLITS=power_of_2(splits), num_warps=1, **overlap(q),
    )  # fmt: skip
    return out


if triton is not None:

    @Kernel
    def _flash(
        q_ptr, k_ptr, v_ptr, q2_ptr, k2_ptr, sinks_ptr, out_ptr,
        T, S, start, window, chunk, H, GROUP, d_qk, d_v, d_2, scale, cap,
        q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, q2_b, q2_t, q2_h, k2_b, k2_s, o_b, o_t, o_h,
        D: tl.constexpr, V: tl.constexpr, D2: tl.constexpr,
        WINDOW: tl.constexpr, CHUNK: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
        b = (tl.program_id(1) // H).to(tl.int64)
        h = (tl.program_id(1) % H).to(tl.int64)
        t = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        d, dv = tl.arange(0, D), tl.arange(0, V)
        at = q_ptr + b * q_b + h * q_h + t.to(tl.int64)[:, None] * q_t + d[None, :]
        q = tl.load(at, mask=(t < T)[:, None] & (d < d_qk)[None, :], other=0.0)
        if D2 > 0:
            d2 = tl.arange(0, D2)
            at = q2_ptr + b * q2_b + h * q2_h + t.to(tl.int64)[:, None] * q2_t + d2[None, :]
            q2 = tl.load(at, mask=(t < T)[:, None] & (d2 < d_2)[None, :], other=0.0)
        query = start + t
        first, last = start + tile * BLOCK_Q, start + tl.minimum(T, tile * BLOCK_Q + BLOCK_Q)
        begin = 0
        if WINDOW:
            begin = tl.maximum(begin, first - window + 1)
        if CHUNK:
            begin = tl.maximum(begin, first // chunk * chunk)
        begin = begin // BLOCK_K * BLOCK_K
        end = tl.minimum(last, S)
        clear = (
            (first + 1) // BLOCK_K * BLOCK_K
        )  # every query of the tile sees all keys up to here, without a window
        top = tl.full([BLOCK_Q], -1e30, dtype=tl.float32)
        total = tl.zeros([BLOCK_Q], dtype=tl.float32)
        if SINKS:
            top = (
                tl.zeros([BLOCK_Q], dtype=tl.float32)
                + tl.load(sinks_ptr + h).to(tl.float32) * 1.4426950408889634
            )
            total = total + 1.0
        out = tl.zeros([BLOCK_Q, V], dtype=tl.float32)
        k_base = k_ptr + b * k_b + (h // GROUP) * k_h
        v_base = v_ptr + b * v_b + (h // GROUP) * v_h
        for s0 in range(begin, end, BLOCK_K):
            s = s0 + tl.arange(0, BLOCK_K)
            k_at = k_base + s.to(tl.int64)[None, :] * k_s + d[:, None]
            k = tl.load(k_at, mask=(s < S)[None, :] & (d < d_qk)[:, None], other=0.0)
            scores = tl.dot(q, k, input_precision=PRECISION)
            if D2 > 0:
                k2_at = k2_ptr + b * k2_b + s.to(tl.int64)[None, :] * k2_s + d2[:, None]
                k2 = tl.load(k2_at, mask=(s < S)[None, :] & (d2 < d_2)[:, None], other=0.0)
                scores += tl.dot(q2, k2, input_precision=PRECISION)
            scores = scores * scale
            if SOFTCAP:
                scores = cap * 1.4426950408889634 * tanh(scores / (cap * 1.4426950408889634))
            if WINDOW or CHUNK or (s0 >= clear):
                seen = s[None, :] <= query[:, None]
                if WINDOW:
                    seen = seen & (s[None, :] > query[:, None] - window)
                if CHUNK:
                    seen = seen & (s[None, :] // chunk == query[:, None] // chunk)
                scores = tl.where(seen, scores, -1e30)
            higher = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - higher[:, None])
            if WINDOW or CHUNK:
                p = tl.where(scores > -1e29, p, 0.0)  # a row that has met no key yet
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, 1)
            v_at = v_base + s.to(tl.int64)[:, None] * v_s + dv[None, :]
            v = tl.load(v_at, mask=(s < S)[:, None] & (dv < d_v)[None, :], other=0.0)
            out = out * shrink[:, None]
            out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
            top = higher
        out = out / total[:, None]
        at = out_ptr + b * o_b + h * o_h + t.to(tl.int64)[:, None] * o_t + dv[None, :]
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & (dv < d_v)[None, :])

    @Kernel
    def _decode(
        q_ptr, k_ptr, v_ptr, q2_ptr, k2_ptr, part_ptr, stats_ptr, position_ptr,
        C, window, chunk, KV, GROUP, d_qk, d_v, d_2, n_splits, n_stats, scale, cap,
        q_b, q_h, k_b, k_s, k_h, v_b, v_s, v_h, q2_b, q2_h, k2_b, k2_s,
        HEADS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, D2: tl.constexpr, SAME: tl.constexpr,
        WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, PLACED: tl.constexpr,
        BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        split = tl.program_id(1)
        b = (tl.program_id(0) // (KV * HEADS)).to(tl.int64)
        kv = (tl.program_id(0) // HEADS % KV).to(tl.int64)
        g = tl.program_id(0) % HEADS * BLOCK_H + tl.arange(0, BLOCK_H)  # queries that share this key head
        h = kv * GROUP + g
        d, dv = tl.arange(0, D), tl.arange(0, V)
        if not PLACED:
            after_previous(OVERLAP)
        pos = tl.load(position_ptr, cache_modifier=".cg").to(tl.int32)
        oldest = tl.maximum(0, pos - C + 1)
        if WINDOW:
            oldest = tl.maximum(oldest, pos - window + 1)
        if CHUNK:
            oldest = tl.maximum(oldest, pos // chunk * chunk)
        count = pos + 1 - oldest
        share = tl.cdiv(tl.cdiv(count, BLOCK_K), n_splits) * BLOCK_K
        begin = oldest + split * share
        end = tl.minimum(begin + share, pos + 1)
        k_ptr += b * k_b + kv * k_h
        v_ptr += b * v_b + kv * v_h
        if PLACED:  # around the multiprocessor's own cache, which may know the newest as it was
            s = begin + tl.arange(0, BLOCK_K)
            slot = (s % C).to(tl.int64)
            k_at, v_at = k_ptr + slot[:, None] * k_s + d[None, :], v_ptr + slot[:, None] * v_s + dv[None, :]
            k_mask, v_mask = (
                (s < end)[:, None] & (d < d_qk)[None, :],
                (s < end)[:, None] & (dv < d_v)[None, :],
            )
            newest = (s == pos)[:, None]
            k = tl.load(k_at, mask=k_mask & (newest == 0), other=0.0, cache_modifier=".cg")
            v = tl.load(v_at, mask=v_mask & (newest == 0), other=0.0, cache_modifier=".cg")
            after_previous(OVERLAP)
            k = tl.where(newest, tl.load(k_at, mask=k_mask & newest, other=0.0, cache_modifier=".cg"), k)
            v = tl.where(newest, tl.load(v_at, mask=v_mask & newest, other=0.0, cache_modifier=".cg"), v)
        at = q_ptr + b * q_b + h[:, None] * q_h + d[None, :]
        q = tl.load(at, mask=(g < GROUP)[:, None] & (d < d_qk)[None, :], other=0.0)
        if D2 > 0:
            d2 = tl.arange(0, D2)
            at = q2_ptr + b * q2_b + h[:, None] * q2_h + d2[None, :]
            q2 = tl.load(at, mask=(g < GROUP)[:, None] & (d2 < d_2)[None, :], other=0.0)
        top = tl.full([BLOCK_H], -1e30, dtype=tl.float32)
        total = tl.zeros([BLOCK_H], dtype=tl.float32)
        out = tl.zeros([BLOCK_H, V], dtype=tl.float32)
        if PLACED:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            top, total, out = attended(scores, s < end, v, top, total, out, scale, cap, SOFTCAP, PRECISION)
            begin += BLOCK_K
        for s0 in range(begin, end, BLOCK_K):
            s = s0 + tl.arange(0, BLOCK_K)
            slot = (s % C).to(tl.int64)
            k_at = k_ptr + slot[:, None] * k_s + d[None, :]
            k = tl.load(k_at, mask=(s < end)[:, None] & (d < d_qk)[None, :], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if D2 > 0:
                k2_at = k2_ptr + b * k2_b + slot[:, None] * k2_s + d2[None, :]
                k2 = tl.load(k2_at, mask=(s < end)[:, None] & (d2 < d_2)[None, :], other=0.0)
                scores += tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
            if SAME:
                v = k
            else:
                v_at = v_ptr + slot[:, None] * v_s + dv[None, :]
                v = tl.load(v_at, mask=(s < end)[:, None] & (dv < d_v)[None, :], other=0.0)
            top, total, out = attended(scores, s < end, v, top, total, out, scale, cap, SOFTCAP, PRECISION)
        row = (b * KV * GROUP + h) * n_splits + split
        tl.store(stats_ptr + row, top, mask=g < GROUP)
        tl.store(stats_ptr + n_stats + row, total, mask=g < GROUP)
        at = part_ptr + row[:, None] * d_v + dv[None, :]
        tl.store(at, out, mask=(g < GROUP)[:, None] & (dv < d_v)[None, :])

    @triton.jit
    def attended(
        scores, there, v, top, total, out, scale, cap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
    ):
        """What a softmax has come to (its maximum, sum and output), after some more keys' products and values."""
        scores = scores * scale
        if SOFTCAP:
            scores = cap * 1.4426950408889634 * tanh(scores / (cap * 1.4426950408889634))
        scores = tl.where(there[None, :], scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None]
        return higher, total, tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)

    @Kernel
    def _join(
        part_ptr, stats_ptr, sinks_ptr, out_ptr, H, d_v, n_splits, n_stats,
        SINKS: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        s, dv = tl.arange(0, SPLITS), tl.program_id(1) * V + tl.arange(0, V)
        after_previous(OVERLAP)
        at = part_ptr + (row * n_splits + s)[:, None] * d_v + dv[None, :]
        part = tl.load(at, mask=(s < n_splits)[:, None] & (dv < d_v)[None, :], other=0.0)
        top = tl.load(stats_ptr + row * n_splits + s, mask=s < n_splits, other=-1e30)
        total = tl.load(stats_ptr + n_stats + row * n_splits + s, mask=s < n_splits, other=0.0)
        highest = tl.max(top, 0)
        if SINKS:
            sink = tl.load(sinks_ptr + row % H).to(tl.float32) * 1.4426950408889634
            highest = tl.maximum(highest, sink)
        weight = tl.exp2(top - highest)
        whole = tl.sum(total * weight, 0)
        if SINKS:
            whole += tl.exp2(sink - highest)
        out = tl.sum(part * weight[:, None], 0) / whole
        tl.store(out_ptr + row * d_v + dv, out.to(out_ptr.dtype.element_ty), mask=dv < d_v)
