"""Apertus. The constants of its activation are tensors, which the variants move like all others."""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Variant, llama3, rope
from zoo.testing.released import plain_rope
from zoo.testing.variant import Settings

# fmt: off

_APERTUS = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3, "rope_parameters": llama3(731.0, 6.0, 160, 1.3, 5.5),
}

# fmt: on


def released(config: Settings) -> Settings:
    return plain_rope(config) | {"mlp_bias": False, "post_norm": False, "qk_norm": True}


# fmt: off
CASE = FamilyCase(
    "apertus",
    (
        Variant("apertus", "ApertusForCausalLM", _APERTUS,
            "xIELU without a gate, QK norm per head, RoPE in three bands, untied"),
        Variant("apertus_bias", "ApertusForCausalLM",
            _APERTUS | {
                "attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 3,
                "rope_parameters": rope(613.0) | {"rope_type": "linear", "factor": 3.0},
            },
            "biases, RoPE slowed as a whole, tied"),
    ),
    released_text=released,
    refused=(
        ("apertus-8b", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("apertus-8b", {"qk_norm": False}, "qk_norm is False"),
        ("apertus-8b", {"post_norm": True}, "post_norm is True"),
        ("apertus-8b", {"mlp_bias": True}, "mlp_bias is True"),
        ("apertus-8b", {"rope_scaling": None}, "none of the fields 'rope_parameters', 'rope_scaling'"),
    ),
)
# fmt: on
