"""Phi-3 (mini, medium), Phi-3.5-mini, Phi-4, Phi-4-mini and their reasoning models.

A Llama with
- q | k | v in one matrix and gate | up in another, as the layout has them;
- LongRoPE beyond the original context: two tables of divisors, the long one for every position of a text that is longer.
  Early configs call it "su" or "yarn". Releases for the original context have plain RoPE;
- RoPE on a part of each head in Phi-4-mini (`partial_rotary_factor` 0.75);
- a window in Phi-3-mini (2047; where it is wider than the context, as in later configs, it hides nothing).
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Spec, hf, read, rules


def spec(c: Config) -> Spec:
    c.refuse(attention_bias=False, mlp_bias=False, lm_head_bias=False)
    c.get("original_max_position_embeddings")  # where RoPE is plain it says nothing
    n_heads, head_dim, norm = c["num_attention_heads"], read.head_dim(c), Norm(c["rms_norm_eps"])
    p = read.rope_parameters(c, default_theta=10000.0)
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=c.get("num_key_value_heads", n_heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.partial_rope(c, p, head_dim, longrope=("longrope", "su", "yarn")),
        window=c.get("sliding_window"),
    )
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    return Spec(
        family="phi3",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, ffn_norm=norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


_L = "model.layers.{i}."
RULES = {
    "hf": rules(
        *hf.ENDS,
        *hf.PRE_NORMS,
        ("layers.{i}.attn.qkv.weight", _L + "self_attn.qkv_proj.weight"),
        ("layers.{i}.attn.out.weight", _L + "self_attn.o_proj.weight"),
        ("layers.{i}.mlp.gate_up.weight", _L + "mlp.gate_up_proj.weight"),
        ("layers.{i}.mlp.down.weight", _L + "mlp.down_proj.weight"),
        hf.INV_FREQ,
    )
}

FAMILY = Family("phi3", ("phi3",), ("Phi3ForCausalLM",), spec, RULES)
