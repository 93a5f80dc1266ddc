"""GLM-4.7-Flash: DeepSeek-V3 in other sizes. Its config says how many first layers are dense; transformers 5 writes a list."""

from __future__ import annotations

from families.deepseek_v3 import mtp
from zoo.testing import BASE, FamilyCase, Variant, rope, yarn
from zoo.testing.released import drop, drop_default, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_FLASH = BASE | {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 18, "kv_lora_rank": 15,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 12, "v_head_dim": 9,
    "hidden_size": 40, "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 3,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "routed_scaling_factor": 1.7,
    "rope_parameters": rope(97.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    drop_default(config, rope_interleave=True)
    config["first_k_dense_replace"] = config["mlp_layer_types"].count("dense")
    drop(config, "head_dim", "mlp_layer_types", "output_router_logits")
    return flat_rope(config) | {"topk_method": "noaux_tc", "num_nextn_predict_layers": 1}


# fmt: off
CASE = FamilyCase(
    "glm4_moe_lite",
    (
        Variant("glm4_moe_lite", "Glm4MoeLiteForCausalLM", _FLASH,
            "MLA with query latent, DeepSeek's router, first layer dense; with the MTP layer", mtp=1),
        Variant("glm4_moe_lite_groups", "Glm4MoeLiteForCausalLM",
            _FLASH | {
                "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "norm_topk_prob": False, "q_lora_rank": None,
                "attention_bias": True, "rope_interleave": False, "tie_word_embeddings": True,
                "mlp_layer_types": ["dense", "dense", "sparse"],
                "rope_parameters": yarn(97.0, 7.0, 64, 3.6, 0.36, mscale=0.8, mscale_all_dim=0.6),
            },
            "groups, not renormalised, q_proj instead of the latent, biases, half-split RoPE scaled by YaRN, two layers dense", not_read_by_upstream="first_k_dense_replace: upstream takes one"),
    ),
    grouped=False,
    released_text=released,
    kept_in_fp32=frozenset({"e_score_correction_bias"}),
    mtp=mtp,
    refused=(
        ("glm-4.7-flash", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("glm-4.7-flash", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
    ),
)
# fmt: on
