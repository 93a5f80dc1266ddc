"""LFM2 with experts. Its releases list every layer's kind."""

from __future__ import annotations

from families.lfm2 import SIZES
from zoo.testing import FULL, FamilyCase, Variant
from zoo.testing.released import drop, drop_default, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_MOE = SIZES | {
    "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 5, "num_dense_layers": 2,
    "num_experts": 6, "num_experts_per_tok": 2, "routed_scaling_factor": 1.7,
    "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
}

# fmt: on


def released(config: Settings) -> Settings:
    drop(config, "output_router_logits")
    drop_default(config, tie_word_embeddings=True)
    return flat_rope(config)


# fmt: off
CASE = FamilyCase(
    "lfm2_moe",
    (
        Variant("lfm2_moe", "Lfm2MoeForCausalLM", _MOE,
            "sigmoid router with a selection bias, after two dense layers, tied"),
        Variant("lfm2_moe_plain", "Lfm2MoeForCausalLM",
            _MOE | {
                "use_expert_bias": False, "norm_topk_prob": False, "conv_bias": True, "num_dense_layers": 1,
                "tie_word_embeddings": False,
            },
            "no selection bias, not renormalised, biases in the convolutions, untied"),
    ),
    layer_kinds=frozenset({FULL, "conv"}),
    released_text=released,
)
# fmt: on
