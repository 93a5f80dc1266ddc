"""Layout: Spec -> the canonical tensors, their names and shapes. Canonical layout version 1.

This is the whole definition of what a converted checkpoint contains. The decoder's parameters carry
the same names (a test holds the two together), converters' rules are written against `Slot.key`, and
no torch is needed to know any of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from zoo.spec import (
    MLP,
    Attention,
    CompressedAttention,
    Compressor,
    DeltaNet,
    Indexer,
    LatentAttention,
    Layer,
    Mamba,
    Mamba1,
    MoE,
    Norm,
    QKNorm,
    ShortConv,
    Spec,
)

VERSION = 1


@dataclass(frozen=True, slots=True)
class Slot:
    """One canonical tensor.

    `key` is `name` with the layer index replaced by `{i}`: what a rule is declared for.
    `parts` are the sizes of the pieces fused along the output axis (axis 0; axis 1 where the tensor
    is stacked over experts), in order: q, k, v rows or gate, up rows. One part: nothing is fused.
    """

    name: str
    key: str
    layer: int | None
    shape: tuple[int, ...]
    parts: tuple[int, ...]
    stacked: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def counts(self) -> bool:
        """Whether it holds whole numbers: the experts of each token."""
        return self.key.endswith(".router.table")

    @property
    def multiplies(self) -> bool:
        """Whether it is the weight of a linear map, or a stack of them: what can be run quantised."""
        looked_up = self.key in ("embed.weight", "positions.weight", "per_layer.embed.weight")
        matrix = (
            len(self.shape) > 1 and self.key.endswith(".weight") and not self.key.endswith(".conv.weight")
        )
        return matrix and not looked_up

    @property
    def codes(self) -> bool:
        """Whether it can be run as it was quantised: what multiplies, and tables of tokens."""
        return self.multiplies or self.key in ("embed.weight", "per_layer.embed.weight")


_Entry = tuple[str, tuple[int, ...], tuple[int, ...], bool]  # name in the layer, shape, parts, stacked


def _one(name: str, *shape: int) -> _Entry:
    return name, shape, shape[:1] or (1,), False


def _fused(name: str, parts: tuple[int, ...], *rest: int) -> _Entry:
    return name, (sum(parts), *rest), parts, False


def _norm(name: str, norm: Norm | None, *shape: int) -> Iterator[_Entry]:
    if norm is None:
        return
    if norm.weight != "none":
        yield _one(f"{name}.weight", *shape)
    if norm.kind == "layer" and norm.bias:
        yield _one(f"{name}.bias", *shape)


def qk_norm_shape(n: QKNorm, heads: int, head_dim: int) -> tuple[int, ...]:
    """The shape of a weight of `n`, for queries or keys of so many heads."""
    return {"head": (head_dim,), "each_head": (heads, head_dim), "all_heads": (heads * head_dim,)}[n.over]


def _attention(a: Attention, d: int) -> Iterator[_Entry]:
    q, k, v = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim, a.n_kv_heads * a.v_head_dim
    parts: tuple[int, ...] = (q,)
    if a.gate:
        parts += (a.n_heads * (a.v_head_dim if a.gate_over == "channel" else 1),)
    if a.kv_from is None:
        parts += (k,) if a.value_from_key else (k, v)
    yield _fused("attn.qkv.weight", parts, d)
    if a.qkv_bias:
        yield _fused("attn.qkv.bias", parts)
    yield _one("attn.out.weight", d, a.n_heads * a.v_head_dim)
    if a.out_bias:
        yield _one("attn.out.bias", d)
    if (n := a.qk_norm) is not None:
        yield from _norm("attn.q_norm", n.norm, *qk_norm_shape(n, a.n_heads, a.head_dim))
        if a.kv_from is None:
            yield from _norm("attn.k_norm", n.norm, *qk_norm_shape(n, a.n_kv_heads, a.head_dim))
    if a.sinks:
        yield _one("attn.sinks", a.n_heads)


def _indexer(x: Indexer, d: int, q_rank: int) -> Iterator[_Entry]:
    yield _one("attn.indexer.q.weight", x.n_heads * x.head_dim, q_rank)
    yield _one("attn.indexer.k.weight", x.head_dim, d)
    yield from _norm("attn.indexer.k_norm", x.key_norm, x.head_dim)
    yield _one("attn.indexer.head_weights.weight", x.n_heads, d)


def _latent_attention(a: LatentAttention, d: int) -> Iterator[_Entry]:
    q = a.n_heads * (a.nope_dim + a.rope_dim)
    if a.q_rank is None:
        yield _one("attn.q.weight", q, d)
    else:
        yield _one("attn.q_down.weight", a.q_rank, d)
        if a.qkv_bias:
            yield _one("attn.q_down.bias", a.q_rank)
        yield from _norm("attn.q_latent_norm", a.latent_norm, a.q_rank)
        yield _one("attn.q_up.weight", q, a.q_rank)
    yield _one("attn.kv_down.weight", a.kv_rank + a.rope_dim, d)
    if a.qkv_bias:
        yield _one("attn.kv_down.bias", a.kv_rank + a.rope_dim)
    yield from _norm("attn.kv_latent_norm", a.latent_norm, a.kv_rank)
    yield _one("attn.kv_up.weight", a.n_heads * (a.nope_dim + a.v_head_dim), a.kv_rank)
    yield _one("attn.out.weight", d, a.n_heads * a.v_head_dim)
    if a.out_bias:
        yield _one("attn.out.bias", d)
    if a.indexer is not None:
        yield from _indexer(a.indexer, d, a.q_rank or d)


def _compressor(name: str, c: Compressor, channels: int, d: int) -> Iterator[_Entry]:
    wide = channels * (1 + c.overlap)
    yield _fused(f"{name}.kv_gate.weight", (wide, wide), d)
    yield _one(f"{name}.positions", c.ratio, wide)
    yield from _norm(f"{name}.norm", c.norm, channels)


def _compressed_attention(a: CompressedAttention, d: int) -> Iterator[_Entry]:
    yield _one("attn.q_down.weight", a.q_rank, d)
    yield from _norm("attn.q_latent_norm", a.latent_norm, a.q_rank)
    yield _one("attn.q_up.weight", a.n_heads * a.head_dim, a.q_rank)
    yield from _norm("attn.q_norm", a.query_norm, a.head_dim)
    yield _one("attn.kv.weight", a.head_dim, d)
    yield from _norm("attn.kv_norm", a.latent_norm, a.head_dim)
    yield _one("attn.sinks", a.n_heads)
    yield _one("attn.out_down.weight", a.out_groups * a.out_rank, a.n_heads * a.head_dim // a.out_groups)
    yield _one("attn.out.weight", d, a.out_groups * a.out_rank)
    if (c := a.compressor) is not None:
        yield from _compressor("attn.compressor", c, a.head_dim, d)
        if (x := a.indexer) is not None:
            yield _one("attn.indexer.q.weight", x.n_heads * x.head_dim, a.q_rank)
            yield _one("attn.indexer.head_weights.weight", x.n_heads, d)
            made_as = dataclasses.replace(c, norm=x.key_norm)
            yield from _compressor("attn.indexer.compressor", made_as, x.head_dim, d)


def _hyper(name: str, parts: tuple[int, ...], streams: int, d: int) -> Iterator[_Entry]:
    yield _one(f"{name}.weight", sum(parts), streams * d)
    yield _one(f"{name}.bias", sum(parts))
    yield _one(f"{name}.factors", len(parts))


def _delta(m: DeltaNet, d: int) -> Iterator[_Entry]:
    k, v = m.n_k_heads * m.k_head_dim, m.n_v_heads * m.v_head_dim
    if m.decay == "head":
        yield _fused("delta.qkvz.weight", (k, k, v, v), d)
        yield _fused("delta.ba.weight", (m.n_v_heads, m.n_v_heads), d)
        yield _one("delta.dt_bias", m.n_v_heads)
    else:
        yield _fused("delta.qkv.weight", (k, k, v), d)
        yield _one("delta.beta.weight", m.n_v_heads, d)
        yield _one("delta.decay_down.weight", m.k_head_dim, d)
        yield _one("delta.decay_up.weight", k, m.k_head_dim)
        yield _one("delta.gate_down.weight", m.v_head_dim, d)
        yield _one("delta.gate_up.weight", v, m.v_head_dim)
        yield _one("delta.dt_bias", k)
    yield _fused("delta.conv.weight", (k, k, v), m.conv)
    yield _one("delta.A_log", m.n_v_heads)
    yield from _norm("delta.norm", m.out_norm, m.v_head_dim)
    yield _one("delta.out.weight", d, v)


def _mamba(m: Mamba, d: int) -> Iterator[_Entry]:
    inner, bc = m.n_heads * m.head_dim, m.n_groups * m.state
    yield _fused("mamba.in_proj.weight", (inner, inner, bc, bc, m.n_heads), d)
    yield _fused("mamba.conv.weight", (inner, bc, bc), m.conv)
    if m.conv_bias:
        yield _fused("mamba.conv.bias", (inner, bc, bc))
    for name in ("A_log", "D", "dt_bias"):
        yield _one(f"mamba.{name}", m.n_heads)
    yield from _norm("mamba.norm", m.out_norm, inner)
    yield _one("mamba.out.weight", d, inner)


def _mamba1(m: Mamba1, d: int) -> Iterator[_Entry]:
    yield _fused("mamba1.in_proj.weight", (m.inner, m.inner), d)
    yield _one("mamba1.conv.weight", m.inner, m.conv)
    if m.conv_bias:
        yield _one("mamba1.conv.bias", m.inner)
    yield _fused("mamba1.x_proj.weight", (m.dt_rank, m.state, m.state), m.inner)
    for name, width in (("dt", m.dt_rank), ("b", m.state), ("c", m.state)):
        yield from _norm(f"mamba1.{name}_norm", m.norm, width)
    yield _one("mamba1.dt_proj.weight", m.inner, m.dt_rank)
    yield _one("mamba1.dt_bias", m.inner)
    yield _one("mamba1.A_log", m.inner, m.state)
    yield _one("mamba1.D", m.inner)
    yield _one("mamba1.out.weight", d, m.inner)


def _short_conv(m: ShortConv, d: int) -> Iterator[_Entry]:
    yield _fused("short_conv.in_proj.weight", (d, d, d), d)
    yield _one("short_conv.conv.weight", d, m.conv)
    yield _one("short_conv.out.weight", d, d)
    if m.bias:
        yield _fused("short_conv.in_proj.bias", (d, d, d))
        yield _one("short_conv.conv.bias", d)
        yield _one("short_conv.out.bias", d)


def _mlp(m: MLP, d: int, prefix: str = "mlp", n_experts: int | None = None) -> Iterator[_Entry]:
    e = () if n_experts is None else (n_experts,)
    stacked = n_experts is not None
    up, parts = ("gate_up", (m.d_ff, m.d_ff)) if m.gated else ("up", (m.d_ff,))
    yield f"{prefix}.{up}.weight", (*e, sum(parts), d), parts, stacked
    yield f"{prefix}.down.weight", (*e, d, m.d_ff), (d,), stacked
    if m.bias:
        yield f"{prefix}.{up}.bias", (*e, sum(parts)), parts, stacked
        yield f"{prefix}.down.bias", (*e, d), (d,), stacked
    if m.act == "xielu":
        yield _one(f"{prefix}.act.positive", 1)
        yield _one(f"{prefix}.act.negative", 1)
        yield _one(f"{prefix}.act.beta")
        yield _one(f"{prefix}.act.near")


def _moe(m: MoE, d: int) -> Iterator[_Entry]:
    yield _one("moe.router.weight", m.n_experts, d)
    if m.router.bias:
        yield _one("moe.router.bias", m.n_experts)
    if m.router.selection_bias:
        yield _one("moe.router.selection_bias", m.n_experts)
    if m.router.by_token is not None:
        yield _one("moe.router.table", m.router.by_token, m.router.top_k)
    if m.router.expert_scale:
        yield _one("moe.router.expert_scale", m.n_experts)
    yield from _norm("moe.router.norm", m.router.norm, d)
    yield from _norm("moe.norm", m.norm, d)
    if m.latent is not None:
        yield _one("moe.latent_down.weight", m.latent, d)
        yield _one("moe.latent_up.weight", d, m.latent)
    yield from _mlp(m.expert, m.latent or d, "moe", m.n_experts)
    yield from _norm("moe.post_norm", m.post_norm, d)
    if m.shared is not None:
        yield from _mlp(m.shared, d, "moe.shared")
        yield from _norm("moe.shared_post_norm", m.shared_post_norm, d)
        if m.shared_gate:
            yield _one("moe.shared_gate.weight", 1, d)


def _layer(spec: Spec, layer: Layer) -> Iterator[_Entry]:
    d = spec.d_model
    yield from _norm("attn_norm", layer.attn_norm, d)
    for mixer in layer.mixers:
        match mixer:
            case Attention():
                yield from _attention(mixer, d)
            case LatentAttention():
                yield from _latent_attention(mixer, d)
            case CompressedAttention():
                yield from _compressed_attention(mixer, d)
            case DeltaNet():
                yield from _delta(mixer, d)
            case Mamba():
                yield from _mamba(mixer, d)
            case Mamba1():
                yield from _mamba1(mixer, d)
            case ShortConv():
                yield from _short_conv(mixer, d)
    yield from _norm("attn_post_norm", layer.attn_post_norm, d)
    yield from _norm("ffn_norm", layer.ffn_norm, d)
    match layer.ffn:
        case MLP():
            yield from _mlp(layer.ffn, d)
        case MoE():
            yield from _moe(layer.ffn, d)
    yield from _norm("ffn_post_norm", layer.ffn_post_norm, d)
    if layer.scalar:
        yield _one("scalar", 1)
    if (a := spec.altup) is not None:
        yield _one("altup.router_norm.weight", d)
        yield _one("altup.router.weight", a.n_streams, d)
        yield _one("altup.predict.weight", a.n_streams**2, a.n_streams)
        yield _one("altup.correct.weight", a.n_streams, a.n_streams)
        if a.correct_scale:
            yield _one("altup.correct_scale", d)
        yield _one("laurel.down.weight", a.laurel_rank, d)
        yield _one("laurel.up.weight", d, a.laurel_rank)
        yield _one("laurel.norm.weight", d)
    if (h := spec.hyper) is not None:
        for branch, there in (("attn", layer.mixer), ("ffn", layer.ffn)):
            if there is not None:
                n = h.n_streams
                yield from _hyper(f"{branch}_hyper", (n, n, n * n), n, d)
    if (p := spec.per_layer_embedding) is not None:
        yield _one("per_layer.gate.weight", p.dim, d)
        yield _one("per_layer.out.weight", d, p.dim)
        yield _one("per_layer.norm.weight", d)


def _ends(spec: Spec) -> Iterator[_Entry]:
    d = spec.d_model
    yield _one("embed.weight", spec.vocab_size, d)
    yield from _norm("embed_norm", spec.embed_norm, d)
    if spec.positions is not None:
        yield _one("positions.weight", spec.positions + spec.positions_offset, d)
    if (p := spec.per_layer_embedding) is not None:
        yield _one("per_layer.embed.weight", p.vocab_size, spec.n_layers * p.dim)
        yield _one("per_layer.proj.weight", spec.n_layers * p.dim, d)
        yield _one("per_layer.norm.weight", p.dim)
    if (a := spec.altup) is not None:
        yield "altup.expand.weight", (a.n_streams - 1, d, d), (d,), True
        yield "altup.merge.weight", (a.n_streams - 1, d, d), (d,), True
    if (h := spec.hyper) is not None:
        yield from _hyper("hyper", (h.n_streams,), h.n_streams, d)
    yield from _norm("norm", spec.norm, d)
    if not spec.tied:
        yield _one("head.weight", spec.vocab_size, d)
        if spec.head_bias:
            yield _one("head.bias", spec.vocab_size)


@functools.lru_cache(maxsize=8)
def layout(spec: Spec) -> dict[str, Slot]:
    """All canonical tensors of `spec` by name, in the order in which they are stored:
    embedding, layers from first to last, final norm, head."""
    ends = [Slot(n, n, None, shape, parts, stacked) for n, shape, parts, stacked in _ends(spec)]
    last = {"norm.weight", "norm.bias", "head.weight", "head.bias", "altup.merge.weight"}
    last |= {"hyper.weight", "hyper.bias", "hyper.factors"}
    slots = {s.name: s for s in ends if s.name not in last}
    kinds: dict[Layer, list[_Entry]] = {}
    for i, layer in enumerate(spec.layers):
        if layer not in kinds:
            kinds[layer] = list(_layer(spec, layer))
        for name, shape, parts, stacked in kinds[layer]:
            full = f"layers.{i}.{name}"
            slots[full] = Slot(full, "layers.{i}." + name, i, shape, parts, stacked)
    slots |= {s.name: s for s in ends if s.name in last}
    return slots


def total_params(spec: Spec) -> int:
    """Parameters of the text model; a tied head counts once. Selection biases are parameters here
    as they are stored; upstream libraries often hold them as buffers."""
    return sum(s.size for s in layout(spec).values())


def active_params(spec: Spec) -> int:
    """Parameters that one token visits: all but the experts it is not routed to. The embedding
    counts (publishers differ: some leave it out)."""
    idle = 0
    for s in layout(spec).values():
        if s.stacked and s.layer is not None:
            ffn = spec.layers[s.layer].ffn
            assert isinstance(ffn, MoE)
            idle += s.size // ffn.n_experts * (ffn.n_experts - ffn.router.top_k)
    return total_params(spec) - idle
