"""Kimi Linear: layers are counted from 1, and transformers renames the dense ones when it saves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo import families
from zoo.errors import ZooError
from zoo.testing import BASE, FULL, LINEAR, FamilyCase, Listed, Variant, build
from zoo.testing.assemble import assemble, in_other_names, same
from zoo.testing.build import rename
from zoo.testing.full_size import mixers, read
from zoo.testing.names import Config, Tensor
from zoo.testing.variant import Draw, Settings, Tensors

# fmt: off

_KIMI_LINEAR = BASE | {
    "hidden_size": 44, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 15,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 9, "intermediate_size": 52,
    "moe_intermediate_size": 28, "num_hidden_layers": 5, "num_local_experts": 8, "num_experts_per_tok": 3,
    "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7,
    "linear_head_dim": 10, "linear_num_heads": 3, "linear_conv_kernel_dim": 3,
    "layer_types": [LINEAR, LINEAR, FULL, LINEAR, FULL],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse"],
}

# fmt: on


def dense_name(name: str) -> str:
    """Dense layers are released as `mlp.*`; `save_pretrained` writes `block_sparse_moe.*`."""
    return re.sub(r"(layers\.\d+)\.block_sparse_moe\.((?:gate|up|down)_proj)\.", r"\1.mlp.\2.", name)


def dense_as_released(case: FamilyCase, tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    return {dense_name(name): t for name, t in tensors.items()}


def kimi_linear_release(tensors: Tensors, config: Settings, draw: Draw) -> None:
    rename(tensors, dense_name)


def released(config: Settings) -> Settings:
    """Layers are counted from 1; dense layers are the first ones."""
    kinds = config.pop("layer_types")
    config["linear_attn_config"] = {
        "full_attn_layers": [i for i, kind in enumerate(kinds, 1) if kind == "full_attention"],
        "kda_layers": [i for i, kind in enumerate(kinds, 1) if kind == "linear_attention"],
        "head_dim": config.pop("linear_head_dim"),
        "num_heads": config.pop("linear_num_heads"),
        "short_conv_kernel_size": config.pop("linear_conv_kernel_dim"),
    }
    config["first_k_dense_replace"] = config.pop("mlp_layer_types").count("dense")
    config["head_dim"] = 72  # the release has one that nothing uses
    return config | {
        "mla_use_nope": True,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "rope_theta": 10000.0,
        "num_nextn_predict_layers": 0,
    }


def upstream_weighs_experts_by_scores_without_the_bias() -> None:
    router = next(m for m in build.fresh(CASE.variants[0]).modules() if hasattr(m, "e_score_correction_bias"))
    h = torch.randn(5, router.hidden_dim, generator=torch.Generator().manual_seed(0))
    before, router.e_score_correction_bias = router(h), router.e_score_correction_bias + 3
    assert torch.equal(before[1], router(h)[1])


# fmt: off
CASE = FamilyCase(
    "kimi_linear",
    (
        Variant("kimi_linear", "KimiLinearForCausalLM", _KIMI_LINEAR,
            "channel-wise gated delta rule and MLA, no positions anywhere; 70 tokens cross a chunk of 64",
            seq_len=70, release=kimi_linear_release),
        Variant("kimi_linear_two_dense", "KimiLinearForCausalLM",
            _KIMI_LINEAR | {
                "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "norm_topk_prob": False,
                "num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, LINEAR],
                "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            },
            "a dense layer of each attention kind, no groups, router weights not renormalised",
            seq_len=70, release=kimi_linear_release),
    ),
    grouped=False,
    layer_kinds=frozenset({FULL, LINEAR}),
    released=dense_as_released,
    mtp_layers={"kimi-linear-48b-a3b": 0},
    listed={"kimi-linear-48b-a3b": Listed("kimi-linear-48b-a3b")},
    refused=(
        ("kimi-linear-48b-a3b", {"mla_use_nope": False}, "mla_use_nope is False"),
        ("kimi-linear-48b-a3b", {"moe_router_activation_func": "softmax"}, "moe_router_activation_func is 'softmax'"),
    ),
    released_text=released,
    optional_rules={
        "layers.{i}.attn.q_down.weight": "V3's queries through a latent",
        "layers.{i}.attn.q_latent_norm.weight": "V3's queries through a latent",
        "layers.{i}.attn.q_up.weight": "V3's queries through a latent",
    },
    disputes={"the selection bias in the routing weights": upstream_weighs_experts_by_scores_without_the_bias},
)
# fmt: on


def test_kimi_linear_counts_its_layers_from_one() -> None:
    spec = families.spec_of(read("kimi-linear-48b-a3b"))
    assert mixers(spec) == "dddl" * 6 + "ddl"


@pytest.mark.parametrize("name", ["kimi_linear", "kimi_linear_two_dense"])
def test_kimi_linears_dense_layers_are_found_where_transformers_saves_them(name: str, tmp_path: Path) -> None:
    folder = build.make(CASE, CASE.variant(name), tmp_path / name)
    hf = load_file(folder / "model.safetensors")
    renamed = {n.replace(".mlp.", ".block_sparse_moe."): t for n, t in hf.items()}
    assert renamed.keys() != hf.keys()
    assert same(assemble(in_other_names(folder, renamed, "saved")), assemble(folder))


def test_layers_that_kimi_linear_lists_twice_or_never_are_refused() -> None:
    config = read("kimi-linear-48b-a3b")
    lists = {**config["linear_attn_config"], "kda_layers": [0, 1, 2]}
    with pytest.raises(ZooError, match="do not make layers 1 to 27"):
        families.spec_of(config | {"linear_attn_config": lists})
