"""AFM-4.5B: a Llama whose MLP is not gated."""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Variant, rope, yarn
from zoo.testing.released import flat_rope
from zoo.testing.variant import Settings

# fmt: off

_AFM = BASE | {
    "hidden_size": 42, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3, "rope_parameters": yarn(97.0, 6.0, 64, 3.6, 0.36),
}

# fmt: on


def released(config: Settings) -> Settings:
    """YaRN's kind is there twice, under its old and its new key."""
    if scaling := flat_rope(config)["rope_scaling"]:
        scaling["type"] = scaling["rope_type"]
    return config


# fmt: off
CASE = FamilyCase(
    "arcee",
    (
        Variant("arcee", "ArceeForCausalLM", _AFM, "relu2, not gated; YaRN"),
        Variant("arcee_bias", "ArceeForCausalLM",
            _AFM | {
                "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu",
                "rope_parameters": rope(613.0),
            },
            "biases everywhere, another activation, tied, plain RoPE"),
    ),
    released_text=released,
    refused=(
        ("afm-4.5b", {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'"),
        ("afm-4.5b", {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope_type is 'ntk'"),
    ),
)
# fmt: on
