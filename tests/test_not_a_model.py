"""What people take for a checkpoint and is none: one line says what it is, and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.cli.export import written_since
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.formats.base import read_json
from zoo.spec import Spec
from zoo.text import Text
from zoo.verify.exact import spec_differences

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456789\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tiny.make("llama", tmp_path / "r")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_called_that(name: str, root: Path) -> None:
    (root / "model.safetensors").unlink()
    (root / name).write_text(POINTER)
    with pytest.raises(ZooError, match=rf"{name}: a git-lfs pointer .*git lfs pull"):
        open_checkpoint(root)


@pytest.mark.parametrize("saved", [POINTER, "\n<!doctype html>\n<html>" + " " * 20])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model.gguf", "config.json", "model.safetensors.index.json", "tokenizer.json"],
)
def test_what_was_saved_in_a_files_place_is_called_what_it_is(name: str, saved: str, root: Path) -> None:
    if name not in ("config.json", "tokenizer.json"):
        (root / "model.safetensors").unlink()
    (root / name).write_text(saved)
    said = f"{name}: a " + ("git-lfs pointer" if saved == POINTER else "web page")
    with pytest.raises(ZooError, match=said):
        Text(root) if name == "tokenizer.json" else open_checkpoint(root)


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        (b"Entry not found" + b" " * 60, "a text .*it begins 'Entry no"), (b'{"error":"Repository not found"}', "a text"),
        (b'<?xml version="1.0"?><Error>', "a web page"), (b"\0" * 4096, "begins with zeros"),
        (b"\x1f\x8b\x08" + b"\0" * 90, r"compressed \(gzip\)"), (b"\x28\xb5\x2f\xfd" + b"\1" * 90, r"compressed \(zstd\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf"])
def test_an_answer_zeros_or_a_compressed_file_in_weights_place_are_called_what_they_are(
    name: str, saved: bytes, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(saved)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ZooError, match=rf"{name}: {says}"):
        open_checkpoint(tmp_path)
    if not saved.startswith(b"{"):
        (tmp_path / "config.json").write_bytes(saved[:64])
        with pytest.raises(
            ZooError, match=r"config\.json: (a web page|begins with zeros|compressed|not valid JSON)"
        ):
            read_json(tmp_path / "config.json", "it is needed")


def test_a_tokenizer_that_is_a_pointer_is_said_before_it_is_missed(root: Path) -> None:
    (root / "tokenizer.json").write_text(POINTER)
    (note,) = open_checkpoint(root).notes
    assert "tokenizer.json: git-lfs pointers" in note and "git lfs pull" in note


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_is_called_that_with_its_base(with_config: bool, root: Path) -> None:
    (root / "model.safetensors").rename(root / "adapter_model.safetensors")
    (root / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    )
    if not with_config:
        (root / "config.json").unlink()
    with pytest.raises(
        ZooError, match=r"an adapter \(LORA\) to org/base, not a model: convert that, and merge this"
    ):
        open_checkpoint(root)


def test_an_adapter_that_zoo_does_not_merge_is_left_to_peft(root: Path) -> None:
    (root / "model.safetensors").rename(root / "adapter_model.safetensors")
    (root / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ZooError, match="a model that it does not name.*with peft .*zoo merges LoRA$"):
        open_checkpoint(root)


def test_a_folder_in_a_files_place_is_called_that(root: Path) -> None:
    (root / "model.safetensors").unlink()
    (root / "model.safetensors").mkdir()
    with pytest.raises(ZooError, match="model.safetensors is a folder, where a file is expected"):
        open_checkpoint(root)


def test_a_model_beside_an_adapter_is_read(root: Path) -> None:
    (root / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, root / "adapter_model.safetensors")
    ckpt = open_checkpoint(root)
    (note,) = ckpt.notes
    assert set(ckpt.files) == {"model.safetensors"} and "not merged into it" in note


@pytest.mark.parametrize("pickled", [True, False])
def test_weights_that_were_not_gathered_are_called_that(pickled: bool, root: Path) -> None:
    tensors = {k: t[:0].clone() for k, t in load_file(root / "model.safetensors").items()}
    if pickled:
        (root / "model.safetensors").unlink()
        torch.save(tensors, root / "pytorch_model.bin")
    else:
        save_file(tensors, root / "model.safetensors")
    with pytest.raises(ZooError, match="is empty .*ZeRO-3 or FSDP without gathering"):
        open_checkpoint(root)


@pytest.mark.parametrize("name", ["hf_model_0001_0.pt", "model.pth", "lit_model.pth"])
def test_a_trainers_own_file_is_called_that(name: str, root: Path) -> None:
    (root / "model.safetensors").rename(root / name)
    with pytest.raises(ZooError, match=rf"{name} is called neither as Hugging Face's nor as Meta's"):
        open_checkpoint(root)


def test_a_folder_called_as_a_file_is_called_that(root: Path) -> None:
    (root / "model.safetensors").unlink()
    (root / "pytorch_model.bin").mkdir()
    with pytest.raises(ZooError, match=r"pytorch_model\.bin: a folder, as DeepSpeed's"):
        open_checkpoint(root)


def test_an_export_of_edited_weights_is_seen(root: Path, tmp_path: Path) -> None:
    folder = zoo.convert(root, tmp_path / "c")
    assert written_since(folder) is None
    file = next(folder.glob("model-*.safetensors"))
    later = (folder / "zoo.json").stat().st_mtime + 60
    os.utime(file, (later, later))
    assert written_since(folder) == file.name


def test_a_declared_dtype_is_no_difference_and_another_field_is_named(root: Path, tmp_path: Path) -> None:
    folder = zoo.convert(root, tmp_path / "c")
    description = json.loads((folder / "zoo.json").read_text())
    description["spec"]["dtype"] = None
    (folder / "zoo.json").write_text(json.dumps(description))
    cert = zoo.verify(folder, level="bytes", write=False)
    assert cert.passed and any("not compared" in n for n in cert.level("plan").notes)
    config = json.loads((root / "config.json").read_text())
    (folder / "config.released.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "dtype"})
    )
    cert = zoo.verify(folder, level="bytes", write=False)
    assert cert.passed and any("in the dtype that it declares" in n for n in cert.level("bytes").notes)
    (folder / "config.released.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert not zoo.verify(folder, level="bytes", write=False).passed
    description["spec"]["vocab_size"] += 1
    a, b = Spec.from_dict(description["spec"]), zoo.spec(root)
    (said,) = spec_differences(a, b)
    assert said == f"vocab_size is {b.vocab_size + 1} in the folder, {b.vocab_size} by the source"
