"""Nemotron 3: one mixer per layer, spelt in letters by releases and as a list by transformers.

transformers clamps dt to `time_step_min` when it reads a prompt, and not when it decodes a single token.
"""

from __future__ import annotations

from typing import Any

import pytest

from zoo import families
from zoo.errors import ZooError
from zoo.testing import EPS, FULL, LINEAR, VOCAB, FamilyCase, Variant, build, names
from zoo.testing.full_size import mixers, read
from zoo.testing.names import Config, Tensor
from zoo.testing.released import drop, drop_default
from zoo.testing.variant import Settings

# fmt: off

_NEMOTRON = VOCAB | {
    "hidden_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "layers_block_type": [LINEAR, "moe", FULL, "mlp", LINEAR, "moe"], "intermediate_size": 52,
    "mamba_num_heads": 6, "mamba_head_dim": 5, "n_groups": 3, "ssm_state_size": 7, "conv_kernel": 3,
    "chunk_size": 8,
    "time_step_min": 1e-7, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "moe_intermediate_size": 28, "moe_shared_expert_intermediate_size": 20, "routed_scaling_factor": 1.7,
    "layer_norm_epsilon": EPS, "max_position_embeddings": 480,
}

# fmt: on


def mtp(case: FamilyCase, config: Config, count: int) -> dict[str, Tensor]:
    """`mtp.layers.N`: the kinds of `mtp_layers_block_type` again and again."""
    text = dict(names.text_config(config))
    d, dtype = text["hidden_size"], names.DTYPES[names.dtype_of(config)]
    vector, matrix = Tensor(dtype, (d,)), Tensor(dtype, (d, 2 * d))
    out: dict[str, Tensor] = {}
    kinds = names.upstream_config(case, config).mtp_layers_block_type
    drop = {"hybrid_override_pattern", "layers_block_type", "num_hidden_layers"}
    small = {k: x for k, x in text.items() if k not in drop} | {"layers_block_type": list(kinds)}
    blocks = names.saved_tensors(case, small)
    for i in range(count * len(kinds)):
        source = f"backbone.layers.{i % len(kinds)}."
        base = f"mtp.layers.{i}."
        out |= {base + k.removeprefix(source): t for k, t in blocks.items() if k.startswith(source)}
        if i % len(kinds) == 0:
            out |= {
                f"{base}enorm.weight": vector,
                f"{base}hnorm.weight": vector,
                f"{base}eh_proj.weight": matrix,
            }
        if i % len(kinds) == len(kinds) - 1:
            out[f"{base}final_layernorm.weight"] = vector
    return out


def released(config: Settings) -> Settings:
    letters = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}
    kinds = config.pop("layers_block_type")
    config["hybrid_override_pattern"] = "".join(letters[kind] for kind in kinds)
    mtp = config.pop("mtp_layers_block_type")
    if config["num_nextn_predict_layers"]:
        config["mtp_hybrid_override_pattern"] = "".join(letters[kind] for kind in mtp)
    else:
        del config["num_nextn_predict_layers"]
    drop_default(config, moe_latent_size=None)
    return drop(config, "time_step_limit", "rope_parameters", "moe_shared_expert_overlap") | {
        "num_hidden_layers": len(kinds),
        "norm_eps": config["layer_norm_epsilon"],
        "rope_theta": 10000,
        "partial_rotary_factor": 1.0,
    }


def upstream_puts_a_floor_under_dt() -> None:
    """If it does not any more, the family's entry among the disagreements has had its day."""
    model = build.fresh(CASE.variant("nemotron_h_dtmin"))
    limits = {m.time_step_limit for m in model.modules() if hasattr(m, "time_step_limit")}
    assert limits == {(0.45, float("inf"))}
    assert tuple(model.config.time_step_limit) == (0.0, float("inf"))
    build.corrected(CASE, model)
    assert {m.time_step_limit for m in model.modules() if hasattr(m, "time_step_limit")} == {
        (0.0, float("inf"))
    }


def upstream_hands_states_on_from_chunk_to_chunk() -> None:
    """The length of a chunk is a matter of speed."""
    variant = CASE.variant("nemotron_h")
    model, ids = build.perturbed(variant), build.tokens(variant)
    chunks = [m for m in model.modules() if hasattr(m, "chunk_size")]
    assert chunks and all(2 * m.chunk_size < ids.shape[1] for m in chunks)
    several = build.logits(model, ids)
    for m in chunks:
        m.chunk_size = 64
    assert (build.logits(model, ids) - several).abs().max() < 1e-4


# fmt: off
CASE = FamilyCase(
    "nemotron_h",
    (
        Variant("nemotron_h", "NemotronHForCausalLM", _NEMOTRON,
            "one mixer per layer: Mamba-2, MoE, attention without positions, MLP; relu^2; dt is never clamped"),
        Variant("nemotron_h_latent", "NemotronHForCausalLM",
            _NEMOTRON | {
                "moe_latent_size": 12, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
                "num_nextn_predict_layers": 1, "layers_block_type": ["moe", LINEAR, "mlp", FULL, LINEAR],
            },
            "experts in a latent space (Nemotron 3 Super); with mtp.* beside the model", mtp=1),
        Variant("nemotron_h_dtmin", "NemotronHForCausalLM", _NEMOTRON | {"time_step_min": 0.45},
            "a floor under dt that would act, if dt had one: see the family's disagreements"),
    ),
    main="nemotron_h_dtmin",
    layer_kinds=frozenset({FULL, LINEAR, "moe", "mlp"}),
    sums_rounded=False,
    kept_in_fp32=frozenset({"e_score_correction_bias"}),
    mtp=mtp,
    refused=(
        ("nemotron3-nano-30b-a3b", {"hybrid_override_pattern": "ME?"}, "unknown layer type(s) ?"),
        ("nemotron3-nano-30b-a3b", {"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'"),
        ("nemotron3-nano-30b-a3b", {"attention_bias": True}, "attention_bias is True"),
    ),
    released_text=released,
    disputes={
        "a floor under dt in Mamba-2": upstream_puts_a_floor_under_dt,
        "what a chunk of a long text hands on to the next in Mamba-2": upstream_hands_states_on_from_chunk_to_chunk,
    },
)
# fmt: on


def test_nemotrons_letters_become_layers_of_one_thing_each() -> None:
    spec = families.spec_of(read("nemotron3-nano-30b-a3b"))
    assert mixers(spec).startswith("m-m-ma-m-m-ma")
    for layer in spec.layers:
        assert (layer.mixer is None) != (layer.ffn is None)
        assert (layer.attn_norm is None) == (layer.mixer is None)


@pytest.mark.parametrize("top", [1e308, float("inf"), {"__float__": "Infinity"}])
def test_what_no_dt_reaches_is_an_open_end(top: Any) -> None:
    config = read("nemotron3-nano-30b-a3b")
    assert families.spec_of({**config, "time_step_limit": [0.0, top]}) == families.spec_of(config)
    with pytest.raises(ZooError, match="only an open end"):
        families.spec_of({**config, "time_step_limit": [0.0, 0.1]})
