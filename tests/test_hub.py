"""`zoo.hub` against a Hub on loopback that misbehaves on demand, and beside the real huggingface_hub.

Most tests run in this process with the library's settings pointed at the server; those about processes (kills,
Ctrl-C, two pulls at once, other tools) start real ones. `ZOO_KILLS=30` tries more points of death.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from hub_client import Spy, environment, pointed_at, raw_answers
from hub_server import HubServer, Repo
from huggingface_hub import constants

from zoo import hub
from zoo.errors import ZooError
from zoo.hub import HubError, cache, endpoint, http
from zoo.hub.errors import Transient

MIB = 1 << 20
KILLS = int(os.environ.get("ZOO_KILLS", "3"))


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


SMALL, LARGE = noise(3 * MIB, 1), noise(12 * MIB, 2)  # below and above what is read from the socket directly
FILES = {"config.json": b'{"model_type": "toy"}', "model-1.safetensors": LARGE, "model-2.safetensors": SMALL}
ALL = tuple(FILES)
TOTAL = sum(map(len, FILES.values()))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with `org/toy`, at which this process' huggingface_hub is pointed, with an empty cache and no token."""
    with HubServer() as server:
        server.repo("org/toy").commit(FILES)
        with pointed_at(server, tmp_path / "home", monkeypatch, timeout=0.5):
            yield server


