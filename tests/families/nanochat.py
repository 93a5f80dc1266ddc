"""nanochat. The config of d20 says logits_soft_cap, which upstream leaves unread: its default is the same number."""

from __future__ import annotations

from zoo import families
from zoo.testing import BASE, FamilyCase, Variant, rope
from zoo.testing.full_size import edited, read

# fmt: off

_NANOCHAT = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3, "final_logit_softcapping": 7.0, "rope_parameters": rope(613.0),
}

CASE = FamilyCase(
    "nanochat",
    (
        Variant("nanochat", "NanoChatForCausalLM", _NANOCHAT,
            "norms without weights, of the embeddings too; RoPE backwards, QK norm after it; squared ReLU, logits capped"),
        Variant("nanochat_bias", "NanoChatForCausalLM",
            _NANOCHAT | {
                "final_logit_softcapping": None, "attention_bias": True, "tie_word_embeddings": True,
                "num_key_value_heads": 3,
            },
            "not capped, biases, tied"),
    ),
    keeps={"nanochat": ("rope_parameters",)},
    refused=(
        ("nanochat-d20", {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'"),
        ("nanochat-d20", {"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}, "rope_type is 'ntk'"),
    ),
)
# fmt: on


def test_the_cap_is_read_under_its_older_name_and_null_is_none() -> None:
    config = read("nanochat-d20")
    assert "final_logit_softcapping" not in config
    caps = [families.spec_of(c).logit_softcap for c in (
        config, edited("nanochat-d20", logits_soft_cap=None), edited("nanochat-d20", logits_soft_cap=30),
        edited("nanochat-d20", final_logit_softcapping=None), edited("nanochat-d20", final_logit_softcapping=20.0))]  # fmt: skip
    assert caps == [15.0, 15.0, 30.0, None, 20.0]
