"""MiMo-V2-Flash. transformers reads few of its release's keys; the defaults happen to be the release's values.

Sinks on sliding layers, so there is no sdpa path. The release keeps o_proj in bf16, though its config does not say so.
"""

from __future__ import annotations

from typing import Any

from zoo import families
from zoo.spec import Attention
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Variant, build, names, rope
from zoo.testing.full_size import read
from zoo.testing.names import Config, Tensor
from zoo.testing.variant import Settings

# fmt: off

_MIMO = BASE | {
    "hidden_size": 40, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12, "v_head_dim": 9,
    "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 5, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7,
    "sliding_window": 7, "attention_value_scale": 0.61,
    "layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse"],
    "rope_parameters": {
        FULL: rope(613.0, partial_rotary_factor=0.34), SLIDING: rope(71.0, partial_rotary_factor=0.34),
    },
}

# fmt: on


def mtp(case: FamilyCase, config: Config, count: int) -> dict[str, Tensor]:
    """`model.mtp.layers.N`: a sliding, dense layer each."""
    text = dict(names.text_config(config))
    d, dtype = text["hidden_size"], names.DTYPES[names.dtype_of(config)]
    vector, matrix = Tensor(dtype, (d,)), Tensor(dtype, (d, 2 * d))
    out: dict[str, Tensor] = {}
    block = names.first_layer(
        case, names.one_layer(text, {"layer_types": ["sliding_attention"], "mlp_layer_types": ["dense"]})
    )
    for i in range(count):
        base = f"model.mtp.layers.{i}."
        for name, t in block.items():
            out[base + name.replace("post_attention_layernorm", "pre_mlp_layernorm")] = t
        out |= {f"{base}{name}.weight": vector for name in ("enorm", "hnorm", "final_layernorm")}
        out[f"{base}eh_proj.weight"] = matrix
    return out


def released(config: Settings) -> Settings:
    """`hybrid_layer_pattern` 1 means a window; a released window of W shows W + 1 keys, itself included."""
    both, kinds = config.pop("rope_parameters"), config.pop("layer_types")
    window = config.pop("sliding_window") - 1
    return config | {
        "rope_theta": both["full_attention"]["rope_theta"],
        "swa_rope_theta": both["sliding_attention"]["rope_theta"],
        "partial_rotary_factor": both["full_attention"]["partial_rotary_factor"],
        "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in kinds],
        "moe_layer_freq": [int(kind == "sparse") for kind in config.pop("mlp_layer_types")],
        "layernorm_epsilon": config.pop("rms_norm_eps"),
        "sliding_window": window,
        "sliding_window_size": window,
        "attention_chunk_size": window,
        "swa_num_attention_heads": config["num_attention_heads"],
        "swa_num_key_value_heads": 2 * config["num_key_value_heads"],
        "swa_head_dim": config["head_dim"],
        "swa_v_head_dim": config["v_head_dim"],
        "n_shared_experts": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    }


def upstream_shows_129_keys_for_a_window_of_128() -> None:
    model, ids = build.fresh(CASE.variants[0]), build.tokens(CASE.variants[0], batch=1)
    assert type(model.config)(sliding_window_size=128).sliding_window == 129
    seen = [int((a[0, 0, -1] > 0).sum()) for a in model(ids, output_attentions=True).attentions]
    windows = [
        model.config.sliding_window if k == SLIDING else ids.shape[1] for k in model.config.layer_types
    ]
    assert seen == windows and set(windows) == {ids.shape[1], model.config.sliding_window}


# fmt: off
# What bf16 logits differ by from upstream's with sdpa, in the median over tokens.
_ROUNDS = "0.09 to 0.15 apart with attention written out as upstream's is; the cause is not known yet"

CASE = FamilyCase(
    "mimo_v2_flash",
    (
        Variant("mimo_v2_flash", "MiMoV2FlashForCausalLM", _MIMO,
            "2 K/V heads on full layers, 4 and sinks on sliding ones, v narrower than k and scaled, RoPE on 4 "
            "of 12 dims",
            eager_only=True, not_read_by_upstream="rope_theta, swa_rope_theta, partial_rotary_factor, "
            "hybrid_layer_pattern, moe_layer_freq and layernorm_epsilon are ignored", rounds_otherwise=_ROUNDS),
        Variant("mimo_v2_flash_mtp", "MiMoV2FlashForCausalLM",
            _MIMO | {
                "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "num_hidden_layers": 3,
                "layer_types": [FULL, SLIDING, FULL], "mlp_layer_types": ["dense", "sparse", "dense"],
                "rope_parameters": {
                    FULL: rope(613.0, partial_rotary_factor=0.5), SLIDING: rope(71.0, partial_rotary_factor=0.5),
                },
            },
            "no groups, not renormalised, a dense layer after a sparse one; with model.mtp.* beside the model",
            mtp=2,
            eager_only=True, not_read_by_upstream="rope_theta, swa_rope_theta, partial_rotary_factor, "
            "hybrid_layer_pattern, moe_layer_freq and layernorm_epsilon are ignored", rounds_otherwise=_ROUNDS),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    kept_in_fp32=frozenset({"e_score_correction_bias"}),
    mtp=mtp,
    mtp_layers={"mimo-v2-flash": 3},
    never_quantised=("o_proj",),
    refused=(
        ("mimo-v2-flash", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("mimo-v2-flash", {"hybrid_layer_pattern": [2] * 48}, "hybrid_layer_pattern[0] is 2"),
        ("mimo-v2-flash", {"n_shared_experts": 1}, "n_shared_experts is 1"),
        ("mimo-v2-flash", {"partial_rotary_factor": None}, "'partial_rotary_factor' is missing"),
    ),
    released_text=released,
    optional_rules={
        "layers.{i}.moe.shared.down.weight": "V3's shared experts",
        "layers.{i}.moe.shared.gate_up.weight": "V3's shared experts",
    },
    disputes={"the window of the sliding layers": upstream_shows_129_keys_for_a_window_of_128},
)
# fmt: on


def test_a_window_of_mimo_shows_one_key_more_than_the_config_says() -> None:
    config = read("mimo-v2-flash")
    windows = {
        a.window
        for a in (layer.mixer for layer in families.spec_of(config).layers)
        if isinstance(a, Attention)
    }
    assert config["sliding_window_size"] == 128 and windows == {None, 129}


def test_values_are_scaled_as_upstream_does_where_the_config_says_nothing() -> None:
    def scales(config: dict[str, Any]) -> set[float]:
        return {layer.mixer.value_scale for layer in families.spec_of(config).layers}

    config = read("mimo-v2-flash")
    said = {k: v for k, v in config.items() if k != "attention_value_scale"}
    assert scales(said) == {0.707}
    assert scales(said | {"attention_value_scale": None}) == {1.0}
