"""What a false Hub, or who sits at HF_ENDPOINT, answers to an upload: refused within limits, of which huggingface-hub's client has none."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from hub_client import pointed_at, raw_answers
from hub_server import HubServer
from huggingface_hub import constants, get_session

from zoo.hub import HubError, http, upload
from zoo.push import _refusals
from zoo.untrusted.bounded import MAX_CONTAINERS

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HubServer() as server, pointed_at(server, tmp_path / "home", monkeypatch, 10):
        yield


def answer(body: bytes, head: str = "", status: int = 200) -> bytes:
    return (
        f"HTTP/1.1 {status} X\r\n{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        + body
    )


def asked() -> httpx2.Response:
    return get_session().post(f"{constants.ENDPOINT}/api/models/me/m/commit/main", json={})


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize(
    ("body", "head", "said"),
    [
        (gzip.compress(b" " * 1000), "Content-Encoding: gzip\r\n", "encoding 'gzip'"),
        (b"x" * 70_000, "", "longer than"),
        (b"{" + b"[]," * (MAX_CONTAINERS + 1), "", "longer than"),
        (b"[" * 60_000, "", "nested too deeply"),
    ],
    ids=["packed", "long", "of many values", "deep"],
)
def test_an_answer_beyond_all_limits_is_refused_whatever_its_status(
    body: bytes, head: str, said: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "MAX_JSON", 1 << 16)
    with (
        raw_answers(answer(body, head, status), monkeypatch),
        upload.bounded(1, 1),
        pytest.raises(HubError, match=said),
    ):
        asked()


def test_no_wait_is_longer_than_a_pulls(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = answer(b"{}", "Retry-After: 86400\r\n", 429)
    with (
        raw_answers(busy, monkeypatch),
        upload.bounded(1, 1),
        pytest.raises(HubError, match="wait of 86400 s"),
    ):
        asked()


@pytest.mark.parametrize(
    ("begin", "drip"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"X: a\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b" "),
        (CONTINUE, CONTINUE),
    ],
    ids=["headers", "body", "1xx"],
)
def test_an_answer_that_trickles_or_never_comes_ends_at_the_second_try(
    begin: bytes, drip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "ANSWER", 0.3)
    monkeypatch.setattr(upload, "API_BODY", 0.3)
    with raw_answers(begin, monkeypatch, drip), upload.bounded(1, 1):
        with pytest.raises(HubError, match="the upload failed"), _refusals("me/m"):
            asked()
        with pytest.raises(HubError, match="too slow"):
            asked()


def test_nothing_goes_without_tls_where_the_hub_has_it_or_is_asked_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    limits = upload._Limits(3)
    ours = httpx2.Request("POST", "https://hub.example/x", headers={"authorization": "Bearer t"})
    limits.request(ours)
    assert ours.headers["authorization"] == "Bearer t" and ours.extensions["timeout"]["read"]
    other = httpx2.Request("PUT", "https://store.example/x", headers={"authorization": "Bearer t"})
    limits.request(other)
    assert "authorization" not in other.headers
    with pytest.raises(HubError, match="not safe"):
        limits.request(httpx2.Request("PUT", "http://169.254.169.254/x"))
    with pytest.raises(HubError, match="more than 3 requests"):
        limits.request(ours)


def test_xets_own_client_speaks_to_the_hub_alone_and_all_is_as_it_was_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with raw_answers(answer(json.dumps({"a": 1}).encode()), monkeypatch):
        with upload.bounded(1, 1):
            assert constants.HF_HUB_DISABLE_XET and asked().json() == {"a": 1}
        assert not constants.HF_HUB_DISABLE_XET
        assert asked().headers["content-length"] == "8", "the client is the library's again"
    monkeypatch.setattr(constants, "ENDPOINT", http.HUBS[0])
    with upload.bounded(1, 1):
        assert not constants.HF_HUB_DISABLE_XET
