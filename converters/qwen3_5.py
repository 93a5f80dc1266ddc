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
GGUF: tuple[RuleLine, ...] = (*qwen3_next.GGUF, *gguf.DELTA, gguf.MTP_LAYERS)
RULES = {
    "hf": rules(*TEXT, *hf.MLP, *BESIDE, prefixes=hf.WRAPPERS),
    "gguf": rules(*GGUF, *gguf.MLP),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """What a GGUF of `qwen35` says: the text model alone."""
    own = qwen3_next.gguf_mixers(f, out)
    part = own.pop("partial_rotary_factor")
    return own | {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "rope_parameters": {
            **(out["rope_scaling"] or {"rope_type": "default"}),
            "rope_theta": out["rope_theta"],
            "partial_rotary_factor": part,
            "mrope_section": gguf.interleaved_positions(f, int(own["head_dim"] * part)),
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
