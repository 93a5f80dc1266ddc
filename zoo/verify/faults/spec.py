"""Mistakes in the Spec: a number, a choice or a pattern of layers read wrongly from the config."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from zoo.kernels.route import SCORES
from zoo.kernels.route import route_reference as route
from zoo.layout import layout
from zoo.model import Decoder
from zoo.model.moe import Router as RouterModule
from zoo.spec import (
    MLP,
    Attention,
    CompressedAttention,
    DeltaNet,
    Indexer,
    LatentAttention,
    Layer,
    Mamba,
    MoE,
    Norm,
    QKNorm,
    Rope,
    Router,
    Spec,
)
from zoo.verify.faults.base import Subject, add
from zoo.verify.faults.weights import components_of, names_of


def map_spec(spec: Spec, change: Callable[[Any], Any]) -> Spec:
    """`spec` with `change` applied to every dataclass in it, from the inside out."""
    done: Spec = map_parts(spec, change)
    return done


def map_parts(part: Any, change: Callable[[Any], Any]) -> Any:
    """As `map_spec`, of a part of a Spec."""

    def walk(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(walk(v) for v in x)
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            new = {f.name: walk(getattr(x, f.name)) for f in dataclasses.fields(x) if f.name != "kind"}
            return change(replace(x, **new))
        return x

    return walk(part)


def _spec(
    name: str,
    what: str,
    kinds: type | tuple[type, ...],
    wrong: Callable[[Any], Any],
    undo: Callable[[Any], Any] | None = None,
) -> None:
    """A mistake in every part of the Spec of this kind: `wrong(part)` gives the part as mistaken, or the
    same part where the mistake can't be made. Applies where it changes the Spec and fits the same layout."""

    def everywhere(spec: Spec, change: Callable[[Any], Any]) -> Spec:
        return map_spec(spec, lambda x: change(x) if isinstance(x, kinds) else x)

    def sites(spec: Spec) -> list[str]:
        new = everywhere(spec, wrong)
        return ["spec"] if new != spec and set(layout(new)) <= set(layout(spec)) else []

    def made(s: Subject, _site: str) -> Subject:
        return s.with_spec(everywhere(s.spec, wrong))

    def repair(s: Subject, _site: str) -> Subject:
        return s.with_spec(everywhere(s.spec, undo or wrong))

    add(name, what, "spec", sites, made, "again" if undo is None else repair)


def _swap_value(x: Any, field: str, a: Any, b: Any) -> Any:
    value = getattr(x, field)
    return replace(x, **{field: b if value == a else a if value == b else value})


def _unknown(x: Any) -> Any:
    """What would undo it is not known: `zoo.verify.remedies` looks for it."""
    return x


# Norms


def _other_eps(n: Norm) -> Norm:
    return replace(n, eps=1e-3 if n.eps < 1e-3 else 1e-5)


_spec("norm_eps", "another eps in the norms", Norm, lambda n: replace(n, eps=1e-6 if n.eps > 2e-6 else 1e-5))
_spec("inner_norm_eps", "another eps in the norms of q and k, or of the latent", (QKNorm, LatentAttention),
      lambda x: replace(x, norm=_other_eps(x.norm)) if isinstance(x, QKNorm)
      else replace(x, latent_norm=_other_eps(x.latent_norm)), _unknown)  # fmt: skip
_spec("norm_plus_one", "norm weights taken as w where they are 1 + w, or the other way round", Norm,
      lambda n: _swap_value(n, "weight", "plain", "plus_one"))  # fmt: skip
_spec("norm_mean", "the mean not removed in the norms", Norm,
      lambda n: replace(n, kind="rms") if n.kind == "layer" else n)  # fmt: skip
_spec("post_norms_skipped", "the norms after attention and feed-forward left out", Layer,
      lambda x: replace(x, attn_post_norm=None, ffn_post_norm=None))  # fmt: skip
