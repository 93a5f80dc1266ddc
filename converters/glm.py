"""GLM-4-9B in Hugging Face's layout (`glm-4-9b-hf`, `glm-4-9b-chat-hf`). THUDM's own `chatglm` files are another.

A Llama with
- RoPE in neighbouring pairs, on the first half of a head (`partial_rotary_factor`; where it is missing, 0.5);
- biases on q, k and v (`attention_bias`; where it is missing, true), none on the output;
- gate and up released as one matrix, `mlp.gate_up_proj`.
"""

from __future__ import annotations

from typing import Any

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Spec, gguf, hf, read, rules


def spec(c: Config) -> Spec:
    norm = Norm(c["rms_norm_eps"])
    layer = Layer(attention(c), mlp(c), attn_norm=norm, ffn_norm=norm)
    return decoder("glm", c, layer)


def attention(c: Config) -> Attention:
    p, head_dim = read.rope_parameters(c), read.head_dim(c)
    turned = read.turned(c, p, head_dim, 0.5)
    return Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.rope(c, p, turned, interleaved=True),
        qkv_bias=c.get("attention_bias", True),
    )


def mlp(c: Config) -> MLP:
    return MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))


def decoder(family: str, c: Config, layer: Layer) -> Spec:
    """Such a layer again and again, and the ends."""
    return Spec(
        family=family,
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(layer,) * c["num_hidden_layers"],
        norm=Norm(c["rms_norm_eps"]),
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


HF = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    ("layers.{i}.mlp.gate_up.weight", "model.layers.{i}.mlp.gate_up_proj.weight"),
    ("layers.{i}.mlp.down.weight", "model.layers.{i}.mlp.down_proj.weight"),
    hf.INV_FREQ,
)
RULES = {
    "hf": rules(*HF),
    "gguf": rules(
        *gguf.ENDS,
        *gguf.PRE_NORMS,
        *gguf.QKV,
        *gguf.attention(interleaved=False),  # of Hugging Face's layout, so the form to write
        *gguf.FUSED_MLP,
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """q, k and v are one matrix where the file was made of THUDM's own `chatglm` files. llama.cpp's converter reads their
    keys: from Hugging Face's layout it writes an eps of 1e-5 and a theta of 10000, whatever the config says; both count."""
    head_dim, part = gguf.rotary(f, out)
    bias = f.has("attn_qkv.bias") or f.has("attn_q.bias")
    return {"head_dim": head_dim, "attention_bias": bias, "partial_rotary_factor": part}


FAMILY = Family("glm", ("glm",), ("GlmForCausalLM",), spec, RULES, gguf={"chatglm": gguf_config})
