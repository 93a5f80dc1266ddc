"""Few bytes that stand for much, certificates that claim what they had no means to find, and disks that fill up: each test builds what
once took minutes, held as proof, or could not be run again."""

from __future__ import annotations

import errno
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from zoo import gallery
from zoo.check import check
from zoo.cli import _common, cli
from zoo.errors import ZooError
from zoo.formats import safetensors
from zoo.formats.base import TensorRef
from zoo.formats.safetensors import parse_header
from zoo.mapping import unmatched
from zoo.mapping.fold import LONGEST, fold
from zoo.untrusted import bounded
from zoo.verify import certificate, golden, selftest

# ---- names, keys, headers


def test_a_name_of_thousands_of_parts_is_held_against_all_that_is_missing_in_a_moment() -> None:
    missing = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(8_000)]
    unexpected = ["a." * 2000 + "x", *(f"z.{i}" for i in range(7_999))]
    m: Any = SimpleNamespace(
        naming="hf", missing={"x": missing}, unexpected=unexpected, misshapen={}, problems=[]
    )
    ckpt: Any = SimpleNamespace(root="x", tensors=dict.fromkeys(unexpected))
    start = time.process_time()
    assert unmatched._renamed(ckpt, SimpleNamespace(name="llama", rules={"hf": None}), m) is None  # type: ignore[arg-type]
    assert time.process_time() - start < 2  # it took 8 s


@pytest.mark.parametrize(
    ("name", "of", "tail"),
    [
        ("a.b.c", "x.b.c", "b.c"),
        ("b.c", "b.c", "c"),
        ("a.b.c", "c", "c"),
        ("a.bc", "x.c", ""),
        ("a", "a", ""),
    ],
)
def test_the_last_parts_that_two_names_share(name: str, of: str, tail: str) -> None:
    assert unmatched._tail(name, of) == tail


def test_names_longer_than_any_are_not_looked_through_for_numbers() -> None:
    names = [f"{i}." * LONGEST + "w" for i in range(3)]
    assert [first for _, first in fold(names)] == names


def test_a_text_of_more_keys_than_any_header_has_is_refused_before_it_is_parsed() -> None:
    text = b"{" + b'"a":0,' * bounded.MAX_KEYS + b'"b":0}'
    start = time.process_time()
    with pytest.raises(ValueError, match="1572865 keys"):
        bounded.parse_json(text)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("on", [True, False])
def test_a_header_is_read_without_the_collector_and_leaves_it_as_it_was(
    on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    during = []

    def ref(*told: Any) -> TensorRef:
        during.append(gc.isenabled())
        return TensorRef(*told)

    monkeypatch.setattr(safetensors, "TensorRef", ref)
    valid = b'{"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}'
    try:
        (gc.enable if on else gc.disable)()
        (found,) = parse_header(valid, "f", 10 + len(valid), "f")
        assert found.shape == (2,) and during == [False] and gc.isenabled() == on
        with pytest.raises(ZooError):
            parse_header(valid, "f", 9, "f")
        assert gc.isenabled() == on
    finally:
        gc.enable()


# ---- certificates


def claimed() -> dict[str, Any]:
    def level(*names: str) -> dict[str, Any]:
        about = {
            "relation": "<=",
            "bound": 0,
            "value": 0,
            "why": "y",
            "passed": True,
            "compared": 9,
            "margin": None,
        }
        return {
            "verdict": "passed",
            "checks": [about | {"name": n} for n in names],
            "notes": [],
            "figures": {},
        }

    return {
        "schema": certificate.SCHEMA, "verdict": "passed", "dtype": "fp32", "created": "2026-01-01T00:00:00",
        "canonical": {"path": "x", "files": {}}, "source": {"path": "y", "files": {}}, "rules": None,
        "oracle": {"kind": "transformers"}, "not_checked": [], "faults": None,
        "levels": {"plan": level("layout tensors missing"), "bytes": level("elements that differ"), "logits": level("|logit error| p50")},
    }  # fmt: skip


def of_large_logits(d: dict[str, Any]) -> None:
    d["levels"]["logits"]["figures"]["largest_logit"] = 1e30
    d["levels"]["logits"]["checks"][0].update(scale=1e30, bound=1e29, value=9e28)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(dtype={}), "it was computed in {}"),
        (lambda d: d.update(oracle={"kind": "none", "why": "x"}), "its oracle is 'none'"),
        (lambda d: d.update(source=None), "it names no source"),
        (lambda d: d.update(faults={"applicable": 0, "caught": 0, "results": []}), "injected 0 faults"),
        (lambda d: d.update(faults={"applicable": -1, "caught": -1, "results": []}), "injected -1 faults"),
        (lambda d: d.update(faults={"applicable": 2, "caught": 2, "results": []}), "tells of 0"),
        (lambda d: d.update(oracle="x"), "not as zoo writes it"),
        (lambda d: d.update(not_checked="x"), "not as zoo writes it"),
        (of_large_logits, "logits beyond 65504"),
    ],
)  # fmt: skip
def test_what_there_were_no_means_to_find_is_no_proof(
    change: Callable[[dict[str, Any]], object], says: str
) -> None:
    data = claimed()
    assert certificate.doubts(data) == []
    change(data)
    assert any(says in doubt for doubt in certificate.doubts(data))


