"""PyTorch pickles: the same tensors as safetensors, and nothing but tensors."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vendor
from test_export import hashes

import zoo
from zoo.errors import ZooError
from zoo.formats import around, open_checkpoint
from zoo.formats.pickle import Budget, read_pickle
from zoo.mapping.export import export


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


@pytest.mark.parametrize(("shards", "zipped"), [(1, True), (3, True), (2, False)])
def test_pickles_come_back_to_the_byte_where_the_source_is_asked_for(
    shards: int, zipped: bool, tmp_path: Path
) -> None:
    source = vendor.to_pickle(tiny.make("llama_tied", tmp_path / "hf"), tmp_path / "bin", shards, zipped)
    canon = zoo.convert(source, tmp_path / "canon")
    assert hashes(export(canon, tmp_path / "back", "source")) == hashes(source)
    new = export(canon, tmp_path / "new")
    assert {p.name for p in new.iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_what_a_trainer_put_beside_the_weights_and_two_names_of_the_same_bytes_come_back(
    tmp_path: Path,
) -> None:
    source = vendor.to_pickle(tiny.make("llama_tied", tmp_path / "hf"), tmp_path / "bin")
    state = torch.load(source / "pytorch_model.bin")
    state = {f"module.{n}": t for n, t in state.items()} | {
        "module.lm_head.weight": state["model.embed_tokens.weight"]
    }
    torch.save({"model": state, "epoch": 3, "moments": {"m": torch.ones(99)}}, source / "pytorch_model.bin")
    canon = zoo.convert(source, tmp_path / "canon")
    assert hashes(export(canon, tmp_path / "back", "source")) == hashes(source)


def test_pickles_that_cannot_be_given_back_are_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = vendor.to_pickle(tiny.make("llama", tmp_path / "hf"), tmp_path / "bin")
    whole = zoo.convert(source, tmp_path / "whole")
    monkeypatch.setattr(around, "MAX_AROUND", 999)
    for name, canon in (
        ("around their tensors", zoo.convert(source, tmp_path / "canon")),
        ("converted to", zoo.convert(source, tmp_path / "bf16", dtype="bf16")),
    ):
        with pytest.raises(ZooError, match=f"cannot be made again .*{name}"):
            export(canon, tmp_path / "back", "source")
    with zipfile.ZipFile(whole / "source.zip") as z:
        (raw,) = (z.read(n) for n in z.namelist())
    for what in (
        raw[:16],
        b"torch._utils",
        b"PK\x05\x06",
        b"PK\x03\x04",
        b"q_proj",
    ):  # of the table, the pickle, the archive
        with zipfile.ZipFile(whole / "source.zip", "w") as z:
            z.writestr("around/pytorch_model.bin", raw.replace(what, bytes(len(what))))
        with pytest.raises(
            ZooError, match=r"source\.zip: pytorch_model\.bin|not as it was converted|changed since"
        ):
            export(whole, tmp_path / "back", "source")


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


def twins(depth: int) -> bytes:
    """A pickle's steps to a tuple of (t, t) of (t, t) ...: 3 bytes each, and 2^depth leaves to whoever visits them all."""
    return pickle.EMPTY_TUPLE + (pickle.DUP + pickle.TUPLE2) * depth


def steps(*what: bytes) -> bytes:
    return pickle.PROTO + b"\x04" + b"".join(what) + pickle.STOP


