"""Releases that mix ways to store weights, as their own configs say: each weight is read as what it is, carried where it can be,
and given back to the byte."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import packs
import pytest
import tiny
import torch
import vendor

import zoo
from zoo import manifest
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.mapping.export import export
from zoo.mapping.plan import make_plan
from zoo.model.load import load
from zoo.quant.schemes import named
from zoo.testing.build import read_config, read_tensors, write_config, write_tensors

How = Callable[[str], packs.Pack | None]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2}
HEADS = SIZES | {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = HEADS | {"moe_intermediate_size": 32}
DELTA = SIZES | {
    "num_hidden_layers": 4, "linear_value_head_dim": 16, "linear_key_head_dim": 16, "vocab_size": 160,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip


def by_modelopt(said: Mapping[str, Any]) -> How:
    """How ModelOpt writes each weight, by what its config says: `quantized_layers` by name, or `quant_algo` for all but those
    left out. Experts that are named as one are numbered."""
    packers = {
        "FP8": packs.fp8("tensor"), "NVFP4": packs.fp4("modelopt"), "W4A16_NVFP4": packs.fp4("modelopt"), "MXFP8": packs.fp8("mx"),
    }  # fmt: skip
    layers, left_out = said.get("quantized_layers"), said.get("ignore") or said.get("exclude_modules") or ()

    def how(name: str) -> packs.Pack | None:
        module = name.removesuffix(".weight")
        if layers is not None:
            algo = layers.get(module) or layers.get(module.partition(".experts.")[0] + ".experts")
            return packers[algo["quant_algo"]] if algo else None
        linear = (
            re.search(r"layers\.\d+\..*(_proj|\.w[123])\.weight$", name)
            and "mtp" not in name
            and "visual" not in name
        )
        return (
            packers[said["quant_algo"]] if linear and not any(fnmatch(module, p) for p in left_out) else None
        )

    return how


def by_blocks(said: Mapping[str, Any], scales: torch.dtype = torch.float32) -> How:
    """How a `quant_method` of fp8 writes each weight: in blocks, but for the modules that it leaves out."""
    pack, left_out = packs.fp8("block", scales), said.get("modules_to_not_convert") or ()

    def how(name: str) -> packs.Pack | None:
        linear = "layers." in name and not re.search(r"norm|mlp\.gate\.|weights_proj|mtp", name)
        return pack if linear and not any(name.removesuffix(".weight") == x for x in left_out) else None

    return how


def by_name(patterns: dict[str, packs.Pack | None]) -> How:
    """The pack of the first pattern that is in the name."""
    return lambda name: next((p for part, p in patterns.items() if re.search(part, name)), None)


def groups(*weights: dict[str, Any]) -> dict[str, Any]:
    """As llm-compressor writes several schemes."""
    return {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {f"group_{n}": {"targets": [f"re:.*{n}"], "weights": w} for n, w in enumerate(weights)},
    }  # fmt: skip


FLOAT = {"type": "float", "symmetric": True, "dynamic": False}
INT = {"type": "int", "symmetric": True, "dynamic": False}
FP8_ROW = FLOAT | {"num_bits": 8, "strategy": "channel"}
NVFP4 = FLOAT | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}
MXFP8 = FLOAT | {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
W8A8 = INT | {"num_bits": 8, "strategy": "channel"}
W4 = INT | {"num_bits": 4, "strategy": "group", "group_size": 32}


@dataclass(frozen=True)
class Release:
    variant: str
    settings: dict[str, Any]
    said: str | dict[str, Any]  # quantization_config, or the release whose own it is
    schemes: set[str]
    how: How | None = None
    beside: dict[str, torch.Tensor] = field(default_factory=dict)  # tensors beside the weights

    @property
    def config(self) -> dict[str, Any]:
        if isinstance(self.said, dict):
            return self.said
        released = manifest.find(self.said).config
        assert released is not None
        found: dict[str, Any] = released["quantization_config"]
        return found

    @property
    def written(self) -> How:
        return self.how or (by_modelopt if self.config["quant_method"] == "modelopt" else by_blocks)(
            self.config
        )


RELEASES: dict[str, Release] = {
    "qwen3-32b-fp8": Release("qwen3", HEADS, "qwen3-32b-fp8", {"fp8-block"}),
    "glm-5-fp8": Release("glm_moe_dsa", {"index_head_dim": 16, "index_n_heads": 4}, "glm-5-fp8", {"fp8-block"}),
    "fp8, scales that are exponents": Release(
        "deepseek_v3", {}, {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, {"fp8-block"},
        by_blocks({}, torch.float8_e8m0fnu),
    ),
    "hy3-fp8": Release(
        "hy_v3", {}, {"quant_method": "fp8", "activation_scheme": "static"}, {"fp8-tensor"},
        by_name({r"shared_m|norm|gate\.|router": None, r"layers.*(_proj|experts)": packs.fp8("tensor", torch.bfloat16)}),
    ),
    "nvfp4, fp8": Release("qwen3_5", DELTA | {"intermediate_size": 48}, "qwen3.6-27b-nvfp4", {"nvfp4", "fp8-tensor"}),
    "nvfp4 experts, fp8": Release(
        "qwen3_5_moe", DELTA | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}, "qwen3.6-35b-a3b-nvfp4",
        {"nvfp4", "fp8-tensor"},
    ),
    "nvfp4 experts, mxfp8": Release(
        "qwen3_moe", EXPERTS, {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, {"nvfp4", "fp8-block-1x32"},
        by_name({"experts": packs.fp4("modelopt"), "self_attn": packs.fp8("mx")}),
    ),
    "packed nvfp4, fp8 rows": Release(
        "qwen3", HEADS, groups(NVFP4, FP8_ROW), {"nvfp4-packed", "fp8-channel"},
        by_name({"mlp": packs.fp4("compressed"), "self_attn": packs.fp8("channel", torch.bfloat16)}),
    ),
    "int4, int8 rows": Release(
        "llama", HEADS, groups(W4, W8A8), {"int4-group32", "int8-channel"},
        by_name({"mlp": packs.packed(4, 32), "self_attn": packs.int8()}),
    ),
    "mxfp8, packed nvfp4 experts": Release(
        "qwen3_moe", EXPERTS, groups(MXFP8, NVFP4), {"nvfp4-packed", "fp8-block-1x32"},
        by_name({"experts": packs.fp4("compressed"), "self_attn": packs.fp8("mx")}),
    ),
    "fp8, some rows in bf16": Release(
        "qwen3", HEADS, {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.mlp.down_proj"]}, {"fp8-tensor"},
        by_name({"layers.0.mlp.down": None, "_proj": packs.fp8("tensor", torch.bfloat16)}),
    ),
    "int4 of gated attention": Release("qwen3_5", DELTA | {"intermediate_size": 48}, groups(W4), {"int4-group32"}, by_name({"attn.*(in_proj_qkv|in_proj_z|[qkv]_proj)[.]": packs.packed(4, 32)})),
}  # fmt: skip


def write(r: Release, at: Path) -> tuple[Path, Path]:
    """(the release, the same with the values that its codes stand for)."""
    path = vendor.make(at / "hf", r.variant, **r.settings)
    coded, plain = packs.mixed(read_tensors(path), r.written)
    (at / "plain").mkdir()
    write_config(at / "plain", read_config(path))
    write_tensors(at / "plain", plain)
    key = "quantization_config" if "quant_method" in r.config else "quantization"
    write_config(path, read_config(path) | {key: r.config})
    write_tensors(path, coded | r.beside)
    return path, at / "plain"


def logits(path: Path, r: Release) -> torch.Tensor:
    with vendor.variant("here", r.variant, **r.settings) as name, torch.inference_mode():
        return load(path, dtype=torch.float32)(tiny.tokens(name))


ALWAYS = {"nvfp4, fp8", "packed nvfp4, fp8 rows", "int4, int8 rows", "mxfp8, packed nvfp4 experts"}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in ALWAYS else pytest.mark.proof) for k in RELEASES]
)
def test_each_weight_is_what_its_own_codes_stand_for_and_comes_back_to_the_byte(
    kind: str, tmp_path: Path
) -> None:
    r = RELEASES[kind]
    path, plain = write(r, tmp_path)
    fp32 = vendor.canonical(path, tmp_path / "fp32", dtype="fp32")
    vendor.same(fp32, vendor.canonical(plain, tmp_path / "want", dtype="fp32"))
    assert set(make_plan(ckpt := open_checkpoint(path)).quant.values()) == r.schemes
    assert set(named(ckpt.tensors, ckpt.config)) == r.schemes
    vendor.canonical(path, tmp_path / "carried")
    assert torch.equal(logits(tmp_path / "carried", r), logits(tmp_path / "fp32", r))
    assert zoo.verify(tmp_path / "carried", level="bytes", write=False).passed
    export(tmp_path / "carried", tmp_path / "back")
    for file in path.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def several(
    q: packs.Pack | None,
    k: packs.Pack | None,
    v: packs.Pack | None,
    gate: packs.Pack | None,
    up: packs.Pack | None,
) -> How:
    """Parts that are fused here, each stored in a way of its own."""
    return by_name({"q_proj": q, "k_proj": k, "v_proj": v, "gate_proj": gate, "up_proj": up})


NF4, ROWS = packs.bnb4(), packs.int8()
BNB = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "llm_int8_skip_modules": ["lm_head"],
}
MLX_BITS = {"group_size": 32, "bits": 3} | {
    f"model.layers.{i}.self_attn.v_proj": {"group_size": 32, "bits": 6} for i in range(2)
}
APART: dict[str, tuple[str, dict[str, Any], dict[str, Any], How]] = {
    # id: (variant, settings, quantization_config, how)
    "unsloth, some in bf16": ("llama", HEADS, BNB, several(None, NF4, NF4, NF4, None)),
    "mlx, more bits for values": (
        "qwen3", HEADS, MLX_BITS, several(packs.mlx(3, 32), packs.mlx(3, 32), packs.mlx(6, 32), packs.mlx(3, 32), packs.mlx(3, 32)),
    ),
    "nvfp4 beside int8 rows": ("llama", HEADS, groups(NVFP4, W8A8), several(packs.fp4("compressed"), ROWS, None, ROWS, packs.fp4("compressed"))),
    "awq, some not": ("qwen3_moe", EXPERTS, {"quant_method": "awq", "bits": 4, "group_size": 32}, several(packs.awq(32), None, packs.awq(32), None, packs.awq(32))),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if "mlx" in k else pytest.mark.proof) for k in APART]
)
def test_parts_stored_in_several_ways_are_dequantised_each_by_its_own(kind: str, tmp_path: Path) -> None:
    variant, settings, said, how = APART[kind]
    path, plain = write(Release(variant, settings, said, set(), how), tmp_path)
    with pytest.raises(ZooError, match=r"stored in several ways \(.*\); convert with --dtype") as e:
        make_plan(open_checkpoint(path))
    assert "unexpected" not in str(e.value)
    fp32 = vendor.canonical(path, tmp_path / "fp32", dtype="fp32")
    vendor.same(fp32, vendor.canonical(plain, tmp_path / "want", dtype="fp32"))
    assert zoo.verify(tmp_path / "fp32", level="bytes", write=False).passed
