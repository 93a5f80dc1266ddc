"""Gemma 2. Its upstream class is eager only: sdpa has no soft cap.

Norms are (1 + w); embeddings are scaled; layers alternate, a window first.
"""

from __future__ import annotations

from zoo import families
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Gguf, Variant, rope
from zoo.testing.full_size import attention, read
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_GEMMA2 = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 4, "rope_parameters": rope(613.0),
    "sliding_window": 7, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 1.7, "final_logit_softcapping": 4.1,
}

# fmt: on


def released(config: Settings) -> Settings:
    if config["layer_types"][0] == SLIDING:
        drop(config, "layer_types")
    drop(config, "use_bidirectional_attention", "tie_word_embeddings")
    return flat_rope(config) | {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}


# fmt: off
CASE = FamilyCase(
    "gemma2",
    (
        Variant("gemma2", "Gemma2ForCausalLM", _GEMMA2,
            "four (1 + w) norms, both soft caps (they act often), a window on every other layer", eager_only=True),
        Variant("gemma2_uncapped", "Gemma2ForCausalLM",
            _GEMMA2 | {
                "num_hidden_layers": 3, "query_pre_attn_scalar": 13, "attn_logit_softcapping": None,
                "final_logit_softcapping": None, "layer_types": [FULL, SLIDING, FULL], "attention_bias": True,
            },
            "no caps, a full layer first, biases: what no release has", eager_only=True),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    refused=(
        ("gemma2-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2-2b", {"hidden_activation": "quick_gelu"}, "hidden_activation is 'quick_gelu'"),
        ("gemma2-2b", {"sliding_window": None}, "'sliding_window' is missing"),
    ),
    released_text=released,
    gguf=(
        Gguf(
            "gemma2",
            lambda c: {
                "attention.key_length": c["head_dim"], "attention.value_length": c["head_dim"],
                "attn_logit_softcapping": c["attn_logit_softcapping"],
                "final_logit_softcapping": c["final_logit_softcapping"],
                "attention.sliding_window": c["sliding_window"],
            },
            settings={"query_pre_attn_scalar": 10},  # llama.cpp has it from the sizes
            plus_one=True,
        ),
    ),
)
# fmt: on


def test_caps_that_the_config_leaves_out_are_the_releases_and_null_means_none() -> None:
    released = dict(read("gemma2-2b"))
    caps = {
        "attn_logit_softcapping": released.pop("attn_logit_softcapping"),
        "final_logit_softcapping": released.pop("final_logit_softcapping"),
    }
    assert families.spec_of(released) == families.spec_of({**released, **caps})
    without = families.spec_of({**released, **dict.fromkeys(caps)})
    assert without.logit_softcap is None and attention(without, 0).softcap is None
