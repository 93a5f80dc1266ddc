"""Gemma 3: 270M, 1B, and the text model of the 4B, 12B and 27B wrappers.

- RMS norms multiply by (1 + w), in fp32; before AND after both branches, and per head on q and k.
  GGUF files hold 1 + w already: their reader says so (`norm_weight_plus_one`), and the norms are plain.
- GEGLU (tanh form); embeddings are multiplied by sqrt(d_model), rounded to their dtype first; tied head.
- Scores are scaled by query_pre_attn_scalar^-0.5, which is not head_dim^-0.5 in the 27B.
- Five layers with a window to one without (`layer_types`, or every `sliding_window_pattern`-th is full).
  RoPE: theta 1e6 with linear scaling (none in the small ones) on full layers; 1e4, unscaled, on the others.
- The configs of March 2025 leave out whatever equals the class defaults of the time: see DEFAULTS.
"""

from __future__ import annotations

from zoo.config import ACTIVATIONS, Config, rope_parameters
from zoo.families import Family
from zoo.mapping.rules import rules
from zoo.spec import MLP, Attention, Layer, Norm, QKNorm, Spec

from . import _dense as dense

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
    t = dense.text_config(c).with_defaults(DEFAULTS)
    t.refuse(use_bidirectional_attention=False, attn_logit_softcapping=None)
    if "text_config" in c:  # the wrapper's class has no softcap
        t.refuse(final_logit_softcapping=None)
    d, head_dim = t["hidden_size"], t["head_dim"]
    norm = Norm(
        t["rms_norm_eps"], weight="plain" if c.get("norm_weight_plus_one") else "plus_one", scale_in="fp32"
    )

    def layer(kind: str) -> Layer:
        sliding = kind == dense.SLIDING
        parameters = rope_parameters(
            t,
            kind,
            theta="rope_local_base_freq" if sliding else "rope_theta",
            scaling=None if sliding else "rope_scaling",
        )
        attention = Attention(
            n_heads=t["num_attention_heads"],
            n_kv_heads=t["num_key_value_heads"],
            head_dim=head_dim,
            v_head_dim=head_dim,
            scale=t["query_pre_attn_scalar"] ** -0.5,
            rope=dense.whole_rope(t, parameters, head_dim),
            window=t["sliding_window"] if sliding else None,
            qkv_bias=t.get("attention_bias", False),
            out_bias=t.get("attention_bias", False),
            qk_norm=QKNorm(norm),
        )
        mlp = MLP(t["intermediate_size"], t.table("hidden_activation", ACTIVATIONS))
        return Layer(attention, mlp, norm, norm, norm, norm)

    return Spec(
        family="gemma3",
        d_model=d,
        vocab_size=t["vocab_size"],
        layers=tuple(layer(kind) for kind in layer_types(t)),
        norm=norm,
        tied=dense.tied(c, t, default=True),
        context_length=t["max_position_embeddings"],
        embed_scale=d**0.5,
        logit_softcap=t.get("final_logit_softcapping"),
        dtype=dense.dtype(c, t),
    )


def layer_types(t: Config) -> list[str]:
    n = t["num_hidden_layers"]
    if "layer_types" in t:
        return t.each_layer("layer_types", n, (dense.FULL, dense.SLIDING))
    every = t.first("sliding_window_pattern", "_sliding_window_pattern", default=6)
    return [dense.FULL if (i + 1) % every == 0 else dense.SLIDING for i in range(n)]


def _plus_one(_: Layer | None, spec: Spec) -> bool:
    """Norms that came as 1 + w have no form in Hugging Face's files: taking the 1 off would round."""
    return spec.norm.weight == "plus_one"


_L = "model.layers.{i}."
NORMS = {
    "norm.weight": "model.norm.weight",
    "layers.{i}.attn_norm.weight": _L + "input_layernorm.weight",
    "layers.{i}.attn_post_norm.weight": _L + "post_attention_layernorm.weight",
    "layers.{i}.ffn_norm.weight": _L + "pre_feedforward_layernorm.weight",
    "layers.{i}.ffn_post_norm.weight": _L + "post_feedforward_layernorm.weight",
    "layers.{i}.attn.q_norm.weight": _L + "self_attn.q_norm.weight",
    "layers.{i}.attn.k_norm.weight": _L + "self_attn.k_norm.weight",
}
RULES = {
    "hf": rules(
        ("embed.weight", "model.embed_tokens.weight"),
        ("head.weight", "lm_head.weight"),
        *((key, name, _plus_one) for key, name in NORMS.items()),
        *dense.ATTENTION,
        *dense.MLP,
        *dense.VISION,
        prefixes=dense.WRAPPERS,
    ),
    "gguf": rules(
        *dense.GGUF_ENDS,
        *dense.GGUF_PRE_NORMS,
        ("layers.{i}.attn_post_norm.weight", "blk.{i}.post_attention_norm.weight"),
        ("layers.{i}.ffn_post_norm.weight", "blk.{i}.post_ffw_norm.weight"),
        *dense.gguf_attention(interleaved=False),
        *dense.GGUF_QK_NORM,
        *dense.GGUF_MLP,
    ),
}

FAMILY = Family(
    "gemma3",
    ("gemma3", "gemma3_text"),
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    spec,
    RULES,
)