@pytest.fixture(params=["socket", "library"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways that a body can take."""
    monkeypatch.setattr(http, "DIRECT", 0 if request.param == "socket" else 1 << 60)


def pull(repo: str = "org/toy", revision: str | None = None, **how: Any) -> Path:
    snapshot = hub.resolve(repo, revision)
    return hub.download(snapshot, [f.path for f in snapshot.files], **how)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


PULL = """
import json, sys
from zoo import hub
class Said:
    def start(self, total): print("start", total, flush=True)
    def phase(self, name): print("phase", name, flush=True)
    def note(self, message): print("note", message, flush=True)
    def advance(self, n): pass
hub.RETRY.first_wait = 0.01
try:
    snapshot = hub.resolve(*sys.argv[1:])
    print("done", hub.download(snapshot, [f.path for f in snapshot.files], progress=Said()))
except hub.HubError as error:
    print("error", error.kind, error)
"""


def start(server: HubServer, home: Path, code: str, *args: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env=environment(server, home) | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=60)
    return out


def until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def refused(kind: str, call: Any) -> str:
    with pytest.raises(HubError) as caught:
        call()
    assert caught.value.kind == kind, caught.value
    return str(caught.value)


# ---- resolve


def test_resolve_names_the_commit_and_every_file_with_size_and_hash(server: HubServer) -> None:
    snapshot = hub.resolve("org/toy")
    assert snapshot.commit == server.repos["org/toy"].refs["main"]
    assert [f.path for f in snapshot.files] == sorted(FILES)
    weights, config = snapshot.file("model-1.safetensors"), snapshot.file("config.json")
    assert (weights.size, weights.sha256, weights.git_sha1) == (
        len(LARGE),
        hashlib.sha256(LARGE).hexdigest(),
        None,
    )
    blob = FILES["config.json"]
    assert config.git_sha1 == hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
    assert config.sha256 is None


def test_a_long_file_list_is_read_page_by_page(server: HubServer) -> None:
    names = {f"part/{i:04}.txt": str(i).encode() for i in range(25)}
    server.repo("org/long").commit(names)
    server.page_size = 7
    assert [f.path for f in hub.resolve("org/long").files] == sorted(names)


def test_empty_pages_without_end_are_the_end(server: HubServer) -> None:
    headers = {
        "Content-Length": "2",
        "Link": f'<{server.url}/api/models/org/toy/tree/main?cursor=1>; rel="next"',
    }
    server.fail("answer", "org/toy/tree", headers=headers, body=b"[]", times=-1)
    assert hub.resolve("org/toy").files == ()


def test_pages_are_asked_for_here_wherever_their_links_lead(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.tokens = {"hf_mine": {"*"}}
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    server.page_size, server.link_base = 1, server.cdn_url
    assert len(hub.resolve("org/toy").files) == 3
    assert server.requests(origin="cdn") == []


@pytest.mark.parametrize("link", ["x" * 60_000, ".elsewhere.org/x", "@elsewhere.org/x", "?a", "https://[::1"])
def test_a_link_that_is_no_path_of_ours_is_the_end(server: HubServer, link: str) -> None:
    """Put behind the endpoint's name it was another host's, or no address, which was called a bug in zoo."""
    response = httpx2.Response(200, headers={"Link": f'<{link}>; rel="next"'})
    assert http._next_page(response) is None
    response = httpx2.Response(200, headers={"Link": '</api/models?cursor=1>; rel="next"'})
    assert http._next_page(response) == f"{constants.ENDPOINT}/api/models?cursor=1"


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504, 522])
def test_both_api_calls_survive_a_server_that_is_busy(server: HubServer, code: int) -> None:
    server.fail("status", "org/toy/revision", code=code, retry_after="0")
    server.fail("status", "org/toy/tree", code=code)
    assert len(hub.resolve("org/toy").files) == 3


def test_retry_after_is_honoured_but_capped(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.RETRY, "longest_retry_after", 0.6)
    server.fail("status", "org/toy/revision", code=429, retry_after="86400")
    began = time.monotonic()
    hub.resolve("org/toy")
    assert 0.6 <= time.monotonic() - began < 30  # not a day


@pytest.mark.parametrize("call", ["revision", "tree"])
@pytest.mark.parametrize(
    "headers",
    [{"Content-Length": "1000"}, {"Content-Encoding": "gzip", "Content-Length": "8"}],
    ids=["breaks off", "is not what it says"],
)
def test_an_api_answer_that_is_not_whole_is_asked_for_again(
    server: HubServer, call: str, headers: dict[str, str]
) -> None:
    server.fail("answer", f"org/toy/{call}", headers=headers, body=b'{"sha": ')
    assert len(hub.resolve("org/toy").files) == 3


def test_json_of_any_depth_is_no_bug(server: HubServer) -> None:
    body = b"[" * 200_000
    server.fail("answer", "org/toy/revision", headers={"Content-Length": str(len(body))}, body=body, times=-1)
    refused("server", lambda: hub.resolve("org/toy"))


@pytest.mark.parametrize("location", ["http://[bad", "http://127.0.0.1:99999/", "http://127.0.0.1:port/"])
def test_a_redirect_to_no_address_is_refused(server: HubServer, location: str) -> None:
    server.fail("redirect", "config.json", location=location)
    refused("server", pull)


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:99999", "hf-mirror.com", "http://[::1", "http://a..b"]
)
def test_an_endpoint_that_is_no_address_is_called_that(
    endpoint: str, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    assert "Check HF_ENDPOINT" in refused("network", lambda: hub.resolve("org/toy"))


def test_a_token_that_cannot_be_sent_is_named(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_é")
    refused("token", lambda: hub.resolve("org/toy"))


def test_a_silent_server_is_asked_again(server: HubServer) -> None:
    def hang(request: Any) -> None:
        if "/revision/" in request.target and not hung:
            hung.append(request)
            server.stopping.wait(5)

    hung: list[Any] = []
    server.before = hang
    assert len(hub.resolve("org/toy").files) == 3


def test_one_clear_message_for_each_way_to_be_refused(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repo("org/gated", gated=True).commit(FILES)
    server.repo("org/private", private=True).commit(FILES)
    server.tokens = {"hf_stranger": set(), "hf_friend": {"org/gated", "org/private"}}

    message = refused("gated", lambda: pull("org/gated"))
    assert f"{server.url}/org/gated" in message
    assert "hf auth login" in message
    assert "org/private" in refused("repo", lambda: pull("org/private"))
    assert "org/none" in refused("repo", lambda: pull("org/none"))
    assert "'v9'" in refused("revision", lambda: pull("org/toy", "v9"))
    assert "model-2.safetensors" in refused(
        "file", lambda: hub.download(hub.resolve("org/toy"), ["model2.safetensors"])
    )
    refused("repo", lambda: pull("no such name"))

    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    message = refused("gated", lambda: pull("org/gated"))
    assert f"{server.url}/org/gated" in message
    assert "hf_stranger" not in message
    assert "org/private" in refused("repo", lambda: pull("org/private"))

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refused("token", lambda: pull("org/toy"))
    assert "HF_TOKEN" in message
    assert "hf_wrong" not in message

    monkeypatch.setenv("HF_TOKEN", "hf_friend")
    assert contents(pull("org/gated")) == FILES
    assert contents(pull("org/private")) == FILES


def test_the_token_never_reaches_the_storage_host(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.tokens = {"hf_mine": {"*"}}
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    pull()
    assert all(r.token == "hf_mine" for r in server.requests(origin="hub"))
    assert server.requests(origin="cdn")
    assert server.leaked_tokens() == 0


def test_no_network_is_said_soon_and_so_is_what_the_cache_holds(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = pull().name
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(http, "_reached", threading.Event())
    message = refused("network", lambda: hub.resolve("org/toy"))
    assert "127.0.0.1:9" in message
    assert commit in message


def test_something_that_is_no_hub_is_called_that(server: HubServer) -> None:
    def answer(self: Any, *_: Any) -> None:
        self.begin(200, {"Content-Length": "6"})
        self.wfile.write(b"<html>")

    handler = server._servers[0].RequestHandlerClass
    original = handler.answer_api  # type: ignore[attr-defined]
    handler.answer_api = answer  # type: ignore[attr-defined]
    try:
        assert "HF_ENDPOINT" in refused("server", lambda: hub.resolve("org/toy"))
    finally:
        handler.answer_api = original  # type: ignore[attr-defined]


def test_a_renamed_repository_is_followed(server: HubServer) -> None:
    server.renamed["org/old"] = "org/toy"
    assert contents(pull("org/old")) == FILES


# ---- hostile repositories


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/x", "a//b", "./a", "a/.", "..", "", "a\\..\\b", "C:/x", "a\0b", "a\nb", "x" * 300, "\ud800", 7, None],
)  # fmt: skip
def test_a_path_that_could_leave_its_folder_is_refused(server: HubServer, path: object) -> None:
    server.repos["org/toy"].extra_tree = [{"type": "file", "oid": "0" * 40, "size": 1, "path": path}]
    refused("path", lambda: hub.resolve("org/toy"))
    assert not Path(constants.HF_HUB_CACHE).exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"type": "symlink", "oid": "0" * 40, "size": 1, "path": "link"},
        {"type": "file", "oid": "../../x", "size": 1, "path": "a"},
        {"type": "file", "oid": "0" * 40, "size": -1, "path": "a"},
        {"type": "file", "oid": "0" * 40, "size": "1", "path": "a"},
        {"type": "file", "oid": "0" * 40, "size": 1, "path": "config.json"},
        {"type": "file", "oid": "0" * 40, "size": 1, "path": "config.json/x"},
        {"type": "file", "oid": "0" * 40, "size": 1, "path": "a", "lfs": {"oid": "../" * 20, "size": 1}},
        {"type": "file", "oid": "0" * 40, "size": 1, "path": "a", "xetHash": "../x"},
        {"type": "file", "oid": "0" * 40, "size": 1, "path": "a", "lfs": "x"},
        {"type": "file", "size": 1, "path": "a"},
        {"type": "file", "oid": "0" * 40, "size": 1 << 63, "path": "a"},
        "config.json",
    ],
)
def test_a_file_list_that_makes_no_sense_is_refused(server: HubServer, entry: Any) -> None:
    server.repos["org/toy"].extra_tree = [entry]
    refused("path", lambda: hub.resolve("org/toy"))


@pytest.mark.parametrize("revision", ["../../../x", "/etc", "a\\b", "a/../b"])
def test_a_revision_that_could_leave_its_folder_is_refused(server: HubServer, revision: str) -> None:
    refused("revision", lambda: hub.resolve("org/toy", revision))
    assert server.log == []


def test_a_folder_that_is_a_link_is_not_written_through(server: HubServer, tmp_path: Path) -> None:
    server.repos["org/toy"].commit({"sub/a.txt": b"a"})
    snapshot = hub.resolve("org/toy")
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = cache.snapshot_folder(snapshot)
    folder.mkdir(parents=True)
    (folder / "sub").symlink_to(outside)
    assert "is a link" in refused("disk", lambda: hub.download(snapshot, ["sub/a.txt"]))
    assert list(outside.iterdir()) == []


def test_nothing_is_asked_of_a_hub_that_nobody_asked_for(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own headers cost a request to the endpoint, whose answer it reads however long it is."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", None)
    pull()
    assert not [r.target for r in server.requests(origin="hub") if "org/toy" not in r.target]


def test_a_network_that_is_slow_to_connect_counts_against_no_server(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "REDIRECTS", 0.2)
    sent = http._sent

    def slow(session: Any, request: Any) -> Any:
        if "/resolve/" in request.url.path:
            time.sleep(0.3)
        return sent(session, request)

    monkeypatch.setattr(http, "_sent", slow)
    snapshot = hub.resolve("org/toy")
    large = max(snapshot.files, key=lambda f: f.size)
    assert hub.download(snapshot, [large.path]).is_dir() and server.requests(origin="cdn")


def test_a_redirect_to_something_other_than_http_is_refused(server: HubServer) -> None:
    server.fail("redirect", "config.json", location="file:///etc/passwd")
    refused("server", pull)


def test_hundreds_of_tiny_files_are_no_trouble(server: HubServer) -> None:
    many = {f"shards/{i:04}.safetensors": str(i).encode() for i in range(300)} | {"empty.txt": b""}
    server.repo("org/many").commit(many)
    assert contents(pull("org/many", workers=8)) == many


# ---- download: the Hub's cache


def test_a_pull_brings_every_file_and_says_how_far_it_is(server: HubServer) -> None:
    spy = Spy()
    assert contents(pull(progress=spy)) == FILES
    assert spy.total == spy.done == TOTAL
    assert spy.phases == ["checking", "downloading"]
    assert server.body_bytes() == TOTAL


def test_a_second_pull_fetches_nothing_and_a_pinned_one_asks_nothing(server: HubServer) -> None:
    commit = pull().name
    server.forget()
    spy = Spy()
    pull(progress=spy)
    assert server.body_bytes() == 0
    assert spy.done == TOTAL
    server.forget()
    assert contents(pull(revision=commit)) == FILES
    assert server.log == []


def test_the_real_library_finds_everything_and_downloads_nothing(server: HubServer, tmp_path: Path) -> None:
    pull()
    server.forget()
    code = """
import json, os, sys
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download
local = snapshot_download("org/toy", local_files_only=True)
assert snapshot_download("org/toy") == local
assert os.path.realpath(hf_hub_download("org/toy", "config.json")) == os.path.realpath(local + "/config.json")
info = scan_cache_dir()
assert not info.warnings and not info.incomplete_files, info
print(sorted(os.listdir(local)))
"""
    assert finish(start(server, tmp_path / "home", code)).splitlines()[-1] == str(sorted(FILES))
    assert server.body_bytes() == 0


def test_what_the_library_downloaded_is_hashed_once_and_not_fetched_again(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from huggingface_hub import snapshot_download; print(snapshot_download('org/toy'))"
    folder = Path(finish(start(server, tmp_path / "home", code)).splitlines()[-1])
    server.forget()
    hashed: list[str] = []
    original = cache.hash_prefix
    monkeypatch.setattr(cache, "hash_prefix", lambda path, *a: (hashed.append(path.name), original(path, *a)))
    assert pull() == folder
    assert len(hashed) == 3
    assert pull() == folder
    assert len(hashed) == 3
    assert server.body_bytes() == 0


def test_a_file_that_another_tool_left_damaged_is_fetched_again(server: HubServer, tmp_path: Path) -> None:
    code = "from huggingface_hub import snapshot_download; print(snapshot_download('org/toy'))"
    folder = Path(finish(start(server, tmp_path / "home", code)).splitlines()[-1])
    blob = (folder / "model-1.safetensors").resolve()
    with open(blob, "r+b") as f:
        f.seek(MIB)
        f.write(b"xx")
    assert hub.cached(hub.resolve("org/toy"), "model-1.safetensors") is None
    server.forget()
    spy = Spy()
    assert contents(pull(progress=spy)) == FILES
    assert server.body_bytes() == len(LARGE)
    assert "damaged" in " ".join(spy.notes)


def test_what_was_verified_is_trusted_until_it_changes_and_if_fresh_until_a_reboot(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub.resolve("org/toy")
    file = snapshot.file("model-2.safetensors")
    path = hub.download(snapshot, [file.path]) / file.path
    assert cache.is_verified(path, file)
    monkeypatch.setattr(cache, "boot", lambda: "another")
    assert not cache.is_verified(path, file)
    os.utime(path, (time.time() - 600,) * 2)
    assert hub.cached(snapshot, file.path) is not None
    monkeypatch.setattr(cache, "boot", lambda: "a third")
    assert cache.is_verified(path, file)
    os.utime(path)
    assert not cache.is_verified(path, file)


def test_a_cache_without_links_works_too(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    folder = pull()
    assert contents(folder) == FILES
    assert not (folder / "config.json").is_symlink()
    server.forget()
    pull()
    assert server.body_bytes() == 0


def test_the_same_contents_under_two_names_are_fetched_once(server: HubServer) -> None:
    server.repo("org/twins").commit({"a.safetensors": SMALL, "b.safetensors": SMALL})
    spy = Spy()
    assert contents(pull("org/twins", progress=spy)) == {"a.safetensors": SMALL, "b.safetensors": SMALL}
    assert server.body_bytes() == len(SMALL)
    assert spy.done == spy.total
    assert spy.notes == []


def test_a_commit_that_comes_in_the_middle_changes_nothing(server: HubServer) -> None:
    def push(request: Any) -> None:
        with pushing:
            if request.origin == "cdn" and len(repo.commits) == 1:
                repo.commit(dict.fromkeys(FILES, b"other"))

    repo, pushing = server.repos["org/toy"], threading.Lock()
    server.before = push
    assert contents(pull()) == FILES
    assert contents(pull()) == dict.fromkeys(FILES, b"other")


def test_a_new_commit_costs_only_the_files_that_changed(server: HubServer) -> None:
    first = pull()
    server.repos["org/toy"].commit({"config.json": b"{}"})
    server.forget()
    spy = Spy()
    assert contents(pull(progress=spy)) == FILES | {"config.json": b"{}"}
    assert contents(first) == FILES
    assert server.body_bytes() == 2
    assert spy.done == spy.total


def test_part_of_a_snapshot_can_be_had_and_completed(server: HubServer) -> None:
    snapshot = hub.resolve("org/toy")
    assert sorted(contents(hub.download(snapshot, ["config.json"]))) == ["config.json"]
    assert contents(pull()) == FILES
    assert server.body_bytes() == TOTAL


# ---- download: bad networks


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ["cut", "reset", "stall"])
def test_a_broken_transfer_goes_on_at_the_byte_it_stopped_at(server: HubServer, kind: str) -> None:
    for after in (2 * MIB, 100_000, 0):
        server.fail(kind, "model-1.safetensors", where="cdn", after=after)
    spy = Spy()
    assert contents(pull(progress=spy)) == FILES
    discarded = 2 * MIB + 100_000 if kind == "reset" else 0  # by the reset itself, on a busy machine
    assert len(LARGE) <= server.body_bytes("model-1.safetensors") <= len(LARGE) + discarded
    assert len(server.requests("model-1.safetensors", origin="cdn")) == 4
    assert spy.done == TOTAL


@pytest.mark.parametrize("where", ["resolve", "cdn"])
@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_for_files(server: HubServer, where: str, code: int) -> None:
    server.fail("status", "model-2.safetensors", where=where, code=code, times=3, retry_after="0")
    assert contents(pull()) == FILES


def test_a_server_that_stays_down_ends_in_one_message_and_keeps_what_came(server: HubServer) -> None:
    server.fail("cut", "model-1.safetensors", after=5 * MIB)
    fault = server.fail("status", "model-1.safetensors", where="cdn", code=503, times=-1)
    fault.times = 0
    server.before = lambda r: (
        setattr(fault, "times", -1) if r.range == f"bytes={5 * MIB}-{len(LARGE) - 1}" else None
    )
    message = refused("network", pull)
    assert "model-1.safetensors" in message
    assert "503" in message
    server.forget()
    server.before = None
    assert contents(pull()) == FILES
    assert server.body_bytes() <= TOTAL - 5 * MIB


@pytest.mark.usefixtures("way")
def test_a_server_that_ignores_range_costs_bytes_but_not_correctness(server: HubServer) -> None:
    server.fail("cut", "model-1.safetensors", after=5 * MIB)
    server.fail("cut", "model-1.safetensors", after=MIB)
    server.fail("whole", "model-1.safetensors", where="cdn", times=3)
    spy = Spy()
    assert contents(pull(progress=spy)) == FILES
    assert "damaged" not in " ".join(spy.notes)


@pytest.mark.usefixtures("way")
def test_a_flipped_byte_is_noticed_and_the_file_fetched_once_more(server: HubServer) -> None:
    server.fail("corrupt", "model-2.safetensors", after=MIB)
    spy = Spy()
    assert contents(pull(progress=spy)) == FILES
    assert server.body_bytes("model-2.safetensors") == 2 * len(SMALL)
    assert spy.done == TOTAL
    assert "damaged" in spy.notes[0]


def test_a_flipped_byte_in_a_small_git_file_is_noticed_too(server: HubServer) -> None:
    server.fail("corrupt", "config.json", after=3)
    assert contents(pull()) == FILES


def test_a_file_that_stays_wrong_is_reported_with_both_hashes(server: HubServer) -> None:
    server.fail("corrupt", "model-2.safetensors", after=MIB, times=-1)
    wrong = bytearray(SMALL)
    wrong[MIB] ^= 0xFF
    message = refused("content", pull)
    assert "org/toy, file model-2.safetensors" in message
    assert hashlib.sha256(SMALL).hexdigest() in message
    assert hashlib.sha256(wrong).hexdigest() in message
    assert not cache.blob_path("org/toy", hub.resolve("org/toy").file("model-2.safetensors")).exists()
    server.forget()
    assert contents(pull()) == FILES


@pytest.mark.parametrize("size", [MIB, 0])
def test_a_file_of_another_size_than_listed_is_reported(server: HubServer, size: int) -> None:
    server.fail("size", "model-2.safetensors", after=size, times=-1)
    message = refused("content", pull)
    assert "model-2.safetensors" in message
    assert str(len(SMALL)) in message


def test_a_storage_address_that_ran_out_is_asked_for_again(server: HubServer) -> None:
    server.signature_ttl = -1
    server.before = lambda r: setattr(server, "signature_ttl", 60) if r.origin == "cdn" else None
    assert contents(pull()) == FILES


def test_no_body_is_asked_for_that_is_longer_than_networks_serve(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "SEGMENT", 5 * MIB)
    server.fail("cap", after=5 * MIB)
    assert contents(pull()) == FILES
    assert len(server.requests("model-1.safetensors", origin="cdn")) == 3


def test_a_trickle_counts_as_a_stall(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "STALL_WINDOW", 0.3)
    monkeypatch.setattr(http, "SLOWEST", 1 << 30)
    monkeypatch.setattr(hub.RETRY, "attempts", 2)
    server.rate = 200_000
    assert "bytes came in" in refused(
        "network", lambda: hub.download(hub.resolve("org/toy"), ["model-2.safetensors"])
    )


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A key and its certificate in one file; the certificate alone is cert.pem beside it."""
    pem = tmp_path / "both.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=127.0.0.1 -days 2"
    )
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make a certificate with")
    name = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(pem), "-out", str(tmp_path / "cert.pem")]
    subprocess.run([*command.split(), *name], check=True, capture_output=True)
    with open(pem, "a") as f:
        f.write((tmp_path / "cert.pem").read_text())
    return pem


