"""Object stores as sources and destinations: the real client of S3 against a local server, and a store that breaks down.

`ZOO_KILLS=30` tries every point of death.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import stores
import tiny
from hub_client import pointed_at
from hub_server import HubServer
from machine import Machine
from stores import Told

import zoo
from zoo.cli import cli
from zoo.cli._common import run
from zoo.errors import ZooError
from zoo.formats import canonical
from zoo.mapping.parts import Part
from zoo.pull import convert, pull
from zoo.pull.sent import convert_to_store
from zoo.pull.stored import FIRST, described
from zoo.stores import AT_ONCE, BLOCK, INCOMPLETE, PART, SENDING, Store

KILLS = int(os.environ.get("ZOO_KILLS", "4"))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.make("llama", tmp_path_factory.mktemp("release") / "llama", max_shard_size="60KB")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def want(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.convert(release, tmp_path_factory.mktemp("want") / "canon")


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch, stores.s3(patch) as fs:
        yield fs


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def told() -> Iterator[type[Told]]:
    Told.reset()
    yield Told
    Told.reset()


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    """By name; of zoo.json not where the source lay."""
    out = {}
    for name, data in files.items():
        if name == "zoo.json":
            described = json.loads(data)
            for key in ("path", "origin"):
                described["source"].pop(key, None)
            data = json.dumps(described, sort_keys=True).encode()
        out[name] = hashlib.sha256(data).hexdigest()
    return out


def of_folder(folder: Path) -> dict[str, str]:
    return hashes({p.name: p.read_bytes() for p in folder.iterdir()})


def of_store(fs: Any, root: str) -> dict[str, str]:
    return hashes({p.rpartition("/")[2]: fs.cat_file(p) for p in fs.find(root)})


def upload(release: Path, fs: Any, root: str) -> None:
    for p in release.iterdir():
        fs.pipe_file(f"{root}/{p.name}", p.read_bytes())


def zoo_says(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    code = run(cli, [str(a) for a in args])
    said = capsys.readouterr()
    return code, said.out + said.err


# --- S3 --------------------------------------------------------------------------------------------------------------


def test_s3_from_headers_to_a_folder_to_s3_and_back(
    release: Path,
    want: Path,
    tmp_path: Path,
    s3: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upload(release, s3, "bucket/model")
    code, said = zoo_says(capsys, "inspect", "s3://bucket/model", "--json")
    about = json.loads(said)
    assert (code, about["family"], about["path"]) == (0, "llama", "s3://bucket/model")

    assert zoo_says(capsys, "convert", "s3://bucket/model", tmp_path / "here")[0] == 0
    assert of_folder(tmp_path / "here") == of_folder(want)
    origin = canonical.read(tmp_path / "here").source["origin"]
    md5 = {n: f["md5"] for n, f in origin["files"].items()}
    assert md5 == {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in release.iterdir()}

    code, said = zoo_says(capsys, "convert", "s3://bucket/model", "s3://bucket/canon")
    assert (code, of_store(s3, "bucket/canon")) == (0, of_folder(want)), said
    code, said = zoo_says(capsys, "check", "s3://bucket/canon")
    assert code == 0 and f"whole and unaltered: {len(of_folder(want))} files hashed" in said
    code, said = zoo_says(capsys, "pull", "s3://bucket/canon", "--to", tmp_path / "back")
    assert (code, of_folder(tmp_path / "back")) == (0, of_folder(want)), said


def test_s3s_hash_of_a_file_that_came_in_parts_is_held_to_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: Any
) -> None:
    data = bytes(range(256)) * (24 << 10)  # 6 MiB
    with s3.open("bucket/in/parts", "wb", block_size=5 << 20) as f:
        f.write(data[: 5 << 20])
        f.write(data[5 << 20 :])
    store = Store("s3://bucket/in")
    file = store.files()["parts"]
    assert file.hash is not None and file.hash[0] == "parts" and file.hash[1].endswith("-2")
    with open(tmp_path / "parts", "w+b") as to:
        assert store.fetch(file, to.fileno()) is True
        assert (tmp_path / "parts").read_bytes() == data
        real = store.fs._cat_file

        async def other(*args: Any, **how: Any) -> bytes:
            return bytes((await real(*args, **how))[:-1] + b"?")

        monkeypatch.setattr(store.fs, "_cat_file", other)
        with pytest.raises(ZooError, match="s3://bucket/in: parts: the bytes that came are not those"):
            store.fetch(file, to.fileno())


def test_googles_and_the_hubs_own_hashes_are_held_to_the_bytes_too(
    told: type[Told], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told().pipe_file("/b/m/f", b"weights")
    real, info = told.find, dict[str, Any]()

    def find(self: Told, path: str, **how: Any) -> Any:
        return {name: {**about, **info} for name, about in real(self, path, **how).items()}

    monkeypatch.setattr(told, "find", find)
    for data, right in ((b"weights", True), (b"others!", False)):
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        sha256 = {"blob_id": "0" * 40, "lfs": {"sha256": hashlib.sha256(data).hexdigest()}}
        for says in ({"md5Hash": md5}, sha256, {"blob_id": git, "lfs": None}):
            info.clear()
            info.update(says)
            store = Store("told://b/m")
            with open(tmp_path / "f", "w+b") as to:
                if right:
                    assert store.fetch(store.files()["f"], to.fileno()) is True
                    continue
                with pytest.raises(ZooError, match="told://b/m: f: the bytes that came are not those"):
                    store.fetch(store.files()["f"], to.fileno())


def test_a_folder_below_a_repository_of_the_hub_is_read_by_the_hubs_own_client(
    release: Path, want: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = pytest.importorskip("huggingface_hub").HfFileSystem
    with HubServer() as server, pointed_at(server, tmp_path / "home", monkeypatch, timeout=5):
        server.repo("org/several").commit({f"llama/{p.name}": p for p in release.iterdir()})
        fs.clear_instance_cache()
        for url in ("hf://org/several/llama", "hf://org/several@main/llama"):
            dst = tmp_path / url.partition("@")[1]
            zoo.convert(url, dst / "c")
            assert of_folder(dst / "c") == of_folder(want)
            origin = canonical.read(dst / "c").source["origin"]
            assert origin["files"].keys() == {p.name for p in release.iterdir()}
            assert not any("compared" in f for f in origin["files"].values())
        fs.clear_instance_cache()


# --- into a store ----------------------------------------------------------------------------------------------------


def test_zoo_json_is_written_after_all_others_and_the_mark_taken_away_last(
    release: Path, want: Path, told: type[Told]
) -> None:
    assert convert_to_store(release, "told://b/canon") == "told://b/canon"
    order = [p.removeprefix("canon/") for p in told.written]
    assert order[0] == INCOMPLETE
    assert order[-2:] == ["zoo.json", f"{INCOMPLETE} removed"]
    assert of_store(told(), "/b/canon") == of_folder(want)


def test_killed_at_any_write_it_is_refused_by_readers_and_goes_on_with_what_is_not_there_yet(
    release: Path, want: Path, told: type[Told], home: Path
) -> None:
    convert_to_store(release, "told://b/canon")
    for n in random.Random(28).sample(range(1, len(told.written)), min(KILLS, len(told.written) - 1)):
        told.reset()
        told.breaks_before = n
        with pytest.raises(ZooError, match="told://b/canon: .* ConnectionError: the line is dead"):
            convert_to_store(release, "told://b/canon")
        with pytest.raises(ZooError, match=rf"told://b/canon: not complete \({INCOMPLETE} is there\)"):
            with described("told://b/canon"):
                pass
        there, told.breaks_before = set(told.written), None
        told.written.clear()
        convert_to_store(release, "told://b/canon")
        assert there & set(told.written) <= {f"canon/{INCOMPLETE}"}, "nothing is sent twice"
        assert of_store(told(), "/b/canon") == of_folder(want)
        assert not list(home.rglob("*.safetensors")), "nothing is left on this disk"


SENDING_TO_S3 = """
import time
import s3fs
from zoo.pull.sent import convert_to_store
from zoo.stores import Store
def slowly(name):
    real = getattr(Store, name)
    def call(*a):
        time.sleep(0.02); out = real(*a); time.sleep(0.02)
        return out
    setattr(Store, name, call)
