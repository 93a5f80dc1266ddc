"""OLMo, the first: 1B and 7B, 7B-0424 and 7B-0724.

A Llama with
- LayerNorms without weight or bias, whose eps is fixed at 1e-5 whatever a config says;
- queries, keys and values clipped at `clip_qkv` as projected, where the config has a number (0424 and 0724);
- RoPE computed in fp32 and cast back. The 1B's head is tied.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Spec, hf, read, rules

NORM = Norm(1e-5, kind="layer", weight="none", rounding="last", bias=False)


def spec(c: Config) -> Spec:
    head_dim, bias, clip = read.head_dim(c), c.get("attention_bias", False), c.get("clip_qkv")
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c, default_theta=10000.0), head_dim, rounding="last"),
        qkv_bias=bias,
        out_bias=bias,
        clip=None if clip is None else float(clip),
    )
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    return Spec(
        family="olmo",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=NORM, ffn_norm=NORM),) * c["num_hidden_layers"],
        norm=NORM,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


_ENDS = (("embed.weight", "model.embed_tokens.weight"), ("head.weight", "lm_head.weight"))
RULES = {"hf": rules(*_ENDS, *hf.ATTENTION, *hf.MLP)}

FAMILY = Family("olmo", ("olmo",), ("OlmoForCausalLM",), spec, RULES)
