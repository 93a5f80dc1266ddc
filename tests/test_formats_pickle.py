"""PyTorch pickles: the same tensors as safetensors, and nothing but tensors."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vendor

from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.formats.pickle import read_pickle


def values(file: Path, name: str) -> torch.Tensor:
    """A tensor of a pickle by the byte range that zoo found."""
    ref = next(t for t in read_pickle(file, file.name) if t.name == name)
    types = {
        "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
    }  # fmt: skip
    raw = file.read_bytes()[ref.offset : ref.offset + ref.nbytes]
    flat = (
        torch.empty(0, dtype=types[ref.dtype])
        if not raw
        else torch.frombuffer(bytearray(raw), dtype=types[ref.dtype])
    )
    return torch.as_strided(flat, ref.shape, ref.strides) if ref.strides else flat.reshape(ref.shape)


TENSORS: dict[str, torch.Tensor] = {
    "matrix": torch.randn(3, 5),
    "half": torch.randn(7).half(),
    "bf16": torch.randn(2, 2).bfloat16(),
    "transposed view": torch.randn(4, 6).t(),
    "slice of a storage": torch.randn(5, 6)[1:3],
    "every second row": torch.randn(6, 3)[::2],
    "parameter": torch.nn.Parameter(torch.randn(2)),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "integers": torch.arange(3),
    "flags": torch.tensor([True, False]),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_a_byte_range_of_the_file(name: str, zipped: bool, tmp_path: Path) -> None:
    file = tmp_path / "w.bin"
    torch.save(OrderedDict(TENSORS), file, _use_new_zipfile_serialization=zipped)
    assert torch.equal(values(file, name), TENSORS[name].detach())


def test_fp8_tensors_are_read(tmp_path: Path) -> None:
    w = torch.randn(4, 4).to(torch.float8_e4m3fn)
    torch.save({"w": w}, tmp_path / "w.bin")
    assert torch.equal(values(tmp_path / "w.bin", "w").view(torch.uint8), w.view(torch.uint8))


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_trainers_wrapper_is_looked_through(key: str, tmp_path: Path) -> None:
    other = next(k for k in ("state_dict", "model") if k != key)
    torch.save({key: {"w": torch.ones(2)}, other: {"name": "llama"}, "epoch": 3}, tmp_path / "w.bin")
    assert torch.equal(values(tmp_path / "w.bin", "w"), torch.ones(2))


def test_several_sets_of_weights_in_one_file_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "module": {"w": torch.zeros(2)}}, tmp_path / "w.bin")
    with pytest.raises(ZooError, match=r"w\.bin: holds several sets of tensors \(model, module\)"):
        read_pickle(tmp_path / "w.bin", "w.bin")


@pytest.mark.parametrize(("shards", "zipped"), [(1, True), (3, True), (1, False), (2, False)])
def test_a_bin_converts_to_the_bytes_that_safetensors_convert_to(
    shards: int, zipped: bool, tmp_path: Path
) -> None:
    src = tiny.make("llama", tmp_path / "hf", dtype="bfloat16")
    other = vendor.to_pickle(src, tmp_path / "bin", shards, zipped)
    assert open_checkpoint(other).format == "pickle"
    vendor.same(vendor.canonical(other, tmp_path / "b"), vendor.canonical(src, tmp_path / "a"))


def test_views_that_are_not_contiguous_convert_to_the_same_bytes(tmp_path: Path) -> None:
    src = tiny.make("llama", tmp_path / "hf")
    other = vendor.to_pickle(src, tmp_path / "bin")
    state = {k: t.t().contiguous().t() if t.ndim == 2 else t for k, t in vendor.read_tensors(src).items()}
    torch.save(state, other / "pytorch_model.bin")
    assert any(t.strides for t in open_checkpoint(other).tensors.values())
    vendor.same(vendor.canonical(other, tmp_path / "b"), vendor.canonical(src, tmp_path / "a"))


def test_a_head_that_shares_the_embeddings_storage_is_a_copy(tmp_path: Path) -> None:
    src = tiny.make("llama_tied", tmp_path / "hf")
    other = vendor.to_pickle(src, tmp_path / "bin")
    state = vendor.read_tensors(src)
    torch.save(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, other / "pytorch_model.bin")
    vendor.same(vendor.canonical(other, tmp_path / "b"), vendor.canonical(src, tmp_path / "a"))


# --- refusals -----------------------------------------------------------------------------------------------


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


class Evaluates:
    def __reduce__(self) -> Any:
        return eval, ("1",)


class Loads:
    def __reduce__(self) -> Any:
        return torch.load, ("other",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("evil", "asked"), [(Runs(), "mkdir"), (Evaluates(), "eval"), (Loads(), "torch.*load")]
)
def test_a_pickle_that_asks_for_anything_else_is_refused_by_name(
    evil: Any, asked: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2), "x": evil}, tmp_path / "w.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ZooError, match=rf"w\.bin.*asks for .*{asked}.*refused"):
        read_pickle(tmp_path / "w.bin", "w.bin")
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.bin")
    with pytest.raises(ZooError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        read_pickle(tmp_path / "w.bin", "w.bin")


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(ZooError, match="TorchScript"):
        read_pickle(tmp_path / "w.pt", "w.pt")


@pytest.mark.parametrize("which", ["data.pkl", "data/0"])
def test_a_compressed_entry_is_refused(which: str, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as a, zipfile.ZipFile(tmp_path / "b.bin", "w") as b:
        for entry in a.namelist():
            kind = zipfile.ZIP_DEFLATED if entry.endswith(which) else zipfile.ZIP_STORED
            b.writestr(entry, a.read(entry), kind)
    with pytest.raises(ZooError, match=f"{which} is compressed"):
        read_pickle(tmp_path / "b.bin", "b.bin")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(10)}, tmp_path / "w.bin")
    with zipfile.ZipFile(tmp_path / "w.bin", "a") as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/0"))
        archive.writestr(name, b"\0" * 40)
    with pytest.raises(ZooError, match="two entries of one name"):
        read_pickle(tmp_path / "w.bin", "w.bin")


@pytest.mark.parametrize("text", [b"", b"abc", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_pickle_is_said_to_be_none(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(text)
    with pytest.raises(ZooError, match=r"w\.bin"):
        read_pickle(tmp_path / "w.bin", "w.bin")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_an_error_for_people_never_a_crash(zipped: bool, tmp_path: Path) -> None:
    torch.save(OrderedDict(TENSORS), tmp_path / "w.bin", _use_new_zipfile_serialization=zipped)
    raw = (tmp_path / "w.bin").read_bytes()
    random.seed(5)
    refused = 0
    for n in range(400):
        damaged = bytearray(raw[: random.randrange(len(raw))] if n % 3 == 0 else raw)
        for _ in range(random.randrange(1, 6)):
            if damaged:
                damaged[random.randrange(len(damaged))] = random.randrange(256)
        (tmp_path / "d.bin").write_bytes(damaged)
        try:
            read_pickle(tmp_path / "d.bin", "d.bin")
        except ZooError:
            refused += 1
    assert refused > 100


def test_a_truncated_shard_names_itself(tmp_path: Path) -> None:
    src = vendor.to_pickle(tiny.make("llama", tmp_path / "hf"), tmp_path / "bin", 2)
    shard = src / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-5000])
    with pytest.raises(ZooError, match="00002-of-00002"):
        open_checkpoint(src)


def test_shards_without_an_index_are_an_incomplete_download(tmp_path: Path) -> None:
    src = vendor.to_pickle(tiny.make("llama", tmp_path / "hf"), tmp_path / "bin", 2)
    (src / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(ZooError, match="index"):
        open_checkpoint(src)


def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    src = vendor.to_pickle(tiny.make("llama", tmp_path / "hf"), tmp_path / "bin", 2)
    index = src / "pytorch_model.bin.index.json"
    text = json.loads(index.read_text())
    text["weight_map"]["lm_head.weight"] = "../secret.bin"
    index.write_text(json.dumps(text))
    with pytest.raises(ZooError, match="outside"):
        open_checkpoint(src)


def test_a_pickle_that_makes_room_for_gigabytes_is_refused(tmp_path: Path) -> None:
    bomb = b"\x80\x02}r\x00\x00\x00\x08."  # an empty dict, remembered as number 2^27
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as z:
        z.writestr("archive/data.pkl", bomb)
    (tmp_path / "config.json").write_text("{}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ZooError, match="damaged .*numbers the next one 134217728"):
        read_pickle(tmp_path / "pytorch_model.bin", "pytorch_model.bin")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def packed(data: bytes, file: Path) -> Path:
    """An archive with this pickle, and one storage of 64 bytes."""
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("a/data.pkl", data)
        z.writestr("a/data/0", bytes(64))
    return file


class Made:
    """Pickles as torch pickles a tensor of 16 numbers, with other arguments."""

    def __init__(self, *args: Any, state: Any = None) -> None:
        self.args, self.state = args, state

    def __reduce__(self) -> Any:
        made = torch._utils._rebuild_tensor_v2, self.args
        return made if self.state is None else (*made, self.state)


class Pickler(pickle.Pickler):
    def persistent_id(self, x: Any) -> Any:
        return ("storage", torch.FloatStorage, "0", "cpu", 16) if x == "the storage" else None


def pickled(x: Any) -> bytes:
    out = io.BytesIO()
    Pickler(out, 2).dump(x)
    return out.getvalue()


def test_dicts_that_are_in_many_or_in_themselves_are_read_once(tmp_path: Path) -> None:
    tensor = Made("the storage", 0, (2, 3), (3, 1), False, OrderedDict())
    nested: Any = {"w": tensor}
    for _ in range(60):
        nested = {"a": nested, "b": nested}
    nested["itself"] = nested
    file = packed(pickled({"w": tensor, "more": nested}), tmp_path / "w.bin")
    assert [(t.name, t.shape) for t in read_pickle(file, "w.bin")] == [("w", (2, 3))]


@pytest.mark.parametrize(
    "args",
    [
        ("the storage", 0, (10**5000,), (0,)), ("the storage", 0, (-5, 3), (3, 1)), ("the storage", -1, (2,), (1,)),
        ("the storage", 0, "ab", (1, 1)), ("the storage", 0, (2,), (2.0,)), ("the storage", 0, 3, 1), (1, 0, (2,), (1,)),
        ("the storage", 0, (2,), (1,), False, OrderedDict(), {"neg": True}),
    ],
)  # fmt: skip
def test_a_tensor_that_is_none_is_refused(args: tuple[Any, ...], tmp_path: Path) -> None:
    file = packed(pickled({"w": Made(*args)}), tmp_path / "w.bin")
    with pytest.raises(ZooError, match=r"w\.bin: ") as e:
        read_pickle(file, "w.bin")
    assert len(str(e.value)) < 400


def test_a_pickle_of_more_objects_than_any_release_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.formats.pickle.MAX_STEPS", 1000)
    file = packed(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT * 1001 + pickle.STOP, tmp_path / "w.bin")
    with pytest.raises(ZooError, match=r"w\.bin: .*more than 1000 steps"):
        read_pickle(file, "w.bin")


@pytest.mark.parametrize("state", [{"shape": (-5, 3)}, {"offset": -1000}, (None, {"shape": "ab"})])
def test_a_tensor_is_not_changed_after_it_was_checked(state: Any, tmp_path: Path) -> None:
    changed = Made("the storage", 0, (2, 3), (3, 1), False, OrderedDict(), state=state)
    file = packed(pickled({"w": changed}), tmp_path / "w.bin")
    with pytest.raises(ZooError, match=r"w\.bin: the pickle is damaged"):
        read_pickle(file, "w.bin")


def test_the_readers_own_functions_are_not_changed(tmp_path: Path) -> None:
    build = (
        pickle.PROTO
        + b"\x02"
        + b"ctorch._utils\n_rebuild_tensor_v2\n"
        + b"(dX\x0c\x00\x00\x00__defaults__(I1\ntsb."
    )
    with pytest.raises(ZooError, match="damaged"):
        read_pickle(packed(build, tmp_path / "w.bin"), "w.bin")
    torch.save({"w": torch.ones(2)}, tmp_path / "good.bin")
    assert torch.equal(values(tmp_path / "good.bin", "w"), torch.ones(2))
