"""OLMo, the first. Its norms have neither weights nor an eps in the config."""

from __future__ import annotations

from zoo import families
from zoo.testing import FamilyCase, Variant, rope
from zoo.testing.full_size import attention, edited, read
from zoo.testing.released import flat_rope
from zoo.testing.variant import VOCAB

# fmt: off

_OLMO = VOCAB | {
    "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 52,
    "num_hidden_layers": 3, "max_position_embeddings": 480, "clip_qkv": 0.6, "rope_parameters": rope(613.0),
}

CASE = FamilyCase(
    "olmo",
    (
        Variant("olmo", "OlmoForCausalLM", _OLMO,
            "LayerNorms without weight or bias, queries, keys and values clipped, untied"),
        Variant("olmo_bias", "OlmoForCausalLM",
            _OLMO | {"clip_qkv": None, "attention_bias": True, "tie_word_embeddings": True},
            "not clipped, biases, tied"),
    ),
    released_text=flat_rope,
    refused=(
        ("olmo-7b-0724", {"clip_qkv": -1.0}, "queries, keys and values are clipped at -1.0"),
        ("olmo-7b-0724", {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
        ("olmo-7b-0724", {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'"),
    ),
)
# fmt: on


def test_only_some_releases_are_clipped() -> None:
    clips = {stem: attention(families.spec_of(read(stem)), 0).clip for stem in ("olmo-7b", "olmo-7b-0724")}
    assert clips == {"olmo-7b": None, "olmo-7b-0724": 8.0}
    assert families.spec_of(edited("olmo-7b-0724", rms_norm_eps=1e-5)) == families.spec_of(
        read("olmo-7b-0724")
    )
