"""OLMoE. Releases leave rms_norm_eps out where it is 1e-5."""

from __future__ import annotations

from dataclasses import replace

from zoo import families
from zoo.testing import BASE, FamilyCase, Variant, rope
from zoo.testing.full_size import read
from zoo.testing.released import flat_rope

# fmt: off

_OLMOE = BASE | {
    "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 28, "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 3,
    "rope_parameters": rope(613.0),
}

CASE = FamilyCase(
    "olmoe",
    (
        Variant("olmoe", "OlmoeForCausalLM", _OLMOE,
            "QK norm over all heads at once, pre-norms, softmax router not renormalised"),
        Variant("olmoe_bias", "OlmoeForCausalLM",
            _OLMOE | {
                "norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True, "num_experts": 5,
            },
            "renormalised, biases, tied"),
    ),
    released_text=flat_rope,
    refused=(
        ("olmoe-1b-7b-0924", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("olmoe-1b-7b-0924", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ),
)
# fmt: on


def test_an_eps_that_is_not_said_is_the_classs() -> None:
    config = read("olmoe-1b-7b-0924")
    assert "rms_norm_eps" not in config
    said, other = (families.spec_of(config | {"rms_norm_eps": eps}) for eps in (1e-5, 1e-6))
    assert families.spec_of(config) == said
    assert replace(other.norm, eps=1e-5) == said.norm != other.norm
