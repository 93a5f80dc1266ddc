"""Phi-3 and Phi-4. Upstream fuses q, k, v and gate, up as the releases do.

LongRoPE's long table counts for a whole text as soon as it is longer than the original context.
"""

from __future__ import annotations

import math

from zoo.testing import BASE, FamilyCase, Gguf, Variant, rope
from zoo.testing.released import flat_rope
from zoo.testing.variant import Config, Settings

# fmt: off

_PHI = BASE | {
    "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 52,
    "num_hidden_layers": 3, "rope_parameters": rope(613.0),
}


def _longrope(original: int, **more: object) -> Settings:
    # Divisors of 3 pairs: 6 of the 8 channels of a head.
    return {
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 613.0, "partial_rotary_factor": 0.75,
            "short_factor": [1.1, 1.3, 1.7], "long_factor": [1.2, 2.3, 4.9], **more,
        },
    }


def gguf_fields(c: Config) -> Settings:
    return {"rope.dimension_count": 8, "attention.sliding_window": c["sliding_window"] or 0}


def gguf_longrope(c: Config) -> Settings:
    original = c["original_max_position_embeddings"]
    grown = c["max_position_embeddings"] / original
    return gguf_fields(c) | {
        "rope.dimension_count": 6, "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": math.sqrt(1 + math.log(grown) / math.log(original)),
    }


def gguf_factors(c: Config) -> Settings:
    return {f"rope_factors_{x}.weight": c["rope_parameters"][f"{x}_factor"] for x in ("long", "short")}


CASE = FamilyCase(
    "phi3",
    (
        Variant("phi3", "Phi3ForCausalLM", _PHI | {"sliding_window": 6}, "fused qkv and gate_up; plain RoPE; a window"),
        Variant("phi3_short", "Phi3ForCausalLM", _PHI | _longrope(60) | {"tie_word_embeddings": True},
            "LongRoPE within its original context, on 6 of 8 dims; tied"),
        Variant("phi3_long", "Phi3ForCausalLM", _PHI | _longrope(21, attention_factor=1.3),
            "LongRoPE beyond its original context: the long table for all positions; attention_factor given"),
    ),
    main="phi3_long",
    released_text=lambda config: flat_rope(config, "type"),
    gguf=(
        Gguf("phi3", gguf_fields, refused=({"rope.scaling.attn_factor": 1.3}, {"attention.value_length": 4})),
        Gguf(
            "phi3", gguf_longrope, variant="phi3_short", tables=gguf_factors,
            silent={"rope.scaling.attn_factor": math.sqrt(1 + math.log(8) / math.log(60))},
            refused=({"rope.scaling.attn_factor": 1.3},),
        ),
    ),
    refused=(
        ("phi-4-mini", {"attention_bias": True}, "attention_bias is True"),
        ("phi-4-mini", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type is 'ntk'"),
        ("phi-4-mini", {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 64}}, "'short_factor' is missing"),
        ("phi-4-mini", {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'"),
    ),
)
# fmt: on
