"""Falcon. The 7B's files say 71 key/value heads, and have one."""

from __future__ import annotations

from zoo.testing import EPS, VOCAB, FamilyCase, Variant, rope
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_FALCON = VOCAB | {
    "hidden_size": 60, "num_attention_heads": 6, "num_hidden_layers": 3, "max_position_embeddings": 480,
    "layer_norm_epsilon": EPS, "rope_parameters": rope(613.0), "ffn_hidden_size": 52,
}

# fmt: on


def released(config: Settings) -> Settings:
    return drop(flat_rope(config), "tie_word_embeddings")


# fmt: off
_ONE = "one key/value head: upstream's sdpa takes another kernel for it than for groups, whose logits are equal"
CASE = FamilyCase(
    "falcon",
    (
        Variant("falcon", "FalconForCausalLM", _FALCON | {"num_kv_heads": 1},
            "parallel branches behind one norm; one key/value head; tied", rounds_otherwise=_ONE),
        Variant("falcon_new", "FalconForCausalLM",
            _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
            "groups, a norm for each branch"),
        Variant("falcon_11b", "FalconForCausalLM",
            _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
            "groups, one norm for both branches"),
        Variant("falcon_serial", "FalconForCausalLM",
            _FALCON | {"parallel_attn": False, "num_kv_heads": 1, "bias": True},
            "one branch after the other, biases", rounds_otherwise=_ONE),
    ),
    refused=(
        ("falcon-7b", {"alibi": True}, "alibi is True"),
        ("falcon-7b", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
        ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2"),
        ("falcon-40b", {"parallel_attn": False}, "parallel_attn is False"),
        ("falcon-40b", {"activation": "tanh"}, "activation is 'tanh'"),
    ),
    released_text=released,
)
# fmt: on
