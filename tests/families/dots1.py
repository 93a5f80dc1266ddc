"""dots.llm1. Releases have no n_group, which means one group, and no window."""

from __future__ import annotations

from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Variant, rope
from zoo.testing.released import drop, drop_default, flat_rope, implied_head_dim
from zoo.testing.variant import Settings

# fmt: off

_DOTS = BASE | {
    "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 4, "first_k_dense_replace": 1,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 2, "norm_topk_prob": True,
    "routed_scaling_factor": 1.7, "sliding_window": None, "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    drop_default(config, n_group=1, topk_group=1)
    config["use_sliding_window"] = config["sliding_window"] is not None
    drop(config, "layer_types", "output_router_logits")
    return implied_head_dim(flat_rope(config)) | {
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    }


# fmt: off
CASE = FamilyCase(
    "dots1",
    (
        Variant("dots1", "Dots1ForCausalLM", _DOTS,
            "per-head QK norm, DeepSeek's router without groups, two shared experts, first layer dense"),
        Variant("dots1_window", "Dots1ForCausalLM",
            _DOTS | {
                "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "norm_topk_prob": False, "attention_bias": True,
                "sliding_window": 7, "max_window_layers": 2, "first_k_dense_replace": 2, "tie_word_embeddings": True,
            },
            "windows on the last two layers, groups, not renormalised, biases, tied"),
    ),
    main="dots1_window",
    layer_kinds=frozenset({FULL, SLIDING}),
    released_text=released,
    kept_in_fp32=frozenset({"e_score_correction_bias"}),
    refused=(
        ("dots.llm1-inst", {"sliding_window": 4096, "max_window_layers": 30}, "use_sliding_window is False"),
        ("dots.llm1-inst", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("dots.llm1-inst", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ),
)
# fmt: on
