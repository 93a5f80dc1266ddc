"""GLM-4-9B in Hugging Face's layout (`glm-4-9b-hf`, `glm-4-9b-chat-hf`). THUDM's own `chatglm` files are another.

A Llama with
- RoPE in neighbouring pairs, on the first half of a head (`partial_rotary_factor`; where it is missing, 0.5);
- biases on q, k and v (`attention_bias`; where it is missing, true), none on the output;
- gate and up released as one matrix, `mlp.gate_up_proj`.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Spec, hf, read, rules


def spec(c: Config) -> Spec:
    norm = Norm(c["rms_norm_eps"])
    layer = Layer(attention(c), mlp(c), attn_norm=norm, ffn_norm=norm)
    return decoder("glm", c, layer)


def attention(c: Config) -> Attention:
    p, head_dim = read.rope_parameters(c), read.head_dim(c)
    turned = int(head_dim * p.get("partial_rotary_factor", 0.5))
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
RULES = {"hf": rules(*HF)}

FAMILY = Family("glm", ("glm",), ("GlmForCausalLM",), spec, RULES)
