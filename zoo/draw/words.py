"""What each part of a Spec says in its box: lines of text, those marked that few families need.

Unusual here: nothing of a Spec can be left out in silence. A part is read through `_Read`, which knows what was asked for;
a field that differs from its default and that no line below speaks of is written as it stands. So a field added to the
Spec tomorrow is in the pictures at once, if not in good words. `SILENT` says what pictures leave out on purpose.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from zoo.describe import ACTIVATIONS, UNGATED
from zoo.spec import (
    MLP,
    AltUp,
    Attention,
    CompressedAttention,
    Compressor,
    DeltaNet,
    HyperConnections,
    Indexer,
    LatentAttention,
    Mamba,
    Mamba1,
    Mixer,
    MoE,
    Norm,
    PerLayerEmbedding,
    QKNorm,
    QueryScale,
    Rope,
    RopeScaling,
    Router,
    ShortConv,
)

SILENT = frozenset(
    {"kind", "rounding", "weights_rounding", "score_rounding", "embed_rounding", "adds", "notes", "family"}
)
"""Where steps of a model in bf16 round, names and remarks: in zoo.json, not in a picture."""


@dataclass(frozen=True)
class Line:
    """A line of a box. `rare`: few families do this."""

    text: str
    rare: bool = False


class _Read:
    """A part of a Spec that remembers which of its fields were read."""

    def __init__(self, part: Any) -> None:
        self._part, self._read = part, set(SILENT)

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._part, name)

    def done(self, *names: str) -> None:
        """These say nothing here, or were said in other words."""
        self._read.update(names)

    def rest(self) -> list[Line]:
        """Fields that nobody read and that say something."""
        return [
            Line(f"{f.name.replace('_', ' ')}: {_plain(value)}", True)
            for f in dataclasses.fields(self._part)
            if f.name not in self._read
            and (value := getattr(self._part, f.name)) != f.default
            and value is not None
        ]


def others(part: Any, drawn: Iterable[str]) -> list[Line]:
    """Fields of a layer or a Spec that are not among those `drawn`."""
    r = _Read(part)
    r.done(*drawn)
    return r.rest()


def _plain(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        inside = [(f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value)]
        return ", ".join(f"{n.replace('_', ' ')} {_plain(v)}" for n, v, d in inside if v != d)
    if isinstance(value, tuple):
        return ", ".join(map(_plain, value))
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def number(x: float) -> str:
    """12288 -> '12,288'; 1e-06 -> '1e-6'; six significant digits."""
    if isinstance(x, int) or (x.is_integer() and abs(x) < 1e15):
        return f"{int(x):,}"
    return f"{x:.6g}".replace("e-0", "e-").replace("e+0", "e")


# ---- norms, positions


def norm(n: Norm) -> str:
    """'RMSNorm, ε 1e-6': its kind, epsilon and weight."""
    r = _Read(n)
    text = {"rms": "RMSNorm", "layer": "LayerNorm"}.get(r.kind, f"{n.kind} norm")
    text += {"plain": "", "plus_one": " (1 + w)", "none": ", no weight"}.get(r.weight, f" ({n.weight})")
    text += " without bias" if n.kind == "layer" and n.weight != "none" and not r.bias else ""
    r.done("bias")  # an RMSNorm has none
    return ", ".join([text + f", ε {number(r.eps)}", *(x.text for x in r.rest())])


def rope(m: Rope, of: int) -> Iterator[Line]:
    """Rotary positions of heads of `of` rotary channels."""
    r = _Read(m)
    partial = r.dim != of or r.turning is not None
    text = f"RoPE θ {number(r.theta)}" + (f" on {m.dim} of {of} channels" if r.dim != of else "")
    text += f", {2 * m.turning} of {m.dim} turn" if m.turning is not None else ""
    text += ", neighbours paired" if r.interleaved else ""
    text += ", backwards" if r.backwards else ""
    yield Line(text, partial or m.backwards)
    if r.scaling is not None:
        yield from _scaling(r.scaling)
    yield from r.rest()


def _scaling(s: RopeScaling) -> Iterator[Line]:
    r = _Read(s)
    name = {"yarn": "YaRN", "llama3": "banded (Llama 3)", "longrope": "LongRoPE"}.get(s.kind, s.kind)
    text = f"{name} × {number(r.factor)}" + (
        f" from {number(s.original_context)}" if r.original_context else ""
    )
    if s.kind == "yarn" or s.beta_fast != 32 or s.beta_slow != 1:
        text += f", β {number(r.beta_fast)} to {number(r.beta_slow)}" + ("" if r.truncate else " not rounded")
    if s.kind == "llama3" or s.low_freq_factor != 1 or s.high_freq_factor != 1:
        text += f", frequencies {number(r.low_freq_factor)} to {number(r.high_freq_factor)}"
    yield Line(text)
    if r.attention_factor != 1:
        yield Line(f"cos, sin × {number(s.attention_factor)}")
    if r.long_attention_factor is not None:
        yield Line(f"cos, sin × {number(r.long_attention_factor)} beyond {number(s.original_context)}")
    r.done(
        "beta_fast", "beta_slow", "truncate", "low_freq_factor", "high_freq_factor"
    )  # said where they count
    for which, divisors in (("short", r.short), ("long", r.long)):
        if divisors:
            yield Line(
                f"{len(divisors)} {which} divisors, {number(min(divisors))} to {number(max(divisors))}"
            )
    yield from r.rest()


def _qk_norm(n: QKNorm, turned: bool) -> Iterator[Line]:
    r = _Read(n)
    over = {"head": "per head", "each_head": "a weight for each head", "all_heads": "over all heads"}.get(
        r.over, n.over
    )
    where = ", after RoPE" if r.after_rope else ", before RoPE"
    yield Line(f"QK-norm {over}{where if turned else ''}", n.over != "head" or n.after_rope)
    yield Line(f"  {norm(r.norm)}")
    yield from r.rest()


def _query_scale(q: QueryScale) -> Iterator[Line]:
    r = _Read(q)
    text = f"scores grow with log(position / {number(r.period)})"
    if r.kind == "floor_log":
        at = f"(position + {number(q.offset)})" if q.offset else "position"
        text = f"scores × 1 + {number(q.beta)} ln(1 + ⌊{at} / {number(q.period)}⌋)"
    r.done("beta", "offset")  # said, or of the other kind
    yield Line(text, True)
    yield from r.rest()


def _positions(m: Attention | LatentAttention, of: int, r: _Read) -> Iterator[Line]:
    if r.rope is not None:
        yield from rope(r.rope, of)
    elif isinstance(m, Attention) and r.alibi is not None:
        a = _Read(m.alibi)
        yield Line("ALiBi: a bias by distance" + (f", × {number(a.scale)}" if a.scale != 1 else ""), True)
        a.done("bf16")  # where slopes round
        yield from a.rest()
    else:
        yield Line("no positions in attention")


# ---- mixers


def mixer_title(m: Mixer) -> str:
    match m:
        case Attention():
            if m.n_kv_heads == 1 and m.n_heads > 1:
                return "Multi-query attention"
            return "Multi-head attention" if m.n_kv_heads == m.n_heads else "Grouped-query attention"
        case LatentAttention():
            return "Multi-head latent attention"
        case CompressedAttention():
            if m.compressor is None:
                return "Windowed attention on one latent"
            return "Compressed sparse attention" if m.indexer else "Heavily compressed attention"
        case DeltaNet():
            return "Gated DeltaNet" if m.decay == "head" else "Kimi Delta Attention"
        case Mamba():
            return "Mamba-2"
        case Mamba1():
            return "Mamba"
        case ShortConv():
            return "Gated short convolution"
    return type(m).__name__


SHORT = {
    "Multi-query attention": "MQA", "Multi-head attention": "MHA", "Grouped-query attention": "GQA",
    "Multi-head latent attention": "MLA", "Gated short convolution": "Short convolution",
    "Windowed attention on one latent": "Windowed latent", "Compressed sparse attention": "CSA",
    "Heavily compressed attention": "HCA",
}  # fmt: skip
"""Titles for a narrow box."""


def mixer(m: Mixer) -> list[Line]:
    """What a mixer's box says below its title; a kind this module does not know, field by field."""
    match m:
        case Attention():
            return list(_attention(m))
        case LatentAttention():
            return list(_latent(m))
        case CompressedAttention():
            return list(_compressed(m))
        case DeltaNet():
            return list(_delta(m))
        case Mamba():
            return list(_mamba(m))
        case Mamba1():
            return list(_mamba1(m))
        case ShortConv():
            return list(_short_conv(m))
    return _Read(m).rest()


