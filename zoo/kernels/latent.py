"""Around latent attention: of one query what leads out of the latent, of many the keys and values.

Each head has its own small matrix, [V, rank], used once: what counts is to read each once, from many programs.
(`attention.decode` is what stands before it. Into the latent torch's batched product is faster than a kernel of this kind:
8.2 and 8.9 us.)

Margin, on an H100, of DeepSeek-V3's 128 heads in bf16: out of the latent 7.9 us for 16.8 MB, torch's batched product 8.7. Keys
and values of many tokens come of two batched products, each written where it is read: 2048 tokens in 114 us, 146 by one product
from which a kernel of 62 us then assembles the keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.launch import Kernel, ceil_div, has_triton, overlap, power_of_2, triton

if triton is not None:
    import triton.language as tl

    from zoo.kernels.launch import after_previous


def out_of_latent_reference(y: Tensor, up: Tensor) -> Tensor:
    """y [B, H, R], up [H, V, R] -> [B, H, V]."""
    return torch.einsum("bhr,hvr->bhv", y, up)


def out_of_latent(y: Tensor, up: Tensor) -> Tensor:
    """`out_of_latent_reference`, as one kernel where Triton runs and B is small."""
    if not _fits(y, up):
        return out_of_latent_reference(y, up)
    (b, h, r), v = y.shape, up.shape[1]
    out = y.new_empty(b, h, v)
    block = min(32, power_of_2(v))
    _out_of[(ceil_div(v, block), h, b)](
        y,
        up,
        out,
        v,
        r,
        *y.stride()[:2],
        *up.stride()[:2],
        R=power_of_2(r),
        BLOCK=block,
        num_warps=4,
        **overlap(y),
    )
    return out


def keys_and_values_reference(latent: Tensor, rope: Tensor, up: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """latent [B, S, rank] by each head's up [H, own + V, rank], and the part of the keys that all heads share [B, S, R]:
    keys [B, S, H, own + R] and values [B, S, H, V]."""
    h = len(up)
    kv = F.linear(latent, up.flatten(0, 1)).unflatten(-1, (h, -1))  # [B, S, H, own + V]
    return torch.cat((kv[..., :own], rope.unsqueeze(2).expand(-1, -1, h, -1)), -1), kv[..., own:]


def keys_and_values(latent: Tensor, rope: Tensor, up: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """`keys_and_values_reference`, each written where it belongs where Triton runs."""
    (b, s, rank), (h, n, _), r = latent.shape, up.shape, rope.shape[2]
    if not has_triton(latent) or rope.stride(-1) != 1 or not latent.numel():
        return keys_and_values_reference(latent, rope, up, own)
    rows = latent.reshape(b * s, rank).expand(h, -1, -1)
    k, v = latent.new_empty(b * s, h, own + r), latent.new_empty(b * s, h, n - own)
    torch.bmm(rows, up[:, :own].transpose(1, 2), out=k[..., :own].transpose(0, 1))
    torch.bmm(rows, up[:, own:].transpose(1, 2), out=v.transpose(0, 1))
    heads = min(128, power_of_2(h))
    _share[(b * s, ceil_div(h, heads))](
        rope, k, s, h, own, r, *rope.stride()[:2],
        HEADS=heads, R=power_of_2(r), num_warps=4, **overlap(latent),
    )  # fmt: skip
    return k.view(b, s, h, own + r), v.view(b, s, h, n - own)


def _fits(x: Tensor, up: Tensor) -> bool:
    unit = x.stride(-1) == up.stride(-1) == 1
    return has_triton(x) and len(x) <= 8 and unit and x.dtype == up.dtype and x.dtype != torch.float64


if triton is not None:

    @Kernel
    def _out_of(
        y_ptr, up_ptr, out_ptr, n_out, n_in, y_b, y_h, up_h, up_v,
        R: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        r, v = tl.arange(0, R), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        at = up_ptr + h * up_h + v[:, None] * up_v + r[None, :]
        w = tl.load(at, mask=(v < n_out)[:, None] & (r < n_in)[None, :], other=0.0)
        after_previous(OVERLAP)
        x = tl.load(y_ptr + b * y_b + h * y_h + r, mask=r < n_in, other=0.0).to(tl.float32)
        y = tl.sum(w.to(tl.float32) * x[None, :], 1)
        at = out_ptr + (b * tl.num_programs(1) + h) * n_out + v
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=v < n_out)

    @Kernel
    def _share(
        rope_ptr, k_ptr, S, H, own, n_rope, rope_b, rope_s,
        HEADS: tl.constexpr, R: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        h, r = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, R)
        after_previous(OVERLAP)
        shared = tl.load(rope_ptr + row // S * rope_b + row % S * rope_s + r, mask=r < n_rope, other=0.0)
        at = k_ptr + (row * H + h)[:, None] * (own + n_rope) + own + r[None, :]
        shared = tl.broadcast_to(shared[None, :], (HEADS, R))
        tl.store(at, shared, mask=(h < H)[:, None] & (r < n_rope)[None, :])
