"""Liquid's LFM2 and LFM2.5: 230M to 2.6B.

What is unusual:
- Most layers have a gated short convolution (three taps, no activation) in attention's place.
- QK-norm per head, before RoPE. The eps of every norm is `norm_eps`.
- The width of the feed-forward is computed from the config's: two thirds of it, times a multiplier, up to a multiple of
  256, unless `block_auto_adjust_ff_dim` is false.
- The final norm's name is `embedding_norm`. The head is tied unless the config says otherwise (`tie_embedding`, or
  transformers' own key).
"""

from __future__ import annotations

from zoo.family import (
    FFN,
    MLP,
    Attention,
    Config,
    Family,
    Layer,
    Norm,
    QKNorm,
    RuleLine,
    ShortConv,
    Spec,
    cat,
    hf,
    read,
    rules,
    squeeze,
)

CONV = "conv"


def spec(c: Config) -> Spec:
    attends = c.get("full_attn_idxs", range(c["num_hidden_layers"]))
    kinds = read.layer_types(c, lambda i: read.FULL if i in attends else CONV, (read.FULL, CONV))
    c.refuse(block_use_swiglu=True)
    return decoder("lfm2", c, kinds, [MLP(ffn_width(c))] * len(kinds))


def decoder(family: str, c: Config, kinds: list[str], ffns: list[FFN]) -> Spec:
    """The decoder around each layer's feed-forward."""
    d = c["hidden_size"]
    c.refuse(use_pos_enc=True, block_dim=d, conv_dim=d, conv_dim_out=d)
    c.refuse(block_norm_eps=c["norm_eps"], num_heads=c["num_attention_heads"])
    norm, head_dim = Norm(c["norm_eps"]), read.head_dim(c)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c, default_theta=1e6), head_dim),
        qk_norm=QKNorm(norm),
    )
    conv = ShortConv(c["conv_L_cache"], bias=c.get("conv_bias", False))
    return Spec(
        family=family,
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(conv if kind == CONV else attention, ffn, attn_norm=norm, ffn_norm=norm)
            for kind, ffn in zip(kinds, ffns, strict=True)
        ),
        norm=norm,
        tied=c.first("tie_embedding", "tie_word_embeddings", default=True),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


def ffn_width(c: Config) -> int:
    width: int = c.first("block_ff_dim", "intermediate_size")
    multiple, by = c.get("block_multiple_of", 256), c.said("block_ffn_dim_multiplier", 1.0)
    if c.get("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        if by is not None:
            width = -(-int(by * width) // multiple) * multiple
    return width


_L = "model.layers.{i}."
MIXERS: tuple[RuleLine, ...] = (
    ("embed.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.embedding_norm.weight"),
    ("head.weight", "lm_head.weight"),
    ("layers.{i}.attn_norm.weight", _L + "operator_norm.weight"),
    ("layers.{i}.ffn_norm.weight", _L + "ffn_norm.weight"),
    hf.ATTENTION[0],
    ("layers.{i}.attn.out.weight", _L + "self_attn.out_proj.weight"),
    ("layers.{i}.attn.q_norm.weight", _L + "self_attn.q_layernorm.weight"),
    ("layers.{i}.attn.k_norm.weight", _L + "self_attn.k_layernorm.weight"),
    ("layers.{i}.short_conv.in_proj.weight", _L + "conv.in_proj.weight"),
    ("layers.{i}.short_conv.in_proj.bias", _L + "conv.in_proj.bias"),
    ("layers.{i}.short_conv.conv.weight", squeeze(_L + "conv.conv.weight", 1)),
    ("layers.{i}.short_conv.conv.bias", _L + "conv.conv.bias"),
    ("layers.{i}.short_conv.out.weight", _L + "conv.out_proj.weight"),
    ("layers.{i}.short_conv.out.bias", _L + "conv.out_proj.bias"),
)
MLP_LINES: tuple[RuleLine, ...] = (
    ("layers.{i}.mlp.gate_up.weight", cat(_L + "feed_forward.w1.weight", _L + "feed_forward.w3.weight")),
    ("layers.{i}.mlp.down.weight", _L + "feed_forward.w2.weight"),
)
RULES = {"hf": rules(*MIXERS, *MLP_LINES)}

FAMILY = Family("lfm2", ("lfm2",), ("Lfm2ForCausalLM",), spec, RULES)