def _attention(m: Attention) -> Iterator[Line]:
    r = _Read(m)
    heads = (
        f"{m.n_heads} heads"
        if r.n_kv_heads == r.n_heads
        else f"{m.n_heads} query heads, {m.n_kv_heads} KV heads"
    )
    yield Line(f"{heads}, head dim {r.head_dim}")
    if r.v_head_dim != m.head_dim:
        yield Line(f"values of {m.v_head_dim} channels", True)
    if r.kv_from is not None:
        yield Line("keys and values of an earlier layer", True)
    if r.window is not None:
        yield Line(f"sliding window {number(r.window)}")
    if r.chunk is not None:
        yield Line(f"sees its chunk of {number(r.chunk)} alone", True)
    yield from _positions(m, m.head_dim, r)
    if r.qk_norm is not None:
        yield from _qk_norm(r.qk_norm, m.rope is not None)
    if r.value_norm is not None:
        yield Line(f"values: {norm(r.value_norm)}", True)
    if r.value_from_key:
        yield Line("values are the keys before their norm", True)
    if r.value_scale != 1:
        yield Line(f"values × {number(m.value_scale)}", True)
    if r.sinks:
        yield Line("sinks: a learned logit per head", True)
    if r.gate:
        yield Line(f"output gate: {r.gate_act} per {r.gate_over}", True)
    biases = ["q, k, v"] * bool(r.qkv_bias) + ["output"] * bool(r.out_bias)
    if biases:
        yield Line(f"biases on {' and '.join(biases)}")
    if r.clip is not None:
        yield Line(f"q, k, v clipped at {number(r.clip)}", True)
    if r.softcap is not None:
        yield Line(f"scores capped at {number(r.softcap)}", True)
    yield _scores(r.scale, m.head_dim)
    if r.query_scale is not None:
        yield from _query_scale(r.query_scale)
    yield from r.rest()


