"""llama.cpp's GGUF: rule lines for its names, and what a family reads of its metadata (`Family.gguf`)."""

from __future__ import annotations

from zoo.family.hf import MTP
from zoo.formats.gguf_fields import Fields as Fields
from zoo.formats.gguf_fields import head_dim as head_dim
from zoo.formats.gguf_fields import interleaved_positions as interleaved_positions
from zoo.formats.gguf_fields import layer_types as layer_types
from zoo.formats.gguf_fields import rotary as rotary
from zoo.formats.gguf_fields import shortest as shortest
from zoo.mapping.rules import (
    Expr,
    Extra,
    RuleLine,
    Source,
    cat,
    extra,
    joined,
    minus_exp,
    plus_one,
    rope_halves,
    squeeze,
    stack,
    swap,
    unflatten,
    ungroup,
)
from zoo.spec import DeltaNet, Layer, Mamba, Spec

ENDS: tuple[RuleLine, ...] = (
    ("embed.weight", "token_embd.weight"),
    ("norm.weight", "output_norm.weight"),
    ("head.weight", "output.weight"),
    extra("rope_freqs.weight", "factors of the rotary frequencies; computed from the config"),
)


def norms_plus_one(*lines: RuleLine) -> tuple[RuleLine, ...]:
    """These lines, for an architecture whose norms multiply by 1 + w: llama.cpp's converter stores the sum, in fp32."""
    return tuple(
        line
        if isinstance(line, Extra) or not line[0].endswith("norm.weight") or not isinstance(line[1], str)
        else (line[0], plus_one(line[1]))
        for line in lines
    )


def attention(interleaved: bool) -> tuple[RuleLine, ...]:
    """`interleaved`: llama.cpp rotates this architecture in pairs and its converter permutes q and k for it."""

    def qkv(kind: str) -> Expr:
        q, k, v = (f"blk.{{i}}.attn_{x}.{kind}" for x in "qkv")
        if interleaved:
            return cat(rope_halves(q, "n_heads"), rope_halves(k, "n_kv_heads"), v)
        return cat(q, k, v)

    return (
        ("layers.{i}.attn.qkv.weight", qkv("weight")),
        ("layers.{i}.attn.qkv.bias", qkv("bias")),
        ("layers.{i}.attn.out.weight", "blk.{i}.attn_output.weight"),
        ("layers.{i}.attn.out.bias", "blk.{i}.attn_output.bias"),
    )


GATED_ATTENTION: tuple[RuleLine, ...] = (
    (
        "layers.{i}.attn.qkv.weight",
        cat(ungroup("blk.{i}.attn_q.weight", "n_heads", 2), "blk.{i}.attn_k.weight", "blk.{i}.attn_v.weight"),
    ),
    ("layers.{i}.attn.out.weight", "blk.{i}.attn_output.weight"),
)
"""With an output gate: each head's query, then its gate."""

QK_NORM: tuple[RuleLine, ...] = (
    ("layers.{i}.attn.q_norm.weight", "blk.{i}.attn_q_norm.weight"),
    ("layers.{i}.attn.k_norm.weight", "blk.{i}.attn_k_norm.weight"),
)

LAYER_NORM_BIASES: tuple[RuleLine, ...] = (
    ("norm.bias", "output_norm.bias"),
    ("layers.{i}.attn_norm.bias", "blk.{i}.attn_norm.bias"),
    ("layers.{i}.ffn_norm.bias", "blk.{i}.ffn_norm.bias"),
)

QKV: tuple[RuleLine, ...] = (
    ("layers.{i}.attn.qkv.weight", "blk.{i}.attn_qkv.weight"),
    ("layers.{i}.attn.qkv.bias", "blk.{i}.attn_qkv.bias"),
    ("layers.{i}.attn.out.weight", "blk.{i}.attn_output.weight"),
    ("layers.{i}.attn.out.bias", "blk.{i}.attn_output.bias"),
)
"""q, k and v in one matrix, in the order of the layout."""

FUSED_MLP: tuple[RuleLine, ...] = (
    ("layers.{i}.mlp.gate_up.weight", "blk.{i}.ffn_up.weight"),
    ("layers.{i}.mlp.down.weight", "blk.{i}.ffn_down.weight"),
)
"""Gate and up in one matrix, which llama.cpp calls up."""

PLAIN_MLP: tuple[RuleLine, ...] = (
    ("layers.{i}.mlp.up.weight", "blk.{i}.ffn_up.weight"),
    ("layers.{i}.mlp.up.bias", "blk.{i}.ffn_up.bias"),
    ("layers.{i}.mlp.down.weight", "blk.{i}.ffn_down.weight"),
    ("layers.{i}.mlp.down.bias", "blk.{i}.ffn_down.bias"),
)
"""An MLP without gate."""

MLP: tuple[RuleLine, ...] = (
    ("layers.{i}.mlp.gate_up.weight", cat("blk.{i}.ffn_gate.weight", "blk.{i}.ffn_up.weight")),
    ("layers.{i}.mlp.gate_up.bias", cat("blk.{i}.ffn_gate.bias", "blk.{i}.ffn_up.bias")),
    ("layers.{i}.mlp.down.weight", "blk.{i}.ffn_down.weight"),
    ("layers.{i}.mlp.down.bias", "blk.{i}.ffn_down.bias"),
)

PRE_NORMS: tuple[RuleLine, ...] = (
    ("layers.{i}.attn_norm.weight", "blk.{i}.attn_norm.weight"),
    ("layers.{i}.ffn_norm.weight", "blk.{i}.ffn_norm.weight"),
)

