"""Mixtral. transformers renames `block_sparse_moe` to `mlp` in memory and back on saving.

Routing weights stay in fp32, the router's logits do not.
"""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Gguf, Variant, rope
from zoo.testing.released import drop, flat_rope, implied_head_dim
from zoo.testing.variant import Settings

# fmt: off

_MIXTRAL = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 28, "num_hidden_layers": 3, "num_local_experts": 6, "num_experts_per_tok": 3,
    "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    return implied_head_dim(flat_rope(drop(config, "router_jitter_noise")))


# fmt: off
CASE = FamilyCase(
    "mixtral",
    (
        Variant("mixtral", "MixtralForCausalLM", _MIXTRAL, "three of six experts, renormalised; no window"),
        Variant("mixtral_window", "MixtralForCausalLM",
            _MIXTRAL | {
                "hidden_size": 40, "num_attention_heads": 4, "head_dim": None, "num_hidden_layers": 2,
                "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7, "tie_word_embeddings": True,
            },
            "a window, a tied head, head_dim that follows from the width: what no release has"),
    ),
    refused=(
        ("mixtral-8x7b", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "9 of 8 experts cannot be chosen"),
        ("mixtral-8x7b", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type is 'ntk'"),
    ),
    released_text=released,
    gguf=(
        Gguf(
            "llama",
            lambda c: {
                "rope.dimension_count": c["head_dim"], "expert_count": c["num_local_experts"],
                "expert_used_count": c["num_experts_per_tok"],
            },
            interleaved=True, refused=({"attention.sliding_window": 16},),
        ),
    ),
)
# fmt: on
