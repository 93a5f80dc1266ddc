"""Qwen3, dense. Nothing is unusual about its upstream.

Releases leave layer_types out: windows, where there are any, start at max_window_layers.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.errors import ZooError
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Gguf, Listed, Variant, gguf, rope
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_QWEN3 = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3,
    "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    drop(config, "layer_types")
    return flat_rope(config)


# fmt: off
CASE = FamilyCase(
    "qwen3",
    (
        Variant("qwen3", "Qwen3ForCausalLM", _QWEN3, "per-head QK norm before RoPE, untied"),
        Variant("qwen3_tied", "Qwen3ForCausalLM",
            _QWEN3 | {"tie_word_embeddings": True, "num_key_value_heads": 3, "attention_bias": True},
            "tied; with attention biases"),
        Variant("qwen3_window", "Qwen3ForCausalLM",
            _QWEN3 | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
            "layers from max_window_layers on have a window"),
    ),
    main="qwen3_window",
    layer_kinds=frozenset({FULL, SLIDING}),
    listed={"qwen3-8b-fp8": Listed("qwen3-8b-fp8")},
    refused=(
        ("qwen3-8b", {"use_sliding_window": True, "max_window_layers": 28}, "'sliding_window' is missing"),
        ("qwen3-8b", {"layer_types": ["full_attention"] * 3}, "layer_types should list 36 layers"),
        ("qwen3-8b", {"layer_types": ["sliding_attention"] * 36}, "use_sliding_window is False"),
    ),
    released_text=released,
    gguf=(
        Gguf(
            "qwen3", lambda c: {"attention.key_length": c["head_dim"], "attention.value_length": c["head_dim"]},
            silent={"rope.dimension_count": 10, "attention.sliding_window": 0},
            refused=({"rope.dimension_count": 4}, {"logit_scale": 0.5}),
        ),
    ),
)
# fmt: on


def test_factors_of_rope_that_llama_cpps_graph_does_not_use_are_refused(tmp_path: Path) -> None:
    of = CASE.gguf[0]
    with pytest.raises(ZooError, match=r"rope_freqs\.weight, which llama\.cpp's graph of qwen3 does not use"):
        gguf.config(of, gguf.header(CASE, of, tmp_path), {}, (1.0,) * 5)
