"""Qwen3 with experts. transformers saves their number as num_local_experts, releases as num_experts."""

from __future__ import annotations

from zoo import families
from zoo.testing import BASE, FamilyCase, Gguf, Variant, rope
from zoo.testing.full_size import read
from zoo.testing.released import drop, flat_rope, implied_head_dim
from zoo.testing.variant import Settings

# fmt: off

_QWEN3_MOE = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 44, "moe_intermediate_size": 28, "num_experts": 6, "num_experts_per_tok": 3,
    "num_hidden_layers": 4, "norm_topk_prob": True, "mlp_only_layers": [1], "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    config["num_experts"] = config.pop("num_local_experts")
    return implied_head_dim(flat_rope(drop(config, "layer_types")))


# fmt: off
CASE = FamilyCase(
    "qwen3_moe",
    (
        Variant("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE,
            "softmax router renormalised over the chosen; layer 1 dense by mlp_only_layers"),
        Variant("qwen3_moe_step", "Qwen3MoeForCausalLM",
            _QWEN3_MOE | {
                "norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 2, "num_experts": 5,
            },
            "not renormalised; every second layer sparse by decoder_sparse_step"),
    ),
    refused=(
        ("qwen3-30b-a3b", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3-30b-a3b", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
    ),
    released_text=released,
    gguf=(
        Gguf(
            "qwen3moe",
            lambda c: {
                "attention.key_length": c["head_dim"], "expert_count": c["num_local_experts"],
                "expert_used_count": c["num_experts_per_tok"],
                "expert_feed_forward_length": c["moe_intermediate_size"],
            },
            settings={"mlp_only_layers": []},
            silent={"expert_weights_norm": True, "expert_gating_func": 1, "expert_shared_count": 0},
            refused=({"expert_weights_norm": False}, {"expert_gating_func": 2}, {"leading_dense_block_count": 1}),
            idle=("feed_forward_length",),  # of dense layers, and there are none
        ),
    ),
)
# fmt: on


def test_numbers_of_experts_are_read_under_every_name() -> None:
    config = read("qwen3-30b-a3b")
    renamed = {**config, "num_local_experts": config["num_experts"]}
    del renamed["num_experts"]
    assert families.spec_of(renamed) == families.spec_of(config)
