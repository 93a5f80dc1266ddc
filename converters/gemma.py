"""Gemma 2B and 7B, CodeGemma.

A Llama with
- RMS norms that multiply by (1 + w), in fp32. GGUF files hold the sum;
- GEGLU in the tanh form. The releases say `gelu` and mean it: upstream and Google's own code take the tanh form;
- embeddings multiplied by sqrt(d_model), rounded to their dtype first; a tied head;
- `head_dim` (256) a field of its own; the 2B has one key/value head.
"""

from __future__ import annotations

from typing import Any

from zoo.family import MLP, Attention, Config, Disagreement, Family, Layer, Spec, gguf, hf, read, rules


def spec(c: Config) -> Spec:
    c.refuse(use_bidirectional_attention=False)
    d, head_dim = c["hidden_size"], c["head_dim"]
    norm = read.plus_one_norm(c)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c), head_dim),
        qkv_bias=c.get("attention_bias", False),
        out_bias=c.get("attention_bias", False),
    )
    tanh = "gelu_pytorch_tanh"
    c.choice("hidden_act", ("gelu", tanh), tanh)
    c.choice("hidden_activation", (tanh,), tanh)  # some copies have it, which was meant to mend the first
    mlp = MLP(c["intermediate_size"], "gelu_tanh")
    return Spec(
        family="gemma",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, ffn_norm=norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c["max_position_embeddings"],
        embed_scale=d**0.5,
        dtype=read.dtype(c),
    )


RULES = {
    "hf": rules(
        *hf.ENDS,
        *hf.PRE_NORMS,
        *hf.ATTENTION,
        *hf.MLP,
        hf.INV_FREQ,
    ),
    "gguf": rules(
        *gguf.norms_plus_one(*gguf.ENDS, *gguf.PRE_NORMS), *gguf.attention(interleaved=False), *gguf.MLP
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    return {"head_dim": gguf.head_dim(f, out), "hidden_act": "gelu_pytorch_tanh"}


DISAGREEMENTS = (
    Disagreement(
        about="which GELU a hidden_act of gelu is",
        upstream="takes the tanh form up to 4.47 and since 5.18, and the exact one between",
        vendor="takes the tanh form",
        follows="vendor",
        why="it is how the releases were trained, and they say gelu; what was trained between has both in its weights",
        source="https://github.com/huggingface/transformers/pull/29402",
        since="2025-01",
    ),
)
FAMILY = Family(
    "gemma",
    ("gemma",),
    ("GemmaForCausalLM",),
    spec,
    RULES,
    gguf={"gemma": gguf_config},
    disagreements=DISAGREEMENTS,
)
