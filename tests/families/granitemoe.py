"""Granite with experts. Releases hold them stacked, under other names than transformers has in memory."""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Variant, rope

from .granite import FACTORS, released

# fmt: off

_GRANITEMOE = BASE | FACTORS | {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 28,
    "num_hidden_layers": 3, "rope_parameters": rope(613.0), "num_local_experts": 6, "num_experts_per_tok": 3,
    "tie_word_embeddings": True,
}

CASE = FamilyCase(
    "granitemoe",
    (
        Variant("granitemoe", "GraniteMoeForCausalLM", _GRANITEMOE, "three of six experts, softmax over the chosen; tied",
            rounds_otherwise="0.08 of a spread of 0.10 between upstream's two attentions; the cause is not known yet"),
        Variant("granitemoe_untied", "GraniteMoeForCausalLM",
            _GRANITEMOE | {
                "num_key_value_heads": 3, "num_local_experts": 5, "num_experts_per_tok": 2, "attention_bias": True,
                "tie_word_embeddings": False, "num_hidden_layers": 2,
            },
            "untied and with biases, as in no release"),
        Variant("granitemoe_shared", "GraniteMoeSharedForCausalLM",
            _GRANITEMOE | {"shared_intermediate_size": 44, "num_hidden_layers": 2},
            "an MLP beside the experts"),
    ),
    refused=(
        ("granite-3.1-1b-a400m", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("granite-3.1-1b-a400m", {"num_experts_per_tok": 33}, "33 of 32 experts cannot be chosen"),
        ("granite-3.1-1b-a400m", {"shared_intermediate_size": 64}, "shared_intermediate_size"),
    ),
    released_text=released,
)
# fmt: on
