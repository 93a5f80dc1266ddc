"""Trinity. Releases say what upstream does not read: how the router scores, and that it has one group."""

from __future__ import annotations

import pytest

from zoo import families
from zoo.errors import ZooError
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Variant, rope
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_TRINITY = BASE | {
    "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 4, "num_dense_layers": 1,
    "num_experts": 6, "num_experts_per_tok": 2, "num_shared_experts": 2, "route_scale": 1.7,
    "sliding_window": 7, "global_attn_every_n_layers": 3, "mup_enabled": True, "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    drop(config, "attention_bias", "output_router_logits")
    return flat_rope(config) | {
        "score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1, "num_expert_groups": 1,
        "num_limited_groups": 1, "load_balance_coeff": 0.001,
    }  # fmt: skip


# fmt: off
CASE = FamilyCase(
    "afmoe",
    (
        Variant("afmoe", "AfmoeForCausalLM", _TRINITY,
            "gate per channel, four norms, QK norm, each third layer full and without RoPE, scaled embedding"),
        Variant("afmoe_tied", "AfmoeForCausalLM",
            _TRINITY | {
                "mup_enabled": False, "tie_word_embeddings": True, "num_dense_layers": 2, "num_shared_experts": 1,
                "layer_types": [FULL, SLIDING, SLIDING, FULL],
            },
            "embedding not scaled, tied, two dense layers, the first layer full"),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    released_text=released,
)
# fmt: on


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"score_func": "softmax"}, "score_func is 'softmax'"),
        ({"route_norm": False}, "route_norm is False"),
        ({"n_group": 4}, "n_group is 4"),
        ({"num_limited_groups": 2}, "num_limited_groups is 2"),
        ({"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_what_upstream_does_not_compute_is_refused(said: Settings, what: str) -> None:
    config = {"architectures": ["AfmoeForCausalLM"], "model_type": "afmoe", "hidden_act": "silu", **_TRINITY}
    families.spec_of(config)
    with pytest.raises(ZooError, match=what):
        families.spec_of(config | said)