def _scores(scale: float, dim: int) -> Line:
    """1 / sqrt(dim) is what most have; where it is 1 / sqrt of another whole number, that says more than its digits."""
    of = scale**-2 if scale > 1e-6 else 0.0
    whole = round(of)
    if whole > 1 and abs(of / whole - 1) < 1e-6:
        root = math.isqrt(whole)
        plain = root * root == whole and whole != dim
        return Line(f"scores / {root}" if plain else f"scores / √{whole}", whole != dim)
    return Line(f"scores × {number(scale)}", True)


def _latent(m: LatentAttention) -> Iterator[Line]:
    r = _Read(m)
    shared = "rotary" if m.rope is not None else "shared by all"
    yield Line(f"{r.n_heads} heads of {r.nope_dim} + {r.rope_dim} {shared}, values {r.v_head_dim}")
    yield Line(f"keys, values through a latent of {number(r.kv_rank)}")
    yield Line(f"queries through {number(r.q_rank)}" if r.q_rank is not None else "queries not compressed")
    yield Line(f"  latents: {norm(r.latent_norm)}")
    yield from _positions(m, m.rope_dim, r)
    if r.indexer is not None:
        yield from _indexer(r.indexer)
    if r.indexer_from is not None:
        yield Line("keys chosen by an earlier layer's indexer", True)
    biases = ["q, k, v"] * bool(r.qkv_bias) + ["output"] * bool(r.out_bias)
    if biases:
        yield Line(f"biases on {' and '.join(biases)}", True)
    yield _scores(r.scale, m.nope_dim + m.rope_dim)
    if r.query_scale is not None:
        yield from _query_scale(r.query_scale)
    yield from r.rest()


def _compressed(m: CompressedAttention) -> Iterator[Line]:
    r = _Read(m)
    yield Line(f"{r.n_heads} heads of {r.head_dim}; one latent is key and value", True)
    yield Line(f"queries through {number(r.q_rank)}; sliding window {number(r.window)}")
    yield Line(f"  latents: {norm(r.latent_norm)}")
    yield Line(f"  queries, per head: {norm(r.query_norm)}")
    if r.compressor is not None:
        yield from _compressor(r.compressor)
    if r.indexer is not None:
        yield from _indexer(r.indexer, "entries")
    yield from rope(r.rope, m.head_dim)
    yield Line("  of the last channels; values are turned back", True)
    yield Line("sinks: a learned logit per head", True)
    yield _scores(r.scale, m.head_dim)
    yield Line(f"output: {r.out_groups} groups of heads, {number(r.out_rank)} channels each", True)
    yield from r.rest()


def _compressor(c: Compressor) -> Iterator[Line]:
    r = _Read(c)
    of = f"{2 * c.ratio} tokens" if r.overlap else "these"
    yield Line(f"an entry for each {r.ratio} tokens, pooled of {of}", True)
    yield Line(f"  entries: {norm(r.norm)}")
    yield from r.rest()


