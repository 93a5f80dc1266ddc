"""Rule lines that dense families share: names that most of Hugging Face's decoders give the same parts.

A family file still says what it has: it lists these groups beside the lines of its own. A line whose
canonical tensor the Spec doesn't have (a bias, a head that is tied) does nothing.
"""

from __future__ import annotations

from zoo.mapping.rules import Expr, RuleLine, cat, extra, rope_halves

_L = "model.layers.{i}."

ENDS: tuple[RuleLine, ...] = (
    ("embed.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
)

ATTENTION: tuple[RuleLine, ...] = (
    (
        "layers.{i}.attn.qkv.weight",
        cat(_L + "self_attn.q_proj.weight", _L + "self_attn.k_proj.weight", _L + "self_attn.v_proj.weight"),
    ),
    (
        "layers.{i}.attn.qkv.bias",
        cat(_L + "self_attn.q_proj.bias", _L + "self_attn.k_proj.bias", _L + "self_attn.v_proj.bias"),
    ),
    ("layers.{i}.attn.out.weight", _L + "self_attn.o_proj.weight"),
    ("layers.{i}.attn.out.bias", _L + "self_attn.o_proj.bias"),
)

QK_NORM: tuple[RuleLine, ...] = (
    ("layers.{i}.attn.q_norm.weight", _L + "self_attn.q_norm.weight"),
    ("layers.{i}.attn.k_norm.weight", _L + "self_attn.k_norm.weight"),
)

MLP: tuple[RuleLine, ...] = (
    ("layers.{i}.mlp.gate_up.weight", cat(_L + "mlp.gate_proj.weight", _L + "mlp.up_proj.weight")),
    ("layers.{i}.mlp.gate_up.bias", cat(_L + "mlp.gate_proj.bias", _L + "mlp.up_proj.bias")),
    ("layers.{i}.mlp.down.weight", _L + "mlp.down_proj.weight"),
    ("layers.{i}.mlp.down.bias", _L + "mlp.down_proj.bias"),
)

PRE_NORMS: tuple[RuleLine, ...] = (
    ("layers.{i}.attn_norm.weight", _L + "input_layernorm.weight"),
    ("layers.{i}.ffn_norm.weight", _L + "post_attention_layernorm.weight"),  # after attention, before the FFN
)

INV_FREQ = extra("*.rotary_emb.inv_freq", "rotary frequencies; computed from the config")

# llama.cpp's GGUF.

GGUF_ENDS: tuple[RuleLine, ...] = (
    ("embed.weight", "token_embd.weight"),
    ("norm.weight", "output_norm.weight"),
    ("head.weight", "output.weight"),
    extra("rope_freqs.weight", "factors of the rotary frequencies; computed from the config"),
)


def gguf_attention(interleaved: bool) -> tuple[RuleLine, ...]:
    """`interleaved`: llama.cpp rotates this architecture in pairs and its converter permutes q and k for it."""

    def qkv(kind: str) -> Expr:
        q, k, v = (f"blk.{{i}}.attn_{x}.{kind}" for x in "qkv")
        if interleaved:
            return cat(rope_halves(q, "n_heads"), rope_halves(k, "n_kv_heads"), v)
        return cat(q, k, v)

    return (
        ("layers.{i}.attn.qkv.weight", qkv("weight")),
        ("layers.{i}.attn.qkv.bias", qkv("bias")),
        ("layers.{i}.attn.out.weight", "blk.{i}.attn_output.weight"),
        ("layers.{i}.attn.out.bias", "blk.{i}.attn_output.bias"),
    )


GGUF_QK_NORM: tuple[RuleLine, ...] = (
    ("layers.{i}.attn.q_norm.weight", "blk.{i}.attn_q_norm.weight"),
    ("layers.{i}.attn.k_norm.weight", "blk.{i}.attn_k_norm.weight"),
)

GGUF_MLP: tuple[RuleLine, ...] = (
    ("layers.{i}.mlp.gate_up.weight", cat("blk.{i}.ffn_gate.weight", "blk.{i}.ffn_up.weight")),
    ("layers.{i}.mlp.gate_up.bias", cat("blk.{i}.ffn_gate.bias", "blk.{i}.ffn_up.bias")),
    ("layers.{i}.mlp.down.weight", "blk.{i}.ffn_down.weight"),
    ("layers.{i}.mlp.down.bias", "blk.{i}.ffn_down.bias"),
)

GGUF_PRE_NORMS: tuple[RuleLine, ...] = (
    ("layers.{i}.attn_norm.weight", "blk.{i}.attn_norm.weight"),
    ("layers.{i}.ffn_norm.weight", "blk.{i}.ffn_norm.weight"),
)
