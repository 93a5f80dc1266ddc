"""LFM2. Its releases list the layers that attend, and name the feed-forward's width `block_ff_dim`."""

from __future__ import annotations

import pytest

from zoo import families
from zoo.errors import ZooError
from zoo.layout import total_params
from zoo.spec import MLP
from zoo.testing import BASE, FULL, FamilyCase, Variant, rope
from zoo.testing.released import drop, drop_default, flat_rope
from zoo.testing.variant import EPS, Settings

# fmt: off

SIZES = {k: v for k, v in BASE.items() if k != "rms_norm_eps"} | {
    "norm_eps": EPS, "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "conv_L_cache": 4, "rope_parameters": rope(613.0),
}
_LFM2 = SIZES | {
    "intermediate_size": 81, "block_multiple_of": 7, "block_ffn_dim_multiplier": 0.9, "num_hidden_layers": 5,
    "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
}

# fmt: on


def released(config: Settings) -> Settings:
    config["full_attn_idxs"] = [i for i, kind in enumerate(config["layer_types"]) if kind == FULL]
    config["block_ff_dim"] = config["intermediate_size"]
    drop(config, "layer_types", "intermediate_size")
    drop_default(config, tie_word_embeddings=True)
    return flat_rope(config) | {
        "block_dim": config["hidden_size"], "conv_dim": config["hidden_size"], "conv_dim_out": config["hidden_size"],
        "block_norm_eps": config["norm_eps"], "num_heads": config["num_attention_heads"],
        "block_use_swiglu": True, "block_use_xavier_init": True, "use_pos_enc": True,
    }  # fmt: skip


# fmt: off
CASE = FamilyCase(
    "lfm2",
    (
        Variant("lfm2", "Lfm2ForCausalLM", _LFM2,
            "short convolutions of 4 taps, per-head QK norm, a computed feed-forward width, tied"),
        Variant("lfm2_bias", "Lfm2ForCausalLM",
            _LFM2 | {"conv_bias": True, "block_auto_adjust_ff_dim": False, "intermediate_size": 44, "tie_word_embeddings": False},
            "biases in the convolution's three parts, the width as it is said, untied"),
    ),
    main="lfm2_bias",
    layer_kinds=frozenset({FULL, "conv"}),
    released_text=released,
)
# fmt: on


# Keys and values of LFM2-1.2B's config that a family reads. No public copy of the file is known, so there is no manifest of it.
# fmt: off
_SAID = {
    "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "hidden_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 65536, "max_position_embeddings": 128000,
    "norm_eps": 1e-5, "rope_theta": 1e6, "conv_L_cache": 3, "conv_bias": False, "conv_dim": 2048,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14], "block_ff_dim": 12288, "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256,
}
# fmt: on


@pytest.mark.parametrize(
    ("said", "width"),
    [
        ({}, 8192),
        ({"block_ffn_dim_multiplier": 1.3}, 10752),
        ({"block_ffn_dim_multiplier": None, "block_ff_dim": 1000}, 666),
        ({"block_auto_adjust_ff_dim": False}, 12288),
    ],
)
def test_the_feed_forward_is_two_thirds_as_wide_as_said_in_steps_of_256(said: Settings, width: int) -> None:
    ffn = families.spec_of(_SAID | said).layers[0].ffn
    assert isinstance(ffn, MLP)
    assert ffn.d_ff == width


@pytest.mark.parametrize(
    "said",
    [
        {"conv_dim": 1024},
        {"block_norm_eps": 1e-6},
        {"block_use_swiglu": False},
        {"use_pos_enc": False},
        {"num_heads": 16},
    ],
)
def test_a_config_that_contradicts_itself_is_refused(said: Settings) -> None:
    with pytest.raises(ZooError, match=f"{next(iter(said))} is"):
        families.spec_of(_SAID | said)


def test_lfm2_1_2b_has_the_published_number_of_parameters() -> None:
    """1.17 billion (https://huggingface.co/LiquidAI/LFM2-1.2B)."""
    assert round(total_params(families.spec_of(_SAID)) / 1e9, 2) == 1.17