def _indexer(x: Indexer, of: str = "keys") -> Iterator[Line]:
    r = _Read(x)
    yield Line(f"sparse: indexer picks {number(r.top_k)} {of}", True)
    yield Line(f"  indexer: {r.n_heads} heads of {r.head_dim}, keys {norm(r.key_norm)}")
    yield from (Line(f"  indexer: {line.text}") for line in rope(r.rope, x.head_dim))
    yield from r.rest()


def _delta(m: DeltaNet) -> Iterator[Line]:
    r = _Read(m)
    yield Line(f"linear: a state of {r.k_head_dim} × {r.v_head_dim} per head")
    yield Line(f"{r.n_k_heads} key heads, {r.n_v_heads} value heads")
    yield Line(f"decay per {'head' if r.decay == 'head' else 'channel'}, short convolution of {r.conv}")
    if r.beta_scale != 1:
        yield Line(f"beta × {number(m.beta_scale)}", True)
    if r.fp32_decay:
        yield Line("its A_log is kept in fp32", True)
    yield Line(f"output: {norm(r.out_norm)}, {r.out_gate} gate")
    yield from r.rest()


def _mamba(m: Mamba) -> Iterator[Line]:
    r = _Read(m)
    yield Line(
        f"{r.n_heads} heads of {r.head_dim}, {r.n_groups} group{'s' * (m.n_groups > 1)}, state {r.state}"
    )
    yield Line(f"convolution of {r.conv}" + (" with bias" if r.conv_bias else ""))
    if r.out_norm is not None:
        yield Line(f"output: {norm(r.out_norm)}, {'before' if r.norm_first else 'after'} its gate")
    else:
        r.done("norm_first")  # of no norm
        yield Line("output gated, no norm", True)
    if r.dt_min:
        yield Line(f"time step ≥ {number(m.dt_min)}")
    if r.in_scale != 1:
        yield Line(f"input × {number(m.in_scale)}", True)
    if r.parts_scales:
        yield Line("gate, input, B, C, dt × " + ", ".join(map(number, m.parts_scales)), True)
    if r.out_scale != 1:
        yield Line(f"output × {number(m.out_scale)}", True)
    yield from r.rest()


def _mamba1(m: Mamba1) -> Iterator[Line]:
    r = _Read(m)
    yield Line(f"{r.inner} channels, state {r.state}, dt from {r.dt_rank}")
    yield Line(f"convolution of {r.conv}" + (" with bias" if r.conv_bias else ""))
    if r.norm is not None:
        yield Line(f"dt, B, C: {norm(r.norm)}", True)
    yield from r.rest()


def _short_conv(m: ShortConv) -> Iterator[Line]:
    r = _Read(m)
    yield Line(f"C · conv(B · x), {r.conv} taps" + (", biases" if r.bias else ""))
    yield from r.rest()


# ---- feed-forwards


def mlp_title(m: MLP) -> str:
    """'SwiGLU': the activation's name, gated or not."""
    return (ACTIVATIONS if m.gated else UNGATED).get(m.act, m.act)


def mlp(m: MLP) -> list[Line]:
    r = _Read(m)
    name = mlp_title(m)
    r.done("gated", "act")  # in the name
    out = [Line(f"{name}, width {number(r.d_ff)}")]
    out += [Line("biases")] if r.bias else []
    if r.limit is not None:
        out.append(
            Line(f"clamped at {number(r.limit)}" + (" after its activation" if r.limit_after else ""), True)
        )
    if m.act == "silu_clamped":
        out.append(Line(f"(up + 1) · gate · σ({number(r.alpha)} gate)", True))
    out += (
        [Line(f"{number(100 * m.sparsity)}% of the gate is set to 0 (sparsity {number(m.sparsity)})", True)]
        if r.sparsity
        else []
    )
    out += [Line(f"gate × {number(m.gate_scale)}", True)] if r.gate_scale != 1 else []
    out += [Line(f"output × {number(m.out_scale)}", True)] if r.out_scale != 1 else []
    return out + r.rest()


@dataclass(frozen=True)
class Experts:
    """What the boxes of a mixture of experts say."""

    about: list[Line]
    router: list[Line]
    routed: list[Line]
    shared: list[Line]