DEEP = pickle.EMPTY_TUPLE + pickle.TUPLE1 * 1_000_000
REBUILD = b"ctorch._utils\n_rebuild_tensor_v3\n"
STORAGE = b"(X\x07\x00\x00\x00storageX\x03\x00\x00\x00F32X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
BOMBS = {
    "an empty dict, remembered as number 2^27": steps(b"}r\x00\x00\x00\x08"),
    "a key nested a million deep": steps(pickle.EMPTY_DICT, DEEP, pickle.NONE, pickle.SETITEM),
    "a key that takes forever to hash": steps(pickle.EMPTY_DICT, twins(60), pickle.NONE, pickle.SETITEM),
    "such keys, several at once": steps(b"}(", twins(60), b"Nu"),
    "a dict made with one": steps(b"(", twins(60), b"Nd"),
    "a frozen set of one": steps(b"(", twins(60), pickle.FROZENSET),
    "a set of one": steps(pickle.EMPTY_SET, b"(", twins(60), pickle.ADDITEMS),
    "an ordered dict of one": steps(b"ccollections\nOrderedDict\n](", twins(60), b"N\x86e\x85R"),
    "a storage of one": steps(twins(60), b"Q"),
    "a storage whose dtype is one": steps(b"(X\x07\x00\x00\x00storage", twins(60), b"NNK\x01tQ"),
    "a storage whose key is one": steps(b"(X\x07\x00\x00\x00storageX\x03\x00\x00\x00F32", twins(60), b"NK\x01tQ"),
    "state set on one": steps(twins(60), b"}b"),
    "a dtype that is none": steps(REBUILD, b"(", STORAGE, b"K\x00(t(t\x89NX\x01\x00\x00\x00xNtR"),
    "text of four gigabytes": steps(b"X\xff\xff\xff\xff"),
    "a frame of an exabyte": steps(b"\x95" + b"\x00" * 7 + b"\x10"),
    "a number of 40,000 digits": steps(b"I" + b"9" * 40_000 + b"\n"),
    "room for 8 GiB": steps(pickle.BYTEARRAY8, struct.pack("<Q", 8 << 30)),
    "a shape of a text, again and again": steps(b"X\x40\x4b\x4c\x00", b"x" * 5_000_000, b"q\x000", b"ctorch\nSize\nh\x00\x85R" * 99),
    "a storage of a text": steps(b"X\x40\x4b\x4c\x00", b"x" * 5_000_000, b"Q"),
    "a tensor of 3,000 axes": steps(REBUILD, b"(", STORAGE, b"K\x00(", b"K\x01" * 3000, b"t(", b"K\x01" * 3000, b"t\x89NNNtR"),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_asks_for_more_than_a_machine_has_is_refused_at_once(
    name: str, zipped: bool, tmp_path: Path
) -> None:
    file = packed(BOMBS[name], tmp_path / "w.bin")
    if not zipped:
        file.write_bytes(BOMBS[name])
    gc.freeze()  # what other tests hold is not gone through again and again at zoo's expense
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ZooError, match=r"w\.bin: ") as e:
        read_pickle(file, "w.bin")
    gc.unfreeze()
    assert len(str(e.value)) < 600
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB


def test_an_ordered_dict_keeps_nothing_of_what_is_set_on_it(tmp_path: Path) -> None:
    """torch.save of a state_dict sets `_metadata`; a hostile file sets `get` and `values`."""
    state = torch.nn.Linear(3, 2).state_dict()
    state.values = 3  # type: ignore[method-assign,assignment]
    torch.save(state, tmp_path / "w.bin")
    assert [t.name for t in read_pickle(tmp_path / "w.bin", "w.bin")] == ["weight", "bias"]


def test_a_compressed_or_long_byte_order_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.bin")
    with zipfile.ZipFile(tmp_path / "w.bin", "a", zipfile.ZIP_DEFLATED) as z:
        z.writestr("other/byteorder", b"little")
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(zipfile.ZipInfo("a/data.pkl"), pickled({}))
        z.writestr("a/byteorder", bytes(1 << 24))
    with pytest.raises(ZooError, match="a/byteorder of 16777216 bytes"):
        read_pickle(tmp_path / "bomb.bin", "bomb.bin")
    assert [t.name for t in read_pickle(tmp_path / "w.bin", "w.bin")] == ["w"]


def test_an_archive_of_more_entries_than_any_release_has_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.formats.pickle.MAX_DIRECTORY", 4000)
    with zipfile.ZipFile(tmp_path / "w.bin", "w") as z:
        for i in range(100):
            z.writestr(f"a/data/{i}", b"")
    with pytest.raises(ZooError, match=r"directory has \d+ bytes \(limit 4000\)"):
        read_pickle(tmp_path / "w.bin", "w.bin")


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


GET = b"h\x00"  # what was made first
MANY = b"(" + b"N" * 500 + b"lq\x000"
AS_KEYS = b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(200)) + b"uq\x000"