_spec("qk_norm_skipped", "q and k not normalised", Attention, lambda a: replace(a, qk_norm=None))
_spec("qk_norm_other_side_of_rope", "q and k normalised on the other side of RoPE", Attention,
      lambda a: replace(a, qk_norm=replace(a.qk_norm, after_rope=not a.qk_norm.after_rope))
      if a.qk_norm and a.rope and a.qk_norm.over == "head" and a.qk_norm.norm.weight != "none" else a)  # fmt: skip
_spec("value_norm_skipped", "v not normalised", Attention, lambda a: replace(a, value_norm=None))

# RoPE


def _rotating(rope: Rope, dim: int) -> Rope:
    """RoPE over `dim` channels; LongRoPE's tables, of a divisor per pair, as long as that."""
    scaling = rope.scaling
    if scaling and scaling.short:
        short, long = ((table + table[-1:] * dim)[: dim // 2] for table in (scaling.short, scaling.long))
        scaling = replace(scaling, short=short, long=long)
    return replace(rope, dim=dim, scaling=scaling)


_spec("rope_theta", "another RoPE theta", Rope, lambda r: replace(r, theta=1e4 if r.theta != 1e4 else 5e5))
_spec("rope_scaling_ignored", "RoPE scaling ignored", Rope,
      lambda r: replace(r, scaling=None) if r.scaling and r.scaling.kind != "dynamic" else r)  # fmt: skip
_spec("rope_scaling_linear", "RoPE scaling taken as linear", Rope,
      lambda r: replace(r, scaling=replace(r.scaling, kind="linear", attention_factor=1.0))
      if r.scaling and r.scaling.kind != "linear" else r)  # fmt: skip
_spec("yarn_attention_factor", "YaRN's attention factor left out", Rope,
      lambda r: replace(r, scaling=replace(r.scaling, attention_factor=1.0, long_attention_factor=None))
      if r.scaling else r)  # fmt: skip
_spec("yarn_betas", "YaRN's ramp between other frequencies", Rope,
      lambda r: replace(r, scaling=replace(r.scaling, beta_fast=2 * r.scaling.beta_fast, beta_slow=2 * r.scaling.beta_slow))
      if r.scaling and r.scaling.kind == "yarn" else r)  # fmt: skip
_spec("rope_partial", "another share of channels rotated", Attention,
      lambda a: replace(a, rope=_rotating(a.rope, a.head_dim if a.rope.dim < a.head_dim else a.rope.dim // 4 * 2))
      if a.rope and (a.rope.dim < a.head_dim or a.rope.dim >= 4) else a)  # fmt: skip
_spec("rope_order", "RoPE rotates the other pairs of channels", (Attention, LatentAttention, CompressedAttention),
      lambda a: replace(a, rope=replace(a.rope, interleaved=not a.rope.interleaved)) if a.rope and a.rope.dim > 2 else a)  # fmt: skip
_spec("rope_skipped", "no RoPE", (Attention, LatentAttention), lambda a: replace(a, rope=None))


def _nope_filled(spec: Spec) -> Spec:
    rope = next((m.rope for m in _attentions(spec) if m.rope), None)
    return map_spec(
        spec, lambda a: replace(a, rope=rope) if isinstance(a, Attention) and a.rope is None else a
    )


def _attentions(spec: Spec) -> list[Attention]:
    return [x.mixer for x in spec.layers if isinstance(x.mixer, Attention)]


def _shift(fields: tuple[str, ...]) -> Callable[[Spec], Spec]:
    """The attention layers' values of `fields` moved to the next attention layer."""

    def change(spec: Spec) -> Spec:
        at = [i for i, x in enumerate(spec.layers) if isinstance(x.mixer, Attention)]
        layers = list(spec.layers)
        for i, before in zip(at, at[-1:] + at[:-1], strict=True):
            values = {f: getattr(spec.layers[before].mixer, f) for f in fields}
            layers[i] = replace(layers[i], mixer=replace(layers[i].mixer, **values))  # type: ignore[type-var]
        return replace(spec, layers=tuple(layers))

    return change


def _whole(
    name: str, what: str, change: Callable[[Spec], Spec], when: Callable[[Spec], bool] = lambda _s: True
) -> None:
    """A mistake in the Spec as a whole."""

    def sites(spec: Spec) -> list[str]:
        if not when(spec):
            return []
        new = change(spec)
        return ["spec"] if new != spec and set(layout(new)) <= set(layout(spec)) else []

    add(name, what, "spec", sites, lambda s, _site: s.with_spec(change(s.spec)))


_whole("nope_ignored", "RoPE on the layers that have none", _nope_filled,
       lambda s: any(a.rope for a in _attentions(s)) and any(a.rope is None for a in _attentions(s)))  # fmt: skip
_whole("nope_shifted", "the pattern of layers without RoPE off by one", _shift(("rope",)),
       lambda s: any(a.rope is None for a in _attentions(s)))  # fmt: skip

# Masks

_spec("window_plus_one", "the window one key wider", Attention,
      lambda a: replace(a, window=a.window + 1) if a.window else a,
      lambda a: replace(a, window=a.window - 1) if a.window else a)  # fmt: skip
_spec("window_minus_one", "the window one key narrower", Attention,
      lambda a: replace(a, window=a.window - 1) if a.window and a.window > 1 else a,
      lambda a: replace(a, window=a.window + 1) if a.window else a)  # fmt: skip
_spec("window_ignored", "no window", Attention, lambda a: replace(a, window=None))
_whole("window_shifted", "the pattern of windowed layers off by one", _shift(("window",)),
       lambda s: len({a.window for a in _attentions(s)}) > 1)  # fmt: skip
_whole("window_inverted", "windows on the layers that have none, and none on those that have", lambda s: _inverted(s),
       lambda s: len({a.window for a in _attentions(s)}) == 2 and None in {a.window for a in _attentions(s)})  # fmt: skip


def _inverted(spec: Spec) -> Spec:
    window = next(a.window for a in _attentions(spec) if a.window)
    return map_spec(
        spec, lambda a: replace(a, window=None if a.window else window) if isinstance(a, Attention) else a
    )


_spec("chunk_ignored", "no chunks", Attention, lambda a: replace(a, chunk=None))
_spec("chunk_plus_one", "chunks one key longer", Attention, lambda a: replace(a, chunk=a.chunk + 1) if a.chunk else a,
      lambda a: replace(a, chunk=a.chunk - 1) if a.chunk else a)  # fmt: skip
_spec("chunk_as_window", "chunks taken for a sliding window", Attention,
      lambda a: replace(a, chunk=None, window=a.chunk) if a.chunk else a)  # fmt: skip
_spec("indexer_top_k", "one key fewer chosen by the indexer", (LatentAttention, CompressedAttention),
      lambda a: replace(a, indexer=replace(a.indexer, top_k=a.indexer.top_k - 1)) if a.indexer else a)  # fmt: skip
_spec("indexer_rope_order", "the indexer's RoPE rotates the other pairs of channels", Indexer,
      lambda i: replace(i, rope=replace(i.rope, interleaved=not i.rope.interleaved)) if i.rope.dim > 2 else i, _unknown)  # fmt: skip
_spec("indexer_ignored", "all keys seen instead of the indexer's choice", (LatentAttention, CompressedAttention),
      lambda a: replace(a, indexer=None))  # fmt: skip

# Attention scores

_spec("attention_scale", "another scale of attention scores", (Attention, LatentAttention, CompressedAttention),
      lambda a: replace(a, scale=a.scale * 1.05), lambda a: replace(a, scale=a.scale / 1.05))  # fmt: skip
_spec("sinks_dropped", "attention sinks left out", Attention, lambda a: replace(a, sinks=False))
_spec(
    "attention_softcap_dropped",
    "no soft cap on attention scores",
    Attention,
    lambda a: replace(a, softcap=None),
)
_spec("attention_softcap_value", "another soft cap on attention scores", Attention,
      lambda a: replace(a, softcap=a.softcap / 2) if a.softcap else a, _unknown)  # fmt: skip
_spec("query_scale_dropped", "queries not scaled by position", (Attention, LatentAttention),
      lambda a: replace(a, query_scale=None))  # fmt: skip
_spec("value_scale_dropped", "values not scaled", Attention, lambda a: replace(a, value_scale=1.0))
_whole("kv_shared_from_another_layer", "shared keys and values taken from another layer",
       lambda s: replace(s, layers=tuple(_other_kv(s, i) for i in range(s.n_layers))))  # fmt: skip


def _other_kv(spec: Spec, i: int) -> Layer:
    layer = spec.layers[i]
    m = layer.mixer
    if not isinstance(m, Attention) or m.kv_from is None:
        return layer
    own = [
        j for j, x in enumerate(spec.layers[:i]) if isinstance(x.mixer, Attention) and x.mixer.kv_from is None
    ]
    return replace(layer, mixer=replace(m, kv_from=next((j for j in own if j != m.kv_from), m.kv_from)))


# Feed-forward

_spec("activation", "another activation", MLP, lambda m: _other_act(m))
_spec(
    "activation_clamp_dropped",
    "gate and up not clamped",
    MLP,
    lambda m: replace(m, limit=1e9) if m.limit else m,
)
_spec("activation_sparsity_dropped", "all activations pass", MLP, lambda m: replace(m, sparsity=0.0))


def _other_act(m: MLP) -> MLP:
    other = {
        "silu": "gelu_tanh",
        "gelu": "gelu_tanh",
        "gelu_tanh": "gelu",
        "relu2": "silu",
        "silu_clamped": "silu",
        "relu": "relu2",
        "quick_gelu": "gelu",
        "xielu": "relu2",
    }
    return replace(m, act=other[m.act], limit=None)  # type: ignore[arg-type]


# Routing

_spec("top_k_minus_one", "one expert fewer per token", Router,
      lambda r: replace(r, top_k=r.top_k - 1) if r.top_k > 1 else r, lambda r: replace(r, top_k=r.top_k + 1))  # fmt: skip
_spec("top_k_plus_one", "one expert more per token", MoE,
      lambda m: replace(m, router=replace(m.router, top_k=m.router.top_k + 1))
      if m.router.top_k < m.n_experts // m.router.n_groups * m.router.top_groups else m,
      lambda m: replace(m, router=replace(m.router, top_k=m.router.top_k - 1)))  # fmt: skip
_spec("routing_not_normalised", "routing weights not (or wrongly) divided by their sum", Router,
      lambda r: replace(r, normalize=not r.normalize) if r.top_k > 1 and r.over == "all" else r)  # fmt: skip
_spec("routed_scale_dropped", "routed output not scaled", Router, lambda r: replace(r, scale=1.0))
_spec(
    "routed_scale_value",
    "another scale of the routed output",
    Router,
    lambda r: replace(r, scale=1.25 * r.scale),
    _unknown,
)
_spec("router_score", "softmax taken for sigmoid, or the other way round", Router,
      lambda r: _swap_value(r, "score", "softmax", "sigmoid") if r.over != "near" else r)  # fmt: skip
_spec("router_over", "scores over all experts taken for scores over the chosen, or the other way round", Router,
      lambda r: _swap_value(r, "over", "all", "chosen")
      if r.score == "softmax" and not r.normalize and not r.selection_bias and r.n_groups == 1 else r)  # fmt: skip
_spec(
    "router_near_ignored",
    "an expert's score over the chosen, not over those near it",
    Router,
    lambda r: replace(r, over="chosen") if r.over == "near" else r,
    lambda r: replace(r, over="near") if r.near else r,
)
_spec(
    "router_near_value",
    "another distance within which experts are near",
    Router,
    lambda r: replace(r, near=2 * r.near),
    lambda r: replace(r, near=r.near / 2),
)
_spec(
    "router_groups_ignored",
    "experts of all groups eligible",
    Router,
    lambda r: replace(r, n_groups=1, top_groups=1),
)
_spec("router_softcap_dropped", "no soft cap on router logits", Router, lambda r: replace(r, softcap=None))
_spec("selection_bias_dropped", "selection bias left out", Router, lambda r: replace(r, selection_bias=False))
_spec("weight_on_output", "routing weight on the experts' output instead of their input, or the other way round", MoE,
      lambda m: replace(m, weight_input=not m.weight_input))  # fmt: skip
_spec(
    "shared_expert_dropped",
    "shared expert left out of the Spec",
    MoE,
    lambda m: replace(m, shared=None, shared_gate=False),
)
_spec("shared_gate_dropped", "shared expert not gated", MoE, lambda m: replace(m, shared_gate=False))
_spec("moe_scale_dropped", "routed and shared output not scaled", MoE, lambda m: replace(m, scale=1.0))


def _bias_in_weights(s: Subject, _site: str) -> Subject:
    """No Spec can say this: the routers themselves are changed."""

    def patch(model: Decoder) -> None:
        for m in model.modules():
            if isinstance(m, RouterModule) and m.selection_bias is not None:
                m.forward = functools.partial(_biased, m)  # type: ignore[method-assign]

    return replace(s, patch=patch)


def _biased(m: RouterModule, x: Tensor, _ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    logits = m.logits(x)
    chosen, _ = route(logits, m.selection_bias, m.spec)
    scores = SCORES[m.spec.score](logits.float())
    assert m.selection_bias is not None
    weights = (scores + m.selection_bias).gather(-1, chosen)
    if m.spec.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + m.spec.normalize_eps)
    return chosen, (weights * m.spec.scale).to(m.weights_dtype(x))


add("selection_bias_in_weights", "selection bias used in the routing weights, not in the choice alone", "spec",
     lambda spec: [s.name for s in layout(spec).values() if s.name.endswith("router.selection_bias")], _bias_in_weights)  # fmt: skip


# Linear mixers

_spec("delta_gate", "another activation of the delta rule's output gate", DeltaNet,
      lambda m: _swap_value(m, "out_gate", "silu", "sigmoid"))  # fmt: skip
_spec("delta_beta", "another factor on the delta rule's beta", DeltaNet,
      lambda m: replace(m, beta_scale=1.0 if m.beta_scale != 1.0 else 2.0))  # fmt: skip
_spec("dt_clamp_dropped", "dt not clamped", Mamba, lambda m: replace(m, dt_min=0.0))

# The whole model

_whole("embed_scale_dropped", "embeddings not scaled", lambda s: replace(s, embed_scale=1.0))
_whole("embed_scale_added", "embeddings scaled that are not to be", lambda s: replace(s, embed_scale=s.d_model**0.5),
       lambda s: s.embed_scale == 1)  # fmt: skip
_whole("logit_softcap_value", "another soft cap on the logits",
       lambda s: replace(s, logit_softcap=s.logit_softcap / 2 if s.logit_softcap else None))  # fmt: skip
_whole("logit_scale_dropped", "logits not scaled", lambda s: replace(s, logit_scale=1.0))
_whole("logit_softcap_dropped", "no soft cap on the logits", lambda s: replace(s, logit_softcap=None))
_whole(
    "last_layer_dropped",
    "one layer too few",
    lambda s: replace(s, layers=s.layers[:-1]),
    lambda s: s.n_layers > 1,
)


def _extra_layer(s: Subject, _site: str) -> Subject:
    """A prediction (MTP) layer after the last one run as if it were part of the decoder."""
    n, last = s.spec.n_layers, s.spec.n_layers - 1
    copies = {
        f"layers.{n}." + name.split(".", 2)[2]: s.tensors[name] * 0.9
        if s.tensors[name].is_floating_point() and s.tensors[name].element_size() > 1
        else s.tensors[name]
        for slot in names_of(s.spec, last)
        for name in components_of(s, slot)
    }
    quant = {
        **s.quant,
        **{
            f"layers.{n}." + q.split(".", 2)[2]: v
            for q, v in s.quant.items()
            if q.startswith(f"layers.{last}.")
        },
    }
    spec = replace(s.spec, layers=(*s.spec.layers, s.spec.layers[-1]))
    return Subject(spec, {**s.tensors, **copies}, quant)


add("mtp_layer_included", "a prediction (MTP) layer run as part of the decoder", "spec",
     lambda spec: ["spec"] if spec.per_layer_embedding is None else [], _extra_layer)  # fmt: skip
