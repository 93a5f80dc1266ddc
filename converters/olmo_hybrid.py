"""Olmo Hybrid 7B (Ai2): base, Instruct and Think.

What is unusual:
- Three layers of gated DeltaNet to one of attention. Attention's are OLMo 2's (see there): norms on what the branches
  give; DeltaNet's have theirs before the branches.
- DeltaNet's projections are all apart (q, k, v, gate, beta, decay), and so are its convolutions; its output norm has a
  fixed eps of 1e-5; beta is doubled (`linear_allow_neg_eigval`). A_log stays in fp32.
- No positions in the releases: `rope_parameters` is null, or has a theta that is null.
- Sizes of DeltaNet's heads may be left out: as many heads as attention has, keys of 3/4 of their share of the width, values
  twice as wide.
- DeltaNet's layers call their norms `attention_layer_norm` and `feedforward_layer_norm`. transformers, saving, also calls
  attention's so, and cuts the convolutions of q, k and v into thirds (since 5.15), though v's is wider.
"""

from __future__ import annotations

from typing import Any

from zoo.family import (
    Config,
    DeltaNet,
    Disagreement,
    Family,
    Layer,
    Norm,
    Rope,
    RuleLine,
    Spec,
    cat,
    hf,
    pieces,
    read,
    rules,
    squeeze,
)

from . import olmo2

OUT_NORM_EPS = 1e-5


def spec(c: Config) -> Spec:
    attention = olmo2.layer(c, rope(c))
    norm = olmo2.norm_of(c)
    linear = Layer(delta(c), olmo2.mlp(c), attn_norm=norm, ffn_norm=norm)
    of = {read.FULL: attention, read.LINEAR: linear}
    kinds = read.layer_types(c, read.every(4, read.LINEAR), of)
    return olmo2.model("olmo_hybrid", c, [of[kind] for kind in kinds])


def rope(c: Config) -> Rope | None:
    """Of attention, in fp32; none where no theta is said."""
    p = c.get("rope_parameters") or {}
    if p.get("rope_theta") is None and c.get("rope_theta") is None:
        Config(p, f"{c.where}: rope_parameters").refuse(rope_type="default")
        c.refuse(rope_scaling=None)
        return None
    return read.whole_rope(c, read.rope_parameters(c), read.head_dim(c), rounding="last")


def delta(c: Config) -> DeltaNet:
    c.choice("hidden_act", ("silu",))  # it is the convolution's too
    n_k_heads = c.get("linear_num_key_heads", c["num_attention_heads"])
    k_head_dim = c.get("linear_key_head_dim", int(0.75 * c["hidden_size"] / n_k_heads))
    return DeltaNet(
        n_k_heads=n_k_heads,
        n_v_heads=c.get("linear_num_value_heads", c["num_attention_heads"]),
        k_head_dim=k_head_dim,
        v_head_dim=c.get("linear_value_head_dim", 2 * k_head_dim),
        conv=c.get("linear_conv_kernel_dim", 4),
        decay="head",
        out_gate="silu",
        out_norm=Norm(OUT_NORM_EPS),
        beta_scale=2.0 if c.get("linear_allow_neg_eigval", True) else 1.0,
        fp32_decay=True,
    )


_L, _D = "model.layers.{i}.", "model.layers.{i}.linear_attn."
DELTA: tuple[RuleLine, ...] = (
    ("layers.{i}.delta.qkvz.weight", cat(*(f"{_D}{x}_proj.weight" for x in "qkvg"))),
    ("layers.{i}.delta.ba.weight", cat(*(f"{_D}{x}_proj.weight" for x in "ba"))),
    ("layers.{i}.delta.conv.weight", cat(*(squeeze(f"{_D}{x}_conv1d.weight", 1) for x in "qkv"))),
    ("layers.{i}.delta.A_log", _D + "A_log"),
    ("layers.{i}.delta.dt_bias", _D + "dt_bias"),
    ("layers.{i}.delta.norm.weight", _D + "o_norm.weight"),
    ("layers.{i}.delta.out.weight", _D + "o_proj.weight"),
)
HF: tuple[RuleLine, ...] = (
    *hf.ENDS,
    ("layers.{i}.attn_norm.weight", _L + "attention_layer_norm.weight"),
    ("layers.{i}.ffn_norm.weight", _L + "feedforward_layer_norm.weight"),
    *olmo2.POST_NORMS,
    *hf.ATTENTION,
    *hf.QK_NORM,
    *DELTA,
    *hf.MLP,
)
_HELD = (
    *hf.PRE_NORMS,
    *olmo2.POST_NORMS,
    ("layers.{i}.delta.conv.weight", squeeze(_D + "conv1d.weight", 1)),
)
_SAVED: tuple[RuleLine, ...] = (
    ("layers.{i}.delta.conv.weight", pieces(*(squeeze(f"{_D}{x}_conv1d.weight", 1) for x in "qkv"))),
    ("layers.{i}.attn_post_norm.weight", _L + "feedforward_layer_norm.weight"),
)
RULES = {
    "hf": rules(*HF),
    "transformers": rules(*hf.in_memory(HF, *_HELD)),
    "saved": rules(*HF, *_SAVED),
}


def _without_positions(model: Any) -> None:
    """No RoPE where the theta is the one that upstream's class puts in."""
    if model.config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}:
        model.model.rotary_emb = None


DISAGREEMENTS = (
    Disagreement(
        about="positions where rope_parameters is null",
        upstream="its config class puts a theta of 10000 in, unless rope_theta is there too and null",
        vendor="has no positions then: released models have none, and the converter writes null for that",
        follows="vendor",
        why="the model as trained: its long context comes of dropping RoPE",
        source="https://github.com/huggingface/transformers/pull/43358",
        since="2026-03",
        applies=lambda spec: all(getattr(layer.mixer, "rope", None) is None for layer in spec.layers),
        correct=_without_positions,
    ),
)
FAMILY = Family(
    "olmo_hybrid", ("olmo_hybrid",), ("OlmoHybridForCausalLM",), spec, RULES, disagreements=DISAGREEMENTS
)