POST_NORMS: tuple[RuleLine, ...] = (
    ("layers.{i}.attn_post_norm.weight", "blk.{i}.post_attention_norm.weight"),
    ("layers.{i}.ffn_post_norm.weight", "blk.{i}.post_ffw_norm.weight"),
)

MOE: tuple[RuleLine, ...] = (
    ("layers.{i}.moe.router.weight", "blk.{i}.ffn_gate_inp.weight"),
    ("layers.{i}.moe.router.selection_bias", "blk.{i}.exp_probs_b.bias"),
    ("layers.{i}.moe.gate_up.weight", cat("blk.{i}.ffn_gate_exps.weight", "blk.{i}.ffn_up_exps.weight")),
    ("layers.{i}.moe.down.weight", "blk.{i}.ffn_down_exps.weight"),
    (
        "layers.{i}.moe.shared.gate_up.weight",
        cat("blk.{i}.ffn_gate_shexp.weight", "blk.{i}.ffn_up_shexp.weight"),
    ),
    ("layers.{i}.moe.shared.down.weight", "blk.{i}.ffn_down_shexp.weight"),
)
"""Experts are stacked, gate and up apart."""

MOE_ONE_BY_ONE: tuple[RuleLine, ...] = (
    (
        "layers.{i}.moe.gate_up.weight",
        stack(cat("blk.{i}.ffn_gate.{e}.weight", "blk.{i}.ffn_up.{e}.weight")),
    ),
    ("layers.{i}.moe.down.weight", stack("blk.{i}.ffn_down.{e}.weight")),
)
"""Experts as files of before April 2024 have them."""

SHARED_EXPERT_GATE: RuleLine = ("layers.{i}.moe.shared_gate.weight", "blk.{i}.ffn_gate_inp_shexp.weight")


def _values_per_key(layer: Layer | None, _: Spec) -> int:
    assert layer is not None and isinstance(layer.mixer, DeltaNet)
    return layer.mixer.n_v_heads // layer.mixer.n_k_heads


def _tiled(source: Source, axis: int = 0) -> Expr:
    """DeltaNet's value heads, which lie key head by key head in the layout: ggml repeats the row of key heads as a whole, so
    its converter puts the first value head of every key head first."""
    return swap(source, "n_k_heads", _values_per_key, axis)


_QKV, _CONV = "blk.{i}.attn_qkv.weight", "blk.{i}.ssm_conv1d.weight"
DELTA: tuple[RuleLine, ...] = (
    (
        "layers.{i}.delta.qkvz.weight",
        cat(joined(_QKV, _QKV, _tiled(_QKV)), _tiled("blk.{i}.attn_gate.weight")),
    ),
    (
        "layers.{i}.delta.ba.weight",
        cat(_tiled("blk.{i}.ssm_beta.weight"), _tiled("blk.{i}.ssm_alpha.weight")),
    ),
    ("layers.{i}.delta.conv.weight", joined(_CONV, _CONV, _tiled(_CONV))),
    ("layers.{i}.delta.A_log", minus_exp(_tiled("blk.{i}.ssm_a"))),
    ("layers.{i}.delta.dt_bias", _tiled("blk.{i}.ssm_dt.bias")),
    ("layers.{i}.delta.norm.weight", "blk.{i}.ssm_norm.weight"),
    ("layers.{i}.delta.out.weight", _tiled("blk.{i}.ssm_out.weight", axis=1)),
)
"""Gated DeltaNet whose projections lie apart."""

DELTA_BY_KEY_HEAD: tuple[RuleLine, ...] = (
    ("layers.{i}.delta.qkvz.weight", ungroup("blk.{i}.ssm_in.weight", "n_k_heads", 4)),  # files of 2025
    ("layers.{i}.delta.qkvz.weight", cat(ungroup(_QKV, 1, 3), "blk.{i}.attn_gate.weight")),
    ("layers.{i}.delta.ba.weight", ungroup("blk.{i}.ssm_ba.weight", "n_k_heads", 2)),
    ("layers.{i}.delta.conv.weight", _CONV),
    ("layers.{i}.delta.A_log", minus_exp("blk.{i}.ssm_a")),
    ("layers.{i}.delta.dt_bias", "blk.{i}.ssm_dt.bias"),
    ("layers.{i}.delta.norm.weight", "blk.{i}.ssm_norm.weight"),
    ("layers.{i}.delta.out.weight", "blk.{i}.ssm_out.weight"),
)
"""Gated DeltaNet that is released key head by key head (Qwen3-Next): its value heads stay in that order."""


def _norm_groups(layer: Layer | None, _: Spec) -> int:
    assert layer is not None
    mamba = next(m for m in layer.mixers if isinstance(m, Mamba))
    return mamba.n_groups


MAMBA: tuple[RuleLine, ...] = (
    ("layers.{i}.mamba.in_proj.weight", "blk.{i}.ssm_in.weight"),
    ("layers.{i}.mamba.conv.weight", _CONV),
    ("layers.{i}.mamba.conv.bias", "blk.{i}.ssm_conv1d.bias"),
    ("layers.{i}.mamba.A_log", minus_exp(squeeze("blk.{i}.ssm_a", 1))),
    ("layers.{i}.mamba.D", squeeze("blk.{i}.ssm_d", 1)),
    ("layers.{i}.mamba.dt_bias", "blk.{i}.ssm_dt.bias"),
    ("layers.{i}.mamba.norm.weight", unflatten("blk.{i}.ssm_norm.weight", _norm_groups)),
    ("layers.{i}.mamba.out.weight", "blk.{i}.ssm_out.weight"),
)
"""Mamba-2."""

MTP_LAYERS = extra("blk.{i}.*", MTP, beside="nextn.eh_proj.weight")
