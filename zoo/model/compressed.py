"""Attention to a window and to compressed entries (DeepSeek-V4: CSA where an indexer picks them, HCA where all are seen).

Unusual: one latent is key and value of all heads, rotary channels last; so values are turned too, and what a head gives is
turned back by the query's angle. The cache holds the window's latents, the entries, and, of the last tokens, as many as an
entry is made of, what the compressor makes of each, in fp32. Whatever is in these slots, positions say who sees it: a step that may be
captured makes the entry of its token's window each time, and until the window is full nobody sees it.

All of it is plain torch: scores with sinks are written out (`attend`), in blocks of queries.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from zoo.kernels.product import wide_fits, wide_product
from zoo.kernels.rope import rotate
from zoo.model.attention import attend
from zoo.model.cache import Context, Entries
from zoo.model.linear import Linear, Weights
from zoo.model.mla import Scorer
from zoo.model.norm import Norm
from zoo.spec import CompressedAttention as CompressedSpec
from zoo.spec import Compressor as CompressorSpec
from zoo.spec import Indexer as IndexerSpec
from zoo.spec import Rope


def turned(x: Tensor, table: tuple[Tensor, Tensor], rope: Rope) -> Tensor:
    """The last channels of x [B, T, H, D] rotated by cos and sin [T, dim / 2]."""
    rest, last = x.split((x.shape[-1] - rope.dim, rope.dim), -1)
    return torch.cat((rest, rotate(last, *table, rope.interleaved)), -1)


class GroupedLinear(Weights):
    """`weight` [groups * out, in], a map for each group: x [..., groups, in] -> [..., groups * out]."""

    def __init__(self, groups: int, d_in: int, d_out: int) -> None:
        super().__init__(groups * d_out, d_in, parts=(groups * d_out,), bias=False)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        weight = self.dense(x.dtype).unflatten(0, (self.groups, -1))
        return torch.einsum("...gi,goi->...go", x, weight).flatten(-2)


class CompressedAttention(nn.Module):
    KEPT = ("sinks",)

    def __init__(self, spec: CompressedSpec, d: int, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        heads = spec.n_heads * spec.head_dim
        self.q_down = Linear(d, spec.q_rank)
        self.q_latent_norm = Norm(spec.latent_norm, spec.q_rank)
        self.q_up = Linear(spec.q_rank, heads)
        self.q_norm = Norm(spec.query_norm, spec.head_dim)
        self.kv = Linear(d, spec.head_dim)
        self.kv_norm = Norm(spec.latent_norm, spec.head_dim)
        self.sinks = nn.Parameter(torch.empty(spec.n_heads))
        self.out_down = GroupedLinear(spec.out_groups, heads // spec.out_groups, spec.out_rank)
        self.out = Linear(spec.out_groups * spec.out_rank, d)
        c, x = spec.compressor, spec.indexer
        self.compressor = None if c is None else Compressor(c, spec.rope, spec.head_dim, d)
        self.indexer = None if c is None or x is None else Indexer(x, c, d, spec.q_rank, layer)

    def forward(self, x: Tensor, ctx: Context, onto: Tensor | None = None) -> Tensor:
        """Normed x [B, T, d] -> [B, T, d], added to `onto`."""
        s, table = self.spec, ctx.rope(self.spec.rope)
        q_latent = self.q_latent_norm(self.q_down(x))
        q = turned(self.q_norm(self.q_up(q_latent).unflatten(-1, (s.n_heads, s.head_dim))), table, s.rope)
        kv = turned(self.kv_norm(self.kv(x)).unsqueeze(2), table, s.rope).squeeze(2)  # [B, T, D]
        if (slots := ctx.stored(self.layer)) is not None:
            (kv,) = slots.put(ctx, kv)
        kv = kv.unsqueeze(1)  # one key/value head
        beside = self._entries(x, q_latent, ctx)
        visible = ctx.visible(s.window)
        y = attend(q.transpose(1, 2), kv, kv, visible, s.scale, self.sinks, beside=beside)  # [B, T, H, D]
        cos, sin = table
        y = turned(y, (cos, -sin), s.rope)
        y = self.out_down(y.flatten(2).unflatten(-1, (s.out_groups, -1)))
        out: Tensor = self.out(y, onto)
        return out

    def _entries(self, x: Tensor, q_latent: Tensor, ctx: Context) -> tuple[Tensor, Tensor] | None:
        """The entries [B, 1, n, D], and who sees them, [T, n] or [B, 1, 1, T, n]."""
        if self.compressor is None:
            return None
        store = None if ctx.cache is None else ctx.cache.entries[self.layer]
        entries = self.compressor(x, ctx, store)
        seen = ctx.entries_seen(self.compressor.spec.ratio, entries.shape[1])
        if self.indexer is not None:
            seen = self.indexer(x, q_latent, ctx, seen)
        return entries.unsqueeze(1), seen


class Compressor(nn.Module):
    """An entry for each `ratio` tokens."""

    KEPT = ("positions",)

    def __init__(self, spec: CompressorSpec, rope: Rope, channels: int, d: int) -> None:
        super().__init__()
        self.spec, self.rope, self.channels = spec, rope, channels
        wide = channels * (1 + spec.overlap)
        self.kv_gate = Linear(d, wide, wide)
        self.positions = nn.Parameter(torch.empty(spec.ratio, wide))
        self.norm = Norm(spec.norm, channels)

    def forward(self, x: Tensor, ctx: Context, store: Entries | None) -> Tensor:
        """Normed x [B, T, d] -> the entries of all windows that are full by now, [B, n, channels]; in a step that looks at every
        slot all that there is room for."""
        ratio, before = self.spec.ratio, int(self.spec.overlap)
        both = self._projected(x)
        if store is not None and ctx.T == 1:
            store.tail.index_copy_(1, ctx.slots(store.span, True), both)
            if ctx.fixed or (ctx.start + 1) % ratio == 0:
                window = ctx.positions // ratio
                span = (window - before) * ratio + torch.arange(store.span, device=x.device)
                tokens = store.tail.index_select(1, span % store.span)
                store.made.index_copy_(1, window, self._pooled(tokens, ctx, x.dtype))
            return store.made if ctx.fixed else store.made[:, : (ctx.start + 1) // ratio]
        first, last = ctx.start // ratio, (ctx.start + ctx.T) // ratio  # windows
        start = max(0, first - before) * ratio
        if store is not None and start < ctx.start:
            old = torch.arange(start, ctx.start, device=x.device) % store.span
            tokens = torch.cat((store.tail.index_select(1, old), both), 1)
        else:
            tokens = both
        if first < before:  # no window comes before the first: what stands there is not looked at
            tokens = nn.functional.pad(tokens, (0, 0, ratio, 0))
        made = self._pooled(tokens[:, : (last - first + before) * ratio], ctx, x.dtype)
        if store is None:
            return made
        store.tail.index_copy_(1, ctx.slots(store.span, True)[-store.span :], both[:, -store.span :])
        store.made[:, first:last] = made
        return store.made[:, :last]

    def _projected(self, x: Tensor) -> Tensor:
        """c and z [B, T, 2 wide], in fp32."""
        w, wide = self.kv_gate, torch.promote_types(x.dtype, torch.float32)
        if wide != x.dtype and w.scheme is None and wide_fits(x, w.weight):
            return wide_product(x.flatten(0, -2), w.weight).unflatten(0, x.shape[:-1])
        return w.times(x.to(wide))

    def _pooled(self, tokens: Tensor, ctx: Context, dtype: torch.dtype) -> Tensor:
        """c and z of whole windows, where they overlap one more than get an entry [B, windows * ratio, 2 wide] -> entries
        [B, n, channels], turned."""
        s, channels = self.spec, self.channels
        windows = ctx.windows(s.ratio)
        if not len(windows):
            return tokens.new_empty(len(tokens), 0, channels, dtype=dtype)
        c, z = tokens.unflatten(1, (-1, s.ratio)).chunk(2, -1)  # [B, windows, ratio, wide]
        z = z + self.positions.to(z.dtype)
        if s.overlap:
            none = (windows == 0)[:, None, None]
            z_before = z[:, :-1, :, :channels].masked_fill(none, -torch.inf)
            c = torch.cat((c[:, :-1, :, :channels], c[:, 1:, :, channels:]), 2)
            z = torch.cat((z_before, z[:, 1:, :, channels:]), 2)
        y = self.norm((c * z.softmax(2)).sum(2).to(dtype))
        return turned(y.unsqueeze(2), ctx.window_rope(self.rope, s.ratio), self.rope).squeeze(2)


class Indexer(Scorer):
    """A scorer of entries, by entries of its own."""

    def __init__(self, spec: IndexerSpec, made_as: CompressorSpec, d: int, q_rank: int, layer: int) -> None:
        super().__init__(spec, d, q_rank, layer)
        own = dataclasses.replace(made_as, norm=spec.key_norm)
        self.compressor = Compressor(own, spec.rope, spec.head_dim, d)

    def forward(self, x: Tensor, q_latent: Tensor, ctx: Context, seen: Tensor) -> Tensor:
        """`seen` [T, n], or which of these are picked [B, 1, 1, T, n]."""
        s = self.spec
        k = self.compressor(x, ctx, None if ctx.cache is None else ctx.cache.index_entries[self.layer])
        if k.shape[1] <= s.top_k:
            return seen
        q = turned(self.q(q_latent).unflatten(-1, (s.n_heads, s.head_dim)), ctx.rope(s.rope), s.rope)
        return self.picked(q, k, x, seen)[:, None, None]
