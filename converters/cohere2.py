"""Command R7B, Command A, Tiny Aya (Cohere 2).

Cohere's block (one norm, two branches side by side; see cohere.py) without its QK-norm, and with
- a window of `sliding_window` on three layers of four, which have RoPE; the fourth sees everything and has no positions
  at all (`layer_types`, or every `sliding_window_pattern`-th layer);
- head_dim that always is hidden_size / num_attention_heads: upstream reads no other.
"""

from __future__ import annotations

from typing import Any

from zoo.family import MLP, Attention, Config, Family, Layer, Spec, ZooError, gguf, hf, read, rules


def spec(c: Config) -> Spec:
    refuse_other_layouts(c)
    norm, d, n_heads = read.centred_norm(c), c["hidden_size"], c["num_attention_heads"]
    c.choice("head_dim", (d // n_heads,), d // n_heads)
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    return Spec(
        family="cohere2",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(attention(c, d // n_heads, kind == read.SLIDING), mlp, norm, parallel=True, adds="in_turn")
            for kind in layer_kinds(c)
        ),
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c["max_position_embeddings"],
        logit_scale=c.get("logit_scale", 0.0625),
        dtype=read.dtype(c),
    )


def attention(c: Config, head_dim: int, windowed: bool, *, turned: bool = False) -> Attention:
    """A windowed layer's attention, with RoPE, or a full one's, which has it only where it is `turned`."""
    rope = read.whole_rope(c, read.rope_parameters(c), head_dim, interleaved=True, rounding="both")
    return Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope if windowed or turned else None,
        window=c["sliding_window"] if windowed else None,
    )


def layer_kinds(c: Config) -> list[str]:
    """The kind of each layer. `layer_switch` is the pattern in Cohere's own words, beside whatever else says it."""
    kinds = read.layer_types(c, read.every(c.get("sliding_window_pattern", 4)))
    if (switch := c.get("layer_switch")) and kinds != [read.every(switch)(i) for i in range(len(kinds))]:
        raise ZooError(f"{c.where}: layer_switch is {switch}, which is not the pattern of the windows")
    return kinds


def refuse_other_layouts(c: Config) -> None:
    """What releases say of their layout, and upstream does not read; and biases, which none has."""
    c.refuse(
        attention_bias=False,
        use_qk_norm=False,
        rotary_pct=1.0,
        use_parallel_block=True,
        use_gated_activation=True,
    )
    c.refuse(position_embedding_type="rope_gptj", order_of_interleaved_layers="local_attn_first")
    c.choice("use_embedding_sharing", (tied := c.get("tie_word_embeddings", True),), tied)


RULES = {
    "hf": rules(*hf.ENDS, *hf.PARALLEL_NORM, *hf.ATTENTION, *hf.MLP, hf.INV_FREQ),
    "gguf": rules(*gguf.ENDS, gguf.PRE_NORMS[0], *gguf.attention(interleaved=False), *gguf.MLP),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """Rows of q and k are in pairs as in the release: nothing is permuted. The pattern of windows is llama.cpp's own."""
    wide = out["hidden_size"] // out["num_attention_heads"]  # upstream knows no other
    for said in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        f.expect(said, wide)
    return {
        "layer_norm_eps": f["attention.layer_norm_epsilon"],
        "logit_scale": f["logit_scale"],
        "sliding_window": f["attention.sliding_window"],
        "layer_types": gguf.layer_types(f, out["num_hidden_layers"], 4),
    }


FAMILY = Family("cohere2", ("cohere2",), ("Cohere2ForCausalLM",), spec, RULES, gguf={"cohere2": gguf_config})
