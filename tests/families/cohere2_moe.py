"""Cohere 2 with experts: North Mini Code, Command A+. Releases count their dense layers, transformers lists kinds."""

from __future__ import annotations

from zoo.testing import FULL, SLIDING, VOCAB, FamilyCase, Variant
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import EPS, Settings

# fmt: off

_MOE = VOCAB | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 28,
    "num_hidden_layers": 5, "max_position_embeddings": 480, "rms_norm_eps": EPS, "logit_scale": 0.7,
    "sliding_window": 7, "rope_theta": 613.0, "num_experts": 6, "num_experts_per_tok": 3,
    "prefix_dense_intermediate_size": 52, "first_k_dense_replace": 1,
}

# fmt: on


def released(config: Settings) -> Settings:
    dense = config.pop("mlp_layer_types").count("dense")
    return flat_rope(drop(config, "rope_scaling")) | {
        "first_k_dense_replace": dense,
        "use_parallel_block": True,
        "use_qk_norm": False,
    }


# fmt: off
# What bf16 logits differ by from upstream's with sdpa, in the median over tokens.
_ROUNDS = "0.6 to 0.9 of the spread between upstream's two attentions; the cause is not known yet"

CASE = FamilyCase(
    "cohere2_moe",
    (
        Variant("cohere2_moe", "Cohere2MoeForCausalLM",
            _MOE | {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
            "as North Mini Code: sigmoid of the chosen, RMS norms, a dense first layer that is full and has RoPE", rounds_otherwise=_ROUNDS),
        Variant("cohere2_moe_shared", "Cohere2MoeForCausalLM",
            _MOE | {
                "rms_norm_eps": None, "layer_norm_eps": EPS, "num_shared_experts": 2, "first_k_dense_replace": 2,
                "prefix_dense_sliding_window_pattern": 2, "sliding_window_pattern": 3, "tie_word_embeddings": False,
                "num_key_value_heads": 3,
            },
            "softmax over the chosen, two shared experts averaged with them, centred norms, dense layers with a window", rounds_otherwise=_ROUNDS),
        Variant("cohere2_moe_sum", "Cohere2MoeForCausalLM",
            _MOE | {
                "expert_selection_fn": "sigmoid", "num_shared_experts": 1, "num_experts": 5, "num_experts_per_tok": 2,
                "shared_expert_combination_strategy": "sum", "first_k_dense_replace": 0, "num_hidden_layers": 4,
            },
            "sigmoid of the chosen, divided by their sum; a shared expert added; no dense layer", rounds_otherwise=_ROUNDS),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    refused=(
        ("north-mini-code", {"use_qk_norm": True}, "use_qk_norm is True"),
        ("north-mini-code", {"expert_selection_fn": "tanh"}, "expert_selection_fn is 'tanh'"),
        ("north-mini-code", {"num_experts_per_tok": 129}, "129 of 128 experts cannot be chosen"),
    ),
    released_text=released,
)
# fmt: on
