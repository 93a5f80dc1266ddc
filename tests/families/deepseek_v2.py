"""DeepSeek-V2 and V2-Lite: no selection bias, groups judged by their best expert."""

from __future__ import annotations

import math

import pytest

from zoo import families
from zoo.spec import LatentAttention
from zoo.testing import BASE, FamilyCase, Variant, build, rope, yarn
from zoo.testing.full_size import read
from zoo.testing.released import drop, drop_default, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_V2 = BASE | {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 18, "kv_lora_rank": 16,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 12, "v_head_dim": 9,
    "hidden_size": 40, "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 4,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,  # three: two lie in the best two groups anyway
    "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.7,
    "rope_parameters": yarn(97.0, 7.0, 64, 3.6, 0.36, mscale=0.8, mscale_all_dim=0.6),
}

# fmt: on


def released(config: Settings) -> Settings:
    drop_default(config, mlp_bias=False)
    drop(config, "head_dim", "output_router_logits")
    return flat_rope(config, "type") | {"moe_layer_freq": 1, "scoring_func": "softmax", "ep_size": 1}


def upstream_scales_scores() -> None:
    attention = build.fresh(CASE.variants[0]).model.layers[0].self_attn
    assert attention.scaling > 1.1 * attention.qk_head_dim**-0.5


# fmt: off
CASE = FamilyCase(
    "deepseek_v2",
    (
        Variant("deepseek_v2", "DeepseekV2ForCausalLM", _V2,
            "MLA with query latent, RoPE in fp32, YaRN with mscale, softmax router limited to the groups of the best experts"),
        Variant("deepseek_v2_lite", "DeepseekV2ForCausalLM",
            _V2 | {
                "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "n_routed_experts": 6,
                "first_k_dense_replace": 2, "attention_bias": True, "tie_word_embeddings": True,
                "rope_parameters": rope(83.0),
            },
            "q_proj instead of the latent, greedy choice, biases, tied, plain RoPE"),
    ),
    grouped=False,
    released_text=released,
    disputes={"YaRN's factor on the scores": upstream_scales_scores},
    refused=(
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek-v2-lite", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ("deepseek-v2-lite", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ),
)
# fmt: on


def test_the_dispute_about_yarn_concerns_models_with_it_alone() -> None:
    spec = families.spec_of(read("deepseek-v2"))
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, LatentAttention) and mixer.scale == pytest.approx(
        192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2
    )
    assert families.disagreements(spec)
    assert not families.disagreements(families.spec_of(read("deepseek-v2") | {"rope_scaling": None}))
