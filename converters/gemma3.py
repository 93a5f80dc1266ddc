"""Gemma 3: 270M, 1B, and the text model of the 4B, 12B and 27B wrappers.

- RMS norms multiply by (1 + w), in fp32; before AND after both branches, and per head on q and k.
  GGUF files hold the sum.
- GEGLU (tanh form); embeddings are multiplied by sqrt(d_model), rounded to their dtype first; tied head.
- Scores are scaled by query_pre_attn_scalar^-0.5, which is not head_dim^-0.5 in the 27B.
- Five layers with a window to one without (`layer_types`, or every `sliding_window_pattern`-th is full).
  RoPE: theta 1e6 with linear scaling (none in the small ones) on full layers; 1e4, unscaled, on the others.
- The configs of March 2025 leave out whatever equals the class defaults of the time: see DEFAULTS.
"""

from __future__ import annotations

from typing import Any

from zoo.family import MLP, Attention, Config, Family, Layer, QKNorm, Spec, gguf, hf, read, rules

# Source: Gemma3TextConfig, transformers 4.50.
DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window": 4096,
}


def spec(c: Config) -> Spec:
    t = read.text_config(c).with_defaults(DEFAULTS)
    t.refuse(use_bidirectional_attention=False, attn_logit_softcapping=None)
    if "text_config" in c:  # the wrapper's class has no softcap
        t.refuse(final_logit_softcapping=None)
    d, head_dim = t["hidden_size"], t["head_dim"]
    norm = read.plus_one_norm(t)

    def layer(kind: str) -> Layer:
        sliding = kind == read.SLIDING
        parameters = read.rope_parameters(
            t,
            kind,
            theta="rope_local_base_freq" if sliding else "rope_theta",
            scaling=None if sliding else "rope_scaling",
        )
        attention = Attention(
            n_heads=t["num_attention_heads"],
            n_kv_heads=t["num_key_value_heads"],
            head_dim=head_dim,
            scale=t["query_pre_attn_scalar"] ** -0.5,
            rope=read.whole_rope(t, parameters, head_dim),
            window=t["sliding_window"] if sliding else None,
            qkv_bias=t.get("attention_bias", False),
            out_bias=t.get("attention_bias", False),
            qk_norm=QKNorm(norm),
        )
        mlp = MLP(t["intermediate_size"], t.table("hidden_activation", read.ACTIVATIONS))
        return Layer(attention, mlp, norm, norm, norm, norm)

    interval = t.first("sliding_window_pattern", "_sliding_window_pattern", default=6)
    return Spec(
        family="gemma3",
        d_model=d,
        vocab_size=t["vocab_size"],
        layers=tuple(layer(kind) for kind in read.layer_types(t, read.every(interval))),
        norm=norm,
        tied=read.tied(c, t, default=True),
        context_length=t["max_position_embeddings"],
        embed_scale=d**0.5,
        logit_softcap=t.get("final_logit_softcapping"),
        dtype=read.dtype(c, t),
    )


RULES = {
    "hf": rules(
        *hf.ENDS,
        *hf.FOUR_NORMS,
        *hf.QK_NORM,
        *hf.ATTENTION,
        *hf.MLP,
        *hf.VISION,
        prefixes=hf.WRAPPERS,
        beside=(
            {
                "vision_tower.vision_model.": "model.vision_tower.",
                "multi_modal_projector.": "model.multi_modal_projector.",
            },
        ),
    ),
    "gguf": rules(
        *gguf.norms_plus_one(*gguf.ENDS, *gguf.PRE_NORMS, *gguf.POST_NORMS, *gguf.QK_NORM),
        *gguf.attention(interleaved=False),
        *gguf.MLP,
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """What a GGUF of `gemma3` says, and what llama.cpp knows by itself."""
    head_dim = gguf.head_dim(f, out)
    # llama.cpp knows the 27B by its 62 layers: there the scale is (hidden / heads)^-0.5.
    scalar = out["hidden_size"] // out["num_attention_heads"] if out["num_hidden_layers"] == 62 else head_dim
    window = f.get("attention.sliding_window") or None  # not written where no layer has one
    return {
        "model_type": "gemma3_text",
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": window,
        "layer_types": gguf.layer_types(f, out["num_hidden_layers"], 6 if window else 1),
        "rope_theta": f.get("rope.freq_base", 1e6),
        "rope_local_base_freq": f.get("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": f.get("final_logit_softcapping") or None,
    }


FAMILY = Family(
    "gemma3",
    ("gemma3", "gemma3_text"),
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    spec,
    RULES,
    gguf={"gemma3": gguf_config},
)
