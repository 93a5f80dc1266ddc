"""StableLM. Upstream keeps the norm of each head as a module of its own."""

from __future__ import annotations

from zoo.testing import EPS, VOCAB, FamilyCase, Variant, rope
from zoo.testing.released import flat_rope

# fmt: off

_STABLELM = VOCAB | {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 52, "num_hidden_layers": 3,
    "max_position_embeddings": 480, "layer_norm_eps": EPS, "rope_parameters": rope(613.0, partial_rotary_factor=0.45),
}

CASE = FamilyCase(
    "stablelm",
    (
        Variant("stablelm", "StableLmForCausalLM", _STABLELM | {"use_qkv_bias": True},
            "layer norms with biases, RoPE on 4 of 10 dims, q/k/v biases"),
        Variant("stablelm_12b", "StableLmForCausalLM",
            _STABLELM | {"use_parallel_residual": True, "qk_layernorm": True, "num_key_value_heads": 3, "tie_word_embeddings": True},
            "parallel branches behind one norm, a norm for each head of q and k, tied",
            rounds_otherwise="upstream adds attention to x before it adds the MLP"),
    ),
    refused=(
        ("stablelm-3b-4e1t", {"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ("stablelm-3b-4e1t", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type is 'ntk'"),
    ),
    released_text=flat_rope,
)
# fmt: on
