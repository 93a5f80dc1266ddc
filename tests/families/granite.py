"""Granite, dense: a Llama with a factor on embeddings, scores, branches and logits."""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Gguf, Variant, rope
from zoo.testing.released import flat_rope, implied_head_dim
from zoo.testing.variant import Settings

# fmt: off

FACTORS = {
    "embedding_multiplier": 3.7, "attention_multiplier": 0.21, "residual_multiplier": 0.6, "logits_scaling": 0.6,
}
_GRANITE = BASE | FACTORS | {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 52,
    "num_hidden_layers": 3, "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    return implied_head_dim(flat_rope(config))


# fmt: off
CASE = FamilyCase(
    "granite",
    (
        Variant("granite", "GraniteForCausalLM", _GRANITE | {"tie_word_embeddings": True}, "four factors; tied"),
        Variant("granite_biases", "GraniteForCausalLM",
            _GRANITE | {"num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True, "head_dim": 14},
            "untied; biases, and a head_dim of its own, as in no release"),
    ),
    refused=(
        ("granite-4.1-8b", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("granite-4.1-8b", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type is 'ntk'"),
        ("granite-4.1-8b", {"sliding_window": 512}, "sliding_window"),
    ),
    released_text=released,
    gguf=(
        Gguf(
            "granite",
            lambda c: {
                "rope.dimension_count": 10, "attention.scale": c["attention_multiplier"],
                "embedding_scale": c["embedding_multiplier"], "residual_scale": c["residual_multiplier"],
                "logit_scale": c["logits_scaling"],
            },
            variant="granite_biases", settings={"head_dim": 10}, interleaved=True,
            silent={"attention.scale": 0.21, "logit_scale": 0.6, "rope.scaling.finetuned": True},
            refused=({"rope.scaling.finetuned": False}, {"attention.value_length": 14}),
        ),
    ),
)
# fmt: on
