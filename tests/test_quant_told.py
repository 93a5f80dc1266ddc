"""What `zoo show`, `zoo inspect` and `zoo list` say of quantised weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import packs
import pytest
import vendor
from click.testing import CliRunner

from zoo import manifest
from zoo.cli import cli
from zoo.quant.told import told
from zoo.testing.build import read_config, read_tensors, write_config, write_tensors


@pytest.mark.parametrize(
    "q, line",
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}, "fp8: e4m3, a scale per 128x128; as they are: lm_head"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "awq: 4 bits, a scale per 128, version gemm"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": True}, "gptq: 8 bits, a scale per row, act-order"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head", "model.layers.3.mlp", "model.layers.11.mlp"]},
            "bitsandbytes: nf4, a scale per 64, scales in 8 bits; as they are: model.layers.*.mlp (2), lm_head",
        ),
        (
            {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": False}}}},
            "compressed-tensors: integers of 4 bits with zero points, a scale per 32 in all linear layers; as they are: lm_head",
        ),
        ({"bits": 4, "group_size": 64, "model.a": {"bits": 6}, "model.b": {"bits": 6}}, "MLX: 4 bits, a scale per 64; 6 bits, a scale per 64 in 2 modules"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}, "modelopt: NVFP4; as they are: lm_head"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({}, None),
    ],
)  # fmt: skip
def test_a_config_is_told_in_a_line(q: dict[str, Any], line: str | None) -> None:
    assert told({"quantization_config": q}) == told({"text_config": {"quantization_config": q}}) == line


def ran(*args: str) -> str:
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    return result.output


def test_show_says_what_a_release_or_a_config_has(tmp_path: Path) -> None:
    config = manifest.find("qwen3.6-27b-nvfp4").config
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("qwen3.6-27b-nvfp4", str(tmp_path / "config.json")):
        said = json.loads(ran("show", "--json", name))["quantisation"]
        assert said.startswith("modelopt: ") and "NVFP4, activations as they are in 193 modules" in said
        assert "fp8, one scale a tensor in 208 modules" in said and said.endswith(
            "as they are: mtp*, mtp.layers.0*"
        )


def test_inspect_counts_weights_and_bytes_by_scheme(tmp_path: Path) -> None:
    path = vendor.make(
        tmp_path / "hf",
        "llama",
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    coded, _ = packs.quantise(read_tensors(path), packs.awq(32), lambda name: name.endswith("_proj.weight"))
    write_tensors(path, coded)
    write_config(
        path,
        read_config(path) | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}},
    )
    codes = sum(t.nbytes for n, t in coded.items() if n.endswith(("qweight", "qzeros", "scales")))
    whole = sum(t.nbytes for t in coded.values())
    seen = json.loads(ran("inspect", "--json", str(path)))
    assert seen["quantisation"] == "awq: 4 bits, a scale per 32"
    assert seen["bytes_by_scheme"] == {"awq4-group32": codes, "plain": whole - codes}
    vendor.canonical(path, tmp_path / "canon")
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    write_config(path, {k: v for k, v in read_config(path).items() if k != "quantization_config"})
    alone = json.loads(ran("inspect", "--json", str(path)))["quantisation"]
    assert alone == "hf_quant_config.json has quant_algo 'NVFP4'"  # as NVIDIA's older releases have it
    assert (
        json.loads(ran("inspect", "--json", str(tmp_path / "canon")))["bytes_by_scheme"]
        == seen["bytes_by_scheme"]
    )


def test_list_keeps_those_of_a_scheme() -> None:
    names = {m["name"] for m in json.loads(ran("list", "--json", "--scheme", "nvfp4"))}
    assert "qwen3.6-27b-nvfp4" in names and all(
        "nvfp4" in (manifest.find(n).quantization or "") for n in names
    )
    assert {m["name"] for m in json.loads(ran("list", "--json", "--scheme", "fp8-tensor"))} >= {
        "qwen3.6-27b-nvfp4"
    }
    result = CliRunner().invoke(cli, ["list", "--scheme", "exl2"])
    assert "no way of quantising is called 'exl2'" in str(result.exception)
