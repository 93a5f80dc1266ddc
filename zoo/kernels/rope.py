"""What stands between the q, k, v projection and attention: per-head QK norm, RoPE, and the write to the cache.

Unusual: cos and sin come in the dtype they are used in. In bf16 the kernel rounds each product and the sum, as
the plain expression does; with fp32 tables it rotates in fp32 and rounds once. No product is fused with a sum (compilers
do, and see through roundings to bf16), so the rotation gives torch's bits.

Margin: one kernel where the plain expressions are about thirty; torch has none for this. On an H100, of the 33 ms
of a 2048-token prompt through 8 layers of Llama 4 Scout, some 2 went into the elementwise kernels it replaces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.launch import Kernel, ceil_div, has_triton, overlap, power_of_2, triton
from zoo.kernels.norm import rms_norm_reference
from zoo.spec import Norm

if triton is not None:
    import triton.language as tl

    from zoo.kernels.launch import after_previous
    from zoo.kernels.norm import normalise


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] channels of x [B, T, H, D] by the tables [T, .]; the others pass."""
    dim = 2 * cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, dim/2]
    turned, rest = x[..., :dim].to(cos.dtype), x[..., dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    out = out.to(x.dtype)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, reuse: bool = False) -> Tensor:
    """`rotate_reference`, as one kernel where Triton runs: then in x itself, if `reuse` allows it."""
    if not has_triton(x) or x.dtype == torch.float64 or x.stride(-1) != 1 or not x.numel():
        return rotate_reference(x, cos, sin, interleaved)
    b, t, h, d = x.shape
    out = x if reuse else x.new_empty(x.shape)
    heads = min(8 if t == 1 else 32, power_of_2(h))
    _rotate[(b * t, ceil_div(h, heads))](
        x, cos, sin, out, t, h, d, cos.shape[-1], *x.stride()[:3], *out.stride()[:3],
        INTERLEAVED=interleaved, REUSE=reuse, HEADS=heads, D=power_of_2(d), num_warps=4 if t > 1 else 1,
        enable_fp_fusion=False, **overlap(x),
    )  # fmt: skip
    return out


def place_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    table: tuple[Tensor, Tensor] | None,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm: Norm | None = None,
    after: bool = False,
) -> Tensor:
    """Norm and rotate q [B, T, H, D] and k [B, T, K, D] (per head, if `norm`; the other way round if `after`, for
    norms without a weight), and write k and v to the slots (position + t) % C of keys [B, C, K, D] and values [B, C, K, V]. Only the last C of T tokens are written.
    Returns the rotated q."""
    if norm is not None and not after:
        q, k = rms_norm_reference(q, q_norm, norm), rms_norm_reference(k, k_norm, norm)
    if table is not None:
        q, k = rotate_reference(q, *table, interleaved), rotate_reference(k, *table, interleaved)
    if norm is not None and after:
        q, k = rms_norm_reference(q, None, norm), rms_norm_reference(k, None, norm)
    t, c = q.shape[1], keys.shape[1]
    tokens = torch.arange(max(0, t - c), t, device=q.device)
    slots = (position + tokens) % c
    keys[:, slots], values[:, slots] = k[:, tokens], v[:, tokens]
    return q


