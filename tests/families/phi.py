"""Phi-1 and 2. Nothing is unusual about its upstream."""

from __future__ import annotations

from zoo.testing import EPS, VOCAB, FamilyCase, Variant, rope
from zoo.testing.released import flat_rope

# fmt: off

_PHI = VOCAB | {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 52, "num_hidden_layers": 3,
    "max_position_embeddings": 480, "layer_norm_eps": EPS, "rope_parameters": rope(613.0, partial_rotary_factor=0.45),
}

_ROUNDS = "upstream's gelu_new is written out, and rounds after each of its steps"
CASE = FamilyCase(
    "phi",
    (
        Variant("phi", "PhiForCausalLM", _PHI, "parallel branches behind one norm, RoPE on 4 of 10 dims, head with bias",
            rounds_otherwise=_ROUNDS),
        Variant("phi_norms", "PhiForCausalLM", _PHI | {"qk_layernorm": True, "num_key_value_heads": 3, "hidden_act": "gelu"},
            "LayerNorms of queries and keys"),
    ),
    refused=(
        ("phi-2", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("phi-2", {"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ("phi-2", {"partial_rotary_factor": 1.5}, "RoPE would rotate 120 of 80 channels"),
    ),
    released_text=flat_rope,
)
# fmt: on
