"""The structural choices by which releases are filtered and put on a timeline: a name, and whether a Spec makes it.

The words are those of "The Big LLM Architecture Comparison" (S. Raschka). A model with several kinds of layer may have made
several of one group.
"""

from __future__ import annotations

from collections.abc import Callable

from zoo.order import sees_all
from zoo.spec import (
    MLP,
    Attention,
    CompressedAttention,
    DeltaNet,
    LatentAttention,
    Layer,
    Mamba,
    Mamba1,
    Mixer,
    MoE,
    Norm,
    ShortConv,
    Spec,
)


def _mixer(test: Callable[[Mixer], bool]) -> Callable[[Spec], bool]:
    return lambda s: any(test(m) for x in s.layers for m in x.mixers)


def _attention(test: Callable[[Attention], bool]) -> Callable[[Spec], bool]:
    return _mixer(lambda m: isinstance(m, Attention) and test(m))


def _layer(test: Callable[[Layer], bool]) -> Callable[[Spec], bool]:
    return lambda s: any(map(test, s.layers))


def _experts(test: Callable[[MoE], bool]) -> Callable[[Spec], bool]:
    return _layer(lambda x: isinstance(x.ffn, MoE) and test(x.ffn))


def _dense(test: Callable[[MLP], bool]) -> Callable[[Spec], bool]:
    """Of feed-forwards and experts alike."""
    return _layer(lambda x: x.ffn is not None and test(x.ffn.expert if isinstance(x.ffn, MoE) else x.ffn))


def _norm(test: Callable[[Norm], bool]) -> Callable[[Spec], bool]:
    return lambda s: test(s.norm)


def _rotary_part(m: Mixer) -> bool:
    return (
        isinstance(m, Attention | CompressedAttention)
        and m.rope is not None
        and (m.rope.dim != m.head_dim or m.rope.turning is not None)
    )


def _without_positions(m: Mixer) -> bool:
    return (
        isinstance(m, LatentAttention)
        and m.rope is None
        or (isinstance(m, Attention) and m.rope is None and m.alibi is None)
    )


def _before(x: Layer) -> bool:
    return x.attn_norm is not None or x.ffn_norm is not None


def _after(x: Layer) -> bool:
    return x.attn_post_norm is not None or x.ffn_post_norm is not None


CHOICES: dict[str, dict[str, Callable[[Spec], bool]]] = {
    "attention": {
        "MHA": _attention(lambda m: m.n_kv_heads == m.n_heads),
        "GQA": _attention(lambda m: 1 < m.n_kv_heads < m.n_heads),
        "MQA": _attention(lambda m: m.n_kv_heads == 1 < m.n_heads),
        "MLA": _mixer(lambda m: isinstance(m, LatentAttention)),
        "CSA / HCA (compressed)": _mixer(lambda m: isinstance(m, CompressedAttention) and m.compressor is not None),
        "sliding window": lambda s: _mixer(
            lambda m: isinstance(m, Attention | CompressedAttention) and bool(m.window) and not sees_all(m, s.context_length)
        )(s),
        "chunks": lambda s: _attention(lambda m: bool(m.chunk) and not sees_all(m, s.context_length))(s),
        "sparse (indexer)": _mixer(
            lambda m: isinstance(m, LatentAttention | CompressedAttention) and m.indexer is not None
        ),
        "Gated DeltaNet": _mixer(lambda m: isinstance(m, DeltaNet) and m.decay == "head"),
        "Kimi Delta Attention": _mixer(lambda m: isinstance(m, DeltaNet) and m.decay == "channel"),
        "Mamba-2": _mixer(lambda m: isinstance(m, Mamba)),
        "Mamba": _mixer(lambda m: isinstance(m, Mamba1)),
        "short convolution": _mixer(lambda m: isinstance(m, ShortConv)),
        "QK-norm": _attention(lambda m: m.qk_norm is not None),
        "sinks": _mixer(lambda m: isinstance(m, CompressedAttention) or (isinstance(m, Attention) and m.sinks)),
        "output gate": _attention(lambda m: m.gate),
        "biases": _attention(lambda m: m.qkv_bias or m.out_bias),
        "capped scores": _attention(lambda m: m.softcap is not None),
        "shared keys and values": _attention(lambda m: m.kv_from is not None or m.value_from_key),
    },
    "positions": {
        "learned": lambda s: s.positions is not None,
        "RoPE": _mixer(
            lambda m: isinstance(m, Attention | LatentAttention | CompressedAttention) and m.rope is not None
        ),
        "partial RoPE": _mixer(_rotary_part),
        "ALiBi": _attention(lambda m: m.alibi is not None),
        "NoPE": lambda s: s.positions is None and _mixer(_without_positions)(s),
    },
    "norm": {
        "LayerNorm": _norm(lambda n: n.kind == "layer"),
        "RMSNorm": _norm(lambda n: n.kind == "rms"),
        "before (pre-norm)": _layer(lambda x: _before(x) and not _after(x)),
        "after (post-norm in the branch)": _layer(lambda x: _after(x) and not _before(x)),
        "before and after": _layer(lambda x: _before(x) and _after(x)),
        "branches side by side": _layer(lambda x: x.parallel),
    },
    "feed-forward": {
        "dense": lambda s: not any(isinstance(x.ffn, MoE) for x in s.layers),
        "MoE": _experts(lambda f: True),
        "MoE with shared expert": _experts(lambda f: f.shared is not None),
        "MoE, first layers dense": lambda s: _experts(lambda f: True)(s) and isinstance(s.layers[0].ffn, MLP),
        "MoE, 128 experts or more": _experts(lambda f: f.n_experts >= 128),
        "SwiGLU": _dense(lambda m: m.gated and m.act in ("silu", "silu_clamped")),
        "GeGLU": _dense(lambda m: m.gated and m.act.startswith(("gelu", "quick_gelu"))),
        "not gated": _dense(lambda m: not m.gated),
    },
    "other": {
        "tied head": lambda s: s.tied,
        "per-layer embeddings": lambda s: s.per_layer_embedding is not None,
        "several residual streams": lambda s: s.altup is not None or s.hyper is not None,
        "scaled branches": _layer(lambda x: x.residual_scale != 1),
    },
}  # fmt: skip


def choices(spec: Spec) -> dict[str, list[str]]:
    """Group -> the choices in it that `spec` makes, in the order of `CHOICES`."""
    return {group: [name for name, test in of.items() if test(spec)] for group, of in CHOICES.items()}
