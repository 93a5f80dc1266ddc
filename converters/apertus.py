"""Apertus, of the Swiss AI initiative: 8B and 70B.

A Llama with
- an MLP without a gate, whose activation, xIELU, has two learned numbers in every layer. Its two constants are tensors of
  the files too, and are read from there;
- QK-norm per head, before RoPE, which is stretched in three bands;
- names of its own for the norms before attention and feed-forward.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, QKNorm, Spec, hf, read, rules


def spec(c: Config) -> Spec:
    c.choice("hidden_act", ("xielu",))
    c.refuse(qk_norm=True, post_norm=False, mlp_bias=False)
    norm, head_dim, bias = Norm(c["rms_norm_eps"]), read.head_dim(c), c.get("attention_bias", False)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c, needed=True), head_dim),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=QKNorm(norm),
    )
    mlp = MLP(c["intermediate_size"], "xielu", gated=False)
    return Spec(
        family="apertus",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, ffn_norm=norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


_L = "model.layers.{i}."
_ACT = {"positive": "alpha_p", "negative": "alpha_n", "beta": "beta", "near": "eps"}
RULES = {
    "hf": rules(
        *hf.ENDS,
        ("layers.{i}.attn_norm.weight", _L + "attention_layernorm.weight"),
        ("layers.{i}.ffn_norm.weight", _L + "feedforward_layernorm.weight"),
        *hf.ATTENTION,
        *hf.QK_NORM,
        ("layers.{i}.mlp.up.weight", _L + "mlp.up_proj.weight"),
        ("layers.{i}.mlp.down.weight", _L + "mlp.down_proj.weight"),
        *((f"layers.{{i}}.mlp.act.{ours}", f"{_L}mlp.act_fn.{theirs}") for ours, theirs in _ACT.items()),
    )
}

FAMILY = Family("apertus", ("apertus",), ("ApertusForCausalLM",), spec, RULES)
