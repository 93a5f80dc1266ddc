"""Gemma, the first. Upstream turns a released `hidden_act` of `gelu` into the tanh form, which was meant.

Norms are (1 + w); embeddings are scaled.
"""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Gguf, Variant, build, rope
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_GEMMA = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3, "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    drop(
        config, "use_bidirectional_attention", "tie_word_embeddings" if config["tie_word_embeddings"] else ""
    )
    return flat_rope(config) | {"hidden_act": "gelu"}


def upstream_takes_the_tanh_form() -> None:
    variant = CASE.variants[0]
    model = build.fresh(variant.with_text({**variant.text, "hidden_act": "gelu"}))
    assert type(model.model.layers[0].mlp.act_fn).__name__ == "GELUTanh"


# fmt: off
CASE = FamilyCase(
    "gemma",
    (
        Variant("gemma", "GemmaForCausalLM", _GEMMA, "(1 + w) norms, embeddings times 6, tied head"),
        Variant("gemma_bias", "GemmaForCausalLM",
            _GEMMA | {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": False},
            "one K/V head (as 2B); biases and a head of its own, which no release has"),
    ),
    refused=(
        ("gemma-7b", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma-7b", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("gemma-7b", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("gemma-7b", {"head_dim": None}, "'head_dim' is missing"),
    ),
    released_text=released,
    disputes={"which GELU a hidden_act of gelu is": upstream_takes_the_tanh_form},
    gguf=(
        Gguf(
            "gemma", lambda c: {"attention.key_length": c["head_dim"], "attention.value_length": c["head_dim"]},
            plus_one=True,
        ),
    ),
)
# fmt: on
