"""Gemma 2: 2B, 9B, 27B.

A Gemma with
- norms before AND after both branches, as Gemma 3 has them (`post_attention_layernorm` is attention's post-norm here);
- soft caps: attention's scores at 50, before the mask; the logits at 30 (so, too, where the fields are missing; null: none);
- scores scaled by query_pre_attn_scalar^-0.5, which is not head_dim^-0.5 in the 27B;
- layers that alternate, a window first (`layer_types`, or by parity).
"""

from __future__ import annotations

from typing import Any

from zoo.family import MLP, Attention, Config, Family, Layer, Spec, gguf, hf, read, rules


def spec(c: Config) -> Spec:
    c.refuse(use_bidirectional_attention=False)
    d, head_dim = c["hidden_size"], c["head_dim"]
    norm = read.plus_one_norm(c)

    def attention(kind: str) -> Attention:
        return Attention(
            n_heads=c["num_attention_heads"],
            n_kv_heads=c["num_key_value_heads"],
            head_dim=head_dim,
            scale=c["query_pre_attn_scalar"] ** -0.5,
            rope=read.whole_rope(c, read.rope_parameters(c), head_dim),
            window=c["sliding_window"] if kind == read.SLIDING else None,
            qkv_bias=c.get("attention_bias", False),
            out_bias=c.get("attention_bias", False),
            softcap=c.said("attn_logit_softcapping", 50.0),
        )

    kinds = read.layer_types(c, read.every(2))
    mlp = MLP(c["intermediate_size"], c.table("hidden_activation", read.ACTIVATIONS))
    c.choice("hidden_act", (act := c["hidden_activation"],), act)  # its older name: releases have both
    return Spec(
        family="gemma2",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=tuple(Layer(attention(kind), mlp, norm, norm, norm, norm) for kind in kinds),
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c["max_position_embeddings"],
        embed_scale=d**0.5,
        logit_softcap=c.said("final_logit_softcapping", 30.0),
        dtype=read.dtype(c),
    )


RULES = {
    "hf": rules(
        *hf.ENDS,
        *hf.FOUR_NORMS,
        *hf.ATTENTION,
        *hf.MLP,
        hf.INV_FREQ,
    ),
    "gguf": rules(
        *gguf.norms_plus_one(*gguf.ENDS, *gguf.PRE_NORMS, *gguf.POST_NORMS),
        *gguf.attention(interleaved=False),
        *gguf.MLP,
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    head_dim = gguf.head_dim(f, out)
    # llama.cpp knows the 27B by its 46 layers: there the scale is (hidden / heads)^-0.5.
    scalar = out["hidden_size"] // out["num_attention_heads"] if out["num_hidden_layers"] == 46 else head_dim
    return {
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": f["attention.sliding_window"],
        "attn_logit_softcapping": f.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": f.get("final_logit_softcapping", 30.0),
    }


FAMILY = Family("gemma2", ("gemma2",), ("Gemma2ForCausalLM",), spec, RULES, gguf={"gemma2": gguf_config})
