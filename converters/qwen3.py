"""Qwen3 dense: 0.6B, 1.7B, 4B, 8B, 14B, 32B, and their FP8 releases.

A Llama with
- QK-norm per head, before RoPE; head_dim (128) is its own field, not d_model / n_heads;
- a tied head in the small ones; attention biases behind a flag that no release sets;
- optionally (`use_sliding_window`) a window on the layers from `max_window_layers` on.
"""

from __future__ import annotations

from typing import Any

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, QKNorm, Spec, gguf, hf, read, rules


def spec(c: Config) -> Spec:
    norm, head_dim = Norm(c["rms_norm_eps"]), c["head_dim"]

    def attention(kind: str) -> Attention:
        return Attention(
            n_heads=c["num_attention_heads"],
            n_kv_heads=c["num_key_value_heads"],
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=read.whole_rope(c, read.rope_parameters(c), head_dim),
            window=c["sliding_window"] if kind == read.SLIDING else None,
            qkv_bias=c.get("attention_bias", False),
            out_bias=c.get("attention_bias", False),
            qk_norm=QKNorm(norm),
        )

    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    return Spec(
        family="qwen3",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(attention(kind), mlp, attn_norm=norm, ffn_norm=norm) for kind in read.late_windows(c)
        ),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


RULES = {
    "hf": rules(*hf.ENDS, *hf.PRE_NORMS, *hf.ATTENTION, *hf.QK_NORM, *hf.MLP),
    "gguf": rules(
        *gguf.ENDS,
        *gguf.PRE_NORMS,
        *gguf.attention(interleaved=False),
        *gguf.QK_NORM,
        *gguf.MLP,
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp does not write: it has no windows for this architecture."""
    return {"head_dim": gguf.head_dim(f, out), "use_sliding_window": False}


FAMILY = Family("qwen3", ("qwen3",), ("Qwen3ForCausalLM",), spec, RULES, gguf={"qwen3": gguf_config})
