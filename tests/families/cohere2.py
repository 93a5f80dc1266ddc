"""Cohere 2: Command R7B, Command A, Tiny Aya. Three windowed layers with RoPE, then a full one without.

Releases before transformers 4.53 say `sliding_window_pattern` in place of layer_types.
"""

from __future__ import annotations

from zoo.testing import FULL, SLIDING, VOCAB, FamilyCase, Gguf, Variant, rope
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import EPS, Settings

# fmt: off

_COHERE2 = VOCAB | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 52,
    "num_hidden_layers": 5, "max_position_embeddings": 480, "layer_norm_eps": EPS, "logit_scale": 0.7,
    "sliding_window": 7, "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    every_third = [SLIDING, SLIDING, FULL, SLIDING, SLIDING]
    pattern = {"sliding_window_pattern": 3} if config["layer_types"] == every_third else {}
    if pattern or config["layer_types"] == [SLIDING, SLIDING, SLIDING, FULL, SLIDING]:
        drop(config, "layer_types")
    return (
        flat_rope(drop(config, "head_dim"))
        | pattern
        | {
            "layer_switch": pattern.get("sliding_window_pattern", 4),
            "order_of_interleaved_layers": "local_attn_first",
            "position_embedding_type": "rope_gptj",
            "rotary_pct": 1.0,
            "use_embedding_sharing": config["tie_word_embeddings"],
            "use_gated_activation": True,
            "use_parallel_block": True,
            "use_qk_norm": False,
        }
    )


# fmt: off
CASE = FamilyCase(
    "cohere2",
    (
        Variant("cohere2", "Cohere2ForCausalLM", _COHERE2, "every fourth layer full and without positions; tied"),
        Variant("cohere2_third", "Cohere2ForCausalLM",
            _COHERE2 | {
                "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING], "num_key_value_heads": 3,
                "tie_word_embeddings": False,
            },
            "every third; untied, as in no release"),
    ),
    main="cohere2_third",
    layer_kinds=frozenset({FULL, SLIDING}),
    refused=(
        ("tiny-aya-3b", {"use_qk_norm": True}, "use_qk_norm is True"),
        ("tiny-aya-3b", {"attention_bias": True}, "attention_bias is True"),
        ("tiny-aya-3b", {"layer_switch": 3}, "layer_switch is 3"),
        ("tiny-aya-3b", {"head_dim": 64}, "head_dim is 64"),
        ("tiny-aya-3b", {"sliding_window": None}, "'sliding_window' is missing"),
    ),
    released_text=released,
    gguf=(
        Gguf(
            "cohere2",
            lambda c: {
                "attention.layer_norm_epsilon": c["layer_norm_eps"], "logit_scale": c["logit_scale"],
                "attention.sliding_window": c["sliding_window"], "rope.dimension_count": 6, "rope.scaling.type": "none",
            },
            silent={"logit_scale": 0.7, "attention.sliding_window_pattern": 4},
            refused=({"rope.dimension_count": 4},),
        ),
    ),
)
# fmt: on
