"""StarCoder: GPT-2's keys, one key/value head."""

from __future__ import annotations

from zoo.testing import EPS, FamilyCase, Variant
from zoo.testing.released import drop
from zoo.testing.variant import Settings

# fmt: off

_BIGCODE = {
    "vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2,
    "n_embd": 60, "n_head": 6, "n_layer": 3, "n_positions": 37, "layer_norm_epsilon": EPS, "n_inner": 52,
}

# fmt: on


def released(config: Settings) -> Settings:
    return drop(config, "tie_word_embeddings", "num_key_value_heads", "add_cross_attention")


# fmt: off
CASE = FamilyCase(
    "gpt_bigcode",
    (
        Variant("gpt_bigcode", "GPTBigCodeForCausalLM", _BIGCODE, "one key/value head, learned positions, tied"),
    ),
    refused=(
        ("starcoder", {"activation_function": "tanh"}, "activation_function is 'tanh'"),
        ("starcoder", {"add_cross_attention": True}, "add_cross_attention is True"),
    ),
    released_text=released,
)
# fmt: on