slowly("send"), slowly("put"), slowly("remove")
def run(src, url):
    convert_to_store(src, url)
"""


@pytest.mark.proof
def test_killed_at_any_moment_a_place_in_s3_is_complete_or_refused_and_the_same_command_goes_on(
    release: Path, want: Path, tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    draw, killed, found = random.Random(28), 0, set[str]()
    with Machine(SENDING_TO_S3, errors=tmp_path / "errors") as machine:
        for name in ("warm", "timed"):
            began = time.monotonic()
            assert machine.wait(machine.start(release, f"s3://bucket/{name}")) == 0
        length = time.monotonic() - began
        for n in range(40):
            if (
                n >= 4 and len(found) == 3
            ):  # a busy machine's moments lie elsewhere than the one that was timed
                break
            url, done = f"s3://bucket/killed-{n}", False
            while not done:
                pid = machine.start(release, url)
                time.sleep(draw.uniform(0, length))
                done = not machine.kill(pid)
                killed += not done
                s3.invalidate_cache()  # this client did not send what is there
                try:
                    with described(url):
                        found.add("complete")
                    assert of_store(s3, url.removeprefix("s3://")) == of_folder(want)
                    done = True
                except ZooError as e:
                    assert not done, e
                    sent = s3.find(url, withdirs=False)
                    assert not sent or f"not complete ({INCOMPLETE} is there)" in str(e)
                    found.add("not complete" if sent else "nothing")
    assert killed > 4 and found == {"complete", "not complete", "nothing"}
    assert not list((tmp_path / "home").rglob("*.safetensors")), "nothing is left on this disk"


def test_a_folder_is_replaced_with_force_alone_and_only_one_that_zoo_wrote(
    release: Path, told: type[Told]
) -> None:
    convert_to_store(release, "told://b/canon")
    with pytest.raises(ZooError, match="told://b/canon: exists already"):
        convert_to_store(release, "told://b/canon", dtype="bf16")
    told().pipe_file("/b/canon/old.safetensors", b"")
    with pytest.raises(ZooError, match=r"holds what zoo did not write \(.*\)"):
        convert_to_store(release, "told://b/canon", dtype="bf16", force=True)
    told().rm_file("/b/canon/old.safetensors")
    convert_to_store(release, "told://b/canon", dtype="bf16", force=True)
    with described("told://b/canon") as root:
        assert {t.dtype for t in canonical.read(root).tensors.values()} == {"BF16"}
    told().pipe_file("/b/mine/notes.txt", b"")
    with pytest.raises(ZooError, match=r"told://b/mine: holds what zoo did not write \(notes.txt\)"):
        convert_to_store(release, "told://b/mine", force=True)


def test_a_conversion_out_of_a_store_is_shared_by_processes(
    release: Path, want: Path, told: type[Told], tmp_path: Path
) -> None:
    upload(release, told(), "/b/model")
    for k in (2, 1):
        assert not (tmp_path / "c").exists()
        convert("told://b/model", tmp_path / "c", part=Part(k, 2))
    assert of_folder(tmp_path / "c") == of_folder(want)
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == ["c"], "nothing is left beside it"


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_bytes_on_their_way_are_bounded_in_both_directions(
    release: Path, told: type[Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 256 << 20
    assert 2 * AT_ONCE * BLOCK <= most and SENDING * (3 * PART + BLOCK) <= most
    upload(release, told(), "/b/model")
    monkeypatch.setattr("zoo.stores.BLOCK", 1 << 10)
    monkeypatch.setattr("zoo.stores.PART", 2 << 10)
    monkeypatch.setattr(sys.modules["zoo.pull.stored"], "FIRST", 1 << 10)
    told.most = 0
    zoo.convert("told://b/model", tmp_path / "c")
    assert 4 << 10 < told.most <= AT_ONCE << 10
    told.most = 0
    convert_to_store(release, "told://b/canon")
    assert 4 << 10 < told.most <= SENDING * (3 * (2 << 10) + (1 << 10))
    assert told.now == 0


def test_a_plan_reads_headers_only(release: Path, told: type[Told], monkeypatch: pytest.MonkeyPatch) -> None:
    upload(release, told(), "/b/model")
    read: dict[str, int] = {}
    real = Store.read

    def counted(self: Store, name: str, start: int, end: int) -> bytes:
        read[name] = read.get(name, 0) + end - start
        return real(self, name, start, end)

    monkeypatch.setattr(Store, "read", counted)
    monkeypatch.setattr(sys.modules["zoo.pull.stored"], "FIRST", 64)
    assert zoo.plan("told://b/model").nbytes > 100_000
    for p in release.glob("*.safetensors"):
        header = int.from_bytes(p.read_bytes()[:8], "little")
        assert read[p.name] == 8 + header < p.stat().st_size / 2
    assert FIRST < BLOCK


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_strangers_names_lead_nowhere(
    release: Path, told: type[Told], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    upload(release, told(), "/b/model")
    real = told.find
    for name in ("../out.safetensors", "a\\b", "x/../../out"):

        def find(self: Told, path: str, name: str = name, **how: Any) -> Any:
            return {**real(self, path, **how), f"{path}/{name}": {"size": 8, "type": "file"}}

        monkeypatch.setattr(told, "find", find)
        with pytest.raises(ZooError, match="told://b/model: a file called .* would lie outside of it"):
            zoo.plan("told://b/model")

    def below_a_file(self: Told, path: str, **how: Any) -> Any:
        return {**real(self, path, **how), f"{path}/config.json/deeper": {"size": 8, "type": "file"}}

    monkeypatch.setattr(told, "find", below_a_file)
    with pytest.raises(ZooError, match="told://b/model: a file called .* can't be one here"):
        zoo.plan("told://b/model")


@pytest.mark.parametrize(
    "listing",
    [
        {"/x/a": {"size": None}}, {"/x/a": {}}, {"/x/a": {"size": -1}}, {"/x/a": {"size": 1 << 70}}, {"/x/a": {"size": "9" * 5000}},
        {"/x/a": {"size": math.inf}}, {"/x/a": {"size": 1, "md5Hash": "YQ"}}, {"/x/a": [1]}, {5: {"size": 1}}, [1], None,
        {"/x/\ud800.json": {"size": 1}}, {"/x/" + "d/" * 1000: {"size": 1}, "/x/d/d/d": {"size": 1}},
        {f"/x/{n}": {"size": 1} for n in range(10_001)},
    ],
)  # fmt: skip
def test_a_listing_that_no_store_gives_is_refused(listing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.find", lambda *_, **__: listing)
    with pytest.raises(ZooError, match="memory://x"), described("memory://x"):
        pass


@pytest.mark.parametrize("answer", [None, "{}", b"{} ", b""])
def test_bytes_that_were_not_asked_for_are_refused(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = "fsspec.implementations.memory.MemoryFileSystem."
    monkeypatch.setattr(memory + "find", lambda *_, **__: {"/x/config.json": {"size": 2}})
    monkeypatch.setattr(memory + "cat_file", lambda *_, **__: answer)
    with pytest.raises(ZooError, match=r"memory://x: config\.json"), described("memory://x"):
        pass


def test_headers_are_not_read_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 shards whose headers are refused at the first one, few are asked for."""
    asked: list[str] = []

    def answer(_: Any, path: str, start: int, end: int) -> bytes:
        asked.append(path)
        return b"\0" * (end - start)

    names = [f"/x/model-{n:05}-of-00400.safetensors" for n in range(1, 401)]
    memory = "fsspec.implementations.memory.MemoryFileSystem."
    monkeypatch.setattr(memory + "find", lambda *_, **__: {n: {"size": 1 << 30} for n in names})
    monkeypatch.setattr(memory + "cat_file", answer)
    with pytest.raises(ZooError, match="begins with zeros"), described("memory://x"):
        pass
    assert len(asked) <= AT_ONCE


