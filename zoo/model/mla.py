"""Multi-head latent attention (arXiv 2405.04434), and DeepSeek's sparse attention on top of it.

Unusual: the cache holds the latent (after its norm) and the one rotary key, not keys and values. Several
new tokens rebuild keys and values of all heads; a single one is attended in absorbed form instead: the
up-projection of keys moves to the query, that of values to the output, and all heads share the latent as
their only key and value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.kernels.attention import attention, cudnn_fits, decode, flash
from zoo.kernels.latent import keys_and_values, out_of_latent
from zoo.kernels.launch import has_triton
from zoo.kernels.rope import rotate
from zoo.model.attention import attend
from zoo.model.cache import Context, Visible
from zoo.model.linear import Linear
from zoo.model.norm import Norm
from zoo.spec import Indexer as IndexerSpec
from zoo.spec import LatentAttention as LatentSpec


class LatentAttention(nn.Module):
    def __init__(self, spec: LatentSpec, d: int, layer: int, shares: bool = False) -> None:
        """`shares`: a later layer sees what this one's indexer chooses."""
        super().__init__()
        self.spec, self.layer, self.shares = spec, layer, shares
        q = spec.n_heads * (spec.nope_dim + spec.rope_dim)
        if spec.q_rank is None:
            self.q = Linear(d, q)
        else:
            self.q_down = Linear(d, spec.q_rank, bias=spec.qkv_bias)
            self.q_latent_norm = Norm(spec.latent_norm, spec.q_rank)
            self.q_up = Linear(spec.q_rank, q)
        self.kv_down = Linear(d, spec.kv_rank + spec.rope_dim, bias=spec.qkv_bias)
        self.kv_latent_norm = Norm(spec.latent_norm, spec.kv_rank)
        self.kv_up = Linear(spec.kv_rank, spec.n_heads * (spec.nope_dim + spec.v_head_dim))
        self.out = Linear(spec.n_heads * spec.v_head_dim, d, bias=spec.out_bias)
        self.indexer = None if spec.indexer is None else Indexer(spec.indexer, d, spec.q_rank or d, layer)

    def forward(self, x: Tensor, ctx: Context, onto: Tensor | None = None) -> Tensor:
        """Normed x [B, T, d] -> [B, T, d], added to `onto`."""
        s = self.spec
        q_latent = x if s.q_rank is None else self.q_latent_norm(self.q_down(x))
        q = (self.q if s.q_rank is None else self.q_up)(q_latent)
        q = q.unflatten(-1, (s.n_heads, s.nope_dim + s.rope_dim))  # [B, T, H, nope + rope]
        q_nope, q_rope = q.split((s.nope_dim, s.rope_dim), -1)
        latent, k_rope = self.kv_down(x).split((s.kv_rank, s.rope_dim), -1)
        if s.rope is not None:
            table = ctx.rope(s.rope)
            q_rope = rotate(q_rope, *table, s.rope.interleaved, reuse=True)
            k_rope = rotate(k_rope.unsqueeze(2), *table, s.rope.interleaved).squeeze(2)
        stored = torch.cat((self.kv_latent_norm(latent), k_rope), -1)  # [B, T, rank + rope]
        if (slots := ctx.stored(self.layer)) is not None:
            (stored,) = slots.put(ctx, stored)
        if s.query_scale is not None:
            factor = ctx.query_scale(s.query_scale)[:, None, None]
            q_nope, q_rope = (q_nope * factor).to(x.dtype), (q_rope * factor).to(x.dtype)
        sparse = self.indexer is not None or s.indexer_from is not None
        if not sparse and has_triton(x) and x.dtype != torch.float64:
            y = self._fused(q, q_nope, q_rope, stored, ctx)
        else:
            visible = self._visible(x, q_latent, ctx)
            mix = self._absorbed if ctx.cache is not None and ctx.T == 1 else self._expanded
            y = mix(q_nope, q_rope, stored, visible)  # [B, T, H, V]
        out: Tensor = self.out(y.flatten(2), onto)
        return out

    def _visible(self, x: Tensor, q_latent: Tensor, ctx: Context) -> Visible:
        if self.spec.indexer_from is not None:
            return ctx.chosen[self.spec.indexer_from]
        visible = ctx.visible()
        if self.indexer is not None:
            visible = self.indexer(x, q_latent, ctx, visible)
        if self.shares:
            ctx.chosen[self.layer] = visible
        return visible

    def _fused(self, q: Tensor, q_nope: Tensor, q_rope: Tensor, stored: Tensor, ctx: Context) -> Tensor:
        """`_absorbed` or `_expanded` by kernels; with a cache, `stored` [B, S, rank + rope] may have more slots
        than are filled. The two parts of a query lie side by side in q, unless they have been scaled."""
        s = self.spec
        latent, k_rope = stored.split((s.kv_rank, s.rope_dim), -1)
        if ctx.cache is not None and ctx.T == 1:
            up = self._up(q_nope.dtype)
            q = torch.einsum("bhn,hnr->bhr", q_nope[:, 0], up[:, : s.nope_dim])
            shared = latent.unsqueeze(2)  # [B, S, 1, rank]
            y = decode(q, shared, shared, ctx.positions, scale=s.scale, q2=q_rope[:, 0], k2=k_rope)
            return out_of_latent(y, up[:, s.nope_dim :])[:, None]
        if s.query_scale is None and ctx.start == 0 and cudnn_fits(q):
            k, v = keys_and_values(latent, k_rope, self._up(q_nope.dtype), s.nope_dim)
            return attention(q, k, v, scale=s.scale)
        k_nope, v = self._rebuilt(latent)
        return flash(q_nope, k_nope, v, scale=s.scale, start=ctx.start, q2=q_rope, k2=k_rope)

    def _up(self, dtype: torch.dtype) -> Tensor:
        """What rebuilds each head's own part of its keys, and its values, from the latent: [H, nope + V, rank]."""
        s = self.spec
        return self.kv_up.dense(dtype).view(s.n_heads, s.nope_dim + s.v_head_dim, s.kv_rank)

    def _rebuilt(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Each head's own part of its keys [B, S, H, nope], and its values [B, S, H, V]."""
        s = self.spec
        kv = self.kv_up(latent).unflatten(-1, (s.n_heads, s.nope_dim + s.v_head_dim))
        k_nope, v = kv.split((s.nope_dim, s.v_head_dim), -1)
        return k_nope, v

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, stored: Tensor, visible: Visible) -> Tensor:
        s = self.spec
        latent, k_rope = stored.split((s.kv_rank, s.rope_dim), -1)
        k_nope, v = (t.transpose(1, 2) for t in self._rebuilt(latent))  # [B, H, S, ...]
        k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, s.n_heads, -1, -1)), -1)
        q = torch.cat((q_nope, q_rope), -1).transpose(1, 2)  # [B, H, T, nope + rope]
        return attend(q, k, v, visible, s.scale)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, stored: Tensor, visible: Visible) -> Tensor:
        s = self.spec
        up = self._up(q_nope.dtype)
        up_k, up_v = up.split((s.nope_dim, s.v_head_dim), 1)  # [H, nope, rank], [H, V, rank]
        q_latent = torch.einsum("bthn,hnr->bhtr", q_nope, up_k)
        q = torch.cat((q_latent, q_rope.transpose(1, 2)), -1)  # [B, H, T, rank + rope]
        shared = stored.unsqueeze(1)  # one key/value head
        y = attend(q, shared, shared, visible, s.scale)[..., : s.kv_rank]  # [B, T, H, rank]
        return torch.einsum("bthr,hvr->bthv", y, up_v)


