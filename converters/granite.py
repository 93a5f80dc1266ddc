"""Granite 3.x and 4.1 (IBM), dense.

A Llama with four factors, each with a field of its own:
- `embedding_multiplier` on embeddings, `residual_multiplier` on what each branch adds;
- `attention_multiplier` on scores, in place of head_dim^-0.5; logits divided by `logits_scaling`.
"""

from __future__ import annotations

from typing import Any

from zoo.family import (
    FFN,
    MLP,
    Attention,
    Config,
    Family,
    Layer,
    Mixer,
    Norm,
    Rope,
    Spec,
    gguf,
    hf,
    read,
    rules,
)


def spec(c: Config) -> Spec:
    rope = read.whole_rope(c, read.rope_parameters(c), read.head_dim(c))
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS), bias=c.get("mlp_bias", False))
    return decoder("granite", c, [(attention(c, rope), mlp)] * c["num_hidden_layers"])


def attention(c: Config, rope: Rope | None) -> Attention:
    return Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
        head_dim=read.head_dim(c),
        scale=float(c.get("attention_multiplier", 1.0)),
        rope=rope,
        qkv_bias=c.get("attention_bias", False),
        out_bias=c.get("attention_bias", False),
    )


def decoder(family: str, c: Config, layers: list[tuple[Mixer, FFN]]) -> Spec:
    """What all Granites have around their mixers and feed-forwards."""
    norm, residual = Norm(c["rms_norm_eps"]), float(c.get("residual_multiplier", 1.0))
    return Spec(
        family=family,
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(mixer, ffn, norm, ffn_norm=norm, residual_scale=residual) for mixer, ffn in layers
        ),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        embed_scale=float(c.get("embedding_multiplier", 1.0)),
        embed_rounding="last",
        logit_scale=1 / float(c.get("logits_scaling", 1.0)),
        dtype=read.dtype(c),
    )


RULES = {
    "hf": rules(*hf.ENDS, *hf.PRE_NORMS, *hf.ATTENTION, *hf.MLP, hf.INV_FREQ),
    "gguf": rules(*gguf.ENDS, *gguf.PRE_NORMS, *gguf.attention(interleaved=True), *gguf.MLP),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """The four factors. Where one is 0 or missing, llama.cpp's graph goes without it."""
    f.expect("rope.scaling.finetuned", True)  # in this architecture: whether there is RoPE at all
    head_dim = gguf.head_dim(f, out)
    return {
        "head_dim": head_dim,
        "mlp_bias": f.has("ffn_gate.bias"),
        "attention_multiplier": f.get("attention.scale") or head_dim**-0.5,
        "embedding_multiplier": f.get("embedding_scale") or 1.0,
        "residual_multiplier": f.get("residual_scale") or 1.0,
        "logits_scaling": f["logit_scale"],
    }


FAMILY = Family("granite", ("granite",), ("GraniteForCausalLM",), spec, RULES, gguf={"granite": gguf_config})