def test_what_is_read_of_a_connection_that_was_broken_for_its_slowness_is_what_was_sent(
    certificate: Path,
) -> None:
    """Over TLS: what lies in this machine's buffers by then is encrypted."""
    listener = socket.create_server(("127.0.0.1", 0))
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(certificate)

    def serve() -> None:
        with suppress(OSError), theirs.wrap_socket(listener.accept()[0], server_side=True) as peer:
            peer.sendall(b"A" * (4 << 20))

    threading.Thread(target=serve, daemon=True).start()
    ours = ssl.create_default_context(cafile=str(certificate.with_name("cert.pem")))
    with (
        listener,
        ours.wrap_socket(
            socket.create_connection(listener.getsockname()), server_hostname="127.0.0.1"
        ) as sock,
    ):
        stream = SimpleNamespace(get_extra_info=lambda _: sock)
        response: Any = SimpleNamespace(extensions={"network_stream": stream})
        came = sock.recv(1 << 10)
        with pytest.raises(Transient), http.paced(response, 0.1, 60.0, slow=False):
            time.sleep(0.5)
            with suppress(OSError):
                while data := sock.recv(1 << 16):
                    came += data
    assert len(came) > 1 << 10 and set(came) == {ord("A")}


@pytest.mark.parametrize("direct", [0, 1 << 60])
def test_it_all_works_over_tls_and_a_certificate_that_no_one_signed_is_named(
    tmp_path: Path, direct: int, certificate: Path
) -> None:
    code = f"from zoo.hub import http; http.DIRECT = {direct}\n{PULL}"
    with HubServer(certificate=certificate) as server:
        server.repo("org/toy").commit(FILES)
        server.fail("cut", "model-1.safetensors", after=5 * MIB)
        server.fail("corrupt", "model-2.safetensors", after=MIB)
        trust = {"SSL_CERT_FILE": str(tmp_path / "cert.pem")}
        out = finish(start(server, tmp_path / "home", code, "org/toy", **trust))
        assert contents(Path(out.split("done ")[1].strip())) == FILES
        assert server.body_bytes() == TOTAL + len(SMALL)
        assert "certificate" in finish(start(server, tmp_path / "home2", code, "org/toy"))