@pytest.mark.parametrize(
    ("names", "says"),
    [([f"x{i}" for i in range(20_001)], "lists 20,001 files"), (["./a"], "names the file './a'")],
    ids=["many", "one file by many names"],
)
def test_no_file_is_hashed_as_often_as_a_list_likes(names: list[str], says: str, tmp_path: Path) -> None:
    data = claimed()
    data["canonical"]["files"] = {n: {"bytes": 1, "sha256": "0" * 64} for n in names}
    (tmp_path / "parity.json").write_text(json.dumps(data))
    for look in (certificate.check, certificate.standing, lambda p: check(p, by=p / "parity.json")):
        with pytest.raises(ZooError, match=says):
            look(tmp_path)


def test_a_self_test_that_has_nothing_to_find_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a certificate that `--check-certificate` then called contradictory."""
    folder: Any = SimpleNamespace(root="canon", spec=None)
    how: Any = SimpleNamespace(dtype="fp32", device="cpu", say=lambda _: None)
    unused: Any = None
    monkeypatch.setattr(selftest.Recorded, "of", lambda *_: None)
    monkeypatch.setattr(selftest, "subject_of", lambda *_, **__: None)
    monkeypatch.setattr(selftest, "in_numbers", lambda *_: SimpleNamespace(quant={}))
    monkeypatch.setattr(
        selftest, "applicable", lambda *_: [SimpleNamespace(name="a"), SimpleNamespace(name="b")]
    )
    monkeypatch.setattr(selftest, "_try", lambda *_: None)
    with pytest.raises(ZooError, match="of 2 faults that could be seeded none changes a bit"):
        selftest.run(folder, unused, unused, unused, None, how)


# ---- recordings


def test_a_recording_of_batches_or_tokens_without_end_is_refused(tmp_path: Path) -> None:
    about = {"zoo": json.dumps({"schema": golden.SCHEMA, "dtype": "fp32"})}
    ids, logits = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1)
    many = {
        f"{n}.{b}": t.clone()
        for b in range(golden.MAX_BATCHES + 1)
        for n, t in (("ids", ids), ("logits", logits))
    }
    save_file(many, tmp_path / "many.safetensors", about)
    with pytest.raises(ZooError, match="257 batches"):
        golden.Golden(tmp_path / "many.safetensors")
    n = golden.MAX_TOKENS + 1
    save_file(
        {"ids.0": torch.zeros(1, n, dtype=torch.long), "logits.0": torch.zeros(n, 1)},
        tmp_path / "long.safetensors",
        about,
    )
    with pytest.raises(ZooError, match="more than 131,072 tokens"):
        golden.Golden(tmp_path / "long.safetensors")


def test_a_recording_is_not_written_through_links(tmp_path: Path) -> None:
    (victim := tmp_path / "victim").write_text("mine")
    (out := tmp_path / "g.safetensors").symlink_to(victim)
    (tmp_path / ".g.safetensors.part").symlink_to(tmp_path / "new")
    golden.check_output(out)
    golden.write(out, {"a": torch.zeros(1)}, {})
    assert victim.read_text() == "mine" and not out.is_symlink() and not (tmp_path / "new").exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_what_could_not_be_read_again_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = SimpleNamespace(ids=torch.zeros(2, 40, dtype=torch.long))
    golden.refuse_long(SimpleNamespace(batches=[batch]))  # type: ignore[arg-type]
    monkeypatch.setattr(golden, "MAX_TOKENS", 79)
    with pytest.raises(ZooError, match="1 batches of 80 tokens in all.*smaller --max-length"):
        golden.refuse_long(SimpleNamespace(batches=[batch]))  # type: ignore[arg-type]


# ---- disks that fill up


def full(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the n-th file on, no file can be put in its place."""
    replace, left = os.replace, [after]

    def put(*args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*args)

    monkeypatch.setattr(os, "replace", put)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_gallery_that_a_full_disk_cut_short_is_written_again(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "collect", lambda _: [])
    with monkeypatch.context() as m, pytest.raises(OSError):
        full(after, m)
        gallery.write(tmp_path / "site")
    gallery.write(tmp_path / "site")
    assert (tmp_path / "site" / "index.html").is_file()


def test_a_report_that_does_not_fit_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "c").mkdir()
    data = claimed() | {"versions": {}, "machine": {}, "timing": {}, "rests_on": "logits", "inputs": None}
    data["canonical"] |= {"family": "llama", "layout_version": 1}
    data["source"]["format"] = "safetensors"
    data["oracle"] = {"kind": "golden"}
    data["levels"].pop("logits")
    data["rests_on"] = "bytes"
    (folder / "parity.json").write_text(json.dumps(data))
    (out := tmp_path / "r.html").write_text("before")
    with monkeypatch.context() as m:
        full(0, m)
        assert _common.run(cli, ["report", str(folder), "-o", str(out)]) == 1
    assert out.read_text() == "before" and sorted(os.listdir(tmp_path)) == ["c", "r.html"]
    assert _common.run(cli, ["report", str(folder), "-o", str(out)]) == 0
    assert "<html" in out.read_text()
    os.mkfifo(pipe := tmp_path / "pipe")
    held = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert _common.run(cli, ["report", str(folder), "-o", str(pipe)]) == 0
    assert os.read(held, 9).lower() == b"<!doctype" and pipe.is_fifo()
    os.close(held)
