"""Seed-OSS: a Llama with biases on q, k and v. Its releases say rope_scaling of type default."""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Variant, llama3, rope
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_SEED = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3, "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    drop(flat_rope(config), "pretraining_tp")
    return config | {"rope_scaling": config["rope_scaling"] or {"rope_type": "default"}}


# fmt: off
CASE = FamilyCase(
    "seed_oss",
    (
        Variant("seed_oss", "SeedOssForCausalLM", _SEED, "biases on q, k and v; untied"),
        Variant("seed_oss_bias", "SeedOssForCausalLM",
            _SEED | {
                "attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
                "rope_parameters": llama3(731.0, 6.0, 160, 1.3, 5.5),
            },
            "biases on the outputs and in the MLP instead; tied, scaled RoPE"),
    ),
    released_text=released,
    refused=(
        ("seed-oss-36b", {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'"),
        ("seed-oss-36b", {"head_dim": None}, "'head_dim' is missing"),
    ),
)
# fmt: on
