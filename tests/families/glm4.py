"""GLM-4-0414. GLM-4-9B, with a norm on what either branch gives."""

from __future__ import annotations

from zoo.testing import FamilyCase, Gguf, Variant, rope
from zoo.testing.released import flat_rope

from .glm import GLM

# fmt: off

CASE = FamilyCase(
    "glm4",
    (
        Variant("glm4", "Glm4ForCausalLM", GLM, "four norms; half of each head turns, in neighbouring pairs; biases on q, k, v"),
        Variant("glm4_plain", "Glm4ForCausalLM",
            GLM | {
                "rope_parameters": rope(97.0, partial_rotary_factor=0.34), "attention_bias": False,
                "num_key_value_heads": 3, "tie_word_embeddings": True,
            },
            "no biases, as 32B; a third turns, tied: what no release has"),
    ),
    refused=(
        ("glm-4-32b-0414", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("glm-4-32b-0414", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type is 'ntk'"),
        ("glm-4-32b-0414", {"sliding_window": 512}, "sliding_window"),
    ),
    released_text=flat_rope,
    gguf=(
        # M-RoPE is that of GLM-4's multimodal kin, for which the converter also puts rows of q and k in another order.
        Gguf("glm4", lambda c: {"rope.dimension_count": 6, "attention.key_length": 12},
            refused=({"attention.value_length": 8}, {"rope.dimension_sections": [1, 1, 1, 0]})),
    ),
)
# fmt: on