@pytest.mark.parametrize(
    "data",
    [
        steps(pickle.EMPTY_DICT * 1001),
        steps(MANY, (b"ctorch\nSize\n" + GET + b"\x85R0") * 9),
        steps(AS_KEYS, (b"ccollections\nOrderedDict\n" + GET + b"\x85R0") * 9),
        steps(AS_KEYS, (REBUILD + b"(" + STORAGE + b"K\x00))\x89N" + GET + b"tR0") * 9),
        steps(b"}X\x05\x00\x00\x00model}K\x01", REBUILD, b"(", STORAGE, b"K\x00))\x89N)tRss(", AS_KEYS, b"".join(b"K%c" % i + GET for i in range(9)), b"u"),
    ],
    ids=["objects", "shapes of a list", "dicts of a dict", "tensors beside a dict", "a dict under many keys"],
)  # fmt: skip
def test_a_pickle_that_is_more_work_than_any_release_is_refused(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.formats.pickle.MAX_STEPS", 1000)
    with pytest.raises(ZooError, match=r"w\.bin: .*more than 1000 steps"):
        read_pickle(packed(data, tmp_path / "w.bin"), "w.bin", [])


ALIKE = [k * (2**61 - 1) + 1 for k in range(20_000)]
"""Numbers of one hash: each that is added to a dict is compared with all that are there."""
LONG = [b"\x8a\x10" + n.to_bytes(16, "little") for n in ALIKE]


@pytest.mark.parametrize(
    "data",
    [
        steps(b"}(", b"".join(n + b"N" for n in LONG), b"u"),
        steps(b"\x8f(", b"".join(LONG), b"\x90"),
        steps(b"ccollections\nOrderedDict\n](", b"".join(n + b"N\x86" for n in LONG), b"e\x85R"),
        steps(b"]", b"".join(b"p%d\n" % n for n in ALIKE[5:])),
    ],
    ids=["dict", "set", "pairs", "memo"],
)
def test_numbers_that_are_hashed_to_the_same_are_no_keys(data: bytes, tmp_path: Path) -> None:
    start = time.process_time()
    with pytest.raises(ZooError, match=r"a key in it is|a number that is none, or beyond all"):
        read_pickle(packed(data, tmp_path / "w.bin"), "w.bin", [])
    assert time.process_time() - start < 1  # 60,000 of them took minutes


def test_the_files_of_a_checkpoint_have_one_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.formats.pickle.MAX_STEPS", 1000)
    monkeypatch.setattr("zoo.formats.pickle.MAX_DIRECTORY", 1000)
    torch.save({"w": torch.ones(2)}, tmp_path / "w.bin")
    for spent in ("steps", "directory"):
        budget = Budget()
        with pytest.raises(ZooError, match=r"w\.bin: .*(more than 1000 steps|directory has)"):
            for _ in range(100):
                read_pickle(tmp_path / "w.bin", "w.bin", None, budget)
                setattr(budget, "steps" if spent == "directory" else "directory", 1000)
        assert getattr(budget, spent) < 500


def test_a_directory_whose_end_looks_like_another_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its offset, of which Python makes nothing, is spelled like the mark that an end begins with."""
    monkeypatch.setattr("zoo.formats.pickle.MAX_DIRECTORY", 4000)
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0)
    directory = b"".join(entry + b"%08d" % i for i in range(100))
    end = struct.pack("<4s4HI4sH", b"PK\5\6", 0, 0, 1, 1, len(directory), b"PK\5\6", 0)
    (tmp_path / "w.bin").write_bytes(b"PK\3\4" + directory + end)
    with pytest.raises(ZooError, match="directory has"):
        read_pickle(tmp_path / "w.bin", "w.bin")


@pytest.mark.parametrize("state", [{"shape": (-5, 3)}, {"offset": -1000}, (None, {"shape": "ab"})])
def test_a_tensor_is_not_changed_after_it_was_checked(state: Any, tmp_path: Path) -> None:
    changed = Made("the storage", 0, (2, 3), (3, 1), False, OrderedDict(), state=state)
    file = packed(pickled({"w": changed}), tmp_path / "w.bin")
    with pytest.raises(ZooError, match=r"w\.bin: it sets the state of "):
        read_pickle(file, "w.bin")


def test_the_readers_own_functions_are_not_changed(tmp_path: Path) -> None:
    build = (
        pickle.PROTO
        + b"\x02"
        + b"ctorch._utils\n_rebuild_tensor_v2\n"
        + b"(dX\x0c\x00\x00\x00__defaults__(I1\ntsb."
    )
    with pytest.raises(ZooError, match="it sets the state of "):
        read_pickle(packed(build, tmp_path / "w.bin"), "w.bin")
    torch.save({"w": torch.ones(2)}, tmp_path / "good.bin")
    assert torch.equal(values(tmp_path / "good.bin", "w"), torch.ones(2))
