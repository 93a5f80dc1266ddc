"""Laguna. Its configs, younger than transformers 5, are what transformers saves, and say some things twice."""

from __future__ import annotations

import pytest

from zoo import families
from zoo.errors import ZooError
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Variant, rope, yarn
from zoo.testing.full_size import attention, read
from zoo.testing.variant import Settings

# fmt: off

_LAGUNA = BASE | {
    "hidden_size": 36, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20,
    "intermediate_size": 44, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 22,
    "num_experts": 6, "num_experts_per_tok": 3, "moe_routed_scaling_factor": 1.7,
    "num_hidden_layers": 4, "sliding_window": 7, "layer_types": [FULL, SLIDING, SLIDING, FULL],
    "num_attention_heads_per_layer": [4, 6, 8, 4],
    "rope_parameters": {
        FULL: yarn(97.0, 6.0, 64, 3.6, 0.36, attention_factor=1.3, partial_rotary_factor=0.6),
        SLIDING: rope(71.0, partial_rotary_factor=0.8),
    },
}

# fmt: on


def released(config: Settings) -> Settings:
    n = config["num_hidden_layers"]
    over = config["gating"] if isinstance(config["gating"], str) else "per-head"
    original = config["rope_parameters"][FULL]["original_max_position_embeddings"]
    config["rope_parameters"] = config["rope_parameters"] | {"original_max_position_embeddings": original}
    return config | {
        "gating_types": [over.replace("-", "_")] * n, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [0], "partial_rotary_factor": 0.6,
    }  # fmt: skip


# fmt: off
CASE = FamilyCase(
    "laguna",
    (
        Variant("laguna", "LagunaForCausalLM", _LAGUNA,
            "softplus gate per head, heads and RoPE by layer, YaRN over part of a head, scaled experts, first layer dense"),
        Variant("laguna_channel", "LagunaForCausalLM",
            _LAGUNA | {
                "gating": "per-element", "moe_router_logit_softcapping": 0.8, "tie_word_embeddings": True,
                "mlp_layer_types": ["sparse", "dense", "sparse", "dense"], "num_attention_heads_per_layer": None,
            },
            "gate per channel, router's logits capped, dense layers between, tied"),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    released_text=released,
    keeps={"laguna": ("rope_parameters",)},
    refused=(
        ("laguna-xs.2", {"moe_apply_router_weight_on_input": True}, "moe_apply_router_weight_on_input is True"),
        ("laguna-xs.2", {"attention_bias": True}, "attention_bias is True"),
        ("laguna-xs.2", {"gating": False}, "gating is False"),
        ("laguna-xs.2", {"gating_types": ["per_element"] * 40}, "gating_types[0] is 'per_element'"),
        ("laguna-xs.2", {"num_attention_heads_per_layer": [48]}, "should list 40 layers"),
    ),
)
# fmt: on


def test_layers_differ_in_heads_window_and_rope() -> None:
    spec = families.spec_of(read("laguna-xs.2"))
    full, sliding = attention(spec, 0), attention(spec, 1)
    assert full.rope is not None and sliding.rope is not None and full.rope.scaling is not None
    assert (full.n_heads, full.window, full.rope.dim, full.rope.scaling.beta_fast) == (48, None, 64, 64.0)
    assert (sliding.n_heads, sliding.window, sliding.rope.dim, sliding.rope.scaling) == (64, 512, 128, None)


def test_two_original_contexts_are_refused() -> None:
    config = read("laguna-xs.2")
    config["rope_parameters"] = config["rope_parameters"] | {"original_max_position_embeddings": 8192}
    with pytest.raises(ZooError, match="8192 beside the layers' kinds, but 4096 for full_attention"):
        families.spec_of(config)
