"""GLM-4.5 and 4.6. The prediction layer is one more layer in the files, as DeepSeek's is."""

from __future__ import annotations

from families.deepseek_v3 import mtp
from zoo.testing import BASE, FamilyCase, Listed, Variant, rope
from zoo.testing.released import flat_rope

# fmt: off

_GLM = BASE | {
    "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
    "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 4, "first_k_dense_replace": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "n_group": 2, "topk_group": 1,
    "routed_scaling_factor": 1.7,
    "attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 1,
    "rope_parameters": rope(613.0, partial_rotary_factor=0.67),
}
_NO_MTP = {"num_nextn_predict_layers": 0}

CASE = FamilyCase(
    "glm4_moe",
    (
        Variant("glm4_moe", "Glm4MoeForCausalLM", _GLM,
            "QK norm, partial RoPE on 8 of 12 dims, q/k/v biases, groups; with the MTP layer", mtp=1),
        Variant("glm4_moe_air", "Glm4MoeForCausalLM",
            _GLM | _NO_MTP | {
                "use_qk_norm": False, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1,
                "n_shared_experts": 1, "norm_topk_prob": False,
                "rope_parameters": rope(613.0, partial_rotary_factor=0.5),
            },
            "no QK norm, two dense layers, no groups, router weights not renormalised"),
    ),
    released_text=flat_rope,
    kept_in_fp32=frozenset({"e_score_correction_bias"}),
    mtp=mtp,
    listed={"glm-4.5-fp8": Listed("glm-4.5", frozenset({"model"}))},
    refused=(
        ("glm-4.5", {"topk_method": "group_limited_greedy"}, "topk_method is 'group_limited_greedy'"),
        ("glm-4.5", {"partial_rotary_factor": 1.5}, "RoPE would rotate 192 of 128 channels"),
    ),
)
# fmt: on
