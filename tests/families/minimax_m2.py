"""MiniMax-M2: QK norm over the full width; its release says rotary_dim, not partial_rotary_factor."""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Listed, Variant, names, rope
from zoo.testing.full_size import read
from zoo.testing.released import flat_rope
from zoo.testing.variant import Settings


def released(config: Settings) -> Settings:
    flat_rope(config)
    config["rotary_dim"] = round(config.pop("partial_rotary_factor") * config["head_dim"])
    del config["rope_scaling"]
    return config | {
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "use_routing_bias": True,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "attn_type_list": [1] * config["num_hidden_layers"],
    }


def upstream_reads_rotary_dim() -> None:
    config = names.upstream_config(CASE, read("minimax-m2"))
    assert (config.rope_parameters["partial_rotary_factor"], config.head_dim) == (0.5, 128)


# fmt: off
CASE = FamilyCase(
    "minimax_m2",
    (
        Variant("minimax_m2", "MiniMaxM2ForCausalLM",
            BASE | {
                "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
                "intermediate_size": 28, "num_hidden_layers": 3, "num_local_experts": 6, "num_experts_per_tok": 3,

                "rope_parameters": rope(613.0, partial_rotary_factor=8 / 12),
            },
            "QK norm over the full width, partial RoPE on 8 of 12 dims, sigmoid router with a selection bias"),
    ),
    mtp_layers={"minimax-m2": 0},
    listed={"minimax-m2.7": Listed("minimax-m2")},
    refused=(
        ("minimax-m2", {"partial_rotary_factor": 0.25}, "rotary_dim and partial_rotary_factor differ"),
        ("minimax-m2", {"attn_type_list": [0] * 62}, "attn_type_list[0] is 0"),
        ("minimax-m2", {"qk_norm_type": "per_head"}, "qk_norm_type is 'per_head'"),
        ("minimax-m2", {"shared_intermediate_size": 64}, "shared_intermediate_size is 64"),
        ("minimax-m2", {"num_experts_per_tok": None}, "num_experts_per_tok"),
    ),
    released_text=released,
    disputes={"how much of a head turns": upstream_reads_rotary_dim},
)
# fmt: on
