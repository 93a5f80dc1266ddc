"""StableLM 3B-4E1T, StableLM 2 (1.6B, 12B), Stable Code and Zephyr.

A Llama with
- LayerNorms with biases, also where linear layers have none; q, k, v biases in the 1.6B (`use_qkv_bias`);
- RoPE on the first quarter of each head;
- in the 12B both branches behind one norm (`use_parallel_residual`), and a LayerNorm without bias of each head of q and k,
  with a weight of its own (`qk_layernorm`).
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, QKNorm, Spec, hf, read, rules, stack


def spec(c: Config) -> Spec:
    n_heads, eps = c["num_attention_heads"], c["layer_norm_eps"]
    head_dim = c["hidden_size"] // n_heads
    norm, head_norm = (Norm(eps, kind="layer", rounding="last", bias=bias) for bias in (True, False))
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.partial_rope(c, read.rope_parameters(c, default_theta=10000.0), head_dim, 0.25),
        qkv_bias=c.get("use_qkv_bias", False),
        qk_norm=QKNorm(head_norm, over="each_head") if c.get("qk_layernorm", False) else None,
    )
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    parallel = c.get("use_parallel_residual", False)
    layer = Layer(attention, mlp, attn_norm=norm, ffn_norm=None if parallel else norm, parallel=parallel)
    return Spec(
        family="stablelm",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(layer,) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


_A = "model.layers.{i}.self_attn."
RULES = {
    "hf": rules(
        *hf.ENDS,
        *hf.LAYER_NORMS,
        *hf.ATTENTION,
        ("layers.{i}.attn.q_norm.weight", stack(_A + "q_layernorm.norms.{e}.weight")),
        ("layers.{i}.attn.k_norm.weight", stack(_A + "k_layernorm.norms.{e}.weight")),
        *hf.MLP,
    )
}

FAMILY = Family("stablelm", ("stablelm",), ("StableLmForCausalLM",), spec, RULES)