def place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    position: Tensor,
    table: tuple[Tensor, Tensor] | None,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm: Norm | None = None,
    after: bool = False,
) -> Tensor:
    """`place_reference` as one kernel where Triton runs (see `place_fits`). q, k and v are slices of one projection
    [B, T, (H + K) D + K V], in that order; `position` is a tensor of one int on their device. Without keys and values
    to write to, q and k are normed and rotated where they are."""
    (b, t, h, d), (kv, dv) = q.shape, v.shape[2:]
    out, reuse = q, keys is None or values is None
    slots = t
    strides: tuple[int, ...] = (0,) * 6
    if keys is not None and values is not None:
        out = q.new_empty(b, t, h, d)
        slots, strides = keys.shape[1], (*keys.stride()[:3], *values.stride()[:3])
    elif table is None and norm is None:
        return q
    cos, sin = table if table is not None else (q, q)
    block = power_of_2(max(d, dv))
    heads, warps = (4, 4) if t == 1 else (max(1, 1024 // block), 2)  # measured on an H100
    kind = 0 if norm is None else 1 if norm.weight == "none" else 2 if norm.rounding == "first" else 3
    _place[(b * t, ceil_div(h + (kv if reuse else 2 * kv), heads))](
        q, _apart(q, k), _apart(q, v), keys, values, out, position, cos, sin, q_norm, k_norm,
        t, h, kv, slots, d, dv, cos.shape[-1] if table else 0, 0.0 if norm is None else norm.eps,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides,
        REUSE=reuse, KIND=kind, AFTER=after, PLUS_ONE=norm is not None and norm.weight == "plus_one", ROPE=table is not None,
        INTERLEAVED=interleaved, HEADS=heads, D=block, num_warps=warps,
        enable_fp_fusion=False, **overlap(q),
    )  # fmt: skip
    return out


def _apart(q: Tensor, x: Tensor) -> int:
    """How many elements x lies behind q. (Both are slices of one projection, as a rule, but need not be.)"""
    return (x.data_ptr() - q.data_ptr()) // q.element_size()


def place_fits(norm: Norm | None, *tensors: Tensor | None) -> bool:
    """Whether the kernel serves q, k, v, keys and values."""
    there = [x for x in tensors if x is not None]
    unit = all(x.stride(-1) == 1 for x in there)
    same = len({x.dtype for x in there}) == 1 and there[0].dtype != torch.float64
    return has_triton(there[0]) and unit and same and (norm is None or norm.kind == "rms")


if triton is not None:

    @triton.jit
    def neighbours(x):
        """x [N, D], the channels of each pair in the other order. (Loaded so, each would be a load of two bytes.)"""
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        return tl.reshape(tl.join(b, a), x.shape)

    @Kernel
    def _place(
        x_ptr, k_from, v_from, keys_ptr, values_ptr, out_ptr, position_ptr, cos_ptr, sin_ptr, qn_ptr, kn_ptr,
        T, H, KV, C, d_qk, d_v, half, eps,
        q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, ks_b, ks_s, ks_h, vs_b, vs_s, vs_h,
        REUSE: tl.constexpr, KIND: tl.constexpr, AFTER: tl.constexpr, PLUS_ONE: tl.constexpr, ROPE: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        HEADS: tl.constexpr, D: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
        h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)  # q heads, then k heads, then v heads
        is_q, is_k, is_v = h < H, (h >= H) & (h < H + KV), (h >= H + KV) & (h < H + 2 * KV)
        d = tl.arange(0, D)
        dtype = out_ptr.dtype.element_ty
        after_previous(OVERLAP)
        slot = (tl.load(position_ptr).to(tl.int64) + t) % C
        kept = t + 0 * h >= T - C
        k_at = k_from + k_b * b + k_t * t + k_h * (h - H)
        v_at = v_from + v_b * b + v_t * t + v_h * (h - H - KV)
        base = tl.where(is_q, q_b * b + q_t * t + q_h * h, tl.where(is_k, k_at, v_at))
        qk = ((is_q | is_k)[:, None]) & (d < d_qk)[None, :]
        at = base[:, None] + d[None, :]
        vm = is_v[:, None] & (d < d_v)[None, :]
        raw = tl.load(x_ptr + at, mask=qk | vm, other=0.0)
        x = raw.to(tl.float32)
        if ROPE:
            turns = d < 2 * half
            if INTERLEAVED:
                angle = d // 2
                first = d % 2 == 0
            else:
                first = d < half
                angle = tl.where(first, d, d - half)
                mate = tl.where(turns, tl.where(first, d + half, d - half), d)
                at = base[:, None] + mate[None, :]
                y = tl.load(x_ptr + at, mask=qk, other=0.0).to(tl.float32)
        if KIND != 0 and not AFTER:
            r = tl.rsqrt(tl.sum(x * x, 1) / d_qk + eps)[:, None]
            x = x * r
            w = x
            if KIND > 1:
                w = tl.load(qn_ptr + d, mask=d < d_qk, other=0.0).to(tl.float32)[None, :]
                w = tl.where(
                    is_q[:, None], w, tl.load(kn_ptr + d, mask=d < d_qk, other=0.0).to(tl.float32)[None, :]
                )
            x = normalise(x, w, KIND - 1, PLUS_ONE, dtype)
            if ROPE and not INTERLEAVED:
                y = y * r
                if KIND > 1:
                    w = tl.load(qn_ptr + mate, mask=d < d_qk, other=0.0).to(tl.float32)[None, :]
                    other = tl.load(kn_ptr + mate, mask=d < d_qk, other=0.0).to(tl.float32)[None, :]
                    w = tl.where(is_q[:, None], w, other)
                y = normalise(y, w, KIND - 1, PLUS_ONE, dtype)
        if ROPE:
            if INTERLEAVED:
                y = neighbours(x)
            cos = tl.load(cos_ptr + t * half + angle, mask=turns, other=1.0)
            sin = tl.load(sin_ptr + t * half + angle, mask=turns, other=0.0)
            work = cos.dtype
            c32, s32 = cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]
            a = (x * c32).to(work).to(tl.float32)
            o = (y * s32).to(work).to(tl.float32)
            x = tl.where(turns[None, :], tl.where(first[None, :], a - o, a + o).to(work).to(tl.float32), x)
        if AFTER:
            x = x.to(dtype).to(tl.float32)
            x = x * tl.rsqrt(tl.sum(x * x, 1) / d_qk + eps)[:, None]
        if REUSE:
            tl.debug_barrier()  # a mate may be another warp's
            tl.store(x_ptr + base[:, None] + d[None, :], x.to(dtype), mask=qk)
        else:
            at = ((b * T + t) * H + h)[:, None] * d_qk + d[None, :]
            tl.store(out_ptr + at, x.to(dtype), mask=is_q[:, None] & qk)
            at = (ks_b * b + ks_s * slot + ks_h * (h - H))[:, None] + d[None, :]
            tl.store(keys_ptr + at, x.to(dtype), mask=(is_k & kept)[:, None] & qk)
            at = (vs_b * b + vs_s * slot + vs_h * (h - H - KV))[:, None] + d[None, :]
            tl.store(values_ptr + at, raw, mask=vm & kept[:, None])

    @Kernel
    def _rotate(
        x_ptr, cos_ptr, sin_ptr, out_ptr, T, H, n_d, half, x_b, x_t, x_h, out_b, out_t, out_h,
        INTERLEAVED: tl.constexpr, REUSE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
        h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        d = tl.arange(0, D)
        after_previous(OVERLAP)
        mask = (h < H)[:, None] & (d < n_d)[None, :]
        if INTERLEAVED:
            first, angle = d % 2 == 0, d // 2
        else:
            first = d < half
            angle = tl.where(first, d, d - half)
            mate = tl.where(first, d + half, d - half)
        turns = d < 2 * half
        base = x_ptr + b * x_b + t * x_t + h[:, None] * x_h
        x = tl.load(base + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if INTERLEAVED:
            y = neighbours(x)
        else:
            y = tl.load(base + tl.where(turns, mate, d)[None, :], mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + t * half + angle, mask=turns, other=1.0)
        sin = tl.load(sin_ptr + t * half + angle, mask=turns, other=0.0)
        work = cos.dtype
        a = (x * cos.to(tl.float32)[None, :]).to(work).to(tl.float32)
        o = (y * sin.to(tl.float32)[None, :]).to(work).to(tl.float32)
        x = tl.where(turns[None, :], tl.where(first[None, :], a - o, a + o).to(work).to(tl.float32), x)
        if REUSE:
            tl.debug_barrier()  # a mate may be another warp's
        at = out_ptr + b * out_b + t * out_t + h[:, None] * out_h + d[None, :]
        tl.store(at, x.to(out_ptr.dtype.element_ty), mask=mask)
