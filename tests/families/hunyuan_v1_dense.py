"""Hunyuan dense. Its RoPE is called "dynamic" and has an alpha."""

from __future__ import annotations

import pytest

from zoo import families
from zoo.testing import BASE, FamilyCase, Variant, rope
from zoo.testing.full_size import attention, read
from zoo.testing.released import flat_rope
from zoo.testing.variant import Settings

# fmt: off

_HUNYUAN = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 52,
    "num_hidden_layers": 3, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 613.0, "alpha": 7.0, "factor": 1.0},
}

# fmt: on


def released(config: Settings) -> Settings:
    return flat_rope(config, type_key="type")


# fmt: off
CASE = FamilyCase(
    "hunyuan_v1_dense",
    (
        Variant("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", _HUNYUAN,
            "QK norm per head after RoPE, theta raised by alpha, tied head"),
        Variant("hunyuan_v1_dense_plain", "HunYuanDenseV1ForCausalLM",
            _HUNYUAN | {
                "rope_parameters": rope(613.0), "attention_bias": True, "tie_word_embeddings": False,
                "num_key_value_heads": 3, "rms_norm_eps": 0.03,
            },
            "no alpha, biases, untied"),
    ),
    released_text=released,
    refused=(
        ("hunyuan-mt-7b", {"use_qk_norm": False}, "use_qk_norm is False"),
        ("hunyuan-mt-7b", {"rope_scaling": {"type": "dynamic", "alpha": 10.0, "factor": 4.0}}, "factor is 4.0"),
        ("hunyuan-mt-7b", {"rope_scaling": {"type": "dynamic", "factor": 1.0}}, "alpha"),
    ),
)
# fmt: on


def test_alpha_raises_theta_once() -> None:
    rope = attention(families.spec_of(read("hunyuan-mt-7b")), 0).rope
    assert rope is not None and rope.scaling is None
    assert rope.theta == pytest.approx(1e4 * 1e5 ** (128 / 126))


def test_the_size_of_a_head_is_read_under_both_names() -> None:
    config = read("hunyuan-mt-7b")
    renamed = {**config, "attention_head_dim": config["head_dim"]}
    del renamed["head_dim"]
    assert families.spec_of(renamed) == families.spec_of(config)
    assert attention(families.spec_of({**renamed, "attention_head_dim": 96}), 0).head_dim == 96
