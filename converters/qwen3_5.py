"""Qwen3.5 dense (0.8B to 27B), Qwen3.6 27B and Qwen3.8 27B.

Qwen3-Next with
- DeltaNet's projections apart and in plain order (q | k | v, then z, b, a): cat makes the canonical ones of them;
- a SwiGLU in every layer where Qwen3-Next has experts;
- a wrapper that sees images (`model.visual.*`); the text model's settings lie in `text_config`. For text all three
  positions of its RoPE are equal, which is plain RoPE.
"""

from __future__ import annotations

from typing import Any

from zoo.family import (
    FFN,
    MLP,
    Config,
    Family,
    Layer,
    RuleLine,
    Spec,
    cat,
    extra,
    gguf,
    hf,
    read,
    rules,
    ungroup,
)

from . import qwen3_next


def spec(config: Config) -> Spec:
    c = read.text_config(config)
    return decoder("qwen3_5", config, c, MLP(c["intermediate_size"]))


def decoder(family: str, config: Config, c: Config, ffn: FFN) -> Spec:
    """`config` is the wrapper or `c` itself, its text model; all layers have the same `ffn`."""
    c.choice("hidden_act", ("silu",))
    c.refuse(attn_output_gate=True)
    c.choice("output_gate_type", ("swish", "silu"), "swish")  # DeltaNet's
    norm = qwen3_next.plus_one(c)
    return Spec(
        family=family,
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(Layer(mixer, ffn, attn_norm=norm, ffn_norm=norm) for mixer in qwen3_next.mixers(c)),
        norm=norm,
        tied=read.tied(config, c, default=False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(config, c),
    )


_D = "model.layers.{i}.linear_attn."
TEXT: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *qwen3_next.GATED_ATTENTION,
    (
        "layers.{i}.delta.qkvz.weight",
        cat(
            ungroup(_D + "in_proj_qkv.weight", 1, 3), _D + "in_proj_z.weight"
        ),  # q | k | v: one group of three
    ),
    ("layers.{i}.delta.ba.weight", cat(_D + "in_proj_b.weight", _D + "in_proj_a.weight")),
    *qwen3_next.DELTA,
)
BESIDE: tuple[RuleLine, ...] = (
    extra("mtp.*", hf.MTP),
    extra("model.visual.*", "the vision tower; text needs none of it"),
)
GGUF: tuple[RuleLine, ...] = (
    *gguf.norms_plus_one(
        *gguf.ENDS,
        ("layers.{i}.attn_norm.weight", "blk.{i}.attn_norm.weight"),
        ("layers.{i}.ffn_norm.weight", "blk.{i}.post_attention_norm.weight"),
        *gguf.QK_NORM,
    ),
    *gguf.GATED_ATTENTION,
    *gguf.DELTA,
    gguf.MTP_LAYERS,
)
RULES = {
    "hf": rules(*TEXT, *hf.MLP, *BESIDE, prefixes=hf.WRAPPERS),
    "gguf": rules(*GGUF, *gguf.MLP),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """What a GGUF of `qwen35` says: the text model alone. Heads of keys and values are equally wide in llama.cpp's graph."""
    head_dim, part = gguf.rotary(f, out)
    n, state, values = out["num_hidden_layers"], f["ssm.state_size"], f["ssm.time_step_rank"]
    f.expect("ssm.inner_size", state * values)
    every = f.get("full_attention_interval", 4)
    linear = f.raw("attention.recurrent_layers", [(i + 1) % every != 0 for i in range(n)])
    rope = out["rope_scaling"] or {"rope_type": "default"}
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "head_dim": head_dim,
        "layer_types": [read.LINEAR if linear[i] else read.FULL for i in range(n)],
        "linear_num_key_heads": f["ssm.group_count"],
        "linear_num_value_heads": values,
        "linear_key_head_dim": state,
        "linear_value_head_dim": state,
        "linear_conv_kernel_dim": f["ssm.conv_kernel"],
        "rope_parameters": rope
        | {
            "rope_theta": out["rope_theta"],
            "partial_rotary_factor": part,
            "mrope_section": gguf.interleaved_positions(f, int(head_dim * part)),
            "mrope_interleaved": True,
        },
        "rope_scaling": None,
    }


FAMILY = Family(
    "qwen3_5",
    ("qwen3_5", "qwen3_5_text"),
    ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
    spec,
    RULES,
    gguf={"qwen35": gguf_config},
)
