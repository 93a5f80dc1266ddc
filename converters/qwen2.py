"""Qwen2 and Qwen2.5: 0.5B to 72B, Coder, Math, QwQ, and what was distilled into them (DeepSeek-R1-Distill-Qwen).

A Llama with
- biases on q, k and v, always (no config field says so), and none on the output;
- a tied head in the small ones;
- optionally (`use_sliding_window`) a window on the layers from `max_window_layers` on. No release has it switched on.
"""

from __future__ import annotations

from typing import Any

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Spec, gguf, hf, read, rules


def spec(c: Config) -> Spec:
    norm, head_dim = Norm(c["rms_norm_eps"]), read.head_dim(c)

    def attention(kind: str) -> Attention:
        return Attention(
            n_heads=c["num_attention_heads"],
            n_kv_heads=c["num_key_value_heads"],
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=read.whole_rope(c, read.rope_parameters(c), head_dim),
            window=c["sliding_window"] if kind == read.SLIDING else None,
            qkv_bias=True,
        )

    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    return Spec(
        family="qwen2",
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
    "hf": rules(*hf.ENDS, *hf.PRE_NORMS, *hf.ATTENTION, *hf.MLP, hf.INV_FREQ),
    "gguf": rules(*gguf.ENDS, *gguf.PRE_NORMS, *gguf.attention(interleaved=False), *gguf.MLP),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    return {"head_dim": gguf.head_dim(f, out), "use_sliding_window": False}


FAMILY = Family("qwen2", ("qwen2",), ("Qwen2ForCausalLM",), spec, RULES, gguf={"qwen2": gguf_config})
