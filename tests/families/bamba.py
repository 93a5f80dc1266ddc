"""Bamba: Mamba-2 but for a few layers, whose attention rotates half of each head."""

from __future__ import annotations

from zoo import families
from zoo.testing import BASE, FamilyCase, Variant, build, rope
from zoo.testing.full_size import attention, edited, mixers, read
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

from .granitemoehybrid import upstream_norms_each_group_by_itself

# fmt: off

_BAMBA = BASE | {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 52,
    "num_hidden_layers": 4, "attn_layer_indices": [1, 3], "rope_parameters": rope(613.0, partial_rotary_factor=0.5),
    "mamba_n_heads": 8, "mamba_d_head": 15, "mamba_n_groups": 2, "mamba_d_state": 7, "mamba_d_conv": 3, "mamba_chunk_size": 8,
}
_DECODES = "upstream counts positions from 0 at every step, unless they are given"

# fmt: on


def released(config: Settings) -> Settings:
    out = flat_rope(drop(config, "time_step_limit", "z_loss_coefficient"))
    return out | {"attn_rotary_emb": 6, "mamba_dt_rank": 4, "use_mamba_kernels": True}


def upstream_turns_half_of_a_head() -> None:
    model = build.fresh(CASE.variants[0])
    assert len(model.model.rotary_emb.inv_freq) == 12 // 2 // 2  # pairs


# fmt: off
CASE = FamilyCase(
    "bamba",
    (
        Variant("bamba", "BambaForCausalLM", _BAMBA,
            "Mamba-2 and attention by turns, RoPE on half of each head", decodes_otherwise=_DECODES),
        Variant("bamba_bias", "BambaForCausalLM",
            _BAMBA | {
                "num_hidden_layers": 3, "attn_layer_indices": [0], "attention_bias": True, "mlp_bias": True,
                "mamba_conv_bias": False, "mamba_d_head": "auto", "mamba_n_heads": 12, "mamba_n_groups": 3,
                "tie_word_embeddings": True,
            },
            "biases everywhere but in the convolution, tied", decodes_otherwise=_DECODES),
    ),
    released_text=released,
    disputes={
        "the norm behind Mamba-2 where it has groups": lambda: upstream_norms_each_group_by_itself(CASE.variants[0]),
        "how much of a head turns": upstream_turns_half_of_a_head,
    },
    refused=(
        ("bamba-9b-v2", {"attn_rotary_emb": 128}, "attn_rotary_emb is 128, but of head_dim 128 half, 64"),
        ("bamba-9b-v2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("bamba-9b-v2", {"mamba_proj_bias": True}, "mamba_proj_bias is True"),
        ("bamba-9b-v2", {"mamba_d_head": 60}, "mamba_n_heads * mamba_d_head is 7680"),
    ),
)
# fmt: on


def test_three_layers_of_bamba_attend_and_half_of_a_head_turns() -> None:
    spec = families.spec_of(read("bamba-9b-v2"))
    assert "".join(mixers(spec)[i] for i in (9, 18, 27)) == "aaa" and mixers(spec).count("m") == 29
    for left_out in ({}, {"partial_rotary_factor": None}, {"rope_theta": None}):
        rope = attention(families.spec_of(edited("bamba-9b-v2", **left_out)), 9).rope
        assert rope is not None and (rope.dim, rope.theta) == (64, 10000.0)
