"""Llama 2, 3.x and what shares their architecture (SmolLM2, and Llama-shaped fine-tunes).

The plain decoder the others differ from: RMS pre-norms, grouped-query attention, SwiGLU, RoPE.
- 3.1 and later stretch RoPE in three bands ("llama3"); 3.2 1B and 3B tie the head.
- `head_dim` may be independent of d_model / n_heads; biases exist behind two flags that no release sets.
- Meta's own files (`consolidated.NN.pth`) and llama.cpp's GGUF hold q and k rows in interleaved RoPE order.
- Meta's files of N ranks are slices: q, k, v, gate, up and head by output rows, out and down by input
  columns, the embedding by columns in Llama 2 and by rows in Llama 3, whose vocabulary is 4 times as large.
"""

from __future__ import annotations

from zoo.config import ACTIVATIONS, Config, rope, rope_parameters
from zoo.families import Family
from zoo.mapping.rules import Expr, cat, extra, ranks, rope_halves, rules
from zoo.spec import MLP, Attention, Layer, Norm, Spec

from . import _dense as names


def spec(c: Config) -> Spec:
    d, n_heads = c["hidden_size"], c["num_attention_heads"]
    head_dim = c.get("head_dim", d // n_heads)
    norm = Norm(c["rms_norm_eps"])
    c.refuse(rope_interleaved=False)
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=c.get("num_key_value_heads", n_heads),
        head_dim=head_dim,
        v_head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope(c, rope_parameters(c), head_dim),
        qkv_bias=c.get("attention_bias", False),
        out_bias=c.get("attention_bias", False),
    )
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", ACTIVATIONS, "silu"), bias=c.get("mlp_bias", False))
    return Spec(
        family="llama",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, ffn_norm=norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=c.first("dtype", "torch_dtype", default=None),
    )


def _meta(name: str, axis: int | None) -> Expr:
    return ranks("rank{r}." + name, axis)


_M = "layers.{i}."
RULES = {
    "hf": rules(*names.ENDS, *names.PRE_NORMS, *names.ATTENTION, *names.MLP, names.INV_FREQ),
    "meta": rules(
        ("embed.weight", _meta("tok_embeddings.weight", 0), lambda _, s: s.vocab_size > 100_000),
        ("embed.weight", _meta("tok_embeddings.weight", 1), lambda _, s: s.vocab_size <= 100_000),
        ("norm.weight", _meta("norm.weight", None)),
        ("head.weight", _meta("output.weight", 0)),
        ("layers.{i}.attn_norm.weight", _meta(_M + "attention_norm.weight", None)),
        ("layers.{i}.ffn_norm.weight", _meta(_M + "ffn_norm.weight", None)),
        (
            "layers.{i}.attn.qkv.weight",
            cat(
                rope_halves(_meta(_M + "attention.wq.weight", 0), "n_heads"),
                rope_halves(_meta(_M + "attention.wk.weight", 0), "n_kv_heads"),
                _meta(_M + "attention.wv.weight", 0),
            ),
        ),
        ("layers.{i}.attn.out.weight", _meta(_M + "attention.wo.weight", 1)),
        (
            "layers.{i}.mlp.gate_up.weight",
            cat(_meta(_M + "feed_forward.w1.weight", 0), _meta(_M + "feed_forward.w3.weight", 0)),
        ),
        ("layers.{i}.mlp.down.weight", _meta(_M + "feed_forward.w2.weight", 1)),
        extra("rank*.rope.freqs", "rotary frequencies; computed from the config"),
    ),
    "gguf": rules(
        *names.GGUF_ENDS,
        *names.GGUF_PRE_NORMS,
        *names.gguf_attention(interleaved=True),
        *names.GGUF_MLP,
    ),
}

FAMILY = Family("llama", ("llama",), ("LlamaForCausalLM",), spec, RULES)
