"""Falcon: 7B, 11B, 40B, 180B.

LayerNorms with a bias beside linear layers without (`bias`), an MLP without gate (GELU), RoPE, a tied head.
- 7B: both branches read one norm of the same x; all query heads share one key/value head (`multi_query`).
- 40B, 180B (`new_decoder_architecture`): groups of query heads, a norm for each branch (one for both in the 11B,
  `num_ln_in_parallel_attn` 1).
- q, k and v are fused by key/value head: the queries of the first, its k, its v, then those of the second.
- Upstream rounds between a matrix and its bias.
ALiBi, which the Falcon-RW models have, is refused.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, RuleLine, Spec, hf, read, rules


def spec(c: Config) -> Spec:
    c.refuse(alibi=False, apply_residual_connection_post_layernorm=False)
    new, bias = c.get("new_decoder_architecture", False), c.get("bias", False)
    parallel = True if new else c.get("parallel_attn", True)
    if new:
        c.choice("parallel_attn", (True,), True)
        c.get("multi_query")  # says nothing where there are groups
    two_norms = not parallel or (new and c.choice("num_ln_in_parallel_attn", (1, 2), 2) == 2)
    if not new:
        c.choice("num_ln_in_parallel_attn", (1,), 1)
    d, n_heads = c["hidden_size"], c["num_attention_heads"]
    if new:
        n_kv_heads = c["num_kv_heads"]
    else:
        c.get("num_kv_heads")  # 71 in the 7B, which has one
        n_kv_heads = 1 if c.get("multi_query", True) else n_heads
    head_dim = d // n_heads
    norm = Norm(c["layer_norm_epsilon"], kind="layer", rounding="last")
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c, default_theta=10000.0), head_dim),
        qkv_bias=bias,
        out_bias=bias,
    )
    mlp = MLP(
        c.get("ffn_hidden_size", 4 * d),
        c.table("activation", read.ACTIVATIONS, "gelu"),
        gated=False,
        bias=bias,
    )
    layer = Layer(attention, mlp, attn_norm=norm, ffn_norm=norm if two_norms else None, parallel=parallel)
    return Spec(
        family="falcon",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=(layer,) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c.get("max_position_embeddings", 2048),
        dtype=read.dtype(c),
    )


_T = "transformer."
_L = "transformer.h.{i}."


def _norm(key: str, source: str, *, parallel: bool) -> tuple[RuleLine, ...]:
    """A norm that is called so where the branches are side by side, each with one of its own, or where they are not."""

    def so(layer: Layer | None, _: Spec) -> bool:
        return layer is not None and layer.ffn_norm is not None and layer.parallel == parallel

    return tuple((f"{key}.{kind}", f"{source}.{kind}", so) for kind in ("weight", "bias"))


RULES = {
    "hf": rules(
        ("embed.weight", _T + "word_embeddings.weight"),
        ("head.weight", "lm_head.weight"),
        *hf.affine("norm", _T + "ln_f"),
        *_norm("layers.{i}.attn_norm", _L + "ln_attn", parallel=True),
        *hf.affine("layers.{i}.attn_norm", _L + "input_layernorm"),
        *_norm("layers.{i}.ffn_norm", _L + "ln_mlp", parallel=True),
        *_norm("layers.{i}.ffn_norm", _L + "post_attention_layernorm", parallel=False),
        *hf.fused_per_head(_L + "self_attention.query_key_value"),
        *hf.affine("layers.{i}.attn.out", _L + "self_attention.dense"),
        *hf.affine("layers.{i}.mlp.up", _L + "mlp.dense_h_to_4h"),
        *hf.affine("layers.{i}.mlp.down", _L + "mlp.dense_4h_to_h"),
    )
}

FAMILY = Family("falcon", ("falcon",), ("FalconForCausalLM",), spec, RULES)
