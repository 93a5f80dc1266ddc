"""Qwen3 dense: 0.6B, 1.7B, 4B, 8B, 14B, 32B, and their FP8 releases.

A Llama with
- QK-norm per head, before RoPE; head_dim (128) is its own field, not d_model / n_heads;
- a tied head in the small ones; attention biases behind a flag that no release sets;
- optionally (`use_sliding_window`) a window on the layers from `max_window_layers` on.
"""

from __future__ import annotations

from zoo.config import ACTIVATIONS, Config, rope_parameters
from zoo.families import Family
from zoo.mapping.rules import rules
from zoo.spec import MLP, Attention, Layer, Norm, QKNorm, Spec

from . import _dense as dense


def spec(c: Config) -> Spec:
    norm, head_dim = Norm(c["rms_norm_eps"]), c["head_dim"]

    def attention(kind: str) -> Attention:
        return Attention(
            n_heads=c["num_attention_heads"],
            n_kv_heads=c["num_key_value_heads"],
            head_dim=head_dim,
            v_head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=dense.whole_rope(c, rope_parameters(c), head_dim),
            window=c["sliding_window"] if kind == dense.SLIDING else None,
            qkv_bias=c.get("attention_bias", False),
            out_bias=c.get("attention_bias", False),
            qk_norm=QKNorm(norm),
        )

    mlp = MLP(c["intermediate_size"], c.table("hidden_act", ACTIVATIONS))
    return Spec(
        family="qwen3",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(Layer(attention(kind), mlp, attn_norm=norm, ffn_norm=norm) for kind in layer_types(c)),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=dense.dtype(c),
    )


def layer_types(c: Config) -> list[str]:
    """The list, or what upstream makes of `use_sliding_window` and `max_window_layers`."""
    n = c["num_hidden_layers"]
    if "layer_types" in c:
        kinds = c.each_layer("layer_types", n, (dense.FULL, dense.SLIDING))
        if dense.SLIDING in kinds:
            c.choice("use_sliding_window", (True,), False)  # upstream forgets the window otherwise
        return kinds
    first = c["max_window_layers"] if c.get("use_sliding_window", False) else n
    return [dense.SLIDING if i >= first else dense.FULL for i in range(n)]


RULES = {
    "hf": rules(*dense.ENDS, *dense.PRE_NORMS, *dense.ATTENTION, *dense.QK_NORM, *dense.MLP),
    "gguf": rules(
        *dense.GGUF_ENDS,
        *dense.GGUF_PRE_NORMS,
        *dense.gguf_attention(interleaved=False),
        *dense.GGUF_QK_NORM,
        *dense.GGUF_MLP,
    ),
}

FAMILY = Family("qwen3", ("qwen3",), ("Qwen3ForCausalLM",), spec, RULES)
