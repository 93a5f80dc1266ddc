"""Llama 2, 3.x, and what shares their architecture (SmolLM2, and Llama-shaped fine-tunes).

The plain decoder that the others differ from: RMS pre-norms, grouped-query attention, SwiGLU, RoPE.
- 3.1 and later stretch RoPE in three bands ("llama3"); 3.2 1B and 3B tie the head.
- `head_dim` may be independent of d_model / n_heads; biases exist behind two flags that no release sets.
- Llama 2's configs leave `rope_theta` out: it is 10000.
- Meta's own files (`consolidated.NN.pth`) and llama.cpp's GGUF hold q and k rows in interleaved RoPE order.
- Meta's files of N ranks are slices: q, k, v, gate, up and head by output rows, out and down by input
  columns, the embedding by columns in Llama 2 and by rows in Llama 3 (whose vocabulary is 4 times as large).
"""

from __future__ import annotations

from zoo.config import ACTIVATIONS, Config, rope_parameters
from zoo.families import Family
from zoo.mapping.rules import Expr, extra, ranks, rules
from zoo.spec import MLP, Attention, Layer, Norm, Spec

from . import _dense as dense


def spec(c: Config) -> Spec:
    c.refuse(rope_interleaved=False)
    d, n_heads = c["hidden_size"], c["num_attention_heads"]
    head_dim = c.get("head_dim", d // n_heads)
    norm = Norm(c["rms_norm_eps"])
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=c.get("num_key_value_heads", n_heads),
        head_dim=head_dim,
        v_head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=dense.whole_rope(c, rope_parameters(c, default_theta=10000.0), head_dim),
        qkv_bias=c.get("attention_bias", False),
        out_bias=c.get("attention_bias", False),
    )
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", ACTIVATIONS), bias=c.get("mlp_bias", False))
    return Spec(
        family="llama",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, ffn_norm=norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=dense.dtype(c),
    )


def _at(name: str, axis: int | None) -> Expr:
    return ranks("rank{r}." + name, axis)


RULES = {
    "hf": rules(*dense.ENDS, *dense.PRE_NORMS, *dense.ATTENTION, *dense.MLP, dense.INV_FREQ),
    "meta": rules(
        ("embed.weight", _at("tok_embeddings.weight", 0), lambda _, s: s.vocab_size > 100_000),
        ("embed.weight", _at("tok_embeddings.weight", 1), lambda _, s: s.vocab_size <= 100_000),
        *dense.vendor_names(_at),
        extra("rank*.rope.freqs", "rotary frequencies; computed from the config"),
    ),
    "gguf": rules(
        *dense.GGUF_ENDS,
        *dense.GGUF_PRE_NORMS,
        *dense.gguf_attention(interleaved=True),
        *dense.GGUF_MLP,
    ),
}

FAMILY = Family("llama", ("llama",), ("LlamaForCausalLM",), spec, RULES)