@pytest.fixture
def false_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[stores.False_S3]:
    with stores.false_s3(monkeypatch) as server:
        yield server


FOREVER = b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: 9000000000\r\n\r\n"


@pytest.mark.parametrize("status", [b"200 OK", b"403 Forbidden", b"503 Slow Down"])
@pytest.mark.parametrize("what", ["list", "read"])
def test_an_answer_of_s3_that_does_not_end_is_read_no_further_than_a_block(
    false_s3: stores.False_S3, status: bytes, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["s3fs"].S3FileSystem, "retries", 2)
    false_s3.start, false_s3.drip, false_s3.every = FOREVER % status, b"a" * (1 << 20), 0
    store = Store("s3://bucket/model")
    with pytest.raises(ZooError, match="is longer than 8,388,608 bytes"):
        store.files() if what == "list" else store.read("x", 0, 8)
    assert false_s3.sent < 20 * (8 << 20)  # the client tries again


ELSEWHERE = (
    b"HTTP/1.1 %s\r\nLocation: http://%s/bucket/x\r\nx-amz-bucket-region: %s\r\nContent-Type: application/xml\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%s"
)
MOVED = b"<Error><Code>PermanentRedirect</Code><Endpoint>%s</Endpoint><Bucket>bucket</Bucket><Message>moved</Message></Error>"


