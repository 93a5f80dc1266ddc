"""MiniCPM3. Its release has LongRoPE under `rope_scaling`, no theta, and leaves out what follows from other fields."""

from __future__ import annotations

import pytest

from zoo import families
from zoo.spec import LatentAttention
from zoo.testing import BASE, FamilyCase, Variant, rope
from zoo.testing.full_size import read
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_MINICPM3 = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 52,
    "num_hidden_layers": 3, "q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6,
    "v_head_dim": 7, "scale_emb": 5, "scale_depth": 1.9, "dim_model_base": 23,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 613.0, "original_max_position_embeddings": 60,
        "short_factor": [1.1, 1.7, 2.6], "long_factor": [1.3, 2.9, 7.7],
    },
}

# fmt: on


def released(config: Settings) -> Settings:
    return flat_rope(drop(config, "head_dim"), type_key="type")


# fmt: off
CASE = FamilyCase(
    "minicpm3",
    (
        Variant("minicpm3", "MiniCPM3ForCausalLM", _MINICPM3,
            "latent attention with LongRoPE, half-split; embeddings x 5, branches x 1.1, logits x 23/36; tied head",
            rounds_otherwise="upstream scales the last state, not the logits, and its SDPA takes another path where values are "
            "narrower than keys; the other variant, where neither matters, is upstream's to the bit"),
        Variant("minicpm3_noqlora", "MiniCPM3ForCausalLM",
            _MINICPM3 | {
                "q_lora_rank": None, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False,
                "rope_parameters": rope(613.0), "rms_norm_eps": 0.03, "v_head_dim": 14, "dim_model_base": 18,
            },
            "q_proj instead of the latent, biases, RoPE unscaled, untied; values as wide as keys, logits x 1/2"),
    ),
    grouped=False,
    released_text=released,
    refused=(
        ("minicpm3-4b", {"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ("minicpm3-4b", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ("minicpm3-4b", {"scale_depth": None}, "scale_depth"),
    ),
)
# fmt: on


def test_the_release_leaves_out_what_upstream_takes_for_granted() -> None:
    spec = families.spec_of(read("minicpm3-4b"))
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, LatentAttention) and mixer.rope is not None
    assert (mixer.v_head_dim, mixer.rope.theta, spec.tied) == (64, 1e4, True)
    assert spec.layers[0].residual_scale == pytest.approx(1.4 / 62**0.5) and spec.logit_scale == 0.1
