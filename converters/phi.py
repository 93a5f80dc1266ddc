"""Phi-1, Phi-1.5, Phi-2.

- Both branches read one LayerNorm of the same x; biases everywhere, in the head too; an MLP without gate (tanh GELU).
- RoPE on a part of each head: half of it where the config is silent, 0.4 in Phi-2.
- Optionally (`qk_layernorm`, no release) LayerNorms of queries and keys.
The first uploads (`phi-msft`, remote code, other names) are not read.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, QKNorm, Spec, hf, read, rules


def spec(c: Config) -> Spec:
    c.refuse(tie_word_embeddings=False)
    n_heads, head_dim = c["num_attention_heads"], read.head_dim(c)
    norm = Norm(c["layer_norm_eps"], kind="layer", rounding="last")
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=c.get("num_key_value_heads", n_heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.partial_rope(c, read.rope_parameters(c, default_theta=10000.0), head_dim, 0.5),
        qkv_bias=True,
        out_bias=True,
        qk_norm=QKNorm(norm) if c.get("qk_layernorm", False) else None,
    )
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS), gated=False, bias=True)
    return Spec(
        family="phi",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, parallel=True),) * c["num_hidden_layers"],
        norm=norm,
        tied=False,
        head_bias=True,
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


_L = "model.layers.{i}."
_A = _L + "self_attn."
RULES = {
    "hf": rules(
        ("embed.weight", "model.embed_tokens.weight"),
        *hf.affine("norm", "model.final_layernorm"),
        *hf.affine("head", "lm_head"),
        *hf.affine("layers.{i}.attn_norm", _L + "input_layernorm"),
        *hf.affine("layers.{i}.attn.qkv", _A + "q_proj", _A + "k_proj", _A + "v_proj"),
        *hf.affine("layers.{i}.attn.out", _A + "dense"),
        *hf.affine("layers.{i}.attn.q_norm", _A + "q_layernorm"),
        *hf.affine("layers.{i}.attn.k_norm", _A + "k_layernorm"),
        *hf.affine("layers.{i}.mlp.up", _L + "mlp.fc1"),
        *hf.affine("layers.{i}.mlp.down", _L + "mlp.fc2"),
    )
}

FAMILY = Family("phi", ("phi",), ("PhiForCausalLM",), spec, RULES)
