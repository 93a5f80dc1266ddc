"""Qwen2, dense. Nothing is unusual about its upstream.

Releases leave layer_types out: windows, where there are any, start at max_window_layers.
"""

from __future__ import annotations

from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Gguf, Variant, rope, yarn
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_QWEN2 = BASE | {
    "hidden_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3, "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    return flat_rope(drop(config, "layer_types"))


# fmt: off
CASE = FamilyCase(
    "qwen2",
    (
        Variant("qwen2", "Qwen2ForCausalLM", _QWEN2, "biases on q, k and v that no field says; untied"),
        Variant("qwen2_window", "Qwen2ForCausalLM",
            _QWEN2 | {
                "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "tie_word_embeddings": True,
                "rope_parameters": yarn(97.0, 6.0, 64, 3.6, 0.36),
            },
            "layers from max_window_layers on have a window; tied; YaRN, as the README of 2.5 tells to add it"),
    ),
    main="qwen2_window",
    layer_kinds=frozenset({FULL, SLIDING}),
    refused=(
        ("qwen2.5-7b", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 20},
            "'sliding_window' is missing"),
        ("qwen2.5-7b", {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window is False"),
        ("qwen2.5-7b", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
    ),
    released_text=released,
    gguf=(
        Gguf("qwen2", lambda c: {}, settings={"hidden_size": 60}, refused=({"attention.value_length": 8},)),
    ),
)
# fmt: on
