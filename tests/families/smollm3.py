"""SmolLM3: some layers have no positions, and where windows are used those have them."""

from __future__ import annotations

from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Listed, Variant, rope
from zoo.testing.released import drop_default, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_SMOLLM3 = BASE | {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 52,
    "num_hidden_layers": 4,
    "no_rope_layer_interval": 3, "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    drop_default(config, tie_word_embeddings=True)
    return flat_rope(config) | {"max_window_layers": 28}


# fmt: off
CASE = FamilyCase(
    "smollm3",
    (
        Variant("smollm3", "SmolLM3ForCausalLM", _SMOLLM3, "tied; layer 2 without RoPE"),
        Variant("smollm3_window", "SmolLM3ForCausalLM",
            _SMOLLM3 | {
                "use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [1, 0, 0, 1],
                "tie_word_embeddings": False,
            },
            "untied; explicit NoPE list, and the NoPE layers have a window"),
    ),
    main="smollm3_window",
    layer_kinds=frozenset({FULL, SLIDING}),
    listed={"smollm3-3b": Listed("smollm3-3b")},
    refused=(("smollm3-3b", {"no_rope_layers": [2] * 36}, "no_rope_layers[0] is 2"),),
    released_text=released,
)
# fmt: on
