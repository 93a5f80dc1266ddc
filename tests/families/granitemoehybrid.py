"""Granite 4.0: Mamba-2 in most layers, attention in a few, and an MLP beside experts or alone."""

from __future__ import annotations

from zoo import families
from zoo.testing import BASE, FULL, LINEAR, FamilyCase, Variant, build, rope
from zoo.testing.full_size import mixers, read
from zoo.testing.released import drop
from zoo.testing.variant import Settings

from . import granite

# fmt: off

_HYBRID = BASE | granite.FACTORS | {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 28,
    "num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, FULL], "num_local_experts": 6, "num_experts_per_tok": 3,
    "shared_intermediate_size": 44, "mamba_n_heads": 8, "mamba_d_head": 15, "mamba_n_groups": 2, "mamba_d_state": 7,
    "mamba_d_conv": 3, "mamba_chunk_size": 8, "tie_word_embeddings": True,
}

# fmt: on


def released(config: Settings) -> Settings:
    names = {LINEAR: "mamba", FULL: "attention"}
    config["layer_types"] = [names[kind] for kind in config["layer_types"]]
    if config["position_embedding_type"] is None:
        config["position_embedding_type"] = "nope"
    return granite.released(drop(config, "time_step_limit"))


def upstream_norms_each_group_by_itself(variant: Variant | None = None) -> None:
    mixers = [m for m in build.fresh(variant or CASE.variants[0]).modules() if hasattr(m, "n_groups")]
    assert mixers
    for m in mixers:
        assert m.n_groups > 1 and m.norm.group_size * m.n_groups == m.intermediate_size


# fmt: off
CASE = FamilyCase(
    "granitemoehybrid",
    (
        Variant("granitemoehybrid", "GraniteMoeHybridForCausalLM", _HYBRID,
            "Mamba-2 and attention without positions by turns; an MLP beside the experts"),
        Variant("granitemoehybrid_dense", "GraniteMoeHybridForCausalLM",
            {k: x for k, x in _HYBRID.items() if k != "num_experts_per_tok"} | {
                "num_hidden_layers": 3, "layer_types": [FULL, LINEAR, FULL], "num_local_experts": 0,
                "position_embedding_type": "rope", "rope_parameters": rope(613.0), "mamba_conv_bias": False,
                "mamba_d_head": "auto", "mamba_expand": 3,
                "mamba_n_heads": 12, "mamba_n_groups": 3, "tie_word_embeddings": False, "attention_bias": True,
            },
            "no experts; RoPE and biases in attention, none in the convolution"),
    ),
    layer_kinds=frozenset({FULL, LINEAR}),
    refused=(
        ("granite-4.0-h-small", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("granite-4.0-h-small", {"mamba_d_head": 60}, "mamba_n_heads * mamba_d_head is 7680"),
        ("granite-4.0-h-small", {"mamba_proj_bias": True}, "mamba_proj_bias is True"),
        ("granite-4.0-h-small", {"position_embedding_type": "learned"}, "position_embedding_type is 'learned'"),
        ("granite-4.0-h-small", {"num_experts_per_tok": 73}, "73 of 72 experts cannot be chosen"),
    ),
    released_text=released,
    disputes={"the norm behind Mamba-2 where it has groups": upstream_norms_each_group_by_itself},
)
# fmt: on


def test_every_tenth_layer_of_granite_4_attends() -> None:
    spec = families.spec_of(read("granite-4.0-h-small"))
    assert mixers(spec) == "mmmmmammmmmmmmmammmmmmmmmammmmmmmmmammmm"
