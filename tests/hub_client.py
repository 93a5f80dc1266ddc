"""The client's side of `hub_server`: this process, or another one, pointed at it with a cache of its own."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import close_session, constants

from zoo import hub

ROOT = Path(hub.__file__).parents[2]


@contextmanager
def pointed_at(
    server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch, timeout: float
) -> Iterator[HubServer]:
    """This process' huggingface_hub talks to `server`, with an empty cache in `home`, no token, and no patience.
    `timeout`: seconds without a byte."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "ENDPOINT": server.url,
        # which the library makes once, of the endpoint
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DOWNLOAD_TIMEOUT": timeout,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hub.RETRY, "first_wait", 0.01)
    monkeypatch.setattr(hub.RETRY, "longest_wait", 0.05)
    yield server
    close_session()


@contextmanager
def raw_answers(answer: bytes, monkeypatch: pytest.MonkeyPatch, drip: bytes = b"") -> Iterator[None]:
    """The Hub is a socket that says `answer` to whatever is asked, then `drip` every 20 ms until nobody listens."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(peer: socket.socket) -> None:
        with peer, suppress(OSError):
            peer.settimeout(20)
            while b"\r\n\r\n" not in peer.recv(1 << 16):
                pass
            peer.sendall(answer)
            while drip:
                peer.sendall(drip)
                time.sleep(0.02)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    try:
        yield
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def environment(server: HubServer, home: Path) -> dict[str, str]:
    """The environment of another process that talks to `server`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return kept | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }


class Spy:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.phases: list[str] = []
        self.notes: list[str] = []

    def start(self, total: int) -> None:
        self.total = total

    def advance(self, n: int) -> None:
        self.done += n

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def note(self, message: str) -> None:
        self.notes.append(message)
