"""Export: what was released comes back to the byte; what was changed comes back as a checkpoint upstream loads."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.mapping import decode, execute
from zoo.mapping import export as export_module
from zoo.mapping.execute import convert
from zoo.mapping.export import export
from zoo.mapping.plan import make_plan


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def converted(source: Path, dst: Path, dtype: str | None = None, shard_size: int = 40_000) -> Path:
    return convert(make_plan(open_checkpoint(source), dtype=dtype), dst, shard_size=shard_size)


# --- to the byte --------------------------------------------------------------------------------------------------


def test_a_single_file_comes_back_as_one(tmp_path: Path) -> None:
    source = tiny.make("qwen3_next_mtp", tmp_path / "source")
    assert (source / "model.safetensors").exists()
    export(converted(source, tmp_path / "canon"), tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


def test_headers_in_any_style_and_order_come_back(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "source", dtype="bfloat16")
    raw = (source / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    odd = json.dumps(dict(reversed(header.items())), indent=3).encode() + b" " * 13
    (source / "model.safetensors").write_bytes(len(odd).to_bytes(8, "little") + odd + raw[8 + n :])
    export(converted(source, tmp_path / "canon"), tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


def test_bits_that_no_number_has_come_back(tmp_path: Path) -> None:
    source = tiny.make("gpt_oss", tmp_path / "source", dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        n: torch.randint(-(2**15), 2**15, t.shape, generator=generator, dtype=torch.int16).view(t.dtype)
        for n, t in tensors.items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    export(converted(source, tmp_path / "canon"), tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


def test_parts_of_different_dtypes_come_back_in_their_own(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "source", dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors[
        "model.layers.1.self_attn.k_proj.weight"
    ].float()
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].half()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    export(converted(source, tmp_path / "canon"), tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


@pytest.mark.parametrize("equal", [True, False], ids=["a copy", "its own"])
def test_a_head_that_is_stored_although_tied_comes_back(equal: bool, tmp_path: Path) -> None:
    source = tiny.make("llama_tied", tmp_path / "source", dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embed.clone() if equal else embed + 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    export(converted(source, tmp_path / "canon"), tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next", "gpt2", "llama4"])
def test_the_way_through_memory_gives_the_same_bytes_in_pieces_of_any_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.make(name, tmp_path / "source", dtype="bfloat16")
    canon = converted(source, tmp_path / "canon")
    monkeypatch.setattr(export_module, "in_kernel", lambda loop, itemsize: False)
    monkeypatch.setattr(decode, "MAPPED", 3_000)
    export(canon, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


def test_an_interrupted_export_leaves_nothing_under_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.make("llama", tmp_path / "source", dtype="bfloat16")
    canon = converted(source, tmp_path / "canon")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(execute, "copy", stop)
        with pytest.raises(KeyboardInterrupt):
            export(canon, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    export(canon, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


# --- as a new checkpoint ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama", "gemma3_vision", "qwen3_moe", "gpt_oss", "kimi_k2", "gpt2", "nemotron_h"]
)
def test_a_cast_checkpoint_is_one_that_upstream_loads(name: str, tmp_path: Path) -> None:
    source = tiny.make(name, tmp_path / "source", dtype="bfloat16")
    export(converted(source, tmp_path / "canon", "fp32"), tmp_path / "back", shard_size=50_000)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config.get("torch_dtype") or config.get("dtype")) == "float32"
    ids = tiny.tokens(name)
    with torch.inference_mode():
        a, b = (tiny.logits(tiny.upstream(p), ids) for p in (source, tmp_path / "back"))
    assert torch.equal(a, b)


def test_extras_go_along_with_a_cast_checkpoint(tmp_path: Path) -> None:
    source = tiny.make("deepseek_v3_mtp", tmp_path / "source", dtype="bfloat16")
    export(converted(source, tmp_path / "canon", "fp32"), tmp_path / "back")
    before, after = (open_checkpoint(p).tensors for p in (source, tmp_path / "back"))
    assert sorted(before) == sorted(after)
    assert {t.dtype for n, t in after.items() if n.startswith("model.layers.3.")} >= {"BF16"}, "as released"


def test_a_new_checkpoint_converts_to_the_same_canonical_tensors(tmp_path: Path) -> None:
    source = tiny.make("gpt_oss", tmp_path / "source", dtype="bfloat16")
    canon = converted(source, tmp_path / "canon", "fp32")
    again = converted(export(canon, tmp_path / "back"), tmp_path / "again")
    files = [p.name for p in canon.glob("*.safetensors")]
    assert {f: hashes(canon)[f] for f in files} == {f: hashes(again)[f] for f in files}


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_rules_that_have_changed_since_do_not_give_back_something_else(tmp_path: Path) -> None:
    canon = converted(tiny.make("llama", tmp_path / "source"), tmp_path / "canon")
    j = json.loads((canon / "zoo.json").read_text())
    j["source"]["plan"] = "0" * 32
    (canon / "zoo.json").write_text(json.dumps(j))
    with pytest.raises(ZooError, match="rules have changed since it was converted"):
        export(canon, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_part_of_a_model_is_not_exported(tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(tiny.make("llama", tmp_path / "source"))).restrict([0])
    canon = convert(plan, tmp_path / "canon")
    with pytest.raises(ZooError, match=r"holds layers \[0\] only"):
        export(canon, tmp_path / "back")


def test_what_is_no_canonical_folder_is_refused(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "source")
    with pytest.raises(ZooError, match="not a canonical checkpoint"):
        export(source, tmp_path / "back")
    canon = converted(source, tmp_path / "canon")
    with pytest.raises(ZooError, match="is a canonical checkpoint already"):
        open_checkpoint(canon)
    with pytest.raises(ZooError, match="unknown format 'onnx'"):
        export(canon, tmp_path / "back", format="onnx")


def test_an_existing_destination_is_refused(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "source")
    canon = converted(source, tmp_path / "canon")
    with pytest.raises(ZooError, match="exists already"):
        export(canon, source)
    export(canon, tmp_path / "back")
    export(canon, tmp_path / "back", force=True)
    with pytest.raises(ZooError, match=r"holds what zoo did not write|holds the checkpoint"):
        export(canon, canon, force=True)


# --- folders that somebody else made ----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["../secret"], ["/etc/hostname"], ["config.json", 3], "config.json"])
def test_carried_files_that_lie_elsewhere_are_refused(names: object, tmp_path: Path) -> None:
    canon = converted(tiny.make("llama", tmp_path / "source"), tmp_path / "canon")
    (tmp_path / "secret").write_text("x")
    described = json.loads((canon / "zoo.json").read_text())
    (canon / "zoo.json").write_text(json.dumps(described | {"carried": names}))
    with pytest.raises(ZooError, match="outside the checkpoint's folder|expected names of files"):
        export(canon, tmp_path / "deep" / "back")
    assert not (tmp_path / "deep").exists()


def test_a_released_file_that_would_lie_elsewhere_is_refused(tmp_path: Path) -> None:
    canon = converted(tiny.make("llama", tmp_path / "source"), tmp_path / "canon")
    described = json.loads((canon / "zoo.json").read_text())
    files = described["source"]["files"]
    files["../evil.safetensors"] = files.pop("model.safetensors")
    (canon / "zoo.json").write_text(json.dumps(described))
    with zipfile.ZipFile(canon / "source.zip") as z:
        raw = z.read("headers/model.safetensors")
    with zipfile.ZipFile(canon / "source.zip", "w") as z:
        z.writestr("headers/../evil.safetensors", raw)
    with pytest.raises(ZooError, match="outside"):
        export(canon, tmp_path / "back")
    assert not (tmp_path / "evil.safetensors").exists() and not (tmp_path / "back").exists()


def test_kept_headers_that_are_damaged_or_gone_are_named(tmp_path: Path) -> None:
    canon = converted(tiny.make("llama", tmp_path / "source"), tmp_path / "canon")
    whole = (canon / "source.zip").read_bytes()
    for at in range(40, len(whole), max(1, len(whole) // 40)):
        (canon / "source.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            export(canon, tmp_path / "back")
        except ZooError as error:
            assert "source.zip" in str(error) or "convert" in str(error)
        else:  # a byte that says nothing, such as a date's
            assert hashes(tmp_path / "back") == hashes(tmp_path / "source")
            shutil.rmtree(tmp_path / "back")
    (canon / "source.zip").unlink()
    with pytest.raises(ZooError, match=r"source\.zip: missing"):
        export(canon, tmp_path / "back")


def test_force_replaces_an_export_but_no_folder_that_holds_more(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "source")
    canon = converted(source, tmp_path / "canon")
    export(canon, tmp_path / "back")
    export(canon, tmp_path / "back", force=True)
    assert hashes(tmp_path / "back") == hashes(source)
    (tmp_path / "back" / "notes").write_text("keep")
    with pytest.raises(ZooError, match="not replaced, even with --force"):
        export(canon, tmp_path / "back", force=True)
    assert (tmp_path / "back" / "notes").read_text() == "keep"


@pytest.mark.parametrize(
    ("key", "value"),
    [("files", 3), ("naming", ["hf"]), ("n_ranks", "x"), ("family", None), ("prefix", 1), ("format", {})],
)
def test_a_description_that_zoo_did_not_write_is_an_error_of_that_file(
    key: str, value: object, tmp_path: Path
) -> None:
    canon = converted(tiny.make("llama", tmp_path / "source"), tmp_path / "canon")
    described = json.loads((canon / "zoo.json").read_text())
    described["source"][key] = value
    (canon / "zoo.json").write_text(json.dumps(described))
    try:
        export(canon, tmp_path / "back")
    except ZooError:
        assert not (tmp_path / "back").exists()
