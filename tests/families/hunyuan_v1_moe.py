"""Hunyuan with experts. Its config says much of what other Hunyuans have."""

from __future__ import annotations

from zoo import families
from zoo.spec import MoE
from zoo.testing import BASE, FamilyCase, Variant, rope
from zoo.testing.full_size import edited, read
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_HUNYUAN = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 28,
    "num_hidden_layers": 3, "num_experts": 6, "moe_topk": [2, 1, 3], "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 613.0, "alpha": 7.0, "factor": 1.0},
}

# fmt: on


def released(config: Settings) -> Settings:
    n = config["num_hidden_layers"]
    drop(config, "output_router_logits")
    return flat_rope(config, type_key="type") | {
        "moe_intermediate_size": [config["intermediate_size"]] * n,
        "num_shared_expert": [1] * n,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": False,
        "norm_topk_prob": True,
    }


def upstream_keys(config: Settings) -> Settings:
    """The size of a head under its first name, which upstream does not read."""
    head_dim = config.pop("attention_head_dim", None)
    return config if head_dim is None else {"head_dim": head_dim} | config


# fmt: off
CASE = FamilyCase(
    "hunyuan_v1_moe",
    (
        Variant("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", _HUNYUAN,
            "QK norm after RoPE, theta raised by alpha, softmax router, each layer its own number of experts to a token, "
            "shared expert, tied"),
        Variant("hunyuan_v1_moe_plain", "HunYuanMoEV1ForCausalLM",
            _HUNYUAN | {
                "rope_parameters": rope(613.0), "attention_bias": True, "tie_word_embeddings": False,
                "num_key_value_heads": 3, "moe_topk": 2, "num_experts": 5,
            },
            "no alpha, biases, untied, the same number in all layers"),
    ),
    released_text=released,
    upstream_keys=upstream_keys,
    refused=(
        ("hunyuan-a13b-instruct", {"use_cla": True}, "use_cla is True"),
        ("hunyuan-a13b-instruct", {"moe_intermediate_size": 1536}, "moe_intermediate_size is 1536"),
        ("hunyuan-a13b-instruct", {"num_shared_expert": [2] * 32}, "num_shared_expert is [2"),
        ("hunyuan-a13b-instruct", {"moe_topk": [8] * 31}, "moe_topk should list 32 layers"),
        ("hunyuan-a13b-instruct", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    ),
)
# fmt: on


def test_a_list_of_equal_numbers_means_that_number() -> None:
    one = families.spec_of(edited("hunyuan-a13b-instruct", moe_topk=8, num_shared_expert=1))
    assert one == families.spec_of(read("hunyuan-a13b-instruct"))
    ffn = one.layers[0].ffn
    assert isinstance(ffn, MoE) and ffn.router.top_k == 8
