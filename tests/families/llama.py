"""Llama 3 and SmolLM2. Nothing is unusual about its upstream: the plainest family there is.

head_dim may be given or follow from the width; releases of Llama 2 leave rope_theta out.
"""

from __future__ import annotations

from zoo import families
from zoo.testing import BASE, FamilyCase, Variant, llama3, rope
from zoo.testing.full_size import attention, read
from zoo.testing.released import plain_rope

# fmt: off

_LLAMA = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3,
    "rope_parameters": llama3(731.0, 6.0, 160, 1.3, 5.5),
}

CASE = FamilyCase(
    "llama",
    (
        Variant("llama", "LlamaForCausalLM", _LLAMA,
            "untied head; head_dim 10 is not 36/6; llama3 RoPE scaling with all three bands"),
        Variant("llama_tied", "LlamaForCausalLM",
            _LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 3}, "tied head: no lm_head on disk"),
        Variant("llama_bias", "LlamaForCausalLM",
            _LLAMA | {
                "hidden_size": 60, "head_dim": None, "attention_bias": True, "mlp_bias": True,
                "rope_parameters": rope(977.0),
            },
            "attention_bias and mlp_bias; plain RoPE; head_dim follows from hidden_size"),
    ),
    released_text=plain_rope,
    refused=(
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope_type is 'longrope'"),
        ("llama-3.1-8b", {"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "rope_type is 'dynamic'"),
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "llama3"}}, "'factor' is missing"),
        ("llama-3.1-8b", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("llama-3.1-8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama-3.1-8b", {"num_hidden_layers": None}, "'num_hidden_layers' is missing"),
        ("smollm2-135m", {"rope_interleaved": True}, "rope_interleaved is True"),
    ),
)
# fmt: on


def test_llama_2_configs_leave_theta_out() -> None:
    config = read("llama-3.1-8b")
    del config["rope_theta"], config["rope_scaling"]
    rope = attention(families.spec_of(config), 0).rope
    assert rope is not None and rope.theta == 10000.0
