"""Stores for tests: S3's protocol on loopback (moto's server), and one in memory that says what was done with it."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import pytest
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile


@contextmanager
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The real client of a local S3, with an empty bucket called `bucket`; the environment points at it."""
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    try:
        _, port = server.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "the-key-of-a-user",
            "AWS_SECRET_ACCESS_KEY": "the-secret-of-a-user",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        }.items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem()
        fs.mkdir("bucket")
        yield fs
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


class False_S3:
    """A socket that says `start` to whatever is asked, then `drip` `every` so many seconds, until nobody listens; `sent` bytes in
    all."""

    def __init__(self) -> None:
        self.start, self.drip, self.every, self.sent = b"", b"", 0.0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                peer, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(peer,), daemon=True).start()

    def serve(self, peer: socket.socket) -> None:
        with peer, suppress(OSError):
            peer.recv(1 << 16)
            peer.sendall(self.start)
            while True:
                time.sleep(self.every)
                self.sent += peer.send(self.drip) if self.drip else 0
                if not self.drip and not peer.recv(1 << 16):
                    return


@contextmanager
def false_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[False_S3]:
    """The real client of S3, pointed at a `False_S3`."""
    s3fs = pytest.importorskip("s3fs")
    server = False_S3()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "the-key-of-a-user",
        "AWS_SECRET_ACCESS_KEY": "the-secret-of-a-user",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.listener.getsockname()[1]}",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield server
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.listener.close()


class Told(MemoryFileSystem):
    """`told://`: a store in memory that notes what is written, in order, and the most bytes that were on their way at once,
    and that breaks down, for good, before the write that `breaks_before` counts."""

    protocol = "told"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    written: ClassVar[list[str]] = []
    breaks_before: ClassVar[int | None] = None
    now = most = 0
    _lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix("told://"))
        return stripped

    @classmethod
    def reset(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.written.clear()
        cls.breaks_before, cls.now, cls.most = None, 0, 0

    @classmethod
    def on_its_way(cls, n: int) -> None:
        with cls._lock:
            Told.now += n
            Told.most = max(Told.most, Told.now)

    @classmethod
    def note(cls, path: str) -> None:
        with cls._lock:
            if Told.breaks_before is not None and len(Told.written) >= Told.breaks_before:
                raise ConnectionError("the line is dead")
            Told.written.append(path.strip("/").partition("/")[2])

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **how: Any) -> bytes:
        data: bytes = super().cat_file(path, start, end, **how)
        self.on_its_way(len(data))
        time.sleep(0.001)
        self.on_its_way(-len(data))
        return data

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **how: Any) -> None:
        self.note(path)
        with MemoryFileSystem._open(self, self._strip_protocol(path), "wb") as f:
            f.write(value)

    def rm_file(self, path: str) -> None:
        self.note(f"{path} removed")
        super().rm_file(path)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **how: Any) -> Any:
        return _Sent(self, path, mode, block_size or 4096) if mode == "wb" else super()._open(path, mode)


class _Sent(AbstractBufferedFile):  # type: ignore[misc]
    """Buffers as the clients of S3 and Google do; the file appears when it is closed."""

    def _initiate_upload(self) -> None:
        self.sent: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.fs.on_its_way(len(data))
        n: int = super().write(data)
        return n

    def _upload_chunk(self, final: bool = False) -> bool:
        data = self.buffer.getvalue()
        self.fs.on_its_way(len(data))  # the client's copy
        time.sleep(0.001)
        self.fs.on_its_way(-2 * len(data))
        self.sent.append(data)
        if final:
            self.fs.note(self.path)
            with MemoryFileSystem._open(self.fs, self.path, "wb") as f:
                f.write(b"".join(self.sent))
        return True

    def discard(self) -> None:
        pass


register_implementation("told", Told, clobber=True)