# ---- download: ends and beginnings


def leave_part(data: bytes) -> Path:
    """A part of model-1.safetensors as a killed process leaves it."""
    part = cache.part_path("org/toy", hub.resolve("org/toy").file("model-1.safetensors"))
    part.parent.mkdir(parents=True)
    part.write_bytes(data)
    return part


@pytest.mark.parametrize("have", [1, 7 * MIB, len(LARGE)])
def test_a_part_is_continued_by_another_process(server: HubServer, have: int) -> None:
    part = leave_part(LARGE[:have])
    spy = Spy()
    assert contents(pull(progress=spy)) == FILES
    assert server.body_bytes() == TOTAL - have
    assert spy.done == TOTAL
    assert not part.exists()


def test_a_part_that_is_wrong_is_thrown_away(server: HubServer) -> None:
    leave_part(b"wrong" * MIB)
    assert contents(pull()) == FILES


def test_a_part_that_is_too_long_is_thrown_away_unread(server: HubServer) -> None:
    leave_part(LARGE + b"too long")
    spy = Spy()
    assert contents(pull(progress=spy)) == FILES
    assert spy.notes == []


def test_killed_at_any_point_the_next_pull_ends_with_the_same_bytes(
    server: HubServer, tmp_path: Path
) -> None:
    home, chance = tmp_path / "killed", random.Random(7)
    server.rate = 15e6
    for _ in range(KILLS):
        before = server.body_bytes()
        process = start(server, home, PULL, "org/toy")
        target = before + chance.randrange(1, TOTAL // KILLS)
        until(lambda t=target, p=process: server.body_bytes() >= t or p.poll() is not None)
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.wait()
    until(lambda: server.body_bytes() == (time.sleep(0.1), server.body_bytes())[1])
    out = finish(start(server, home, PULL, "org/toy"))
    assert contents(Path(out.split("done ")[1].strip())) == FILES
    again = server.body_bytes() - TOTAL
    print(f"{KILLS} kills, {again} bytes fetched again of {TOTAL}")
    assert again <= KILLS * MIB  # what was on the wire


def test_ctrl_c_stops_at_once_and_keeps_what_came(server: HubServer, tmp_path: Path) -> None:
    server.fail("stall", "model-1.safetensors", after=6 * MIB, times=-1)
    process = start(server, tmp_path / "stopped", PULL, "org/toy", HF_HUB_DOWNLOAD_TIMEOUT="60")
    until(lambda: server.body_bytes("model-1.safetensors") == 6 * MIB and server.body_bytes() > 9 * MIB)
    time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in finish(process)
    assert time.monotonic() - began < 30  # not the 60 s of its timeout
    server.forget()
    assert "done" in finish(start(server, tmp_path / "stopped", PULL, "org/toy"))
    assert server.body_bytes() == 6 * MIB


def test_of_two_pulls_at_once_one_works_and_the_other_says_that_it_waits(
    server: HubServer, tmp_path: Path
) -> None:
    server.rate = 12e6
    both = [start(server, tmp_path / "both", PULL, "org/toy") for _ in range(2)]
    outs = [finish(process) for process in both]
    assert all("done" in out for out in outs), outs
    assert sum("another process is fetching org/toy" in out for out in outs) == 1, outs
    assert server.body_bytes() == TOTAL


def test_a_caller_can_stop_a_download(server: HubServer) -> None:
    server.rate = 5e6
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    refused("cancelled", lambda: pull(cancel=cancel))


def test_offline_a_complete_snapshot_is_enough(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = pull().name
    server.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert contents(pull()) == FILES
    assert contents(pull(revision=commit)) == FILES
    assert server.log == []


def test_offline_what_is_missing_is_named(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.download(hub.resolve("org/toy"), ["config.json"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "model-1.safetensors" in refused("offline", pull)
    assert "org/other" in refused("offline", lambda: pull("org/other"))


def test_offline_the_names_of_blobs_stand_in_for_a_file_list(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = pull().name
    shutil.rmtree(cache.folder("org/toy") / "trees")
    from huggingface_hub import _tree_cache

    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = hub.resolve("org/toy")
    assert snapshot.commit == commit
    assert snapshot.file("model-1.safetensors").sha256 == hashlib.sha256(LARGE).hexdigest()
    assert contents(hub.download(snapshot, ALL)) == FILES


def test_too_little_space_is_said_before_anything_is_fetched(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, MIB))
    message = refused("disk", pull)
    assert "15.73 MB" in message
    assert "HF_HOME" in message
    assert server.body_bytes() == 0


def test_a_disk_that_fills_up_ends_in_one_message_and_the_pull_can_go_on(
    server: HubServer, tmp_path: Path
) -> None:
    """A disk of 22 MiB, of which someone else takes 12 while 15 MiB are on their way."""
    server.rate = 5e6
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=22m tmpfs {disk}; "
        f"(while ! ls {disk}/hub/*/blobs/*.incomplete; do sleep 0.02; done; head -c 12M /dev/zero > {disk}/other) "
        ">/dev/null 2>&1 & "
        f'{sys.executable} -c "$0" org/toy; ls -s {disk}/hub/models--org--toy/blobs; '
        f'rm {disk}/other; {sys.executable} -c "$0" org/toy'
    )
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, PULL],
        env=environment(server, disk),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "error disk the disk is full" in run.stdout, run
    assert "zoo.incomplete" in run.stdout
    assert "done" in run.stdout
    assert server.body_bytes() < TOTAL + 4 * MIB


# ---- download: elsewhere


@pytest.mark.usefixtures("way")
def test_a_file_can_be_had_outside_the_cache(server: HubServer, tmp_path: Path) -> None:
    snapshot, dest, spy = hub.resolve("org/toy"), tmp_path / "work" / "shard", Spy()
    server.fail("corrupt", "model-1.safetensors", after=MIB)
    server.fail("cut", "model-1.safetensors", after=2 * MIB)
    assert hub.download_to(snapshot, "model-1.safetensors", dest, progress=spy).read_bytes() == LARGE
    assert spy.done == len(LARGE)
    assert [p.name for p in dest.parent.iterdir()] == ["shard"]
    server.forget()
    hub.download_to(snapshot, "model-1.safetensors", dest)
    assert server.body_bytes() == 0
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_outside_the_cache_a_part_is_continued(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "shard.part").write_bytes(LARGE[: 4 * MIB])
    hub.download_to(hub.resolve("org/toy"), "model-1.safetensors", tmp_path / "shard")
    assert (tmp_path / "shard").read_bytes() == LARGE
    assert server.body_bytes() == len(LARGE) - 4 * MIB


# ---- parts of files


def safetensors(header: dict[str, Any], data: int, pad: int = 0) -> bytes:
    text = json.dumps(header).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + noise(data)


def headers_repo(server: HubServer) -> Repo:
    header = {"w": {"dtype": "U8", "shape": [1000], "data_offsets": [0, 1000]}}
    repo = server.repo("org/headers")
    repo.commit({f"{i}.safetensors": safetensors(header, 1000, pad=i) for i in range(20)})
    repo.commit({"long.safetensors": safetensors(header, 1000, pad=400_000)})
    return repo


def test_headers_are_read_without_the_weights(server: HubServer) -> None:
    headers_repo(server)
    snapshot = hub.resolve("org/headers")
    headers = hub.read_headers(snapshot, [f.path for f in snapshot.files])
    assert len(headers) == 21
    for header, data_start in headers.values():
        assert json.loads(header)["w"]["shape"] == [1000]
        assert data_start == 8 + len(header)
    assert len(server.requests("long.safetensors", origin="cdn")) == 2


def test_a_wait_while_headers_are_read_is_told(server: HubServer) -> None:
    headers_repo(server)
    snapshot = hub.resolve("org/headers")
    server.fail("status", "3.safetensors", where="cdn", code=429, retry_after="0")
    told = Spy()
    hub.read_headers(snapshot, [f.path for f in snapshot.files], progress=told)
    assert len(told.notes) == 1 and "429" in told.notes[0] and "3.safetensors" in told.notes[0]


def test_headers_of_a_verified_file_need_no_request(server: HubServer) -> None:
    headers_repo(server)
    snapshot = hub.resolve("org/headers")
    hub.download(snapshot, ["3.safetensors"])
    server.forget()
    header, _ = hub.read_safetensors_header(snapshot, "3.safetensors")
    assert json.loads(header)["w"]["shape"] == [1000]
    assert server.log == []


@pytest.mark.parametrize("length", [1 << 62, 2001, (1 << 64) - 1])
def test_a_header_that_claims_more_than_the_file_has_is_refused(server: HubServer, length: int) -> None:
    server.repo("org/bad").commit(
        {"x.safetensors": struct.pack("<Q", length) + b"{}" * 1000, "y.safetensors": b"{}"}
    )
    snapshot = hub.resolve("org/bad")
    assert str(length) in refused("content", lambda: hub.read_safetensors_header(snapshot, "x.safetensors"))
    refused("content", lambda: hub.read_safetensors_header(snapshot, "y.safetensors"))


def test_a_header_longer_than_the_caller_allows_is_refused(server: HubServer) -> None:
    headers_repo(server)
    snapshot = hub.resolve("org/headers")
    refused("content", lambda: hub.read_safetensors_header(snapshot, "long.safetensors", max_header=1000))


@pytest.mark.parametrize("kind", ["cut", "reset", "stall"])
def test_a_range_is_whole_whatever_the_network_does(server: HubServer, kind: str) -> None:
    server.fail(kind, "model-1.safetensors", after=1000)
    server.fail("status", "model-1.safetensors", where="cdn", code=503)
    assert hub.read_range(hub.resolve("org/toy"), "model-1.safetensors", 12345, 54321) == LARGE[12345:66666]
    assert server.body_bytes() in (
        54321,
        55321 if kind == "reset" else 0,
    )  # a reset may discard what was sent


def test_another_range_than_asked_for_is_not_taken(server: HubServer) -> None:
    server.fail("shift", "model-1.safetensors", after=1)
    assert hub.read_range(hub.resolve("org/toy"), "model-1.safetensors", 100, 100) == LARGE[100:200]


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, len(SMALL) + 1), (len(SMALL), 1), (5, -1)])
def test_a_range_outside_the_file_is_refused(server: HubServer, start: int, length: int) -> None:
    snapshot = hub.resolve("org/toy")
    refused("content", lambda: hub.read_range(snapshot, "model-2.safetensors", start, length))


