"""OLMo 2: norms on the outputs of branches only, QK norm over the full width."""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Variant, rope
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_OLMO = BASE | {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 52,

}

# fmt: on


def released(config: Settings) -> Settings:
    return drop(flat_rope(config), "attention_bias", "attention_dropout")


# fmt: off
CASE = FamilyCase(
    "olmo2",
    (
        Variant("olmo2", "Olmo2ForCausalLM",
            _OLMO | {"num_hidden_layers": 3, "rope_parameters": rope(613.0)},
            "norms on branch outputs only; QK norm over the full width"),
    ),
    refused=(("olmo2-7b", {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'"),),
    released_text=released,
)
# fmt: on
