"""Solar Open. Its release leaves out what is one group, SiLU or no bias, and names a width for dense layers that it has not."""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Variant, rope, yarn
from zoo.testing.released import drop, drop_default, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_SOLAR = BASE | {
    "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
    "moe_intermediate_size": 28, "num_hidden_layers": 3, "n_routed_experts": 6, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.7,
    "rope_parameters": yarn(97.0, 7.0, 64, 3.6, 0.36),
}

# fmt: on


def released(config: Settings) -> Settings:
    drop_default(config, n_group=1, topk_group=1, hidden_act="silu", attention_bias=False)
    drop(config, "output_router_logits")
    return flat_rope(config, type_key="type") | {"first_k_dense_replace": 0, "intermediate_size": 52}


# fmt: off
CASE = FamilyCase(
    "solar_open",
    (
        Variant("solar_open", "SolarOpenForCausalLM", _SOLAR,
            "DeepSeek's router in every layer, YaRN over the whole head, no QK norm"),
        Variant("solar_open_groups", "SolarOpenForCausalLM",
            _SOLAR | {
                "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "norm_topk_prob": False, "n_shared_experts": 2,
                "attention_bias": True, "tie_word_embeddings": True,
                "rope_parameters": rope(613.0),
            },
            "groups, not renormalised, two shared experts, q/k/v biases, plain RoPE, tied"),
    ),
    released_text=released,
    kept_in_fp32=frozenset({"e_score_correction_bias"}),
    refused=(
        ("solar-open-100b", {"first_k_dense_replace": 3}, "first_k_dense_replace is 3"),
        ("solar-open-100b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("solar-open-100b", {"use_qk_norm": True}, "use_qk_norm is True"),
        ("solar-open-100b", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ),
)
# fmt: on
