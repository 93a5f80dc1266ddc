"""Hy3. Its config says how many first layers are dense; transformers 5 writes a list. The prediction layer is DeepSeek's."""

from __future__ import annotations

from families.deepseek_v3 import mtp
from zoo.testing import BASE, FamilyCase, Variant, rope
from zoo.testing.released import drop, drop_default
from zoo.testing.variant import Settings

# fmt: off

_HY3 = BASE | {
    "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
    "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 3,
    "num_experts": 6, "num_experts_per_tok": 2, "num_shared_experts": 1, "router_scaling_factor": 1.7,
    "enable_moe_fp32_combine": False, "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    dense = config["mlp_layer_types"].count("dense")
    drop_default(config, attention_bias=False)
    drop(config, "mlp_layer_types", "mlp_bias", "attention_dropout")
    return config | {
        "first_k_dense_replace": dense,
        "expert_hidden_dim": config["moe_intermediate_size"],
        "moe_router_enable_expert_bias": True,
        "moe_router_use_sigmoid": True,
        "qk_norm": True,
        "route_norm": True,
        "enable_attention_fp32_softmax": False,
        "enable_lm_head_fp32": True,
        "use_grouped_mm": False,
        "num_nextn_predict_layers": 1,
    }


# fmt: off
CASE = FamilyCase(
    "hy_v3",
    (
        Variant("hy_v3", "HYV3ForCausalLM", _HY3,
            "QK norm, sigmoid router with a selection bias, shared expert, first layer dense; with the MTP layer", mtp=1),
        Variant("hy_v3_bias", "HYV3ForCausalLM",
            _HY3 | {
                "attention_bias": True, "num_shared_experts": 2, "tie_word_embeddings": True,
                "num_experts": 5, "mlp_layer_types": ["dense", "dense", "sparse"],
            },
            "biases, two shared experts, tied, two layers dense",
            not_read_by_upstream="first_k_dense_replace: upstream takes one"),
    ),
    released_text=released,
    keeps={"hy_v3": ("rope_parameters",)},
    kept_in_fp32=frozenset({"expert_bias"}),
    mtp=mtp,
    refused=(
        ("hy3", {"route_norm": False}, "route_norm is False"),
        ("hy3", {"qk_norm": False}, "qk_norm is False"),
        ("hy3", {"expert_hidden_dim": 512}, "expert_hidden_dim is 512"),
        ("hy3", {"moe_router_use_sigmoid": False}, "moe_router_use_sigmoid is False"),
    ),
)
# fmt: on
