"""Canonical tensors under the names of others: in memory, for a trainer's checkpoint, in files of another dtype or size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
import verified
from click.testing import CliRunner
from safetensors.torch import load_file
from test_quant_models import fp8_blocks, quantised
from test_save import held, same

import zoo
from zoo.cli import cli
from zoo.cli.export import Size
from zoo.errors import ZooError
from zoo.formats.dcp import open_saved
from zoo.testing import build

# Released under one name and held under another: packed experts, transposed ones, a tied head, a fused projection, a prefix.
NAMES = ("gpt_oss", "llama_tied", "qwen3_5_moe", "falcon", "laguna", "gpt2", "deepseek_v3")


def released(name: str) -> dict[str, torch.Tensor]:
    verified.canonical(name)
    files = (verified.ROOT / f"{name}-float32-source").glob("*.safetensors")
    return {k: t for f in files for k, t in load_file(f).items()}


def in_files(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}


@pytest.mark.parametrize("name", [*NAMES[:3], *(pytest.param(n, marks=pytest.mark.proof) for n in NAMES[3:])])
def test_a_state_has_the_releases_names_or_those_of_its_class_and_loads(name: str) -> None:
    canon = verified.canonical(name)
    assert same(zoo.state_dict(canon, "hf"), released(name))
    assert same(zoo.state_dict(canon, "canonical"), zoo.load(canon).state_dict())
    model = build.fresh(tiny.VARIANTS[name])
    state = zoo.state_dict(canon, names="transformers")
    assert not model.load_state_dict(state, strict=False).missing_keys
    assert same(model.state_dict(), tiny.upstream(verified.ROOT / f"{name}-float32-source").state_dict())


@pytest.mark.parametrize(
    "name", ["gpt2_release", "gemma3_vision", *(pytest.param(n, marks=pytest.mark.proof) for n in ("opt_bare", "bloom_bare", "mistral3", "gemma4_unified"))]
)  # fmt: skip
def test_names_in_memory_are_those_of_the_class_where_the_files_begin_otherwise(name: str) -> None:
    """Released without `transformer.`, or within a class that sees images: a trainer's load_state_dict(strict=False) would load none."""
    held = tiny.upstream(verified.ROOT / f"{verified.canonical(name).name}-source").state_dict()
    state = zoo.state_dict(verified.canonical(name), names="transformers")
    assert not held.keys() - state.keys()
    assert all(torch.equal(state[k], t) for k, t in held.items())


def test_a_tower_that_the_class_holds_otherwise_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Kimi's vision tower has its rows moved in memory: no name says that."""
    zoo.state_dict(verified.canonical("kimi_k25"), names="transformers")
    assert (
        "17 tensors beside the model (vision_tower." in caplog.text
        and "load_state_dict leaves them" in caplog.text
    )


def test_a_state_of_released_names_is_views_of_the_files_that_change_no_file(tmp_path: Path) -> None:
    canon = verified.canonical("llama")
    state = zoo.state_dict(canon)
    q, k = (state[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qk")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    q.zero_()
    assert same(zoo.state_dict(canon), released("llama"))
    with pytest.raises(ZooError, match="unknown names 'peft'"):
        zoo.state_dict(canon, "peft")


def test_an_export_in_another_dtype_or_in_smaller_files_has_the_releases_names(tmp_path: Path) -> None:
    canon, old = verified.canonical("qwen3_5_moe"), released("qwen3_5_moe")
    args = ["export", str(canon), str(tmp_path / "small"), "--max-shard-size", "50KB"]
    assert CliRunner().invoke(cli, args).exit_code == 0
    files = sorted((tmp_path / "small").glob("*.safetensors"))
    assert same(in_files(tmp_path / "small"), old) and len(files) > 3
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == old.keys()
    for size in ("many", "0", "0.0001", "1.GB", "iB", "9" * 5000):
        assert CliRunner().invoke(cli, [*args[:-1], size]).exit_code == 2, size
    assert Size().convert("3 KiB", None, None) == 3072 and Size().convert("3kb", None, None) == 3000
    assert Size().convert("1.5GB", None, None) == 1_500_000_000

    done = CliRunner().invoke(cli, ["export", str(canon), str(tmp_path / "bf16"), "--dtype", "bf16"])
    assert done.exit_code == 0, done.output
    new, aside = in_files(tmp_path / "bf16"), {k for k in old if "visual" in k or k.startswith("mtp")}
    assert same(new, {k: t if k in aside else t.bfloat16() for k, t in old.items()})
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert {v for c in (config, config["text_config"]) for k, v in c.items() if k.endswith("dtype")} == {
        "bfloat16"
    }
    assert same(held(zoo.convert(tmp_path / "bf16", tmp_path / "again")), held(zoo.convert(verified.ROOT / "qwen3_5_moe-float32-source", tmp_path / "cast", dtype="bf16")))  # fmt: skip

    same_dtype = zoo.export(canon, tmp_path / "fp32", dtype="fp32")
    for file in (verified.ROOT / "qwen3_5_moe-float32-source").glob("*.safetensors"):
        assert (same_dtype / file.name).read_bytes() == file.read_bytes()
    fp8 = zoo.convert(quantised("qwen3", {}, fp8_blocks, tmp_path / "hf"), tmp_path / "fp8")
    with pytest.raises(ZooError, match="weights are quantised .* convert the source again with --dtype"):
        zoo.export(fp8, tmp_path / "x", dtype="bf16")
    with pytest.raises(ZooError, match='a dtype for "hf"; "dcp" holds tensors as they are'):
        zoo.export(canon, tmp_path / "x", "dcp", dtype="bf16")


def test_a_trainer_loads_what_was_exported_for_it(tmp_path: Path) -> None:
    """By torch's own loader, into the class of transformers and into zoo's decoder."""
    canon, name = verified.canonical("laguna"), "laguna"
    out = tmp_path / "dcp"
    assert CliRunner().invoke(cli, ["export", str(canon), str(out), "--format", "dcp"]).exit_code == 0
    model = build.fresh(tiny.VARIANTS[name])
    state = model.state_dict()
    dcp.load(state, checkpoint_id=str(out), no_dist=True)
    expected = tiny.upstream(verified.ROOT / f"{name}-float32-source").state_dict()
    assert same(state, expected)
    assert same(held(zoo.save(out, canon, tmp_path / "back")), held(canon))

    args = ["export", str(canon), str(out), "--format", "dcp", "--names", "canonical", "--force"]
    assert CliRunner().invoke(cli, args).exit_code == 0
    assert open_saved(out).tensors.keys() == held(canon).keys()
    decoder = zoo.load(canon, trainable=True)
    with torch.no_grad():
        for p in decoder.parameters():
            p.zero_()
    dcp.load(decoder.state_dict(), checkpoint_id=str(out), no_dist=True)
    assert same(decoder.state_dict(), held(canon))
    (out / "notes.txt").write_text("mine")
    done = CliRunner().invoke(cli, args)
    assert "not replaced, even with --force" in str(done.exception)
