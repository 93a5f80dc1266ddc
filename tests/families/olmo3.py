"""OLMo 3. Its release has one rope_theta, and rope_scaling means the full layers only.

transformers 5.23 gives sliding layers the class default 500000 whatever rope_theta says; releases have that value.
"""

from __future__ import annotations

import pytest
import torch

from zoo import families
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Variant, build, rope, yarn
from zoo.testing.full_size import attention, read
from zoo.testing.released import flat_rope
from zoo.testing.variant import Settings

# fmt: off

_OLMO = BASE | {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 52,

}

# fmt: on


def released(config: Settings) -> Settings:
    """One rope_theta; rope_scaling means the full layers only."""
    both = config["rope_parameters"]
    assert both["full_attention"]["rope_theta"] == both["sliding_attention"]["rope_theta"]
    config["rope_parameters"] = both["full_attention"]
    return flat_rope(config)


def upstream_stretches_full_layers_only() -> None:
    model = build.fresh(CASE.variants[0]).model
    x, positions = torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long)
    factors = {kind: model.rotary_emb(x, positions, kind)[0].unique().tolist() for kind in (FULL, SLIDING)}
    assert factors == {
        FULL: [pytest.approx(1.17)],
        SLIDING: [1.0],
    }  # YaRN's factor on cos, which is 1 at position 0


# fmt: off
CASE = FamilyCase(
    "olmo3",
    (
        Variant("olmo3", "Olmo3ForCausalLM",
            _OLMO | {
                "num_hidden_layers": 5, "sliding_window": 6,
                "rope_parameters": {
                    FULL: yarn(613.0, 5.0, 64, 2.6, 0.13, attention_factor=1.17), SLIDING: rope(613.0),
                },
            },
            "3 sliding layers to 1 full; YaRN with a given attention factor on full layers only",
            not_read_by_upstream="rope_theta reaches the full layers only; sliding layers get the class default 500000"),
        Variant("olmo3_plain", "Olmo3ForCausalLM",
            _OLMO | {
                "num_hidden_layers": 5, "sliding_window": 6, "num_key_value_heads": 3,
                "layer_types": [FULL, SLIDING, FULL, SLIDING, SLIDING],
                "rope_parameters": {FULL: rope(613.0), SLIDING: rope(613.0)},
            },
            "explicit layer types, plain RoPE everywhere",
            not_read_by_upstream="rope_theta reaches the full layers only; sliding layers get the class default 500000"),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    refused=(
        ("olmo3-7b", {"layer_types": ["linear_attention"] * 32}, "layer_types[0] is 'linear_attention'"),
    ),
    released_text=released,
    disputes={"which layers YaRN stretches": upstream_stretches_full_layers_only},
)
# fmt: on


def test_full_layers_alone_are_scaled() -> None:
    spec = families.spec_of(read("olmo3-7b"))
    sliding, full = attention(spec, 0).rope, attention(spec, 3).rope
    assert sliding is not None and full is not None
    assert (sliding.theta, sliding.scaling, full.theta) == (5e5, None, 5e5)
    assert full.scaling is not None and full.scaling.attention_factor == 1.2079441541679836
