"""What the families without experts share, and those with experts use too: readings of a wrapper and of RoPE,
and rule lines for names that most of Hugging Face's decoders, llama.cpp, and Meta and Mistral themselves give
the same parts.

A family file still says what it has: it lists these groups beside the lines of its own. A line whose
canonical tensor the Spec doesn't have (a bias, a head that is tied) does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zoo.config import Config, rope
from zoo.mapping.rules import Expr, RuleLine, Source, cat, extra, rope_halves
from zoo.spec import Rope, Rounding

FULL, SLIDING = "full_attention", "sliding_attention"

# --- reading configs ------------------------------------------------------------------------------------


def text_config(c: Config) -> Config:
    """The language model's part of a config, wrapper or not."""
    return c.sub("text_config") if "text_config" in c else c


def dtype(*configs: Config) -> str | None:
    """The declared dtype, under its old or new key, of the first config (wrapper, text) that has one."""
    return next((d for c in configs if (d := c.first("dtype", "torch_dtype", default=None))), None)


def tied(c: Config, text: Config, default: bool) -> bool:
    """Whether the head is the embedding: the wrapper's word counts before its text model's."""
    return bool(c.get("tie_word_embeddings", text.get("tie_word_embeddings", default)))


def whole_rope(c: Config, p: Mapping[str, Any], head_dim: int, *, rounding: Rounding = "first") -> Rope:
    """RoPE over the whole head; a config that wants only a part of it rotated is refused."""
    Config(p, f"{c.where}: rope_parameters").refuse(partial_rotary_factor=1.0)
    return rope(c, p, head_dim, rounding=rounding)


# --- Hugging Face names -----------------------------------------------------------------------------------

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

WRAPPERS: tuple[dict[str, str], ...] = (
    {},
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "model.language_model."},
)
"""Where a multimodal wrapper puts its language model: as released, and as transformers 5 has it in memory."""

VISION: tuple[RuleLine, ...] = tuple(
    extra(f"{prefix}{part}.*", reason)
    for prefix in ("", "model.")
    for part, reason in (
        ("vision_tower", "the vision tower; text needs none of it"),
        ("multi_modal_projector", "carries image features into the text model's width"),
    )
)

# --- Meta's and Mistral's own names -----------------------------------------------------------------------


def vendor_names(at: Callable[[str, int | None], Source]) -> tuple[RuleLine, ...]:
    """Attention, MLP, norms and head. Rows of q and k are in interleaved RoPE order.

    `at(name, axis)` is a source tensor that tensor-parallel ranks cut along `axis` (None: each has it whole).
    """
    layer = "layers.{i}."
    return (
        ("norm.weight", at("norm.weight", None)),
        ("head.weight", at("output.weight", 0)),
        ("layers.{i}.attn_norm.weight", at(layer + "attention_norm.weight", None)),
        ("layers.{i}.ffn_norm.weight", at(layer + "ffn_norm.weight", None)),
        (
            "layers.{i}.attn.qkv.weight",
            cat(
                rope_halves(at(layer + "attention.wq.weight", 0), "n_heads"),
                rope_halves(at(layer + "attention.wk.weight", 0), "n_kv_heads"),
                at(layer + "attention.wv.weight", 0),
            ),
        ),
        ("layers.{i}.attn.out.weight", at(layer + "attention.wo.weight", 1)),
        (
            "layers.{i}.mlp.gate_up.weight",
            cat(at(layer + "feed_forward.w1.weight", 0), at(layer + "feed_forward.w3.weight", 0)),
        ),
        ("layers.{i}.mlp.down.weight", at(layer + "feed_forward.w2.weight", 1)),
    )


# --- llama.cpp's GGUF -------------------------------------------------------------------------------------

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
