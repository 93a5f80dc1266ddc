"""Trainers' checkpoints, adapters, quantised weights, lists of hashes and GGUF out: each test builds an input that did harm, or
could, and holds zoo to an answer."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import verified
from click.testing import CliRunner
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from zoo import gallery, remote
from zoo.check import NOTES, check
from zoo.cli import cli
from zoo.errors import ZooError
from zoo.formats import canonical, gguf_vocab, safetensors
from zoo.formats import pickle as weights
from zoo.formats.base import MAX_DEPTH, TensorRef, files_below
from zoo.formats.dcp import open_saved
from zoo.formats.wrapped import unwrapped
from zoo.hub import cache
from zoo.hub.files import RemoteFile, Snapshot
from zoo.hub.http import Watch
from zoo.manifest import Source
from zoo.mapping import export_gguf, merge
from zoo.mapping.fold import fold
from zoo.quant import bitsandbytes, schemes
from zoo.quant.base import MAX_SHAPES, check_shape
from zoo.remote import Remote
from zoo.untrusted.alike import alike

# ---- torch.distributed.checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "dcp"
    dcp.save({"w": torch.ones(4, 4), "b": torch.ones(4)}, checkpoint_id=str(path), no_dist=True)
    return path


def metadata_refused(path: Path, raw: bytes) -> str:
    kept = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(raw)
    try:
        with pytest.raises(ZooError) as e:
            saved = open_saved(path)
            saved.get("w")
        return str(e.value)
    finally:
        (path / ".metadata").write_bytes(kept)


SHARED = b"\x80\x04}(K\x00" + b"2\x86" * 60 + b"K\x01u."
"""A key of 2^60 leaves in 130 bytes."""


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"\x80\x04}()" + b"\x85" * 1_000_000 + b"K\x01u.", "ended the process"),
        (b"\x80\x04K\x00r\xff\xff\xff\x7f.", "Memory"),
        (b"\x80\x04" + b"]" * 1_000_000 + b".", "not as torch.distributed.checkpoint writes it"),
        (b"\x80\x04cos\nsystem\n(X\x02\x00\x00\x00idtR.", "names os.system"),
        (b"\x80\x04ctorch\nload\n.", "names torch.load"),
        pytest.param(SHARED, "ended the process", marks=pytest.mark.proof),
    ],
    ids=["depth", "memo", "lists", "code", "torch's code", "sharing"],
)
def test_metadata_that_would_end_the_process_or_never_end_is_refused(
    trained: Path, raw: bytes, says: str
) -> None:
    assert says in metadata_refused(trained, raw)


def larger(told: Any) -> None:
    w = told.state_dict_metadata["w"]
    w.size = torch.Size([1 << 20, 1 << 20])
    w.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), w.size)]


def overlapping(told: Any) -> None:
    """The first half twice, and the second never."""
    half = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 4]))
    told.state_dict_metadata["w"].chunks = [half, half]


def shared(told: Any) -> None:
    """Two tensors of the same bytes."""
    infos = {k.fqn: v for k, v in told.storage_data.items()}
    infos["b"].offset = infos["w"].offset


def outside(told: Any) -> None:
    for info in told.storage_data.values():
        info.relative_path = "../x"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (larger, "in [0-9]+ bytes"),
        (overlapping, "saved twice"),
        (shared, "made of the bytes"),
        (outside, "outside"),
    ],
)
def test_a_piece_is_held_to_the_files_before_room_is_made_for_it(
    trained: Path, change: Callable[[Any], None], says: str
) -> None:
    told = pickle.loads((trained / ".metadata").read_bytes())
    change(told)
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(metadata_refused(trained, pickle.dumps(told)))


# ---- adapters

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def like() -> canonical.Canonical:
    return canonical.read(verified.canonical("llama"))


def adapter(path: Path, tensors: dict[str, torch.Tensor], **told: Any) -> merge.Adapter:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | told
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.{k}": t for k, t in tensors.items()}, path / "adapter_model.safetensors")
    return merge.read_adapter(path)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+x",
        "(.*)*x",
        "(m|m)(o|o)(d|d)(e|e)x",
        ".*.*.*.*x",
        "a" * 501,
        "(",
        "(?=a)*b",
        r"(a)\1",
        "a{99999999999}",
    ],
)
def test_a_pattern_of_an_adapter_that_could_be_matched_for_ever_is_refused(
    pattern: str, tmp_path: Path
) -> None:
    made = merge.Adapter(tmp_path, {"alpha_pattern": {pattern: 1}})
    with pytest.raises(ZooError, match="alpha_pattern"):
        made.scale(Q, None, 2)


@pytest.mark.parametrize(
    "pattern", ["q_proj", r"model\.layers\.(0|1|2).*q_proj", r"layers.\d+.self_attn.q_proj", "^model.*"]
)
def test_a_pattern_that_ends_is_matched_as_peft_does(pattern: str, tmp_path: Path) -> None:
    assert merge.Adapter(tmp_path, {"alpha_pattern": {pattern: 6}}).scale(Q, None, 2) == 3


@pytest.mark.parametrize("alpha", ["4", None, [4], math.nan, True])
def test_an_alpha_that_is_no_number_is_refused(alpha: Any, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="an alpha is"):
        merge.Adapter(tmp_path, {"lora_alpha": alpha}).scale(Q, None, 2)


def test_a_lora_of_another_shape_is_not_spread_over_the_weight(
    like: canonical.Canonical, tmp_path: Path
) -> None:
    d = like.spec.d_model
    for b in (torch.ones(1, 2), torch.ones(d * 7, 2)):
        made = adapter(tmp_path, {f"{Q}.lora_A.weight": torch.ones(2, d), f"{Q}.lora_B.weight": b})
        (change,) = merge._find(like, made).changed.values()
        with pytest.raises(ZooError, match="does not go with the weight"):
            change(torch.ones(d, d))
    for a, b in (
        (torch.ones(0, d), torch.ones(d, 0)),
        (torch.ones(2), torch.ones(2)),
        (torch.ones(3, d), torch.ones(d, 2)),
    ):
        with pytest.raises(ZooError, match="no product of matrices"):
            adapter(tmp_path, {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b})


def test_names_of_an_adapter_are_read_in_a_moment(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="a key of [0-9]+ bytes"):
        adapter(tmp_path, {"x" + ".base_layer" * 90_000 + ".lora_A.weight": torch.ones(1, 1)})


def test_one_number_does_not_stand_for_a_tensor_of_any_size(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1, 1).expand(1 << 20, 64)}, tmp_path / "x.bin")
    with pytest.raises(ZooError, match="an expanded view"):
        weights.read_pickle(tmp_path / "x.bin", "x.bin")
    torch.save({"w": torch.zeros(1, 1).expand(8, 8)}, tmp_path / "x.bin")
    assert weights.read_pickle(tmp_path / "x.bin", "x.bin")[0].shape == (8, 8)


# ---- quantised weights


def refs(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, TensorRef]:
    return {
        (n := k.replace("_", ".", 1) if k != "w_packed" else "w.weight_packed"): TensorRef(n, d, s, "f", 0, 0)
        for k, (d, s) in tensors.items()
    }


INT4 = {"config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 1_000_000, "type": "int"}}}}


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({"quant_method": "gptq", "group_size": 1_000_000}, {"w_qweight": ("I32", (1_000_000, 1)), "w_qzeros": ("I32", (1, 1))}),
        ({"quant_method": "awq", "group_size": 1_000_000}, {"w_qweight": ("I32", (1_000_000, 1)), "w_qzeros": ("I32", (1, 1))}),
        ({"quant_method": "gptq", "format": []}, {"w_qweight": ("I32", (1, 1)), "w_qzeros": ("I32", (1, 1))}),
        ({"quant_method": "compressed-tensors"}, {"w_weight": ("I8", (1, 2_000_000)), "w_weight_scale": ("F32", (1, 2))}),
        ({"quant_method": "compressed-tensors"}, {"w_weight": ("I8", ()), "w_weight_scale": ("F32", (1, 2))}),
        ({"quant_method": "compressed-tensors"} | INT4, {"w_weight_packed": ("I32", (1, 1)), "w_weight_scale": ("F32", ())}),
        ({"bits": 4, "group_size": 1_000_000}, {"w_weight": ("U32", (1, 1)), "w_scales": ("F16", (1, 1)), "w_biases": ("F16", (1, 1))}),
    ],
    ids=["gptq", "awq", "format", "int8", "int8 of no axes", "packed", "mlx"],
)  # fmt: skip
def test_a_group_or_shape_that_no_scheme_has_is_refused(config: dict[str, Any], tensors: Any) -> None:
    with pytest.raises(ZooError):
        schemes.detect("w.weight", refs(**tensors), {"quantization_config": config})


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_words_of_no_axes_are_no_codes(method: str) -> None:
    found = refs(w_qweight=("I32", ()), w_qzeros=("I32", ()))
    assert schemes.detect("w.weight", found, {"quantization_config": {"quant_method": method}}) is None


def test_a_state_or_shape_of_megabytes_is_not_spelled_out() -> None:
    with pytest.raises(ZooError, match="quant_state has"):
        bitsandbytes._state(torch.zeros(bitsandbytes.MAX_STATE + 1, dtype=torch.uint8), 64, False)
    with pytest.raises(ZooError, match="weight_shape has"):
        check_shape(torch.zeros(MAX_SHAPES + 2), (1,), 1)


# ---- zoo check


def test_notes_that_are_no_files_and_folders_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / NOTES).mkdir(parents=True)
    note = tmp_path / NOTES / "a.json.metadata"
    os.mkfifo(note)
    for _ in range(2):
        with pytest.raises(ZooError, match="huggingface-hub notes"):
            check(tmp_path)
        note.unlink()
        note.write_bytes(b"0" * 5000)
    here = tmp_path
    for _ in range(MAX_DEPTH + 1):
        here /= "d"
    here.mkdir(parents=True)
    with pytest.raises(ZooError, match="in one another"):
        files_below(tmp_path)


def test_a_list_without_the_weights_does_not_make_them_unaltered(tmp_path: Path) -> None:
    root = verified.copy(verified.canonical("llama"), tmp_path / "c")
    (root / "parity.json").unlink(missing_ok=True)
    small = (root / "zoo.json").read_bytes()
    listed = {"zoo.json": {"bytes": len(small), "sha256": hashlib.sha256(small).hexdigest()}}
    (by := tmp_path / "by.json").write_text(json.dumps({"canonical": {"files": listed}}))
    report = check(root, by=by)
    assert (
        report.hashed == 1 and "unaltered" not in report.verdict and "has no hash of model-" in report.verdict
    )


# ---- links, and folders that are swapped


def test_no_carried_file_of_a_canonical_folder_leads_out(tmp_path: Path) -> None:
    root = verified.copy(verified.canonical("llama"), tmp_path / "c")
    (secret := tmp_path / "secret").write_text("{}")
    told = json.loads((root / "zoo.json").read_text())
    (root / "tokenizer.json").unlink(missing_ok=True)
    (root / "tokenizer.json").symlink_to(secret)
    (root / "zoo.json").write_text(json.dumps(told | {"carried": [*told["carried"], "tokenizer.json"]}))
    with pytest.raises(ZooError, match="outside the checkpoint's folder"):
        canonical.read(root)


def test_a_gallery_is_not_written_or_cleared_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "collect", lambda _: [])
    (mine := tmp_path / "mine").mkdir()
    (page := mine / "page.html").write_text("mine")
    (site := tmp_path / "site").mkdir()
    (site / "gallery.json").write_text("{}")
    (site / "r").symlink_to(mine)
    with pytest.raises(ZooError, match="is a link"):
        gallery.write(site)
    (site / "r").unlink()
    (site / "index.html").symlink_to(page)
    gallery.write(site)
    assert [p.name for p in mine.iterdir()] == ["page.html"] and page.read_text() == "mine"


def test_a_mark_of_the_cache_is_not_written_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.constants, "HF_HOME", str(tmp_path))
    (mine := tmp_path / "mine").write_text("mine")
    (blob := tmp_path / "blob").write_bytes(b"x")
    file = RemoteFile("blob", 1, "0" * 64, None)
    mark = cache._mark(blob, file)
    mark.parent.mkdir(parents=True)
    mark.symlink_to(mine)
    cache.mark_verified(blob, file, Watch())
    assert mine.read_text() == "mine" and not mark.is_symlink()


def test_a_link_in_place_of_the_marks_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.constants, "HF_HOME", str(tmp_path / "home"))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "zoo").symlink_to(elsewhere)
    (blob := tmp_path / "blob").write_bytes(b"x")
    told: list[str] = []
    watch = Watch()
    monkeypatch.setattr(watch, "note", told.append)
    for _ in range(2):
        cache.mark_verified(blob, RemoteFile("blob", 1, "0" * 64, None), watch)
    assert len(told) == 1 and told[0].startswith(f"{tmp_path / 'home' / 'zoo'} is a link")
    assert "set HF_HOME" in told[0] and not list(elsewhere.iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the folder is held where it has such a path")
def test_a_gguf_is_not_written_through_a_folder_that_is_swapped(tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "x.gguf").write_text("mine")
    partial = tmp_path / "x.gguf.partial"

    def swap(done: int, total: int) -> None:
        if not partial.is_symlink():
            partial.rename(tmp_path / "moved")
            partial.symlink_to(elsewhere)

    export_gguf.export_gguf(verified.canonical("mistral"), tmp_path / "x.gguf", progress=swap)
    assert (elsewhere / "x.gguf").read_text() == "mine" and (tmp_path / "x.gguf").read_bytes()[:4] == b"GGUF"


# ---- vocabularies


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": json.loads('{"type":"Sequence","normalizers":[' * 400 + "null" + "]}" * 400)},
        {"added_tokens": [{"id": 1, "content": 5, "special": True}]},
        {"added_tokens": [{"id": 0.5, "content": "a", "special": True}]},
        {"added_tokens": [{"id": -1, "content": "a", "special": True}]},
    ],
    ids=["nested", "a token that is no text", "half a number", "a negative number"],
)
def test_a_vocabulary_that_is_none_is_refused(change: dict[str, Any]) -> None:
    whole = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}} | change
    with pytest.raises(ZooError):
        gguf_vocab.fields({"tokenizer.json": json.dumps(whole).encode()}, 4, "x")


def test_names_are_likened_to_those_that_could_be_meant() -> None:
    """How alike two names are takes as long as their lengths multiplied, and a repository may list 100,000 of any length."""
    assert alike("config.jsn", ["config.json", "x"]) == ["config.json"]
    letters = [chr(0x4E00 + i) for i in range(200)] * 5
    names = ["".join(random.Random(i).sample(letters, 1000)) for i in range(30)]
    began = time.process_time()
    assert alike(names[0], names * 3000) == alike("config.json", names) == []
    assert time.process_time() - began < 1


def test_of_names_without_end_a_message_looks_at_some() -> None:
    seen = []
    names = (seen.append(i) or "a" * 4000 + f".{i}" for i in range(50_000))  # type: ignore[func-returns-value]
    fold(names)
    assert len(seen) < 2200


def test_a_repository_of_ten_thousand_shards_without_an_index_is_narrowed_at_once(tmp_path: Path) -> None:
    files = tuple(RemoteFile(f"model-{i:05}.safetensors", 1, "0" * 64, None) for i in range(10_000))
    snapshot = Snapshot("a/b", "main", "0" * 40, files)
    began = time.process_time()
    whole = Remote(Source("hub", "a/b"), snapshot, files)
    assert remote._narrowed(whole, tmp_path) is whole
    assert time.process_time() - began < 1


def test_what_a_folder_says_of_itself_is_shown_as_far_as_people_read(tmp_path: Path) -> None:
    canon = verified.copy(verified.canonical("llama"), tmp_path / "c")
    told = json.loads((canon / "zoo.json").read_text()) | {"notes": ["x" * 5000] * 1000}
    (canon / "zoo.json").write_text(json.dumps(told))
    shown = CliRunner().invoke(cli, ["inspect", str(canon)]).output
    assert len(shown) < 20_000 and "--json has all" in shown


def test_a_header_of_objects_without_end_is_refused_before_they_are_made() -> None:
    raw = b"{" + b",".join(b'"k%d":{}' % i for i in range(600_000)) + b"}"
    began = time.process_time()
    with pytest.raises(ZooError, match="header names 600000 tensors"):
        list(safetensors.parse_header(raw, "x", 8 + len(raw), "x"))
    assert time.process_time() - began < 0.5


def test_wrappers_in_wrappers_are_taken_off_in_one_go() -> None:
    assert unwrapped(["module.a.b", "module.module.c"]) == {
        "module.a.b": "a.b",
        "module.module.c": "module.c",
    }
    assert not unwrapped([]) and not unwrapped(["a", "module.b"])
    began = time.process_time()
    assert unwrapped(["module." * 500 + f"{i}.w" for i in range(2000)])["module." * 500 + "7.w"] == "7.w"
    assert time.process_time() - began < 1
