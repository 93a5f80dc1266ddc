"""Cohere: Command R, Command R+, Aya 23. One norm, two branches side by side; RoPE in neighbouring pairs."""

from __future__ import annotations

from zoo.testing import VOCAB, FamilyCase, Variant, rope
from zoo.testing.released import plain_rope
from zoo.testing.variant import EPS

# fmt: off

_COHERE = VOCAB | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 52,
    "num_hidden_layers": 3, "max_position_embeddings": 480, "layer_norm_eps": EPS, "logit_scale": 0.7,
    "rope_parameters": rope(613.0),
}

CASE = FamilyCase(
    "cohere",
    (
        Variant("cohere", "CohereForCausalLM", _COHERE, "a parallel block, centred norms, a scale on the logits; tied"),
        Variant("cohere_plus", "CohereForCausalLM",
            _COHERE | {"use_qk_norm": True, "num_key_value_heads": 3, "tie_word_embeddings": False, "attention_bias": True},
            "a norm of q and k whose weight is each head's own, as in Command R+; untied and with biases, as in no release"),
    ),
    main="cohere_plus",
    refused=(
        ("aya-23-8b", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("aya-23-8b", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type is 'ntk'"),
        ("aya-23-8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ),
    released_text=plain_rope,
)
# fmt: on
