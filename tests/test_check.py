"""`zoo check`: a folder that somebody downloaded or copied is whole and unaltered, or it is said what is not."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("transformers")
import test_hub_cache
import tiny
from hub_server import HubServer
from test_hub_cache import REPO, library, offline, plain
from verified import canonical, copy

import zoo
from zoo.check import check
from zoo.cli import _common, cli
from zoo.errors import ZooError

release, server = test_hub_cache.release, test_hub_cache.server  # its fixtures


def flip(path: Path) -> None:
    """One bit, the last byte's: of a weight's values, not of a header."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # it may be a link
    path.write_bytes(bytes(data))


def main(args: list[str]) -> int:
    return _common.run(cli, args)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_a_copy_is_held_to_the_hubs_list(server: HubServer, release: Path, tmp_path: Path) -> None:
    here = shutil.copytree(release, tmp_path / "here")
    (here / "README.md").unlink()
    (here / "notes.txt").write_text("mine")
    report = check(here, REPO)
    assert report.whole and report.hashed == len(list(release.iterdir())) - 1
    assert report.against is not None and f"the Hub's list of {REPO}" in report.against
    assert "whole and unaltered" in report.verdict and report.family == "llama"
    assert any("README.md" in x and "not needed" in x for x in report.notes)
    assert any("notes.txt" in x and "not of it" in x for x in report.notes)


