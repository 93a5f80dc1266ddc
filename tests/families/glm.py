"""GLM-4-9B. RoPE on half of a head, in neighbouring pairs; gate and up in one matrix."""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Variant, rope
from zoo.testing.released import flat_rope

# fmt: off

GLM = BASE | {
    "hidden_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 52,
    "num_hidden_layers": 3, "rope_parameters": rope(613.0, partial_rotary_factor=0.5),
}

CASE = FamilyCase(
    "glm",
    (
        Variant("glm", "GlmForCausalLM", GLM, "half of each head turns, in neighbouring pairs; biases on q, k, v"),
        Variant("glm_third", "GlmForCausalLM",
            GLM | {
                "rope_parameters": rope(97.0, partial_rotary_factor=0.34), "attention_bias": False,
                "num_key_value_heads": 3, "tie_word_embeddings": True,
            },
            "a third turns, no biases, tied: what no release has"),
    ),
    main="glm_third",
    refused=(
        ("glm-4-9b", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("glm-4-9b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ("glm-4-9b", {"sliding_window": 512}, "sliding_window"),
    ),
    released_text=flat_rope,
)
# fmt: on
