"""Phi-3.5-MoE: SparseMixer's weights, layer norms, biases everywhere. Upstream has no long table of LongRoPE."""

from __future__ import annotations

import torch

from zoo.testing import BASE, FamilyCase, Variant, build
from zoo.testing.released import flat_rope, implied_head_dim
from zoo.testing.variant import Settings


def upstream_has_no_long_table() -> None:
    """If it has by now, the family's entry among the disagreements has had its day."""
    wrong, right = (build.fresh(CASE.variant("phimoe_long")) for _ in range(2))
    build.corrected(CASE, right)
    x, positions = torch.zeros(1, 29, 1), torch.arange(29)[None]
    tables = [model.model.rotary_emb(x, positions)[0] for model in (wrong, right)]
    assert not torch.allclose(*tables)
    within = [model.model.rotary_emb(x[:, :21], positions[:, :21])[0] for model in (wrong, right)]
    assert torch.equal(*within)


# fmt: off

_PHIMOE = BASE | {
    "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 28,
    "num_hidden_layers": 3, "num_local_experts": 6, "router_jitter_noise": 0.15, "attention_bias": True,
    "lm_head_bias": True,
}


def _longrope(original: int) -> Settings:
    return {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 613.0, "original_max_position_embeddings": original,
            "short_factor": [1.1, 1.3, 1.7, 1.9], "long_factor": [1.2, 2.3, 4.9, 5.3], "short_mscale": 1.2, "long_mscale": 1.3,
        },
    }


CASE = FamilyCase(
    "phimoe",
    (
        Variant("phimoe", "PhimoeForCausalLM", _PHIMOE | _longrope(60) | {"sliding_window": 6},
            "experts weighed over those near them; layer norms; biases; LongRoPE within its original context; a window",
            seq_len=40),
        Variant("phimoe_long", "PhimoeForCausalLM",
            _PHIMOE | _longrope(21) | {
                "num_local_experts": 5, "num_hidden_layers": 2, "attention_bias": False, "lm_head_bias": False,
                "tie_word_embeddings": True,
            },
            "LongRoPE beyond its original context: the long table for all positions; no biases, tied"),
    ),
    main="phimoe_long",
    released_text=lambda config: implied_head_dim(flat_rope(config, "type")),
    refused=(
        ("phi-3.5-moe", {"num_experts_per_tok": 3}, "num_experts_per_tok is 3"),
        ("phi-3.5-moe", {"router_jitter_noise": 0.0}, "near is more than 0, not 0.0"),
        ("phi-3.5-moe", {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'"),
        ("phi-3.5-moe", {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 4096, "long_factor": [1.0] * 64}}, "'short_factor' is missing"),
    ),
    disputes={"LongRoPE beyond the original context": upstream_has_no_long_table},
)
# fmt: on