HELD = 1 << 28
"""Scores of an indexer's heads that are held at once: 64 heads of a prompt of 32,768 tokens have 17 GB in fp32 otherwise."""


class Scorer(nn.Module):
    """Scores every key for every query with a few small heads and keeps the best `top_k`."""

    def __init__(self, spec: IndexerSpec, d: int, q_rank: int, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        self.q = Linear(q_rank, spec.n_heads * spec.head_dim)
        self.head_weights = Linear(d, spec.n_heads)

    def picked(self, q: Tensor, k: Tensor, x: Tensor, seen: Tensor) -> Tensor:
        """Queries q [B, T, Hi, di] of x [B, T, d], keys k [B, S, di] -> which of those `seen` [T, S] are looked at, [B, T, S]."""
        s = self.spec
        weights = self.head_weights(x).float() * s.n_heads**-0.5  # [B, T, Hi]
        keys, pieces = k.float(), []
        size = max(1, HELD // (k.shape[0] * k.shape[1] * s.n_heads))  # queries
        for some, of_each in zip(q.split(size, 1), weights.split(size, 1), strict=True):
            by_head = torch.relu(torch.einsum("bthd,bsd->bths", some.float(), keys) * s.head_dim**-0.5)
            pieces.append(torch.einsum("bth,bths->bts", of_each, by_head))
        scores = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        scores = scores.masked_fill(~seen, -torch.inf)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, self.best(scores), True) & seen

    def best(self, scores: Tensor) -> Tensor:
        """scores [B, T, S] -> the keys to look at [B, T, top_k]; which of those that score alike is not said."""
        return scores.topk(self.spec.top_k, -1).indices


class HeadWeights(Linear):
    """x [B, T, d] -> the weight of each head's scores [B, T, Hi], in fp32 whatever the model is in, by weights of the file's own dtype:
    so it is in the vendor's code (DeepSeek-V3.2-Exp's inference/model.py), and upstream in fp16. In bf16 upstream rounds."""

    KEPT = ("weight",)

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)), onto)


class Indexer(Scorer):
    """A scorer of the tokens' own keys."""

    def __init__(self, spec: IndexerSpec, d: int, q_rank: int, layer: int) -> None:
        super().__init__(spec, d, q_rank, layer)
        self.head_weights = HeadWeights(d, spec.n_heads)
        self.k = Linear(d, spec.head_dim)
        self.k_norm = Norm(spec.key_norm, spec.head_dim)

    def forward(self, x: Tensor, q_latent: Tensor, ctx: Context, visible: Visible) -> Visible:
        s = self.spec
        table = ctx.rope(s.rope)
        k = self.k_norm(self.k(x)).unsqueeze(2)
        k = rotate(k, *table, s.rope.interleaved).squeeze(2)  # [B, T, di]
        if ctx.cache is not None:
            slots = ctx.cache.index_keys[self.layer]
            assert slots is not None
            (k,) = slots.put(ctx, k)
        if k.shape[1] <= s.top_k:
            return visible
        q = rotate(self.q(q_latent).unflatten(-1, (s.n_heads, s.head_dim)), *table, s.rope.interleaved)
        return Visible(self.picked(q, k, x, ctx.causal).unsqueeze(1))  # [B, 1, T, S]
