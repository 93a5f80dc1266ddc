"""Caches of the Hub as people have them: older, copied, partial, without links. Pulled from, and left as they were."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import tiny
from hub_client import Spy, environment, pointed_at
from hub_server import HubServer
from huggingface_hub import _tree_cache, constants

import zoo
from zoo import hub
from zoo.cli.inspect import look
from zoo.errors import ZooError
from zoo.formats import canonical, open_checkpoint
from zoo.hub import HubError, cache
from zoo.pull import default_folder, preview

REPO = "org/tiny"
STRAYS = (".DS_Store", "Thumbs.db", "desktop.ini", "._config.json", "._model-00001-of-00003.safetensors")
EXTRA = {"README.md": b"# tiny", "logo.png": b"\x89PNG"}  # what a pull has no use for


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "llama"
    tiny.make("llama", folder, max_shard_size="60KB")
    for name, data in EXTRA.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def expected(release: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return weights(zoo.convert(release, tmp_path_factory.mktemp("expected") / "canon"))


@pytest.fixture
def server(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.repo(REPO).commit(release)
        with pointed_at(server, tmp_path / "home", monkeypatch, timeout=2):
            yield server


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def library(server: HubServer, **how: Any) -> Path:
    """What huggingface_hub's own `snapshot_download` gives, in another process with this one's cache."""
    code = f"import huggingface_hub as h; print(h.snapshot_download({REPO!r}, **{how!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(server, Path(constants.HF_HOME)),
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(done.stdout.strip())


def needed(server: HubServer) -> Path:
    """A cache with what a conversion needs and no more, as an older library leaves it: no file list. The snapshot."""
    folder = library(server, allow_patterns=["*.safetensors", "*.json"])
    shutil.rmtree(cache.folder(REPO) / "trees")
    return folder


def plain(folder: Path) -> None:
    """Make of a snapshot what `cp -L` or docker's COPY leaves: files instead of links, and no blobs."""
    for file in [p for p in folder.rglob("*") if p.is_symlink()]:
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
    shutil.rmtree(cache.folder(REPO) / "blobs")


def held() -> dict[str, Any]:
    """All that the shared cache holds: links, contents and times."""
    return {
        str(p): os.readlink(p) if p.is_symlink() else (p.stat().st_mtime_ns, p.read_bytes())
        for p in Path(constants.HF_HUB_CACHE).rglob("*")
        if p.is_symlink() or p.is_file()
    }


def offline(monkeypatch: pytest.MonkeyPatch, yes: bool = True) -> None:
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()  # as a new process would
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", yes)


# ------------------------------------------------------------------ what is not known is not written