def test_what_is_missing_cut_or_altered_is_named(
    server: HubServer, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = shutil.copytree(release, tmp_path / "here")
    first, second, third = shards(here)[:3]
    first.unlink()
    flip(second)
    third.write_bytes(third.read_bytes()[:-10])
    (here / "generation_config.json").unlink()
    assert main(["check", str(here), REPO]) == 1
    said = capsys.readouterr().out
    assert f"{first.name}: missing" in said and "generation_config.json: missing" in said
    assert f"{second.name}: its hash is" in said and "altered, or damaged" in said
    assert f"{third.name}: " in said and "fetch it again" in said
    assert "NOT whole" in said


def test_a_download_is_held_offline_to_what_the_library_noted(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = library(server, local_dir=str(tmp_path / "here"))
    offline(monkeypatch)
    report = check(here)
    assert report.whole and "huggingface-hub noted" in report.verdict
    assert any("never downloaded" in x for x in report.notes)
    flip(shards(here)[0])
    shards(here)[1].unlink()
    problems = "\n".join(check(here).problems)
    assert "altered, or damaged" in problems and "missing" in problems


def test_a_snapshot_of_the_cache_is_held_to_the_names_of_its_blobs(server: HubServer) -> None:
    here = library(server)
    assert check(here).whole and "blobs" in check(here).verdict
    blob = shards(here)[0].resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(bytes(data))
    assert any("altered" in x for x in check(here).problems)
    plain(here)  # `cp -L`: links are gone, and with them what the bytes should be
    assert check(here).against is None


def test_a_folder_of_the_cache_stands_for_its_snapshot_which_is_held_to_its_own_commit(
    server: HubServer, release: Path
) -> None:
    snapshot = library(server)
    root = snapshot.parents[1]
    for at, name in ((root, None), (root, REPO), (snapshot.parent, None), (root.parent, REPO)):
        report = check(at, name)
        assert report.whole and report.hashed == len(list(release.iterdir())), at
        assert any(f"its snapshot {snapshot.name} is looked at" in x for x in report.notes)
    with pytest.raises(
        ZooError, match="a cache of the Hub, a folder a model: give one of them: .*models--org--tiny"
    ):
        check(root.parent)

    (root / "blobs" / f"{'0' * 64}.incomplete").write_bytes(b"x")
    for at in (root, snapshot):
        report = check(at)
        assert report.whole and "downloads that have not ended, of which nothing is read" in report.notes[-1]

    server.repos[REPO].commit({"config.json": b"{}"})
    report = check(snapshot, REPO)  # the branch has moved on; the snapshot has not
    assert report.whole and report.remedy is None
    report = check(release, REPO)
    assert not report.whole and any("name that with --revision" in x for x in report.notes)
    assert check(release, REPO, revision=snapshot.name).whole
    flip(shards(snapshot)[0].resolve())
    report = check(snapshot, REPO)
    assert len(report.problems) == 1 and report.remedy is not None
    assert f"`hf download {REPO} --revision {snapshot.name}` fetches" in report.remedy


def test_what_lies_in_a_files_place_is_called_what_it_is(
    release: Path, tmp_path: Path, server: HubServer
) -> None:
    here = shutil.copytree(release, tmp_path / "here")
    pointer, page, link = shards(here)[:3]
    pointer.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")
    page.write_text("<!doctype html>")
    link.unlink()
    link.symlink_to("../blobs/x")
    (here / "model.safetensors.part").write_bytes(b"x")
    report = check(here, REPO)
    said = "\n".join(report.problems)
    assert f"{pointer.name}: a git-lfs pointer" in said and f"{page.name}: a web page" in said
    assert (
        f"{link.name}: a link to ../blobs/x, where there is nothing" in said and "bytes, expected" not in said
    )
    assert "model.safetensors.part" in report.notes[0] and "have not ended" in report.notes[0]
    assert report.remedy is not None and report.remedy.endswith(
        f"--local-dir {here}` fetches what is not there"
    )
    for file in here.iterdir():
        file.unlink()
    report = check(here, REPO)
    assert "none of its" in report.problems[0]
    assert "model.safetensors.index.json: missing" in report.problems


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("version", [2, 4])
def test_a_clone_is_held_to_gits_index_which_has_pointers_of_large_files(
    version: int, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = shutil.copytree(release, tmp_path / "here")
    data = {p: p.read_bytes() for p in shards(here)}
    for p, held in data.items():
        digest = hashlib.sha256(held).hexdigest()
        p.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(held)}\n")
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", f"index.version={version}")
    for args in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "x")):
        subprocess.run(("git", *who, *args), cwd=here, check=True)
    assert "a git-lfs pointer" in check(here).problems[0]
    for p, held in data.items():
        p.write_bytes(held)
    for small in (1 << 20, 10_000):  # whole files first, or pointers
        monkeypatch.setattr("zoo.check.SMALL", small)
        report = check(here)
        assert report.whole and "git's index of this clone, commit " in report.verdict, report.problems
        assert report.hashed == len(list(release.iterdir()))
    flip(shards(here)[1])
    (here / "config.json").write_text((here / "config.json").read_text() + " ")
    report = check(here)
    assert [p.partition(":")[0] for p in report.problems] == ["config.json", shards(here)[1].name]
    assert report.remedy is not None and "git checkout FILE" in report.remedy
    # then what is dropped of the name before, and the rest
    entry = bytes(24) + (0o100644).to_bytes(4, "big") + bytes(34)
    names = entry + b"\0" + b"x" * 4000 + b"\0" + (entry + b"\0xx\0") * 99
    for index in (b"DIRC" + b"\xff" * 99, b"DIRC" + bytes((0, 0, 0, 4, 0, 0, 0, 100)) + names):
        (here / ".git" / "index").write_bytes(index)
        with pytest.raises(ZooError, match="not as git writes it"):
            check(here)


def test_without_any_list_it_says_that_only_headers_were_looked_at(release: Path, tmp_path: Path) -> None:
    here = shutil.copytree(release, tmp_path / "here")
    report = check(here)
    assert report.whole and report.against is None and report.hashed == 0 and report.tensors > 0
    assert "as far as its headers tell" in report.verdict and "unaltered" not in report.verdict
    shards(here)[0].unlink()
    assert not check(here).whole


def test_an_index_is_held_to_the_headers_and_what_it_leaves_out_is_said(
    release: Path, tmp_path: Path
) -> None:
    here = shutil.copytree(release, tmp_path / "here")
    index = here / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    files = list(told["weight_map"].values())
    name = next(n for n, file in told["weight_map"].items() if files.count(file) > 1)
    del told["weight_map"][name]
    told["metadata"]["total_size"] = 1
    index.write_text(json.dumps(told))
    report = check(here)
    assert report.whole and f"does not list {name}" in report.notes[-2] and "total_size 1" in report.notes[-1]
    told["weight_map"]["model.nothing"] = shards(here)[0].name
    index.write_text(json.dumps(told))
    assert "says 'model.nothing' is in" in "".join(check(here).problems)


