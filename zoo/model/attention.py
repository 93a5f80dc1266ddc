"""Softmax attention: grouped queries, windows, chunks, sinks, QK norm, gates, values shared between layers.

Unusual: `attend` leaves to torch's SDPA all that SDPA computes exactly; sinks and soft-capped scores are
written out. A long prompt goes through a window or chunk in blocks of queries, each with the keys it can
reach. A single query folds its group of heads into the query axis, so keys are never repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels.attend import Turn
from zoo.kernels.attend import attend as attend_one
from zoo.kernels.attend import serves as attends_one
from zoo.kernels.attention import attention, decode
from zoo.kernels.cpu import kernels
from zoo.kernels.launch import has_triton, is_recorded
from zoo.kernels.rope import place, place_fits, rotate
from zoo.layout import qk_norm_shape
from zoo.model.cache import Context, Slots, Visible
from zoo.model.linear import Linear
from zoo.model.norm import Norm, Unnormed
from zoo.spec import Attention as AttentionSpec

BLOCK = 512  # queries whose scores are held at once where they are written out
SHORTEST = 64  # queries in a block of a windowed layer, at least
LONG = (
    512  # keys, from which torch's attention makes up for the calls around it: for 4096 it takes half as long
)
SOME = 512  # channels of queries, from which a CPU's kernel is worth asking for (the first time that takes seconds)


def attend(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, K, S, D]
    v: Tensor,  # [B, K, S, V]
    visible: Visible,
    scale: float,
    sinks: Tensor | None = None,  # [H]
    softcap: float | None = None,
    score_scale: Tensor | None = None,  # [T], after the cap
    bias: Tensor | None = None,  # [H, S]
    beside: tuple[Tensor, Tensor] | None = None,  # [B, K, E, D], [T, E] or [B, 1, 1, T, E]
) -> Tensor:  # [B, T, H, V]
    """softmax(cap(q k^T scale) + bias) v over the visible keys; `beside`: more keys, which are values too, and who sees them."""
    T, S, reach = q.shape[2], k.shape[2], visible.reach
    written_out = sinks is not None or softcap is not None or bias is not None or beside is not None
    allowed = visible.allowed
    if written_out and visible.causal:
        allowed = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    size = BLOCK if written_out else T
    if reach is not None:
        size = min(size, max(reach, SHORTEST))
    pieces = []
    for start in range(0, T, size):
        end = min(start + size, T)
        # Keys that no query of the block sees are left out: behind the window, or in the future.
        first = 0 if reach is None else max(0, start + 1 - reach)
        last = S if reach is None and not visible.causal else end
        block, keys, values = q[:, :, start:end], k[:, :, first:last], v[:, :, first:last]
        mask = None if allowed is None else allowed[..., start:end, first:last]
        if beside is not None:
            more, seen = beside[0], beside[1][..., start:end, :]
            keys, values = torch.cat((keys, more), 2), torch.cat((values, more), 2)
            own = seen.new_ones(()) if mask is None else mask
            mask = torch.cat((own.expand(*seen.shape[:-1], last - first), seen), -1)
        if written_out:
            factor = None if score_scale is None else score_scale[start:end]
            added = None if bias is None else bias[:, first:last]
            pieces.append(_written_out(block, keys, values, mask, scale, sinks, softcap, factor, added))
        else:
            pieces.append(_sdpa(block, keys, values, mask, visible.causal, scale))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
    return out.transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool, scale: float) -> Tensor:
    B, H, T, D = q.shape
    K, V = k.shape[1], v.shape[-1]
    if V < D and T > 1:  # one width for all, or SDPA takes its slow path
        v = F.pad(v, (0, D - V))
    if T == 1:
        folded = q.reshape(B, K, H // K, D)
        out = F.scaled_dot_product_attention(folded, k, v, allowed, scale=scale)
        return out.reshape(B, H, 1, V)
    out = F.scaled_dot_product_attention(q, k, v, allowed, is_causal=causal, scale=scale, enable_gqa=K != H)
    return out[..., :V]


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
    score_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    B, H, T, D = q.shape
    K = k.shape[1]
    grouped = q.reshape(B, K, H // K * T, D)
    if bias is not None and softcap is None and score_scale is None:  # in one step, rounded once
        added = bias.view(K, H // K, 1, -1).expand(B, K, H // K, T, -1).reshape(B * K, H // K * T, -1)
        scores = torch.baddbmm(added, grouped.flatten(0, 1), k.transpose(-1, -2).flatten(0, 1), alpha=scale)
        scores, bias = scores.view(B, K, H // K, T, -1), None
    else:
        scores = (grouped @ k.transpose(-1, -2)).view(B, K, H // K, T, -1) * scale  # [B, K, H/K, T, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if score_scale is not None:
        scores = scores * score_scale[:, None]
    if bias is not None:
        scores = scores + bias.view(K, H // K, 1, -1)
    scores = scores.float()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is None:
        p = scores.softmax(-1)
    else:  # one more column that takes its share of the softmax and is dropped
        column = sinks.float().view(K, H // K, 1, 1).expand(B, -1, -1, T, 1)
        p = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    return (p.to(v.dtype).flatten(2, 3) @ v).view(B, H, T, -1)


class Attention(nn.Module):
    sinks: Tensor | None

    def __init__(self, spec: AttentionSpec, d: int, layer: int, shares: bool = False) -> None:
        """`shares`: a later layer reuses this one's keys and values."""
        super().__init__()
        self.spec, self.layer, self.shares = spec, layer, shares
        self.heads = slice(0, spec.n_heads), spec.n_heads  # of how many these are
        H, K, D, V = spec.n_heads, spec.n_kv_heads, spec.head_dim, spec.v_head_dim
        parts = [H * D]
        if spec.gate:
            parts.append(H * V if spec.gate_over == "channel" else H)
        if spec.kv_from is None:
            parts += [K * D] if spec.value_from_key else [K * D, K * V]
        self.qkv = Linear(d, *parts, bias=spec.qkv_bias)
        self.out = Linear(H * V, d, bias=spec.out_bias)
        if (n := spec.qk_norm) is not None:
            self.q_norm = Norm(n.norm, *qk_norm_shape(n, H, D))
            if spec.kv_from is None:
                self.k_norm = Norm(n.norm, *qk_norm_shape(n, K, D))
        if spec.value_norm is not None:
            self.v_norm = Norm(spec.value_norm, V)
        self.register_parameter("sinks", nn.Parameter(torch.empty(H)) if spec.sinks else None)

    def reads(self, x: Unnormed) -> bool:
        """Whether the first product makes the norm of x."""
        return self.qkv.makes_norm(x.x, x.norm)

    def forward(self, x: Tensor | Unnormed, ctx: Context, onto: Tensor | None = None) -> Tensor:
        """Normed x [B, T, d] -> [B, T, d], added to `onto`."""
        s = self.spec
        fused = self.qkv(x) if isinstance(x, Tensor) else self.qkv.of_unnormed(x.x, x.norm)
        q, *rest = fused.split(self.qkv.parts, -1) if len(self.qkv.parts) > 1 else (fused,)
        gate = rest.pop(0) if s.gate else None
        if s.clip is not None:
            q, *rest = (t.clamp(-s.clip, s.clip) for t in (q, *rest))
        y = self._fused(q, rest, ctx) if has_triton(fused) else self._one_token(q, rest, ctx)
        if y is None:
            y = self._plain(q, rest, ctx)
        if gate is not None:
            opened = torch.sigmoid(gate) if s.gate_act == "sigmoid" else F.softplus(gate)
            y = y * opened.unflatten(-1, (s.n_heads, -1))  # [B, T, H, V or 1]
        out: Tensor = self.out(y.flatten(2), onto)
        return out

    def _plain(self, q: Tensor, rest: list[Tensor], ctx: Context) -> Tensor:
        """Queries, keys and values as projected -> [B, T, H, V]."""
        s = self.spec
        q = self._position(q, s.n_heads, "q_norm", ctx)  # [B, H, T, D]
        if s.kv_from is None:
            k, v = self._keys_values(rest[0], rest[-1], ctx)
        else:
            k, v = ctx.kv[s.kv_from]
        score_scale = None
        if s.query_scale is not None:
            factor = ctx.query_scale(s.query_scale)
            if s.softcap is None:  # the cap is not linear: where there is one, the factor comes after it
                q = (q * factor[:, None]).to(q.dtype)
            else:
                score_scale = factor
        own, total = self.heads
        bias = None if s.alibi is None else ctx.alibi(s.alibi, total)[own]
        return attend(
            q, k, v, ctx.visible(s.window, s.chunk), s.scale, self.sinks, s.softcap, score_scale, bias
        )

    def _fused(self, q: Tensor, rest: list[Tensor], ctx: Context) -> Tensor | None:
        """`_plain` by kernels: norm, RoPE and the write to the cache in one, and attention that reads the
        cache as it lies. None where they do not serve."""
        s, n, entry = self.spec, self.spec.qk_norm, ctx.stored(self.layer)
        B, T, _ = q.shape
        if s.kv_from is not None or self.shares or (s.query_scale is not None and s.softcap is not None):
            return None
        if n is not None and n.over == "each_head":
            return None
        if s.alibi is not None or (
            s.value_from_key and s.value_norm is None
        ):  # v would be rotated with k, in place
            return None
        if isinstance(entry, Slots) and entry.ring and ctx.start > 0 and T > 1:
            return None
        k, v = rest[0], rest[-1]
        v = v.view(B, T, s.n_kv_heads, s.v_head_dim)
        if s.value_norm is not None:
            v = self.v_norm(v)
        if s.value_scale != 1.0:
            v = v * s.value_scale
        table = None if s.rope is None else ctx.rope(s.rope)
        weights: tuple[Tensor | None, Tensor | None] = (None, None)
        norm = None
        after = n is not None and n.after_rope and n.norm.weight == "none"
        if n is not None and n.after_rope and not after:
            q, k = (self._position(x, h, m, ctx).transpose(1, 2)
                    for x, h, m in ((q, s.n_heads, "q_norm"), (k, s.n_kv_heads, "k_norm")))  # fmt: skip
            table = None
        else:
            if n is not None and n.over == "all_heads":
                q, k = self.q_norm(q), self.k_norm(k)
            elif n is not None:
                norm, weights = n.norm, (self.q_norm.weight, self.k_norm.weight)
            q, k = q.view(B, T, s.n_heads, s.head_dim), k.view(B, T, s.n_kv_heads, s.head_dim)
        keys: Tensor | None = None
        values: Tensor | None = None
        if isinstance(entry, Slots) and (T <= entry.size or not entry.ring):
            keys, values = (t.transpose(1, 2) for t in entry.tensors)  # [B, slots, K, .]
        if not place_fits(norm, q, k, v, keys, values):
            return None
        interleaved = s.rope is not None and s.rope.interleaved
        if T == 1 and keys is not None and values is not None and s.query_scale is None:
            turn = Turn(norm, weights, after, table, interleaved)
            if attends_one(q, k, v, keys, values, turn, s.window, s.chunk, self.sinks):
                return attend_one(
                    q, k, v, keys, values, ctx.positions[:1], turn, scale=s.scale, window=s.window, chunk=s.chunk,
                    sinks=self.sinks, softcap=s.softcap,
                )[:, None]  # fmt: skip
        q = place(q, k, v, keys, values, ctx.positions[:1], table, interleaved, *weights, norm, after)
        if keys is None or values is None:
            keys, values = k, v
            if isinstance(entry, Slots):
                slots = ctx.slots(entry.size, True)[-entry.size :]
                for store, new in zip(entry.tensors, (keys, values), strict=True):
                    store.index_copy_(2, slots, new[:, -entry.size :].transpose(1, 2))
        if s.query_scale is not None:
            q = (q * ctx.query_scale(s.query_scale)[:, None, None]).to(q.dtype)
        if T == 1 and isinstance(entry, Slots):
            return decode(
                q[:, 0], keys, values, ctx.positions, scale=s.scale, window=s.window, chunk=s.chunk,
                sinks=self.sinks, softcap=s.softcap, placed=True,
            )[:, None]  # fmt: skip
        if (seen := ctx.start + T) < keys.shape[1]:
            keys, values = keys[:, :seen], values[:, :seen]
        return attention(
            q, keys, values, scale=s.scale, start=ctx.start, window=s.window, chunk=s.chunk,
            sinks=self.sinks, softcap=s.softcap,
        )  # fmt: skip

    def _one_token(self, q: Tensor, rest: list[Tensor], ctx: Context) -> Tensor | None:
        """`_plain` of one token in one call on a CPU. None where the kernel does not serve it."""
        s, n, entry = self.spec, self.spec.qk_norm, ctx.stored(self.layer)
        learnt = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if (
            q.device.type != "cpu"
            or ctx.T != 1
            or ctx.fixed
            or q.shape[-1] < SOME
            or learnt
            or is_recorded(q)
        ):
            return None
        if not isinstance(entry, Slots) or self.shares or s.kv_from is not None:
            return None
        if (
            s.alibi is not None
            or s.query_scale is not None
            or (seen := ctx.n_slots(entry.size, entry.ring)) > LONG
        ):
            return None
        if s.value_from_key or s.value_norm is not None or s.value_scale != 1.0:
            return None
        if n is not None and (n.over != "head" or n.after_rope or n.norm.kind != "rms"):
            return None
        if ctx.visible(s.window, s.chunk).allowed is not None or (kernel := kernels("attend")) is None:
            return None
        weights = (None, None) if n is None else (self.q_norm.weight, self.k_norm.weight)
        (q, k, v), (keys, values) = (x[:, 0] for x in (q, *rest)), entry.tensors
        table = None if s.rope is None else ctx.rope(s.rope)
        if not kernel.fits(q, k, v, keys, values, table, *weights):
            return None
        y: Tensor = kernel.attend(
            q, k, v, keys, values, ctx.start % entry.size, seen, table,
            s.rope is not None and s.rope.interleaved, None if n is None else n.norm, *weights, s.scale, self.sinks, s.softcap,
        )  # fmt: skip
        return y.view(len(q), 1, s.n_heads, s.v_head_dim)

    def _keys_values(self, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        s = self.spec
        k = self._position(k, s.n_kv_heads, "k_norm", ctx)
        v = v.unflatten(-1, (s.n_kv_heads, s.v_head_dim))
        if s.value_norm is not None:
            v = self.v_norm(v)
        if s.value_scale != 1.0:
            v = v * s.value_scale
        v = v.transpose(1, 2)
        if (slots := ctx.stored(self.layer)) is not None:
            k, v = slots.put(ctx, k, v)
        if self.shares:
            ctx.kv[self.layer] = k, v
        return k, v

    def _position(self, x: Tensor, heads: int, norm: str, ctx: Context) -> Tensor:
        """Norm and RoPE of queries or keys: [B, T, heads * D] -> [B, heads, T, D]."""
        s, n = self.spec, self.spec.qk_norm
        if n is not None and n.over == "all_heads":
            x = getattr(self, norm)(x)
        x = x.unflatten(-1, (heads, s.head_dim))
        if n is not None and n.over != "all_heads" and not n.after_rope:
            x = getattr(self, norm)(x)
        if s.rope is not None:
            x = rotate(x, *ctx.rope(s.rope), s.rope.interleaved)
        if n is not None and n.after_rope:
            x = getattr(self, norm)(x)
        return x.transpose(1, 2)
