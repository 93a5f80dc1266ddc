"""huggingface_hub's own client for the length of an upload, under limits: it has none.

Its requests have no timeout, its answers no size and no deadline; it waits as long as a `Retry-After` says, goes to whatever address
an answer names, and sends the token there. What it does well stays its own: the protocol of commits, LFS and Xet, and its retries.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager, suppress
from typing import Any

import httpx2
from huggingface_hub import constants, set_client_factory

from zoo.errors import ZooError
from zoo.hub.errors import HubError, Transient
from zoo.hub.http import (
    API_BODY,
    API_WINDOW,
    HUBS,
    MAX_JSON,
    MAX_REDIRECTS,
    RETRY,
    origin,
    paced,
    retry_after,
    translated,
    trusted_origins,
    window_of,
)
from zoo.untrusted.bounded import parse_json
from zoo.untrusted.patience import patience
from zoo.untrusted.within import started

ANSWER = 60.0  # seconds from the last byte of a request to the last of the answer's headers: a commit of many files takes some
STUCK = 60.0  # seconds in which nothing of a request can be sent
OWN = "zoo"
SMALLEST_PART = 1 << 20
"""Bytes of an upload's part, on the whole: object stores take none below 5 MiB, but for the last."""


@contextmanager
def bounded(files: int, size: int) -> Iterator[None]:
    """Meanwhile the library's client has limits, and the token is the Hub's alone. What is uploaded: so many `files`, of `size` bytes.

    Raises HubError for an answer beyond them: in another encoding, longer than `MAX_JSON`, or of more values than any; for one that
    is twice too slow (`ANSWER`, `API_BODY`); for waits of more than `RETRY.longest_retry_after` seconds together, more
    requests than an upload needs, and an address without TLS where the Hub's has it.
    """
    try:  # there is no public way to ask for it; seen in huggingface-hub 2.4
        from huggingface_hub.utils._http import _GLOBAL_CLIENT_FACTORY as made
    except ImportError:
        raise ZooError(
            "this huggingface-hub makes its connections in a way that zoo does not know, so that the token can't be kept to the "
            "Hub: pip install 'huggingface-hub==2.4.*'"
        ) from None
    limits = _Limits(200 + 12 * files + 2 * size // SMALLEST_PART)

    def limited() -> httpx2.Client:
        client = made()
        client.max_redirects = MAX_REDIRECTS
        client.event_hooks = {
            "request": [*client.event_hooks.get("request", ()), limits.request],
            "response": [limits.response, *client.event_hooks.get("response", ())],
        }
        send = client.send
        setattr(client, "send", lambda request, **how: limits.sent(send, request, how))  # noqa: B010
        return client

    # Telemetry: the endpoint would be asked which programs to name in the headers, and its answer read however long it is. Xet has a
    # client of its own, of which none of this holds: the Hub alone is spoken to by it.
    changed = {"HF_HUB_DISABLE_TELEMETRY": True}
    if origin(constants.ENDPOINT) not in map(origin, HUBS):
        changed["HF_HUB_DISABLE_XET"] = True
    before = {name: getattr(constants, name) for name in changed}
    for name, value in changed.items():
        setattr(constants, name, value)
    set_client_factory(limited)
    try:
        yield
    finally:
        set_client_factory(made)
        for name, value in before.items():
            setattr(constants, name, value)


class _Limits:
    """Of all requests of one upload, which several threads make."""

    def __init__(self, requests: int) -> None:
        self.most, self.made, self.slow, self.waits = requests, 0, 0, 0.0
        self.lock = threading.Lock()
        self.hubs = trusted_origins()

    def request(self, request: httpx2.Request) -> None:
        with self.lock:
            self.made += 1
        if self.made > self.most:
            raise HubError(
                f"{constants.ENDPOINT} has this upload make more than {self.most} requests: refused", "server"
            )
        try:
            trusted = origin(str(request.url)) in self.hubs
        except ValueError:  # no address
            trusted = False
        if not trusted:
            request.headers.pop("authorization", None)
        if constants.ENDPOINT.startswith("https:") and request.url.scheme != "https":
            raise HubError(
                f"{constants.ENDPOINT} has this upload go to {request.url!s:.200}, which is not safe",
                "server",
            )
        request.headers["accept-encoding"] = "identity"
        seconds = {"connect": 10.0, "read": ANSWER, "write": STUCK, "pool": None}
        told = request.extensions.get("timeout") or {}
        given = {k: told[k] for k in seconds if told.get(k) is not None}
        request.extensions = {**request.extensions, "timeout": {**seconds, **given}}

    def sent(self, send: Any, request: httpx2.Request, how: dict[str, Any]) -> httpx2.Response:
        """What `send` gives, its headers read within `ANSWER` of the request: they may come a byte at a time, which no timeout of a
        read sees, so that a thread of its own waits for them."""
        if how.get("stream"):  # zoo's own, which has limits, and reads the body itself
            request.extensions = {**request.extensions, OWN: True}
            return send(request, **how)  # type: ignore[no-any-return]
        since, took = list[float](), 0.0

        def trace(event: str, _: object) -> None:
            nonlocal took
            if event.endswith("send_request_body.complete"):
                since.append(time.monotonic())
            elif (
                event.endswith(("send_request_headers.started", "receive_response_headers.complete"))
                and since
            ):
                took += time.monotonic() - since.pop()

        request.extensions = {**request.extensions, "trace": trace}
        most = ANSWER * patience()
        future, cancel = started(lambda: send(request, **how))
        try:
            while True:
                with suppress(NotYet):
                    response: httpx2.Response = future.result(0.5)
                    return response
                if future.done():  # a TimeoutError of its own
                    return future.result()  # type: ignore[no-any-return]
                if took + sum(time.monotonic() - at for at in since[:1]) > most:
                    raise Transient(f"no complete answer came in {most:.0f} s", slow=True)
        except (Transient, httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
            if not future.done():
                cancel()
            if isinstance(error, Transient) and not error.slow:
                raise httpx2.ReadError(str(error)) from None
            with self.lock:
                self.slow += 1
            if self.slow >= RETRY.slow_attempts:
                raise HubError(f"{constants.ENDPOINT} is too slow: {error!s:.200}", "network") from None
            raise httpx2.ReadTimeout(str(error)) from None  # which the library may try again
        except BaseException:
            if not future.done():
                cancel()
            raise

    def response(self, response: httpx2.Response) -> None:
        """Reads the answer, of whatever status, before anything else does."""
        if response.status_code >= 400 and (wait := retry_after(response)) is not None:
            with self.lock:
                self.waits += wait
            if self.waits > RETRY.longest_retry_after:
                raise HubError(
                    f"{constants.ENDPOINT} answered {response.status_code}, and asks for a wait of {wait:.0f} s. Run this again later",
                    "network",
                )
        if OWN in response.request.extensions:
            return
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise HubError(
                f"{constants.ENDPOINT}: an answer is in the encoding {encoding!r:.80}, which nobody asked for: refused",
                "server",
            )
        body = response.stream
        assert isinstance(body, httpx2.SyncByteStream)
        with paced(response, window_of(API_WINDOW), API_BODY * patience(), slow=True) as pace:
            response.stream = _Counted(body, pace)
            with translated():
                text = response.read()
        if text.lstrip()[:1] in (b"[", b"{"):
            try:
                parse_json(text)
            except ValueError as error:
                raise HubError(
                    f"{constants.ENDPOINT} answered what no Hub does ({error!s:.200})", "server"
                ) from None


class _Counted(httpx2.SyncByteStream):
    """A body of `MAX_JSON` bytes at most."""

    def __init__(self, body: httpx2.SyncByteStream, pace: Any) -> None:
        self._body, self._pace = body, pace

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._body:
            self._pace.received += len(chunk)
            if self._pace.received > MAX_JSON:
                raise HubError(
                    f"{constants.ENDPOINT}: an answer is longer than {MAX_JSON} bytes: refused", "server"
                )
            yield chunk

    def close(self) -> None:
        self._body.close()