@pytest.mark.usefixtures("way")
def test_many_ranges_arrive_at_their_offsets_and_neighbours_as_one(server: HubServer) -> None:
    got = bytearray(len(LARGE))
    ranges = [(0, 100), (100, 50), (9 * MIB, 3 * MIB), (MIB, 5 * MIB), (2 * MIB, MIB), (7 * MIB, 0)]
    server.fail("reset", "model-1.safetensors", after=10, times=3)

    def write(offset: int, data: bytes | memoryview) -> None:
        got[offset : offset + len(data)] = data

    spy = Spy()
    hub.download_ranges(hub.resolve("org/toy"), "model-1.safetensors", ranges, write, progress=spy)
    expected = bytearray(len(LARGE))
    for start, length in ranges:
        expected[start : start + length] = LARGE[start : start + length]
    assert got == expected
    assert spy.done == 8 * MIB + 150
    assert len(server.requests("model-1.safetensors", origin="cdn")) == 6


def test_a_sparse_copy_holds_what_was_asked_for_and_goes_on_after_an_end(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, dest = hub.resolve("org/toy"), tmp_path / "partial.safetensors"
    server.fail("status", "model-1.safetensors", where="cdn", code=404, times=1)
    server.before = lambda r: server.faults.clear() if len(server.requests(origin="cdn")) < 2 else None
    hub.download_sparse(snapshot, "model-1.safetensors", [(0, MIB)], dest)
    server.before = None
    server.forget()
    spy = Spy()
    hub.download_sparse(snapshot, "model-1.safetensors", [(0, 2 * MIB), (5 * MIB, MIB)], dest, progress=spy)
    assert server.body_bytes() == 2 * MIB
    assert spy.done == 3 * MIB
    data = dest.read_bytes()
    assert len(data) == len(LARGE)
    assert data[: 2 * MIB] == LARGE[: 2 * MIB]
    assert data[5 * MIB : 6 * MIB] == LARGE[5 * MIB : 6 * MIB]
    assert not any(data[2 * MIB : 5 * MIB])
    with open(dest.with_name(dest.name + ".ranges"), "a") as f:
        f.write("9437184 104")  # a line cut short by a kill
    server.forget()
    hub.download_sparse(snapshot, "model-1.safetensors", [(9 * MIB, 104)], dest)
    assert server.body_bytes() == 104


# ---- answers made to hurt


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "deflate, deflate"])
@pytest.mark.parametrize("code", [404, 503])
def test_the_body_of_a_refusal_is_never_unpacked(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, code: int, encoding: str
) -> None:
    bomb = zlib.compress(bytes(64 * MIB), 9)
    head = f"HTTP/1.1 {code} No\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(bomb)}\r\n\r\n"
    monkeypatch.setattr(http.RETRY, "attempts", 1)
    with raw_answers(head.encode() + bomb, monkeypatch):
        tracemalloc.start()
        with pytest.raises(HubError):
            hub.resolve("org/toy")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * MIB


