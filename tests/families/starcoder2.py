"""StarCoder2: a Llama with layer norms, biases and windows."""

from __future__ import annotations

from zoo.testing import EPS, VOCAB, FamilyCase, Gguf, Variant, rope
from zoo.testing.released import drop_default, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_STARCODER2 = VOCAB | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 52,
    "num_hidden_layers": 3, "max_position_embeddings": 480, "norm_epsilon": EPS, "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    """With the keys of GPT-2 beside those that count."""
    config = drop_default(flat_rope(config), tie_word_embeddings=True)
    return config | {"activation_function": "gelu", "mlp_type": "default", "norm_type": "layer_norm"}


# fmt: off
CASE = FamilyCase(
    "starcoder2",
    (
        Variant("starcoder2", "Starcoder2ForCausalLM", _STARCODER2 | {"sliding_window": 6},
            "layer norms, biases, windows, MLP without gate, tied"),
        Variant("starcoder2_plain", "Starcoder2ForCausalLM",
            _STARCODER2 | {"use_bias": False, "tie_word_embeddings": False, "num_key_value_heads": 3, "hidden_act": "gelu"},
            "no biases, no window, untied"),
    ),
    refused=(
        ("starcoder2-7b", {"mlp_type": "gated"}, "mlp_type is 'gated'"),
        ("starcoder2-7b", {"norm_type": "rms_norm"}, "norm_type is 'rms_norm'"),
        ("starcoder2-7b", {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'"),
    ),
    released_text=released,
    gguf=(
        Gguf(
            "starcoder2", lambda c: {"attention.layer_norm_epsilon": c["norm_epsilon"]},
            settings={"sliding_window": None}, refused=({"attention.sliding_window": 6},),
        ),
    ),
)
# fmt: on