def experts(m: MoE) -> Experts:
    r = _Read(m)
    about = []
    if r.latent is not None:
        about.append(Line(f"experts work in a latent of {number(r.latent)}", True))
    about += [Line("weights multiply the experts' input", True)] if r.weight_input else []
    about += [Line(f"routed + shared, × {number(m.scale)}", True)] if r.scale != 1 else []
    about += [Line(f"routed sum × {number(m.routed_scale)}", True)] if r.routed_scale != 1 else []
    routed = [Line(f"{r.router.top_k} of {r.n_experts} active"), *mlp(r.expert)]
    routed += [Line(f"before: {norm(r.norm)}", True)] if r.norm is not None else []
    routed += [Line(f"after: {norm(r.post_norm)}", True)] if r.post_norm is not None else []
    shared = mlp(r.shared) if r.shared is not None else []
    shared += [Line("behind a sigmoid gate", True)] if r.shared_gate else []
    shared += [Line(f"after: {norm(r.shared_post_norm)}", True)] if r.shared_post_norm is not None else []
    return Experts(about + r.rest(), list(_router(m.router)), routed, shared)


def _router(x: Router) -> Iterator[Line]:
    r = _Read(x)
    r.done("top_k")  # in the experts' box
    over = {"all": "over all", "chosen": "over the chosen", "near": "over those near the best"}.get(
        r.over, x.over
    )
    score = r.score.replace("sqrt_softplus", "root of softplus")
    yield Line(f"{score} {over}" + (f" (within {number(x.near)})" if r.near else ""), x.over == "near")
    if r.by_token is not None:
        yield Line(f"experts by the token's id: a table of {number(r.by_token)}", True)
    if r.n_groups > 1:
        yield Line(f"best {r.top_groups} of {x.n_groups} groups, by their best {r.group_top}")
        if r.masked_groups == "zero":
            yield Line("experts of other groups score 0")
    r.done("group_top", "top_groups", "masked_groups")  # of one group they say nothing
    if r.selection_bias:
        yield Line("selection bias")
    if r.bias:
        yield Line("biases")
    if r.normalize:
        eps = f" + {number(x.normalize_eps)}" if r.normalize_eps else ""
        floor = f", at least {number(x.normalize_floor)}" if r.normalize_floor else ""
        yield Line(f"weights / (their sum{eps}{floor})" if eps or floor else "weights / their sum")
    r.done("normalize_eps", "normalize_floor")
    if r.scale != 1:
        yield Line(f"weights × {number(x.scale)}")
    if r.expert_scale:
        yield Line("× a learned scale per expert", True)
    if r.softcap is not None:
        yield Line(f"logits capped at {number(r.softcap)}", True)
    if r.norm is not None:
        yield Line(f"reads x through {norm(r.norm)}", True)
    if r.input_scale != 1:
        yield Line(f"its input × {number(x.input_scale)}", True)
    yield from r.rest()


# ---- streams and per-layer inputs


def altup(a: AltUp) -> tuple[list[Line], list[Line], list[Line]]:
    """Lines of the boxes predict, correct, LAuReL."""
    r = _Read(a)
    predict = [Line(f"{r.n_streams} streams predicted; stream {r.active} is computed", True)]
    correct = [Line("all streams corrected by what was computed", True)]
    correct += [Line(f"coefficients clipped at {number(r.coef_clip)}")] if r.coef_clip is not None else []
    correct += [Line("times a learned scale")] if r.correct_scale else []
    laurel = [Line(f"low rank {r.laurel_rank}, beside attention", True), Line(norm(r.norm))]
    return predict + r.rest(), correct, laurel


def hyper(h: HyperConnections) -> tuple[list[Line], list[Line]]:
    """Lines of the box in each layer, and of that at the end."""
    r = _Read(h)
    layer = [
        Line(f"{r.n_streams} streams; each branch reads a weighted sum", True),
        Line("and is added to each with a weight of its own", True),
        Line(f"streams mixed: {r.rounds} rounds of Sinkhorn, ε {number(r.eps)}", True),
        Line(f"weights made of all streams: {norm(r.norm)}"),
    ]
    return layer + r.rest(), [Line(f"a weighted sum of the {h.n_streams} streams", True)]


def per_layer(p: PerLayerEmbedding, n_layers: int) -> tuple[list[Line], list[Line]]:
    """Lines of the table's box, and of the box in each layer."""
    r = _Read(p)
    table = [
        Line(f"{number(r.vocab_size)} × {n_layers} layers × {r.dim}", True),
        Line(f"+ a projection of the embedding, {norm(r.norm)}"),
    ]
    act = UNGATED.get(r.act, p.act)
    return table + r.rest(), [Line(f"x + norm(out({act}(gate x) · its vector of {p.dim}))", True)]
