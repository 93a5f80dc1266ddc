"""Falcon-H1: attention and a state space side by side in every layer, and a factor on almost everything."""

from __future__ import annotations

from zoo import families
from zoo.testing import BASE, FamilyCase, Variant, rope
from zoo.testing.full_size import attention, read
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_H1 = BASE | {
    "hidden_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 52,
    "num_hidden_layers": 3, "rope_parameters": rope(613.0), "mamba_d_ssm": 60, "mamba_n_heads": 12, "mamba_d_head": 5,
    "mamba_n_groups": 3, "mamba_d_state": 7, "mamba_d_conv": 3, "mamba_chunk_size": 8, "embedding_multiplier": 1.9,
    "lm_head_multiplier": 0.6, "mlp_multipliers": [0.7, 1.4], "key_multiplier": 0.8, "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.7, "ssm_multipliers": [0.9, 1.1, 0.8, 1.3, 1.2], "ssm_in_multiplier": 1.1,
    "ssm_out_multiplier": 0.6,
}
_ROUNDS = "upstream rounds x and keys times their factors; here these are part of the scores' and the values' scales"

# fmt: on


def released(config: Settings) -> Settings:
    return drop(flat_rope(config), "time_step_limit") | {"attn_layer_indices": None, "mamba_use_mlp": True}


# fmt: off
CASE = FamilyCase(
    "falcon_h1",
    (
        Variant("falcon_h1", "FalconH1ForCausalLM", _H1,
            "attention beside Mamba-2 whose gate is alone; fourteen factors", rounds_otherwise=_ROUNDS),
        Variant("falcon_h1_norm", "FalconH1ForCausalLM",
            _H1 | {
                "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_conv_bias": False, "mlp_bias": True,
                "tie_word_embeddings": True, "num_hidden_layers": 2,
            },
            "a norm after the gate; biases in the MLP, none in the convolution; tied", rounds_otherwise=_ROUNDS),
        Variant("falcon_h1_norm_first", "FalconH1ForCausalLM",
            _H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": True, "mamba_d_head": "auto", "num_hidden_layers": 2},
            "a norm before the gate", rounds_otherwise=_ROUNDS),
    ),
    refused=(
        ("falcon-h1-0.5b", {"attention_bias": True}, "attention_bias is True"),
        ("falcon-h1-0.5b", {"projectors_bias": True}, "projectors_bias is True"),
        ("falcon-h1-0.5b", {"mamba_proj_bias": True}, "mamba_proj_bias is True"),
        ("falcon-h1-0.5b", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("falcon-h1-0.5b", {"mamba_d_head": 60}, "mamba_n_heads * mamba_d_head is 1440"),
        ("falcon-h1-0.5b", {"ssm_multipliers": [1.0, 2.0]}, "there are 2 scales"),
    ),
    released_text=released,
)
# fmt: on


def test_attentions_factors_are_in_its_scales() -> None:
    c = read("falcon-h1-0.5b")
    a = attention(families.spec_of({**c, "attention_in_multiplier": 3.0}), 0)
    assert abs(a.scale - 9 * c["key_multiplier"] / 8) < 1e-9
    assert a.value_scale == 3 * c["attention_out_multiplier"]
