"""What strangers give zoo does no harm: each test builds an input that once did, and holds zoo to an answer."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub_client import pointed_at
from hub_server import HubServer

import zoo
from zoo import hub
from zoo.cli import _common, cli
from zoo.errors import MAX_TEXT, ZooError
from zoo.formats import canonical, open_checkpoint
from zoo.hub import cache
from zoo.mapping import execute
from zoo.mapping.folder import JOURNAL, STATE, Folder
from zoo.mapping.plan import make_plan
from zoo.untrusted.printable import warn

# ---- what is said


@pytest.mark.parametrize(
    "text", ["x" * 10_000_000, "\x1b" * 1900, "\x9b" * 5000, "é" * 2001, "\u202e\u2028" * 500]
)
def test_a_message_is_short_and_printable_whatever_it_was_made_of(text: str) -> None:
    said = str(ZooError(f"model.safetensors: {text}: convert again"))
    assert len(said) <= MAX_TEXT
    assert said.startswith("model.safetensors: ")
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0x2028 <= ord(c) < 0x202F for c in said)


def test_a_name_in_no_encoding_can_be_written_wherever_it_is_told() -> None:
    assert str(ZooError("\udcff.bin")).encode() == b"\\udcff.bin"
    assert json.loads(_common.json_text({"name": "\udcff"}).encode()) == {"name": "\udcff"}


def test_a_message_of_ordinary_length_is_as_it_was_written() -> None:
    assert str(ZooError("a\nb\tc")) == "a\nb\tc"


def test_events_and_notes_hold_nothing_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    from zoo.cli._progress import Bar, Events

    name = "file \x1b]0;mine\x07 \x9b2J \u202egpj \u2066 \u2028"
    Bar().note(name)
    Events().note(name)
    warn(logging.getLogger("zoo"), "%s of %d", name, 2)
    assert _common.run(cli, ["plan", "x", name]) == 2  # as a shell does for a pattern
    out, err = capsys.readouterr()
    assert not set(out + err) & {"\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\u2028"}
    assert json.loads(out)["message"] == name
    assert err.count("gpj") >= 2


def test_a_refusal_of_the_system_is_a_short_message_too(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert _common.run(cli, ["inspect", "\x1b" * 100_000]) in (1, 2)
    assert "\x1b" not in capsys.readouterr().err


# ---- reports


def hostile_certificate() -> dict[str, Any]:
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>"
    check = {
        "name": evil, "value": evil, "bound": evil, "why": evil, "relation": evil, "passed": True, "margin": None,
    }  # fmt: skip
    level = {"verdict": evil, "checks": [check], "notes": [evil], "figures": {}}
    decode = level | {"figures": {"generated": [evil], "oracle": [evil], "equal": evil}}
    return {
        "schema": "zoo-parity-1", "verdict": evil, "created": evil, "dtype": evil,
        "canonical": {"path": evil, "family": evil, "layout_version": evil, "files": {evil: {"bytes": 1, "sha256": evil}}},
        "source": {"path": evil, "format": evil, "files": {evil: {"bytes": 1, "sha256": evil}}},
        "rules": {"family": evil, "naming": evil, "version": evil},
        "oracle": {"kind": evil, "name": evil, "version": evil, "class": evil},
        "levels": {"decode": decode, evil: level},
        "diagnosis": {"where": evil, "suggestions": [evil]},
        "disagreements": [dict.fromkeys(("about", "upstream", "vendor", "follows", "oracle"), evil)],
        "faults": {
            "caught": evil, "applicable": evil, "without_effect": [evil],
            "results": [{"what": evil, "kind": evil, "caught": True, "level": evil, "layer": evil, "value": 1, "bound": 0}],
        },
        "not_checked": [evil], "versions": {evil: evil}, "machine": {evil: evil}, "timing": {evil: 1.0},
    }  # fmt: skip


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def test_a_report_of_a_hostile_certificate_runs_nothing() -> None:
    from zoo.verify import report

    page = Tags()
    page.feed(report.page(hostile_certificate()))
    assert not {"script", "img"} & set(page.tags)
    assert not [a for a in page.attributes if a.startswith("on")]


def test_text_in_a_report_is_escaped_once() -> None:
    from zoo.verify import report

    cert = hostile_certificate() | {"not_checked": ["a < b & c, &lt; as it stands"]}
    assert "<li>a &lt; b &amp; c, &amp;lt; as it stands</li>" in report.page(cert)


def test_a_report_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "canon"
    victim.write_text("mine")
    folder.mkdir()
    (folder / "parity.json").write_text(json.dumps(hostile_certificate()))
    (folder / "report.html").symlink_to(victim)
    assert _common.run(cli, ["report", str(folder)]) == 0
    assert victim.read_text() == "mine"
    assert "<html" in (folder / "report.html").read_text()


# ---- what the system refuses


def test_a_name_with_nul_in_it_is_refused_by_the_api(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "source")
    with pytest.raises(ZooError, match="NUL"):
        zoo.convert(source, "c\0d")


def test_what_the_system_refuses_is_a_zoo_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28), str(tmp_path / "config.json"))

    monkeypatch.setattr("zoo.mapping.export.export", full)
    with pytest.raises(ZooError, match=r"config\.json: No space"):
        zoo.export(tmp_path, tmp_path / "out")


# ---- links and folders that zoo did not make


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of the user's own, with a file in it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "victim").write_text("mine")
    return folder


def untouched(folder: Path) -> bool:
    return [p.name for p in folder.iterdir()] == ["victim"] and (folder / "victim").read_text() == "mine"


@pytest.mark.parametrize("name", ["w.safetensors", STATE])
@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_a_link_planted_while_a_folder_is_made_is_not_written_through(
    tmp_path: Path, elsewhere: Path, name: str, kind: str
) -> None:
    partial = tmp_path / "c.partial"
    partial.mkdir()
    with Folder(tmp_path / "c", {}, "job"):  # so that it is ours
        pass
    (partial / name).unlink(missing_ok=True)
    if kind == "symlink":
        (partial / name).symlink_to(elsewhere / "victim")
    else:
        os.link(elsewhere / "victim", partial / name)
    with contextlib.suppress(ZooError), Folder(tmp_path / "c", {"w.safetensors": 100}, "job") as folder:
        folder.publish()
    assert untouched(elsewhere)


def test_a_small_file_is_not_written_through_a_link(tmp_path: Path, elsewhere: Path) -> None:
    with Folder(tmp_path / "c", {}, "job") as folder:
        (folder.partial / "zoo.json").symlink_to(elsewhere / "victim")
        (folder.partial / "below").symlink_to(elsewhere)
        for name in ("zoo.json", "below/new"):
            with pytest.raises(OSError):
                folder.write(name, b"{}")
    assert untouched(elsewhere)


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"step": "x", "said": [{}, 7], "synced": True}),
        "\n".join([json.dumps({"step": "x", "said": ["y"], "synced": True})] * 50_000),
        "1, 2",
        "[" * 100_000,
    ],
)
def test_a_journal_that_zoo_did_not_write_is_not_believed(tmp_path: Path, line: str) -> None:
    with Folder(tmp_path / "c", {}, "job"):
        pass
    (tmp_path / "c.partial" / JOURNAL).write_text(f"{line}\n")
    began = time.process_time()
    with Folder(tmp_path / "c", {}, "job") as folder:
        assert folder.done <= {"x"} and {*folder.said} <= {"y"}
    assert time.process_time() - began < 2


@pytest.mark.parametrize("name", [STATE, JOURNAL])
def test_a_state_of_a_tebibyte_is_not_read(tmp_path: Path, name: str) -> None:
    with Folder(tmp_path / "c", {}, "job"):
        pass
    with open(tmp_path / "c.partial" / name, "ab") as f:
        f.truncate(1 << 40)
    with pytest.raises(ZooError, match="no conversion writes"), Folder(tmp_path / "c", {}, "job"):
        pass


@pytest.mark.parametrize("kind", ["pipe", "link", "large"])
def test_a_file_that_goes_along_is_looked_at_again_when_it_is_read(tmp_path: Path, kind: str) -> None:
    source = tiny.make("llama", tmp_path / "source")
    (tmp_path / "secret").write_text("mine")
    (source / "LICENSE").write_text("as it was planned")
    planned = make_plan(open_checkpoint(source))
    assert "LICENSE" in planned.carried
    (source / "LICENSE").unlink()
    if kind == "pipe":
        os.mkfifo(source / "LICENSE")
    elif kind == "link":
        (source / "LICENSE").symlink_to(tmp_path / "secret")
    else:
        with open(source / "LICENSE", "wb") as f:
            f.truncate(1 << 40)
    with pytest.raises(ZooError, match="LICENSE"):
        execute.convert(planned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_swapped_gets_nothing_and_loses_nothing(tmp_path: Path, elsewhere: Path) -> None:
    with Folder(tmp_path / "c", {"w": 4}, "job") as folder:
        folder.partial.rename(tmp_path / "aside")
        folder.partial.symlink_to(elsewhere)
        folder.write("zoo.json", b"{}")
        folder.mark("step")
        with pytest.raises(ZooError, match="another folder"):
            folder.publish()
        folder.discard()
    assert untouched(elsewhere)
    assert not (tmp_path / "c").exists()


def test_a_partial_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = tmp_path / "c.partial"
    partial.mkdir()
    if os.geteuid() == 0:
        os.chown(partial, 12345, -1)
    else:
        pytest.skip("only root can give a folder away")
    with pytest.raises(ZooError, match="another user"), Folder(tmp_path / "c", {}, "job"):
        pass
    assert not list(partial.iterdir())


@pytest.mark.parametrize("how", ["link", "another user's"])
def test_an_old_folder_that_was_put_aside_is_ones_own(tmp_path: Path, elsewhere: Path, how: str) -> None:
    aside = tmp_path / ".c.zoo-replaced"
    if how == "link":
        aside.symlink_to(elsewhere)
    elif os.geteuid() == 0:
        aside.mkdir()
        os.chown(aside, 12345, -1)
    else:
        pytest.skip("only root can give a folder away")
    with pytest.raises(ZooError), Folder(tmp_path / "c", {}, "job"):
        pass
    assert untouched(elsewhere) and not os.path.lexists(tmp_path / "c")


@pytest.mark.parametrize("link", ["hub/.locks", "hub/.locks/models--org--toy", "hub/models--org--toy", "zoo"])
def test_no_folder_of_the_cache_that_is_a_link_is_written_through(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    with HubServer() as server:
        server.repo("org/toy").commit({"model.safetensors": b"x" * 5000})
        with pointed_at(server, tmp_path / "home", monkeypatch, timeout=1):
            (at := tmp_path / "home" / link).parent.mkdir(parents=True, exist_ok=True)
            at.symlink_to(elsewhere)
            with contextlib.suppress(hub.HubError):
                hub.download(hub.resolve("org/toy"), ["model.safetensors"])
    assert untouched(elsewhere)


def test_a_part_in_the_cache_that_is_a_link_is_not_written_through(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as server:
        server.repo("org/toy").commit({"model.safetensors": b"x" * 5000})
        with pointed_at(server, tmp_path / "home", monkeypatch, timeout=1):
            snapshot = hub.resolve("org/toy")
            for name in ("part", "blobs"):
                part = cache.part_path("org/toy", snapshot.files[0])
                if name == "part":
                    part.parent.mkdir(parents=True)
                    part.symlink_to(elsewhere / "victim")
                else:
                    part.unlink()
                    part.parent.rmdir()
                    part.parent.symlink_to(elsewhere)
                with pytest.raises(hub.HubError, match="link") as caught:
                    hub.download(snapshot, ["model.safetensors"])
                assert caught.value.kind == "disk"
                assert untouched(elsewhere)


# ---- canonical folders


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    return zoo.convert(tiny.make("llama", root / "source"), root / "canon")


def described(converted: Path, dst: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the folder whose zoo.json was edited."""
    folder = shutil.copytree(converted, dst / "canon")
    data = json.loads((folder / "zoo.json").read_text())
    change(data)
    (folder / "zoo.json").write_text(json.dumps(data))
    return folder


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "600,000 layers": lambda d: d["spec"].update(layers=[0] * 600_000),
    "600,000 kinds of layers": lambda d: d["spec"].update(layer_kinds=d["spec"]["layer_kinds"] * 600_000),
    "1024 layers in small files": lambda d: d["spec"].update(layers=[0] * 1024),
    "layer 99": lambda d: d.update(layers=[99]),
    "layer -1": lambda d: d.update(layers=[-1]),
    "layer 1e999": lambda d: d.update(layers=[float("inf")]),
    "a kind of layer that is not there": lambda d: d["spec"].update(layers=[7]),
    "a float of 401 digits": lambda d: d["spec"].update(embed_scale=10**400),
    "a float of 20 digits": lambda d: d["spec"].update(d_model=10**19),
    "a scheme of 5,000 digits": lambda d: d.update(quant={"layers.0.mlp.down": f"fp8-block-{'9' * 5000}x1"}),
    "a scheme of blocks of nothing": lambda d: d.update(quant={"layers.0.mlp.down": "fp8-block-0x0"}),
    "codes that are floats": lambda d: d.update(quant={"layers.0.mlp.down": "fp8-channel"}),
    "a dtype that is a list": lambda d: d["source"].update(dtype=["fp32"]),
    "a path that is too long": lambda d: d["source"].update(path="x" * 100_000),
    "a size that is text": lambda d: d["source"].update(files={"a": "1"}),
    "a carried file below a file": lambda d: d.update(carried=["config.json", "config.json/x"]),
    "a carried file outside": lambda d: d.update(carried=["../x"]),
    "extras that are a number": lambda d: d.update(extras=1),
    "a spec that is a list": lambda d: d.update(spec=[]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_canonical_folder_that_zoo_did_not_write_so_is_refused(
    converted: Path, tmp_path: Path, what: str
) -> None:
    folder = described(converted, tmp_path, HOSTILE[what])
    before = time.monotonic()
    with pytest.raises(ZooError):
        canonical.read(folder)
    assert time.monotonic() - before < 10  # 600,000 kinds take most of 2 s where nothing else runs


def test_a_json_file_nested_without_end_is_refused(converted: Path, tmp_path: Path) -> None:
    folder = described(converted, tmp_path, lambda d: None)
    (folder / "zoo.json").write_text("[" * 100_000)
    with pytest.raises(ZooError, match="nested"):
        canonical.read(folder)


def test_an_archive_of_headers_with_too_many_entries_is_refused(converted: Path, tmp_path: Path) -> None:
    folder = described(converted, tmp_path, lambda d: None)
    with zipfile.ZipFile(folder / "source.zip", "w") as z:
        for n in range(60_000):
            z.writestr(f"headers/{n:030}", b"")
    with pytest.raises(ZooError, match="directory"):
        zoo.export(folder, tmp_path / "out")


@pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_an_entry_of_an_archive_of_headers_is_unpacked_to_what_it_says(
    converted: Path, tmp_path: Path, packing: int
) -> None:
    folder = described(converted, tmp_path, lambda d: None)
    with zipfile.ZipFile(folder / "source.zip", "w") as z:
        z.writestr("headers/model.safetensors", bytes(64 << 20), packing)
    said = (folder / "source.zip").read_bytes().replace(struct.pack("<I", 64 << 20), struct.pack("<I", 100))
    (folder / "source.zip").write_bytes(said)
    tracemalloc.start()
    with pytest.raises(ZooError, match=r"source\.zip: "):
        zoo.export(folder, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_a_small_archive_of_headers_does_not_stand_for_large_ones(converted: Path, tmp_path: Path) -> None:
    folder = described(converted, tmp_path, lambda d: None)
    with zipfile.ZipFile(folder / "source.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("headers/model.safetensors", b" " * (24 << 20))
    with pytest.raises(ZooError, match=r"25165824 bytes, packed to [0-9]+, which headers are not"):
        zoo.export(folder, tmp_path / "out")


@pytest.mark.parametrize(("tensors", "fields"), [(3_000_000, 0), (0, 3_000_000)])
def test_a_gguf_of_millions_of_entries_is_refused_unread(tmp_path: Path, tensors: int, fields: int) -> None:
    path = tmp_path / "x.gguf"
    with path.open("wb") as f:
        f.write(struct.pack("<4sIQQ", b"GGUF", 3, tensors, fields))
        f.truncate(80_000_000)
    with pytest.raises(ZooError, match="limits"):
        zoo.plan(path)


def test_the_fuzzers_start_from_what_is_valid_and_find_nothing_in_a_moment() -> None:
    fuzz = Path(zoo.__file__).parents[1] / "fuzz" / "run.py"
    done = subprocess.run(
        [sys.executable, str(fuzz), "--seconds", "2", "--seed", "7"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(t["executions"] > 0 for t in json.loads(done.stdout)["targets"].values())