@pytest.mark.parametrize(
    ("status", "region"), [(b"301 Moved Permanently", b"eu-west-1"), (b"307 Temporary Redirect", b"x@%s/?")]
)
@pytest.mark.parametrize("what", ["list", "read"])
def test_s3_leads_the_keys_of_a_user_to_no_other_host(
    false_s3: stores.False_S3, status: bytes, region: bytes, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["s3fs"].S3FileSystem, "retries", 1)
    other = socket.create_server(("127.0.0.1", 0))
    other.setblocking(False)
    at = b"127.0.0.1:%d" % other.getsockname()[1]
    body = MOVED % at
    false_s3.start = ELSEWHERE % (status, at, region.replace(b"%s", at), len(body), body)
    store = Store("s3://bucket/model")
    with other:
        try:  # a list that only says where else to look is one of nothing, to s3fs
            assert what == "list" or store.read("x", 0, 8) is None
            assert what == "read" or not store.files()
        except ZooError as e:
            assert "secret" not in str(e)
        with pytest.raises(BlockingIOError):  # nobody came
            other.accept()


SLOW = {
    "silence": (b"", b""), "headers": (b"HTTP/1.1 200 OK\r\nX: ", b"a"), "a body": (FOREVER % b"200 OK", b"a"),
    "an error": (FOREVER % b"403 Forbidden", b"a"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "answer"),
    [
        (what, answer)
        for what in ("list", "read", "ask", "put", "send")
        for answer in SLOW
        if what != "ask" or answer in ("silence", "headers")  # that is a HEAD, whose answer has no body
    ],
)
def test_an_answer_of_s3_that_trickles_has_a_deadline(
    false_s3: stores.False_S3,
    what: str,
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("zoo.stores.ASKED", 0.1)
    monkeypatch.setattr("zoo.stores.LISTED", 0.1)
    monkeypatch.setattr("zoo.stores.SLOWEST", 1 << 40)
    (false_s3.start, false_s3.drip), false_s3.every = SLOW[answer], 0.02
    store = Store("s3://bucket/model")
    (tmp_path / "x").write_bytes(b"x")
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    calls: dict[str, Any] = {
        "list": store.files, "read": lambda: store.read("x", 0, 8), "ask": lambda: store.file("x"),
        "put": lambda: store.put("x", b"x"), "send": lambda: store.send("x", fd),
    }  # fmt: skip
    began = time.monotonic()
    with pytest.raises(ZooError, match="no whole answer came in time"):
        calls[what]()
    os.close(fd)
    assert time.monotonic() - began < 5


def test_a_listing_without_end_is_ended_by_what_it_takes(
    told: type[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of clients that have no event loop, too."""
    ended = threading.Event()

    def find(self: Told, path: str, **how: Any) -> Any:
        pages = []
        try:
            while True:
                pages.append(b"x" * (1 << 20))
                time.sleep(0.001)
        finally:
            ended.set()

    monkeypatch.setattr(told, "find", find)
    monkeypatch.setattr("zoo.stores.GROWTH", 32 << 20)
    with pytest.raises(ZooError, match="told://b/model: cannot be listed: the answer takes over 32 MiB"):
        zoo.plan("told://b/model")
    assert ended.wait(5)


def test_what_a_client_says_of_keys_is_shown_to_nobody(
    told: type[Told], monkeypatch: pytest.MonkeyPatch, release: Path
) -> None:
    monkeypatch.setenv("SOME_SECRET_KEY", "s3cr3t-value")

    def find(self: Told, path: str, **how: Any) -> Any:
        raise PermissionError("s3cr3t-value may not look at told://me:word@b/model?sig=abc")

    monkeypatch.setattr(told, "find", find)
    with pytest.raises(ZooError) as error:
        zoo.plan("told://me:word@b/model?sig=abc")
    assert "told://b/model: cannot be listed: PermissionError: *** may not look" in str(error.value)
    assert not any(s in str(error.value) for s in ("s3cr3t", "word", "abc"))
    for how in ({"revision": "main"}, {"layers": [0]}):
        with pytest.raises(ZooError) as error:
            pull("told://me:word@b/model?sig=abc", "c", **how)
        assert not any(s in str(error.value) for s in ("s3cr3t", "word", "abc"))


def test_what_needs_a_folder_on_this_disk_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["verify"], ["export", "told://b/c", "out"], ["generate", "told://b/c", "hello"]):
        code, said = zoo_says(capsys, *command, *["told://b/c"][: len(command) == 1])
        assert code == 2
        assert "`zoo pull told://b/c --to FOLDER` brings it here" in " ".join(said.split())
    with pytest.raises(ZooError, match="`zoo pull told://b/c --to FOLDER`"):
        zoo.load("told://b/c")
    with pytest.raises(ZooError, match="give its path, without file://"):
        zoo.plan("file:///tmp/model")
    with pytest.raises(ZooError, match="name a repository of the Hub as owner/name"):
        zoo.plan("https://somewhere/owner/model")
    with pytest.raises(ZooError, match="told://b/c is in a store: `zoo convert` writes there"):
        zoo.convert("somewhere", "told://b/c")


def test_a_canonical_folder_that_was_altered_in_its_store_is_not_whole(
    want: Path, told: type[Told], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    upload(want, told(), "/b/canon")
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in want.iterdir()
    }
    told().pipe_file("/b/canon/parity.json", json.dumps({"canonical": {"files": files}}).encode())
    assert zoo_says(capsys, "check", "told://b/canon")[0] == 0
    name = next(n for n in files if n.endswith(".safetensors"))
    data = bytearray((want / name).read_bytes())
    data[-1] ^= 1
    told().pipe_file(f"/b/canon/{name}", bytes(data))
    code, said = zoo_says(capsys, "check", "told://b/canon")
    assert code == 1 and f"{name}: its hash is another" in said
    told().pipe_file(f"/b/canon/{name}", bytes(data)[:-8])
    with pytest.raises(ZooError, match=f"told://b/canon/{name}: .* truncated"):
        pull("told://b/canon", tmp_path / "c")
    assert not (tmp_path / "c").exists()
