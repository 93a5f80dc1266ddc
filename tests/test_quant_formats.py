"""Quantised releases of other tools: each kind is read as what it stands for, carried as it was released where that can be, and
given back to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import packs
import pytest
import tiny
import torch
import vendor

from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.mapping.export import export
from zoo.mapping.plan import make_plan
from zoo.model.load import load
from zoo.testing.build import read_config, read_tensors, write_config, write_tensors

DENSE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 1,
}
EXPERTS = DENSE | {"moe_intermediate_size": 32, "num_hidden_layers": 2}


def linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def gptq(bits: int, group: int, **kw: Any) -> dict[str, Any]:
    """As Qwen's GPTQ releases have it."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    } | kw


def awq(group: int) -> dict[str, Any]:
    """As Qwen's AWQ releases have it."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": None,
    }


CARRIED: dict[str, tuple[str, packs.Pack, dict[str, Any], str]] = {
    # id: (variant, how, quantization_config, scheme)
    "gptq 4": ("qwen2", packs.gptq(4, 32), gptq(4, 32), "gptq4-group32"),
    "gptq 4, act-order": ("llama", packs.gptq(4, 32, ordered=True), gptq(4, 32, desc_act=True), "gptq4-group32"),
    "gptq 8, channels": ("llama", packs.gptq(8, 0, symmetric=True), gptq(8, -1), "gptq8-channel"),
    "gptq 3": ("llama", packs.gptq(3, 32), gptq(3, 32), "gptq3-group32"),
    "gptq 2, act-order, v2": (
        "llama", packs.gptq(2, 16, ordered=True, version=2), gptq(2, 16, checkpoint_format="gptq_v2"), "gptq2-v2-group16",
    ),
    "gptq 4, experts": ("qwen3_moe", packs.gptq(4, 16), gptq(4, 16), "gptq4-group16"),
    "awq": ("qwen2", packs.awq(32), awq(32), "awq4-group32"),
    "awq, experts": ("qwen3_moe", packs.awq(32), awq(32), "awq4-group32"),
    "awq, fused": ("phi3", packs.awq(16), awq(16), "awq4-group16"),
}  # fmt: skip


def release(
    name: str, pack: packs.Pack, config: dict[str, Any], at: Path, key: str = "quantization_config"
) -> tuple[Path, Path]:
    """(the release, the same with the values that its codes stand for)."""
    settings = (
        EXPERTS if "moe" in name else {k: v for k, v in DENSE.items() if name != "phi3" or k != "head_dim"}
    )
    path = vendor.make(at / "hf", name, **settings)
    coded, plain = packs.quantise(read_tensors(path), pack, linear)
    (at / "plain").mkdir()
    write_config(at / "plain", read_config(path))
    write_tensors(at / "plain", plain)
    write_config(path, read_config(path) | {key: config})
    write_tensors(path, coded)
    return path, at / "plain"


def logits(path: Path, name: str) -> torch.Tensor:
    with torch.inference_mode():
        return load(path, dtype=torch.float32)(tiny.tokens(name))


@pytest.mark.parametrize("kind", CARRIED)
def test_a_release_is_what_its_codes_stand_for_carried_or_dequantised_and_comes_back_to_the_byte(
    kind: str, tmp_path: Path
) -> None:
    name, pack, config, scheme = CARRIED[kind]
    path, plain = release(name, pack, config, tmp_path)
    fp32 = vendor.canonical(path, tmp_path / "fp32", dtype="fp32")
    vendor.same(fp32, vendor.canonical(plain, tmp_path / "want", dtype="fp32"))
    bf16 = vendor.canonical(path, tmp_path / "bf16", dtype="bf16")
    assert all(torch.equal(t.to(torch.bfloat16), bf16[n].to(torch.bfloat16)) for n, t in fp32.items())
    assert set(make_plan(open_checkpoint(path)).quant.values()) == {scheme}
    vendor.canonical(path, tmp_path / "carried")
    assert torch.equal(logits(tmp_path / "carried", name), logits(tmp_path / "fp32", name))
    export(tmp_path / "carried", tmp_path / "back")
    for file in path.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    "kind, change, said",
    [
        ("gptq 4", {"checkpoint_format": "marlin"}, "format 'marlin'; of GPTQ zoo reads gptq, gptq_v2"),
        ("gptq 4", {"bits": 5}, "bits 5; of GPTQ zoo reads 2, 3, 4 and 8"),
        ("gptq 4", {"pack_dtype": "int64"}, "pack_dtype 'int64'; zoo reads int32"),
        ("gptq 4", {"group_size": "all"}, "group_size 'all'; expected a whole number"),
        ("gptq 4", {"group_size": 16}, r"q_proj.scales.*expected \[4, 64\]"),
        ("gptq 4", {"bits": 8}, "shape"),
        ("awq", {"version": "gemv"}, "version 'gemv'; of AWQ zoo reads gemm"),
        ("awq", {"bits": 3}, "bits 3; of AWQ zoo reads 4"),
    ],
)
def test_what_is_not_read_of_a_kind_that_is_is_named(
    kind: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    name, pack, config, _ = CARRIED[kind]
    path, _ = release(name, pack, config | change, tmp_path)
    for dtype in (None, "bf16"):
        with pytest.raises(ZooError, match=said):
            make_plan(open_checkpoint(path), dtype=dtype)