def test_an_answer_is_unpacked_under_a_limit(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(bytes(64 * MIB))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n".encode()
    monkeypatch.setattr(http, "MAX_JSON", MIB)
    with raw_answers(head + bomb, monkeypatch):
        tracemalloc.start()
        with pytest.raises(HubError, match="longer than"):
            hub.resolve("org/toy")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 * MIB


@pytest.mark.parametrize("status", [206, 416])
def test_an_answer_for_a_range_that_was_not_asked_for_is_refused(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with raw_answers(f"HTTP/1.1 {status} X\r\nContent-Length: 2\r\n\r\n{{}}".encode(), monkeypatch):
        with pytest.raises(HubError, match=str(status)):
            hub.resolve("org/toy")


def test_a_ref_of_the_cache_that_is_no_small_file_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (refs := cache.folder("org/toy") / "refs").mkdir(parents=True)
    os.mkfifo(refs / "main")
    assert cache.read_ref("org/toy", "main") is None
    with open(refs / "large", "wb") as f:
        f.truncate(1 << 40)
    assert len(cache.read_ref("org/toy", "large") or "") <= 4096


def test_an_answer_that_is_packed_twice_is_refused(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = gzip.compress(gzip.compress(b"{}"))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip, gzip\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with raw_answers(head + body, monkeypatch), pytest.raises(HubError, match="encoding"):
        hub.resolve("org/toy")


def test_a_packed_answer_is_read(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    body = gzip.compress(json.dumps({"sha": "x"}).encode())
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with raw_answers(head + body, monkeypatch), pytest.raises(HubError, match="named no commit"):
        hub.resolve("org/toy")


@pytest.mark.parametrize(
    ("start", "drip"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nX-A: ", b"a"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10;", b"a"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"A: b\r\n"),
    ],
    ids=["1xx without end", "a header", "a body", "the head of a chunk", "what follows the last chunk"],
)
def test_an_answer_that_trickles_ends(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, start: bytes, drip: bytes
) -> None:
    monkeypatch.setattr(http, "HEADERS", 0.5)
    monkeypatch.setattr(http, "API_WINDOW", 0.5)
    before = time.monotonic()
    with raw_answers(start, monkeypatch, drip), pytest.raises(HubError, match="came in"):
        hub.resolve("org/toy")
    assert time.monotonic() - before < 10
    deadline = time.monotonic() + 5
    while (
        any(t.name in ("zoo-request", "zoo-pace") for t in threading.enumerate())
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not any(t.name in ("zoo-request", "zoo-pace") for t in threading.enumerate())


def test_a_body_that_comes_fast_enough_has_a_deadline_too(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "API_BODY", 0.5)
    start = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n"
    with raw_answers(start, monkeypatch, b" " * 10_000), pytest.raises(HubError, match="came in"):
        hub.resolve("org/toy")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (gzip.compress(b"{}") + bytes(1 << 20), "goes on behind its end"),
        (gzip.compress(b"")[:10] + b"\0\0\0\xff\xff" * 300_000, "longer than"),
        (b"1\r\n \r\n" * 11_000, "pieces"),
    ],
    ids=["more behind the end", "blocks of nothing", "chunks of a byte"],
)
def test_an_answer_that_stands_for_less_than_it_takes_is_refused(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, body: bytes, says: str
) -> None:
    monkeypatch.setattr(http, "MAX_JSON", MIB)
    how = "Content-Encoding: gzip" if says != "pieces" else "Transfer-Encoding: chunked"
    head = f"HTTP/1.1 200 OK\r\n{how}\r\n\r\n".encode()
    with raw_answers(head + body, monkeypatch), pytest.raises(HubError, match=says):
        hub.resolve("org/toy")


def test_what_is_no_http_is_not_asked_for_again_and_again(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"
    with raw_answers(head, monkeypatch), pytest.raises(HubError, match="failed 2 times"):
        hub.resolve("org/toy")


def test_headers_of_many_files_have_one_limit_before_they_are_asked_for(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.hub.transfer.MAX_HEADERS", 3 * MIB)
    shard = struct.pack("<Q", 2 * MIB) + b"{" + b" " * (2 * MIB - 2) + b"}"
    server.repo("org/toy").commit({"a.safetensors": shard, "b.safetensors": shard + b" "})
    snapshot = hub.resolve("org/toy")
    with pytest.raises(HubError, match=rf"have {4 * MIB} bytes of headers"):
        hub.read_headers(snapshot, ["a.safetensors", "b.safetensors"])
    assert server.body_bytes() < 4 * MIB


def test_a_listing_that_takes_too_long_ends(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.hub.repo.LISTING", 0.0)
    entry = {"type": "file", "path": "f", "size": 1, "oid": "0" * 40}
    monkeypatch.setattr("zoo.hub.repo.get_json", lambda *_: (time.sleep(0.1), ([entry], "next"))[1])
    with pytest.raises(HubError, match="too slow"):
        hub.resolve("org/toy", "0" * 40)


@pytest.mark.parametrize("notes", ["1 2 3\n", "x y\n", "0 99999999\n", "9" * 5000 + " 1\n", "\udcff\n"])
def test_notes_of_a_sparse_copy_that_are_none_are_not_believed(
    server: HubServer, tmp_path: Path, notes: str
) -> None:
    snapshot, dest = hub.resolve("org/toy"), tmp_path / "partial.safetensors"
    hub.download_sparse(snapshot, "model-2.safetensors", [(0, 100)], dest)
    with open(tmp_path / "partial.safetensors.ranges", "a", errors="surrogateescape") as f:
        f.write(notes)
    server.forget()
    hub.download_sparse(snapshot, "model-2.safetensors", [(0, 200)], dest)
    assert server.body_bytes() == 100
    assert dest.read_bytes()[:200] == SMALL[:200]


def test_pages_of_one_file_each_are_not_read_for_ever(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def page(url: str, *_: object) -> tuple[Any, str]:
        asked.append(url)
        entry = {"type": "file", "path": f"f{len(asked)}", "size": 1, "oid": "0" * 40}
        return [entry], f"{url.split('&cursor')[0]}&cursor={len(asked)}"

    monkeypatch.setattr("zoo.hub.repo.get_json", page)
    with pytest.raises(HubError, match="pages"):
        hub.resolve("org/toy", "0" * 40)
    assert len(asked) <= 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "Thu, 01 Jan 99999999999 00:00:00 GMT"},
        {"Retry-After": "9" * 5000},
        {"RateLimit": f"r=0;t={'9' * 5000}"},
    ],
)
def test_a_wait_that_is_no_number_of_seconds_is_no_bug(headers: dict[str, str]) -> None:
    assert http.retry_after(httpx2.Response(429, headers=headers)) is None


@pytest.mark.parametrize("told", ["http://[", "http://x:port", "http://x:99999999"])
def test_an_endpoint_that_is_no_address_is_named(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", told)
    with pytest.raises(ZooError, match="HF_ENDPOINT is 'http://.*, which is no address"):
        endpoint.check()
    for fine in ("", "https://huggingface.co", "http://[::1]:8080"):
        monkeypatch.setenv("HF_ENDPOINT", fine)
        endpoint.check()


@pytest.mark.parametrize(
    "headers",
    [{"Content-Range": f"bytes {'9' * 5000}-9/9"}, {"Content-Range": f"bytes 0-9/{'9' * 5000}"}],
)
def test_a_range_of_too_many_digits_is_another_range(headers: dict[str, str]) -> None:
    with pytest.raises(Transient, match="came"):
        http._skip(httpx2.Response(206, headers=headers), 0, 10, 10)
