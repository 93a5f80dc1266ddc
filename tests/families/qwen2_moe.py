"""Qwen1.5-MoE and Qwen2-57B-A14B. Releases leave layer_types, qkv_bias and mlp_only_layers out."""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Variant, rope
from zoo.testing.released import drop, drop_default, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_QWEN2_MOE = BASE | {
    "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 52, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 20,
    "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 3, "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    drop_default(config, qkv_bias=True, mlp_only_layers=[])
    drop(config, "layer_types")
    return flat_rope(config) | {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21}


# fmt: off
CASE = FamilyCase(
    "qwen2_moe",
    (
        Variant("qwen2_moe", "Qwen2MoeForCausalLM", _QWEN2_MOE,
            "biases on q, k, v; softmax router, not renormalised; gated shared expert"),
        Variant("qwen2_moe_step", "Qwen2MoeForCausalLM",
            _QWEN2_MOE | {
                "num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": True,
                "qkv_bias": False, "num_experts": 5, "num_experts_per_tok": 2, "tie_word_embeddings": True,
            },
            "renormalised; one layer sparse: every second but one; no biases, tied"),
    ),
    released_text=released,
    refused=(
        ("qwen1.5-moe-a2.7b-chat", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen1.5-moe-a2.7b-chat", {"rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope'"),
    ),
)
# fmt: on