def test_an_offline_pull_works_each_time_and_tells_the_cache_nothing(
    server: HubServer,
    release: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, before = needed(server), held()
    offline(monkeypatch)
    for n in range(3):
        assert weights(zoo.pull(REPO, tmp_path / f"canon{n}")) == expected
        assert weights(zoo.pull(REPO, tmp_path / f"pinned{n}", revision=folder.name)) == expected
    assert held() == before
    everything = {p.name for p in release.iterdir()}
    assert {p.name for p in folder.iterdir()} < everything
    assert {p.name for p in library(server).iterdir()} == everything
    offline(monkeypatch, False)
    assert weights(zoo.pull(REPO, tmp_path / "online")) == expected


def spoil(folder: Path, how: str) -> None:
    """A file list made from what was cached: as zoo once wrote it (no id for LFS files), or with too few files."""
    files = {}
    for p in folder.iterdir():
        blob = os.path.basename(os.readlink(p))
        large = len(blob) == 64
        if how == "no ids" or not large:
            lfs = {"lfs_sha256": blob, "lfs_size": p.stat().st_size} if large else {}
            files[p.name] = {"size": p.stat().st_size, "blob_id": "" if large else blob, **lfs}
    at = cache.folder(REPO) / "trees" / f"{folder.name}.json"
    at.parent.mkdir()
    at.write_text(json.dumps({"format_version": 1, "files": files}))


@pytest.mark.parametrize("what", ["a pipe", "nested", "lists", "no object", "a size that is text"])
def test_a_file_list_that_is_none_is_fetched_again(
    what: str, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MAX_JSON", 1 << 20)
    commit = hub.resolve(REPO).commit
    at = cache.folder(REPO) / "trees" / f"{commit}.json"
    at.parent.mkdir(parents=True)
    text = {
        "nested": "[" * 200_000,
        "lists": '{"format_version": 1, "x": [' + "[]," * 400_000 + '[]], "files": {}}',
        "no object": "[]",
        "a size that is text": '{"format_version": 1, "files": {"a": {"blob_id": 5}}}',
    }
    if what == "a pipe":
        os.mkfifo(at)
    else:
        at.write_text(text[what])
    assert {f.path for f in hub.resolve(REPO).files} >= {"config.json"}


@pytest.mark.parametrize("how", ["no ids", "too few files"])
def test_a_file_list_that_the_hub_never_sent_is_not_trusted(
    how: str,
    server: HubServer,
    release: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = needed(server)
    spoil(folder, how)
    before = held()
    offline(monkeypatch)
    assert weights(zoo.pull(REPO, tmp_path / "canon")) == expected
    assert held() == before
    offline(monkeypatch, False)
    assert weights(zoo.pull(REPO, tmp_path / "pinned", revision=folder.name)) == expected
    assert {p.name for p in library(server).iterdir()} == {p.name for p in release.iterdir()}  # it was mended


def test_a_list_of_more_files_than_any_hub_sends_is_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "MAX_FILES", 2)
    commit = "0" * 40
    (trees := cache.folder("a/b") / "trees").mkdir(parents=True)
    for n in (2, 3):
        files = {f"{i}.json": {"size": 1, "blob_id": "1" * 40} for i in range(n)}
        (trees / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": files}))
        assert (cache.read_tree("a/b", commit) is None) == (n > 2)


def test_a_list_of_fewer_files_than_the_hub_names_is_fetched_again(
    server: HubServer, release: Path, tmp_path: Path
) -> None:
    folder = library(server, allow_patterns=["config.json"])
    shutil.rmtree(cache.folder(REPO) / "trees")
    spoil(folder, "too few files")  # it agrees with what is cached
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    assert {f.path for f in hub.resolve(REPO).files} == {p.name for p in release.iterdir()}


# ------------------------------------------------------------------ without links, without refs


def test_a_cache_without_links_is_hashed_here_and_that_is_said(
    server: HubServer, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = needed(server)
    plain(folder)
    for name in STRAYS:
        (folder / name).write_bytes(b"\0\5\26\7")
    before, spy = held(), Spy()
    offline(monkeypatch)
    path = zoo.pull(REPO, tmp_path / "canon", progress=spy)
    assert weights(path) == expected and held() == before
    assert any("hash computed here, not compared with the Hub's" in note for note in spy.notes)
    origin = canonical.read(path).source["origin"]
    assert all(f["compared"] is False and len(f["sha256"]) == 64 for f in origin["files"].values())
    assert not {os.path.basename(f) for f in origin["files"]} & set(STRAYS)
    assert zoo.plan(REPO).nbytes and weights(zoo.pull(REPO, tmp_path / "streamed", stream=True)) == expected
    assert canonical.read(zoo.pull(REPO, tmp_path / "part", layers=[1])).layers == (1,)
    zoo.pull(REPO, path)  # is there already
    shard = sorted(folder.glob("model*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(ZooError, match="exists"):  # another source than it was made from
        zoo.pull(REPO, path)


def test_what_an_offline_cache_lacks_is_named(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = needed(server)
    shard = sorted(folder.glob("model*.safetensors"))[1]
    shard.unlink()
    offline(monkeypatch)
    with pytest.raises(ZooError, match=shard.name):
        zoo.pull(REPO, tmp_path / "canon")


def test_what_the_hub_compared_is_not_said_to_be_hashed_here(server: HubServer, tmp_path: Path) -> None:
    files = canonical.read(zoo.pull(REPO, tmp_path / "canon")).source["origin"]["files"]
    assert files and not any("compared" in f for f in files.values())


def test_offline_without_a_ref_the_only_snapshot_is_taken_and_of_several_none(
    server: HubServer, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = needed(server)
    shutil.rmtree(cache.folder(REPO) / "refs")
    before, spy = held(), Spy()
    offline(monkeypatch)
    path = zoo.pull(REPO, tmp_path / "canon", progress=spy)
    assert weights(path) == expected and held() == before
    assert any("the only one" in note and folder.name in note for note in spy.notes)
    assert canonical.read(path).source["origin"]["revision"] == folder.name
    with pytest.raises(HubError, match="'v1' is not in the cache"):
        hub.resolve(REPO, "v1")
    shutil.copytree(folder, folder.with_name("f" * 40), symlinks=True)
    with pytest.raises(HubError, match=f"{folder.name}, {'f' * 40}: name one") as caught:
        hub.resolve(REPO)
    assert caught.value.kind == "offline"
    assert hub.resolve(REPO, folder.name).commit == folder.name


def test_where_the_cache_holds_something_else_that_is_said(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = needed(server)
    offline(monkeypatch)
    at, ref = cache.folder(REPO), cache.folder(REPO) / "refs" / "main"
    ref.write_text("a" * 40)  # a commit whose files were removed, or of another endpoint
    with pytest.raises(
        HubError, match=f"calls that {'a' * 40}, of which it has no file; it holds {folder.name}"
    ):
        hub.resolve(REPO)
    with pytest.raises(HubError, match=f"it holds {folder.name}, each of which can be named"):
        hub.resolve(REPO, folder.name[:7])
    about, _ = look(at)
    assert any(f"refs/main names {'a' * 40}, which is not there" in note for note in about["notes"])
    ref.write_text(folder.name)
    (folder / "config.json").resolve().unlink()
    with pytest.raises(ZooError, match="config.json: a link to .*blobs/.*, where there is nothing"):
        zoo.convert(at, tmp_path / "canon")
    shutil.rmtree(at / "blobs")  # the links alone were copied
    with pytest.raises(HubError, match=f"of {folder.name} it has links whose files are gone"):
        hub.resolve(REPO)


# ------------------------------------------------------------------ a folder of the cache as a source


def test_a_folder_of_the_cache_is_the_snapshot_that_main_names(
    server: HubServer, expected: dict[str, bytes], tmp_path: Path
) -> None:
    folder = library(server)
    other = folder.with_name("0" * 40)
    other.mkdir()
    at = cache.folder(REPO)
    for source in (at, at / "snapshots"):
        canon = zoo.convert(source, tmp_path / f"canon-{source.name}")
        assert weights(canon) == expected
        assert canonical.read(canon).source["path"] == str(folder)
    assert weights(zoo.pull(str(at), tmp_path / "pulled")) == expected
    assert default_folder(str(at)) == "tiny" and preview(str(at)).fetch == 0
    with pytest.raises(ZooError, match="nothing is fetched"):
        zoo.pull(str(at), tmp_path / "part", layers=[0])
    about, _ = look(at)
    assert about["format"] == "safetensors" and any(folder.name in note for note in about["notes"])
    (at / "refs" / "main").unlink()
    with pytest.raises(ZooError, match=f"several snapshots.*{other.name}.*{folder.name}"):
        open_checkpoint(at)
    other.rmdir()
    assert open_checkpoint(at).root == folder
    with pytest.raises(ZooError, match="give one of them: .*models--org--tiny"):
        open_checkpoint(at.parent)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ZooError, match="without a snapshot"):
        open_checkpoint(at)


def test_a_folder_that_was_downloaded_to_is_read_without_what_the_library_notes_there(
    server: HubServer, expected: dict[str, bytes], tmp_path: Path
) -> None:
    folder = library(server, local_dir=str(tmp_path / "here"))
    notes = folder / ".cache" / "huggingface"
    assert list(notes.rglob("*.metadata"))
    shard = next(folder.glob("*.safetensors"))
    (notes / "download" / f"{shard.name}.0123.incomplete").write_bytes(shard.read_bytes()[:100])
    for name in STRAYS:
        (folder / name).write_bytes(b"\0\5\26\7")
    canon = zoo.convert(folder, tmp_path / "canon")
    assert weights(canon) == expected
    assert not [p for p in canon.rglob("*") if p.name in STRAYS or ".cache" in p.parts]
    assert zoo.verify(canon, level="bytes").passed


def test_ones_own_links_are_refused_with_the_way_out(
    release: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "my links"
    folder.mkdir()
    for file in release.iterdir():
        (folder / file.name).symlink_to(file)
    with pytest.raises(ZooError, match="is a symlink to .* refused") as caught:
        zoo.convert(folder, tmp_path / "canon")
    command = str(caught.value).split("`")[3]
    assert command.startswith("cp -rlL")
    way = str(caught.value).split("`")[1].replace("COPY", str(tmp_path / "copy"))
    subprocess.run(["sh", "-c", way], check=True)
    assert weights(zoo.convert(tmp_path / "copy", tmp_path / "canon")) == expected


# ------------------------------------------------------------------ a Hub without a file list


@pytest.mark.parametrize(("code", "error"), [(404, None), (404, "EntryNotFound"), (405, None)])
def test_a_mirror_without_file_lists_is_asked_for_the_commit_with_its_files(
    code: int, error: str | None, server: HubServer, release: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    listed = hub.resolve(REPO)
    server.fail("status", f"{REPO}/tree", where="api", code=code, error=error, times=-1)
    assert hub.resolve(REPO, listed.commit).files == listed.files
    assert weights(zoo.pull(REPO, tmp_path / "canon")) == expected
    assert {p.name for p in library(server).iterdir()} == {p.name for p in release.iterdir()}


def test_a_mirror_that_lists_no_hashes_is_told_apart_in_one_sentence(server: HubServer) -> None:
    commit = hub.resolve(REPO).commit
    server.fail("status", f"{REPO}/tree", where="api", code=404, error="EntryNotFound", times=-1)
    body = json.dumps({"sha": commit, "siblings": [{"rfilename": "config.json"}]}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    server.fail("answer", f"{REPO}/revision", where="api", headers=headers, body=body, times=-1)
    with pytest.raises(HubError, match="does not list the files of org/tiny with their sizes and hashes"):
        hub.resolve(REPO)


def test_where_neither_list_is_served_no_file_called_none_is_missed(server: HubServer) -> None:
    for what in ("tree", "revision"):
        server.fail("status", f"{REPO}/{what}", where="api", code=404, error="EntryNotFound", times=-1)
    with pytest.raises(HubError, match="check that it names a Hub") as caught:
        hub.resolve(REPO, "0" * 40)
    assert "None" not in str(caught.value)
