"""EXAONE 4.0. What is hybrid is said by sliding_window; a pattern of layers may be letters, which upstream leaves unread."""

from __future__ import annotations

import pytest

from zoo import families
from zoo.errors import ZooError
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Variant, llama3, rope
from zoo.testing.full_size import attention, read
from zoo.testing.released import flat_rope
from zoo.testing.variant import Settings

# fmt: off

_EXAONE = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 4, "sliding_window": 7, "sliding_window_pattern": 2,
    "rope_parameters": llama3(731.0, 6.0, 160, 1.3, 5.5),
}

# fmt: on


def released(config: Settings) -> Settings:
    if config["sliding_window"] is not None:
        config["sliding_window_pattern"] = "LG"
    return flat_rope(config)


# fmt: off
CASE = FamilyCase(
    "exaone4",
    (
        Variant("exaone4", "Exaone4ForCausalLM", _EXAONE,
            "norms on outputs only, per-head QK norm; layers with a window have scaled RoPE, full ones none"),
        Variant("exaone4_full", "Exaone4ForCausalLM",
            _EXAONE | {
                "sliding_window": None, "layer_types": [FULL] * 3, "num_hidden_layers": 3, "tie_word_embeddings": True,
                "rope_parameters": rope(613.0),
            },
            "all layers full and rotated, tied"),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    released_text=released,
    refused=(
        ("exaone-4.0-32b", {"sliding_window_pattern": "LLLX", "layer_types": None}, "sliding_window_pattern is 'LLLX'"),
        ("exaone-4.0-1.2b", {"layer_types": ["sliding_attention"] * 30}, "'sliding_window' is missing"),
    ),
)
# fmt: on


def test_letters_say_what_the_list_of_layers_says() -> None:
    config = read("exaone-4.0-32b")
    listed = families.spec_of(config)
    del config["layer_types"]
    assert families.spec_of(config) == listed == families.spec_of(config | {"sliding_window_pattern": 4})


def test_full_layers_have_rope_only_where_no_layer_has_a_window() -> None:
    hybrid, full = (families.spec_of(read(stem)) for stem in ("exaone-4.0-32b", "exaone-4.0-1.2b"))
    assert [attention(hybrid, i).rope is None for i in range(4)] == [False, False, False, True]
    assert all(attention(full, i).rope is not None for i in range(full.n_layers))


def test_a_window_that_is_absent_is_upstreams_and_one_that_is_null_none() -> None:
    config = read("exaone-4.0-32b")
    absent = {k: v for k, v in config.items() if k != "sliding_window"}
    assert families.spec_of(absent) == families.spec_of(config | {"sliding_window": 4096})
    with pytest.raises(ZooError, match="'sliding_window' is missing"):
        families.spec_of(config | {"sliding_window": None})
