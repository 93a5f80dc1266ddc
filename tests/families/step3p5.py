"""Step 3.5 and 3.7 Flash. Upstream has the wrapper alone, and saves by kind of layer what releases list by layer.

Releases' lists go on for three prediction layers after the last one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import zoo
from zoo import families
from zoo.errors import ZooError
from zoo.spec import MLP, MoE
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Variant, build, llama3, names, rope
from zoo.testing.full_size import attention, read
from zoo.testing.names import Config, Tensor
from zoo.testing.released import drop
from zoo.testing.variant import Settings

# fmt: off

_TEXT = BASE | {
    "hidden_size": 36, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20,
    "intermediate_size": 44, "moe_intermediate_size": 28, "share_expert_dim": 22,
    "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_router_scaling_factor": 1.7,
    "num_hidden_layers": 5, "sliding_window": 7, "layer_types": [FULL, SLIDING, SLIDING, SLIDING, FULL],
    "num_sliding_attention_heads": 6, "mlp_layer_types": ["dense", "dense", "sparse", "sparse", "sparse"],
    "swiglu_limits": [None, None, 0.0, 0.05, 0.07], "swiglu_limits_shared": [0.0, 0.06, 0.0, 0.0, 0.04],
    "rope_parameters": {
        FULL: llama3(97.0, 6.0, 64, 1.2, 3.1) | {"partial_rotary_factor": 0.6},
        SLIDING: rope(71.0, partial_rotary_factor=0.8),
    },
}
_VISION = {
    "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 20, "mlp_ratio": 1.5,
    "image_size": 16, "patch_size": 4,
}

# fmt: on


def released(config: Settings) -> Settings:
    n, padding = config["num_hidden_layers"], 3
    kinds = config["layer_types"] + [SLIDING] * padding
    rope = config.pop("rope_parameters")
    by_kind = {kind: rope[kind] for kind in set(kinds)}
    full = dict(by_kind[FULL])
    theta, share = full.pop("rope_theta"), full.pop("partial_rotary_factor")
    assert share == by_kind[FULL]["partial_rotary_factor"]
    experts = [str(i) for i, kind in enumerate(config["mlp_layer_types"]) if kind == "sparse"]
    for ours, theirs in (
        ("num_key_value_heads", "num_attention_groups"),
        ("n_routed_experts", "moe_num_experts"),
        ("num_experts_per_tok", "moe_top_k"),
    ):
        config[theirs] = config.pop(ours)
    for key in ("swiglu_limits", "swiglu_limits_shared"):
        if config[key] is not None:
            config[key] = [x or 0.0 for x in config[key]] + [0.0] * padding
    config |= {
        "layer_types": kinds, "moe_layers_enum": ",".join(experts), "num_nextn_predict_layers": padding,
        "attention_other_setting": {
            "attention_type": SLIDING, "num_attention_heads": config.pop("num_sliding_attention_heads"),
            "num_attention_groups": config["num_attention_groups"], "head_dim": config["head_dim"],
        },
        "rope_theta": [by_kind[k]["rope_theta"] for k in kinds],
        "partial_rotary_factors": [by_kind[k]["partial_rotary_factor"] for k in kinds],
        "rope_scaling": full, "yarn_only_types": [FULL], "use_rope_layers": [], "use_head_wise_attn_gate": True,
        "use_moe": True, "use_moe_router_bias": True, "moe_router_activation": "sigmoid", "norm_expert_weight": True,
        "att_impl_type": "GQA", "zero_centered": True, "sink": False, "fp32_residual_connection": False,
    }  # fmt: skip
    assert theta == config["rope_theta"][kinds.index(FULL)] and n + padding == len(kinds)
    if config["query_pre_attn_scalar"] == config["head_dim"]:
        drop(config, "query_pre_attn_scalar")
    return drop(config, "per_layer_config", "mlp_layer_types", "num_local_experts")


def upstream_keys(config: Settings) -> Settings:
    """Step 3.5 has no wrapper, and upstream nothing but one."""
    if "text_config" in config:
        return config
    return {"model_type": config["model_type"], "text_config": config, "vision_config": {}}


def without_vision(case: FamilyCase, tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    seen = () if "text_config" in config else ("vision_model.", "vit_large_projector.")
    return {name: t for name, t in tensors.items() if not name.startswith(seen)}


def mtp(case: FamilyCase, config: Config, count: int) -> dict[str, Tensor]:
    """Decoder layers with a window and a dense MLP, and around each what DeepSeek's have: two norms, a projection of
    [embedding, hidden], and an output norm and a head of its own."""
    cfg = names.upstream_config(case, config).get_text_config()
    d, dtype = cfg.hidden_size, names.DTYPES[names.dtype_of(config)]
    q, kv = cfg.num_sliding_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    shapes = {
        "enorm": (d,), "hnorm": (d,), "eh_proj": (d, 2 * d), "shared_head.norm": (d,),
        "shared_head.output": (cfg.vocab_size, d), "input_layernorm": (d,), "post_attention_layernorm": (d,),
        "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.g_proj": (cfg.num_sliding_attention_heads, d), "self_attn.o_proj": (d, q),
        "self_attn.q_norm": (cfg.head_dim,), "self_attn.k_norm": (cfg.head_dim,),
        "mlp.gate_proj": (cfg.intermediate_size, d), "mlp.up_proj": (cfg.intermediate_size, d),
        "mlp.down_proj": (d, cfg.intermediate_size),
    }  # fmt: skip
    return {
        f"model.layers.{cfg.num_hidden_layers + k}.{name}.weight": Tensor(dtype, shape)
        for k in range(count)
        for name, shape in shapes.items()
    }


# fmt: off
CASE = FamilyCase(
    "step3p5",
    (
        Variant("step3p5", "Step3p7ForConditionalGeneration", {"text_config": _TEXT, "vision_config": _VISION},
            "gate per head, heads and RoPE by kind of layer, SwiGLU clamped after its activation in some layers, "
            "scaled experts, vision and MTP beside it", mtp=1),
        Variant("step3p5_unclamped", "Step3p7ForConditionalGeneration",
            {
                "text_config": _TEXT | {
                    "swiglu_limits": None, "swiglu_limits_shared": None, "query_pre_attn_scalar": 13,
                    "mlp_layer_types": ["sparse", "dense", "sparse", "dense", "sparse"],
                },
                "vision_config": _VISION,
            },
            "no limits, another scale of scores, dense layers between"),
    ),
    classes={"step3p5": "Step3p7ForConditionalGeneration"},
    layer_kinds=frozenset({FULL, SLIDING}),
    upstream_keys=upstream_keys,
    released_text=released,
    released=without_vision,
    mtp=mtp,
    refused=(
        ("step-3.5-flash", {"use_head_wise_attn_gate": False}, "use_head_wise_attn_gate is False"),
        ("step-3.5-flash", {"moe_router_activation": "softmax"}, "moe_router_activation is 'softmax'"),
        ("step-3.5-flash", {"rope_theta": [5e6, 1e4, 1e4, 2e4] * 12}, "rope_theta of sliding_attention layers"),
    ),
)
# fmt: on


def test_layers_of_a_release_differ_in_heads_rope_experts_and_limits() -> None:
    spec = families.spec_of(read("step-3.5-flash"))
    full, sliding = attention(spec, 0), attention(spec, 1)
    assert full.rope is not None and sliding.rope is not None and full.rope.scaling is not None
    assert (full.n_heads, full.window, full.rope.dim, full.rope.scaling.kind) == (64, None, 64, "llama3")
    assert (sliding.n_heads, sliding.window, sliding.rope.dim, sliding.rope.scaling) == (96, 512, 128, None)
    limits = []
    for ffn in (spec.layers[i].ffn for i in (2, 3, 43, 44)):
        assert isinstance(ffn, MLP | MoE)
        of = [ffn] if isinstance(ffn, MLP) else [ffn.expert, ffn.shared]
        limits.append([m.limit for m in of if m is not None])
    assert limits == [[None], [None, None], [7.0, None], [7.0, 16.0]]


def test_the_router_is_fp32_where_the_release_says_so() -> None:
    config = read("step-3.5-flash")
    for said, rounding in ((True, "last"), (False, "first")):
        ffn = families.spec_of(config | {"need_fp32_gate": said}).layers[3].ffn
        assert isinstance(ffn, MoE) and ffn.router.rounding == rounding


def test_heads_said_twice_must_agree() -> None:
    config = read("step-3.5-flash")
    families.spec_of(config | {"per_layer_config": {"1": {"num_attention_heads": 96}}})
    with pytest.raises(ZooError, match="num_attention_heads is 64"):
        families.spec_of(config | {"per_layer_config": {"1": {"num_attention_heads": 64}}})
    with pytest.raises(ZooError, match="'45' is no layer"):
        families.spec_of(config | {"per_layer_config": {"45": {"num_attention_heads": 96}}})


def test_a_release_that_names_its_language_model_is_the_same_model(tmp_path: Path) -> None:
    release = build.make(CASE, CASE.variants[0], tmp_path / "release")
    within = {
        k.replace("model.", "model.language_model.", 1) if k.startswith("model.") else k: t
        for k, t in build.read_tensors(release).items()
    }
    plain = zoo.convert(release, tmp_path / "plain")
    build.write_tensors(release, within, None)
    assert (
        "model.language_model.layers.3.moe.gate_proj.weight" in within
        and "model.language_model.layers.5.eh_proj.weight" in within
    )
    canon = zoo.convert(release, tmp_path / "within")
    ours, theirs = (sorted(folder.glob("model-*.safetensors")) for folder in (canon, plain))
    assert [f.read_bytes() for f in ours] == [f.read_bytes() for f in theirs] != []
    assert zoo.verify(canon, level="logits", write=False).passed
    zoo.export(canon, tmp_path / "back")
    assert build.read_tensors(tmp_path / "back").keys() == within.keys()