def test_a_canonical_folder_without_a_certificate_is_held_to_what_it_says_itself(tmp_path: Path) -> None:
    source = copy(tiny.make("llama", tmp_path / "release"), tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    folder = zoo.convert(source, tmp_path / "canon")
    assert check(folder).whole and not check(folder).notes
    (folder / "mine.txt").write_text("x")
    (folder / "tokenizer.json").unlink()
    (folder / "source.zip").unlink()
    report = check(folder)
    assert [p.partition(",")[0] for p in report.problems] == [
        "tokenizer.json: missing",
        "source.zip: missing",
    ]
    assert report.notes == ["here, and not of it: mine.txt"]
    next(folder.glob("*.safetensors")).unlink()
    assert "there is no such file" in check(folder).problems[0]


def test_a_canonical_folder_is_held_to_its_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(canonical("llama"), tmp_path / "canon")
    assert zoo.verify(folder, level="bytes").passed
    assert main(["check", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["whole"] and "certificate" in said["against"] and said["files_hashed"] > 1
    source = json.loads((folder / "parity.json").read_text())["source"]
    assert check(canonical("llama").parent / "llama-float32-source", by=folder / "parity.json").hashed == len(
        source["files"]
    )
    flip(next(folder.glob("*.safetensors")))
    assert any("altered" in x for x in check(folder).problems)


def test_an_export_beside_which_the_certificate_lies_is_held_to_it(tmp_path: Path) -> None:
    folder = copy(canonical("llama"), tmp_path / "canon")
    assert zoo.verify(folder, level="bytes").passed
    out = zoo.export(folder, tmp_path / "out")
    assert check(out).against is None
    shutil.copy(folder / "parity.json", out)
    report = check(out)
    assert report.whole and "its certificate" in report.verdict
    flip(next(out.glob("*.safetensors")))
    assert "altered" in check(out).problems[0]
    with pytest.raises(ZooError, match="a canonical folder, whose files are zoo's and none of org/tiny"):
        check(folder, REPO)


def test_of_several_sets_of_weights_the_headers_of_each_are_looked_at(tmp_path: Path) -> None:
    here = tmp_path / "here"
    for type in ("f16", "f32"):
        zoo.export(canonical("qwen3"), here / f"m-{type}.gguf", "gguf", type=type)
    report = check(here)
    assert (
        report.whole
        and report.tensors > 0
        and "2 sets of weights (m-f16.gguf, m-f32.gguf)" in report.notes[0]
    )
    data = (here / "m-f32.gguf").read_bytes()
    (here / "m-f32.gguf").write_bytes(data[:-64])
    assert "m-f32.gguf: tensor" in check(here).problems[0]


def test_a_list_that_leads_out_of_the_folder_is_refused(release: Path, tmp_path: Path) -> None:
    file = tmp_path / "parity.json"
    entry = {"bytes": 1, "sha256": "0" * 64}
    file.write_text(json.dumps({"canonical": {"files": {"../secret": entry}}, "source": None}))
    with pytest.raises(zoo.ZooError, match="outside of the folder"):
        check(release, by=file)


def test_a_list_that_names_what_no_file_can_be_called_is_one_message(release: Path, tmp_path: Path) -> None:
    file = tmp_path / "parity.json"
    for name, size in (("a" * 5000, 1), ("config.json", float("inf"))):
        entry = {"bytes": size, "sha256": "0" * 64}
        file.write_text(json.dumps({"canonical": {"files": {name: entry}}, "source": None}))
        try:
            assert not check(release, by=file).whole
        except zoo.ZooError as e:
            assert "not as zoo writes it" in str(e) or "a key of 5000 bytes" in str(e)
