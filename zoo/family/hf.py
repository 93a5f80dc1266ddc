"""Rule lines for names that most of Hugging Face's decoders give the same parts.

A family still says what it has: it lists these groups beside the lines of its own. A line whose canonical
tensor the Spec doesn't have (a bias, a head that is tied) does nothing.
"""

from __future__ import annotations

from zoo.mapping.rules import RuleLine, cat, extra, stack

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


def gated_mlp(key: str, source: str) -> tuple[RuleLine, ...]:
    """A gated MLP whose tensors lie under `source`."""
    return (
        (f"{key}.gate_up.weight", cat(f"{source}.gate_proj.weight", f"{source}.up_proj.weight")),
        (f"{key}.down.weight", f"{source}.down_proj.weight"),
    )


def numbered(source: str, gate: str, up: str, down: str) -> tuple[RuleLine, ...]:
    """Gated experts that are stored one by one under `source`, which holds `{e}`."""
    return (
        ("layers.{i}.moe.gate_up.weight", stack(cat(f"{source}.{gate}.weight", f"{source}.{up}.weight"))),
        ("layers.{i}.moe.down.weight", stack(f"{source}.{down}.weight")),
    )


NUMBERED = numbered("model.layers.{i}.mlp.experts.{e}", "gate_proj", "up_proj", "down_proj")
"""Experts stored one by one, under the names that most families give them."""

MTP = "multi-token prediction: no part in the next token's logits"
MTP_LAYERS = extra("model.layers.{i}.*", MTP, beside="eh_proj.weight")
"""Layers after the last one, each with the projection that joins the next token's embedding to the state."""
