"""ERNIE 4.5, dense: a Llama with interleaved RoPE in fp32."""

from __future__ import annotations

from zoo import families
from zoo.testing import BASE, FamilyCase, Variant, rope
from zoo.testing.full_size import read
from zoo.testing.released import flat_rope

# fmt: off

_ERNIE = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3, "rope_parameters": rope(613.0),
}

CASE = FamilyCase(
    "ernie4_5",
    (
        Variant("ernie4_5", "Ernie4_5ForCausalLM", _ERNIE, "interleaved RoPE in fp32, tied"),
        Variant("ernie4_5_bias", "Ernie4_5ForCausalLM",
            _ERNIE | {"use_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 3},
            "biases on every matrix but the head, untied"),
    ),
    released_text=flat_rope,
    refused=(
        ("ernie-4.5-0.3b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("ernie-4.5-0.3b", {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'"),
    ),
)
# fmt: on


def test_ernie_is_known_under_its_first_class_too() -> None:
    config = read("ernie-4.5-0.3b")
    first = {**config, "architectures": ["Ernie4_5_ForCausalLM"]}
    assert families.find(first).name == "ernie4_5"
