"""Hunyuan dense: 0.5B to 7B, and the translation models made of them (Hunyuan-MT).

A Llama with
- QK-norm per head, after RoPE;
- RoPE called "dynamic" that is not: with an `alpha`, theta is theta * alpha^(d / (d - 2)) at any length. What such a config
  says beside alpha nobody reads; values that no release has are refused;
- a tied head in the releases, which say so.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, QKNorm, Rope, Spec, hf, read, rules


def spec(c: Config) -> Spec:
    c.refuse(use_qk_norm=True, use_cla=False, num_experts=1, norm_type="rms")
    norm = Norm(c["rms_norm_eps"])
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    return Spec(
        family="hunyuan_v1_dense",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(Layer(attention(c), mlp, attn_norm=norm, ffn_norm=norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


def attention(c: Config) -> Attention:
    """Grouped heads, normed after RoPE; the size of a head goes by two names."""
    head_dim = c.first("head_dim", "attention_head_dim", default=c["hidden_size"] // c["num_attention_heads"])
    bias = c.get("attention_bias", False)
    return Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope(c, head_dim),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=QKNorm(Norm(c["rms_norm_eps"]), after_rope=True),
    )


def rope(c: Config, head_dim: int) -> Rope:
    """RoPE over the whole head, its theta raised once by `alpha` if there is one."""
    p = read.rope_parameters(c)
    if p["rope_type"] != "dynamic":
        return read.whole_rope(c, p, head_dim)
    q = Config(p, f"{c.where}: rope_parameters")
    q.refuse(factor=1.0, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
    return Rope(float(q["rope_theta"]) * float(q["alpha"]) ** (head_dim / (head_dim - 2)), head_dim)


ATTENTION = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    ("layers.{i}.attn.q_norm.weight", "model.layers.{i}.self_attn.query_layernorm.weight"),
    ("layers.{i}.attn.k_norm.weight", "model.layers.{i}.self_attn.key_layernorm.weight"),
)
RULES = {"hf": rules(*ATTENTION, *hf.MLP)}
FAMILY = Family("hunyuan_v1_dense", ("hunyuan_v1_dense",), ("HunYuanDenseV1ForCausalLM",), spec, RULES)
