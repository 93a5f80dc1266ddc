"""One request to the Hub that survives real networks.

The library's session is used (proxies, certificates, offline mode, a company's client factory); what it lacks is
added: a timeout on every call, every transient failure retried and continued at the byte it stopped at, bodies of
any size, the token kept from other hosts.
"""

from __future__ import annotations

import email.utils
import math
import queue
import random
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import __version__ as library
from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import OfflineModeIsEnabled

from zoo._version import __version__
from zoo.hub.errors import About, Cancelled, Damaged, HubError, Transient, refusal
from zoo.untrusted.bounded import parse_json, whole
from zoo.untrusted.patience import patience
from zoo.untrusted.within import end

SEGMENT = 16 << 30  # bytes asked for at once: content delivery networks refuse bodies over 50 GB
MAX_JSON = 64 << 20  # bytes of one page of an API answer
MAX_DRAINED = 1 << 20  # bytes, as sent, of a body nobody wants that are read for the sake of the connection
DRAINED = 5.0  # seconds for it
MAX_REDIRECTS = 8
SLOWEST = 1 << 10  # bytes per second, over `STALL_WINDOW`: slower is a stall that no timeout sees
STALL_WINDOW = 60.0  # seconds
API_WINDOW = 10.0  # seconds: the same for answers of the API, and for files and parts of up to `SMALL` bytes
SMALL = 1 << 20
API_BODY = 20.0  # seconds for the body of an answer of the API: a page of the Hub's is some 100 kB
SHORTEST = 64  # bytes: a body whose chunks are shorter than this, on the whole, costs more time than any that is sent
HEADERS = 12.0  # seconds from the request to the last of the headers; the timeout of a read is 10
REDIRECTS = 20.0  # seconds that servers may take for all redirects of a request together; one more may begin
ANSWER = 90.0  # seconds for all of it, addresses that don't answer and proxies included
DIRECT = 8 << 20  # bodies at least this long are read from the socket (see `_chunks`)
RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 525)})  # the last are Cloudflare's


@dataclass
class Retry:
    """How patient a pull is. Waits double from `first_wait` to `longest_wait`, in seconds."""

    attempts: int = 8  # failures in a row, without progress, before giving up
    unreachable_attempts: int = 3  # the same when no connection has been made since the start
    slow_attempts: int = 2  # the same for answers that come, and too slowly
    first_wait: float = 1.0
    longest_wait: float = 30.0
    longest_retry_after: float = 300.0  # cap on what a server may ask for


RETRY = Retry()
_reached = threading.Event()  # some answer came since the start of this process


class Progress(Protocol):
    """What a transfer tells its caller. Calls come from several threads, never two at once."""

    def start(self, total: int) -> None:
        """`total` bytes are to be had; those already there will be advanced over."""

    def advance(self, n: int) -> None:
        """`n` more bytes are there. Negative when damaged bytes were thrown away."""

    def phase(self, name: str) -> None:
        """What happens now: `checking` (hashing what was there before) or `downloading`."""

    def note(self, message: str) -> None:
        """A sentence for people: a wait, a retry, a file fetched again."""


class Watch:
    """The caller's progress and wish to stop, for all threads of one transfer."""

    def __init__(self, progress: Progress | None = None, cancel: threading.Event | None = None) -> None:
        self.stop = threading.Event()
        self.damaged: set[str] = set()  # files found wrong, so that they aren't hashed twice
        self._progress, self._cancel, self._lock = progress, cancel, threading.Lock()
        self.waited = 0.0
        """Seconds between tries, for which no answer is to blame."""

    def check(self) -> None:
        if self.stop.is_set() or (self._cancel is not None and self._cancel.is_set()):
            raise Cancelled

    def sleep(self, seconds: float) -> None:
        began = time.monotonic()
        until = began + seconds
        while (left := until - time.monotonic()) > 0:
            self.check()
            self.stop.wait(min(left, 0.2))
        self.waited += time.monotonic() - began
        self.check()

    def tell(self, call: Callable[[Progress], None]) -> None:
        if self._progress is not None:
            with self._lock:
                call(self._progress)

    def advance(self, n: int) -> None:
        if n:
            self.tell(lambda p: p.advance(n))

    def note(self, message: str) -> None:
        self.tell(lambda p: p.note(message))


class Patience:
    """Counts failures in a row and waits between them."""

    def __init__(self, about: About, watch: Watch) -> None:
        self.about, self.watch, self.failures, self.slow, self.moved = about, watch, 0, 0, 0

    def progressed(self, n: int) -> None:
        self.moved += n
        if self.moved >= 1 << 20:
            self.failures = self.slow = self.moved = 0

    def failed(self, error: Transient) -> None:
        """Wait for the next try, or raise HubError when there have been enough."""
        self.failures += 1
        first_contact = error.unreachable and not _reached.is_set()
        self.slow += error.slow
        if (
            self.failures >= (RETRY.unreachable_attempts if first_contact else RETRY.attempts)
            or self.slow >= RETRY.slow_attempts
        ):
            raise gave_up(self.about, error, self.failures)
        wait = min(RETRY.first_wait * 2 ** (self.failures - 1), RETRY.longest_wait) * random.uniform(
            0.75, 1.25
        )
        if error.wait is not None:
            wait = min(error.wait, RETRY.longest_retry_after)
        self.watch.note(f"{self.about}: {error}; trying again in {wait:.0f} s")
        self.watch.sleep(wait)


def gave_up(about: About, error: Transient, failures: int) -> HubError:
    if error.unreachable:
        return HubError(
            f"can't reach {constants.ENDPOINT} for {about}: {error}. Check the network and proxy settings and run "
            "this again; with HF_HUB_OFFLINE=1 only what is in the cache is used.",
            "network",
        )
    return HubError(
        f"{about}: the transfer failed {failures} times in a row, the last time because {error}. "
        "Run the same command again later: what was fetched is kept.",
        "network",
    )


def get_json(url: str, about: About, watch: Watch) -> tuple[Any, str | None]:
    """The answer of an API call, and the address of the next page if there is one."""
    failures = Patience(about, watch)
    while True:
        try:
            with _opened(url, about, None) as response:
                data = _body(response, about, watch)
                try:
                    return parse_json(data), _next_page(response)
                except ValueError as error:
                    raise HubError(
                        f"{constants.ENDPOINT} answered something other than JSON for {about} ({error}). "
                        "If HF_ENDPOINT is set, check that it names a Hub.",
                        "server",
                    ) from None
        except Transient as error:
            failures.failed(error)


def _body(response: httpx2.Response, about: About, watch: Watch) -> bytes:
    """The body of an API answer, decompressed under the limit: a kilobyte may stand for a gigabyte, and one encoding
    within another for its square, so each chunk is asked only for what is still allowed."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):  # all that was asked for
        raise HubError(f"{about}: the server's answer is in the encoding {encoding!r:.80}: refused", "server")
    unpack = zlib.decompressobj(47) if encoding != "identity" else None
    data, received, chunks = bytearray(), 0, 0
    with paced(response, window_of(API_WINDOW), API_BODY * patience(), slow=True) as pace, translated():
        for chunk in response.iter_raw():
            watch.check()
            pace.received += len(chunk)
            received, chunks = received + len(chunk), chunks + 1
            if unpack and unpack.eof:  # zlib would keep all of it
                raise HubError(f"{about}: the server's answer goes on behind its end: refused", "server")
            try:
                data += unpack.decompress(chunk, MAX_JSON + 1 - len(data)) if unpack else chunk
            except zlib.error as error:
                raise Transient(f"the answer is damaged ({error})") from None
            if max(received, len(data)) > MAX_JSON:  # what is packed may stand for nothing, without end
                raise HubError(f"{about}: the file list is longer than {MAX_JSON} bytes", "server")
            if chunks > 10_000 and received < SHORTEST * chunks:
                raise HubError(f"{about}: the server's answer comes in {chunks} pieces: refused", "server")
    if unpack and not unpack.eof:
        raise Transient("the answer ends early")
    return bytes(data)


class _Pace:
    """How far a body has come."""

    def __init__(self) -> None:
        self.received = 0
        self.busy = False
        """What came is being put away: a slow disk is no slow server."""


def window_of(seconds: float) -> float:
    """No shorter than what people said that a read may take."""
    said = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    return max(seconds * patience(), said if said > constants.DEFAULT_DOWNLOAD_TIMEOUT else 0.0)


@contextmanager
def paced(response: httpx2.Response, window: float, most: float, *, slow: bool) -> Iterator[_Pace]:
    """While a body is read: Transient, said to be `slow`, where less than `SLOWEST` came in a `window` of seconds, or more
    than `most` seconds went by. What is yielded is to be told how many bytes came, and while they are put away.

    A thread looks, and breaks the connection: the head of a chunk or what follows the last may come a byte at a time, which
    no timeout of a read sees, nor a loop over chunks."""
    stream = response.extensions.get("network_stream")
    sock = None if stream is None else stream.get_extra_info("socket")
    over, ends, late, pace = threading.Event(), threading.Lock(), list[str](), _Pace()

    def look() -> None:
        began, before = time.monotonic(), 0
        while not over.wait(min(window, max(0.0, began + most - time.monotonic()))):
            elapsed = time.monotonic() - began
            if elapsed >= most or (pace.received - before < SLOWEST * window and not pace.busy):
                with ends, suppress(OSError):
                    if not over.is_set():  # else the connection may be another answer's by now
                        late.append(f"only {pace.received} bytes came in {elapsed:.0f} s")
                        if isinstance(sock, socket.socket):
                            # Not SSLSocket's own: that forgets TLS first, and what is queued would be read as it was sent, encrypted.
                            socket.socket.shutdown(sock, socket.SHUT_RDWR)
                return
            before = pace.received

    thread = threading.Thread(target=look, daemon=True, name="zoo-pace")
    thread.start()
    try:
        yield pace
    except Transient:
        if late:
            raise Transient(late[0], slow=slow) from None
        raise
    finally:
        with ends:
            over.set()
    if late:
        raise Transient(late[0], slow=slow)


def _next_page(response: httpx2.Response) -> str | None:
    """The next page, always on our endpoint: a Link elsewhere (mirrors keep the Hub's) must not get the token."""
    url = response.links.get("next", {}).get("url")
    if not url:
        return None
    try:
        there = urlsplit(url)
    except ValueError:
        return None
    if not there.path.startswith("/"):  # behind the endpoint's name it would be part of another host's
        return None
    return f"{constants.ENDPOINT}{there.path}?{there.query}"


def stream(
    url: str,
    about: About,
    start: int,
    stop: int,
    size: int,
    sink: Callable[[bytes | memoryview], None],
    watch: Watch,
    *,
    direct: bool = True,
) -> None:
    """Feed bytes [start, stop) of a file of `size` bytes to `sink`, in order and once, whatever the network does.

    Raises HubError when patience ends or the Hub refuses, Damaged when the file has another size than listed.
    """
    failures, at = Patience(about, watch), start
    while at < stop:
        end = min(stop, at + SEGMENT)
        try:
            with _opened(url, about, (at, end)) as response:
                skip = _skip(response, at, end, size)
                small = stop - start <= SMALL
                with paced(
                    response, window_of(API_WINDOW if small else STALL_WINDOW), math.inf, slow=small
                ) as pace:
                    for chunk in _chunks(response, skip + end - at, direct):
                        pace.received, pace.busy = pace.received + len(chunk), True
                        watch.check()
                        if skip:  # the server ignored Range
                            dropped = min(skip, len(chunk))
                            skip -= dropped
                            chunk = memoryview(chunk)[dropped:]
                        sink(chunk)
                        at += len(chunk)
                        failures.progressed(len(chunk))
                        pace.busy = False
            if at < end:
                raise Transient(f"the connection closed at byte {at} of {size}")
        except Transient as error:
            failures.failed(error)


def _skip(response: httpx2.Response, start: int, end: int, size: int) -> int:
    """How many bytes of this body come before `start`. Raises Damaged if the file isn't as long as listed."""
    headers = response.headers
    if response.status_code == 416:
        raise Damaged(
            f"{size} bytes", f"{headers.get('Content-Range', '').rpartition('/')[2] or 'fewer'} bytes"
        )
    if headers.get("Content-Encoding", "identity") != "identity":
        raise Transient("the server compressed the file")
    if response.status_code == 200:
        length = headers.get("Content-Length")
        if length is not None and whole(length) != size:
            raise Damaged(f"{size} bytes", f"{length} bytes")
        return start
    match = re.fullmatch(
        r"bytes ([0-9]{1,20})-([0-9]{1,20})/([0-9]{1,20}|\*)", headers.get("Content-Range", "")
    )
    if match is None or int(match[1]) != start:
        raise Transient(f"bytes {start}-{end - 1} were asked for, {headers.get('Content-Range')!r:.80} came")
    if match[3] != "*" and int(match[3]) != size:
        raise Damaged(f"{size} bytes", f"{match[3]} bytes")
    return 0


def _chunks(response: httpx2.Response, length: int, direct: bool) -> Iterator[bytes | memoryview]:
    """The first `length` bytes of a body as they arrive. Each chunk is good until the next is asked for.

    A long HTTP/1.1 body is read from the socket itself, which costs an eighth of the CPU of httpx2's way through h11
    (0.3 against 2.7 s per GB) and lets files arrive in parallel, since nothing holds the GIL. After a chunk h11 has
    handed out all it had, so the rest of the body is what the socket gives; the connection is not used again.
    Known to hold for httpx2/httpcore2 2.x with h11 0.16; anything else takes the ordinary way, and so does the
    second try of a file whose hash was wrong.
    """
    body = response.iter_raw()
    sock = _socket(response) if direct and length >= DIRECT else None
    with translated():
        left = length
        while left > 0 and (sock is None or left == length) and (data := next(body, b"")):
            left -= len(data)
            yield data if left >= 0 else data[:left]
        if sock is None:
            if response.headers.get("Content-Length") == str(length):
                next(body, None)  # lets httpx2 see the end, so that the connection can be used again
            return
        buffer = memoryview(bytearray(1 << 20))
        while left > 0:
            n = sock.recv_into(buffer, min(left, len(buffer)))
            if n == 0:
                return
            left -= n
            yield buffer[:n]


def _socket(response: httpx2.Response) -> socket.socket | None:
    """The socket of a response whose body is all that will come over it, or None."""
    if response.http_version != "HTTP/1.1" or "Content-Length" not in response.headers:
        return None
    if "Transfer-Encoding" in response.headers or not httpx2.__version__.startswith("2."):
        return None
    stream = response.extensions.get("network_stream")
    if stream is None:
        return None
    sock = stream.get_extra_info("socket")
    # An SSLObject is TLS inside the TLS of a proxy: the socket would give what is still encrypted.
    if not isinstance(sock, socket.socket) or isinstance(stream.get_extra_info("ssl_object"), ssl.SSLObject):
        return None
    if response.request.url.scheme == "https" and not isinstance(sock, ssl.SSLSocket):
        return None
    return sock


@contextmanager
def _opened(url: str, about: About, span: tuple[int, int] | None) -> Iterator[httpx2.Response]:
    """The response to a GET, redirects followed, its body not read. Other answers than 200, 206 and 416 are raised."""
    with translated():
        session = get_session()
    try:
        hubs = trusted_origins()
    except ValueError as error:
        raise _no_address(error) from None
    # Not the library's own headers: to make them it asks the endpoint which programs it should know, and reads whatever comes.
    agent = f"zoo/{__version__}; hf_hub/{library}"
    plain = {"user-agent": f"{agent}; origin/{by}" if (by := constants.HF_HUB_USER_AGENT_ORIGIN) else agent}
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    private = plain | ({"authorization": f"Bearer {token}"} if token else {})
    sent_token = token is not None
    if token and not token.isascii():
        raise HubError(
            "your token has characters that no token has: set it again (HF_TOKEN, `hf auth login`)", "token"
        )
    took = 0.0
    for _ in range(MAX_REDIRECTS):
        if took > REDIRECTS * patience():
            raise Transient(f"redirects, and no answer in {REDIRECTS:.0f} s", slow=True)
        trusted = origin(url) in hubs  # a mirror may send us on to the Hub
        headers = dict(private if trusted else plain) | {"Accept-Encoding": "gzip"}
        if span is not None:
            headers |= {"Accept-Encoding": "identity", "Range": f"bytes={span[0]}-{span[1] - 1}"}
        with translated():
            request = session.build_request(
                "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
            response, seconds = _sent(session, request)
        took += seconds
        try:
            _reached.set()
            if response.status_code >= 300:
                began = time.monotonic()
                _drain(response)
                took += time.monotonic() - began
            if response.status_code in (301, 302, 303, 307, 308) and "Location" in response.headers:
                url = _redirect(url, response.headers["Location"], about)
                continue
            if response.status_code in RETRYABLE:
                raise Transient(f"the server answered {response.status_code}", wait=retry_after(response))
            if response.status_code == 403 and not trusted:
                raise Transient("the storage host answered 403 (an address that ran out?)")
            if response.status_code not in ((200,) if span is None else (200, 206, 416)):
                raise refusal(response.status_code, response.headers, about, sent_token=sent_token)
            yield response
            return
        finally:
            with translated():
                response.close()
    raise HubError(f"{about}: more than {MAX_REDIRECTS} redirects, the last to {url}", "server")


def _sent(session: httpx2.Client, request: httpx2.Request) -> tuple[httpx2.Response, float]:
    """The response, its headers read, within `HEADERS` of the request or Transient; and how many seconds that took.

    The client's own timeout is for each read: a header a byte at a time, or one 100 Continue after the other, has none.
    So the request is made by a thread of its own, which is stopped when its time is over. Connecting has limits already, and
    counts for neither: a slow network is no slow server.
    """
    answer: queue.SimpleQueue[httpx2.Response | BaseException] = queue.SimpleQueue()
    asked, late = list[float](), threading.Event()

    def trace(event: str, _: object) -> None:
        if event.endswith("send_request_headers.started"):
            asked.append(time.monotonic())

    def work() -> None:
        try:
            response = session.send(request, stream=True, follow_redirects=False)
        except BaseException as error:
            answer.put(error)
            return
        answer.put(response)
        if late.is_set():  # nobody will take it
            response.close()

    request.extensions = {**request.extensions, "trace": trace}
    thread = threading.Thread(target=work, daemon=True, name="zoo-request")
    thread.start()
    limit, most = time.monotonic() + ANSWER * patience(), window_of(HEADERS)
    came: httpx2.Response | BaseException | None = None
    while came is None and (left := min([limit, *(at + most for at in asked[:1])]) - time.monotonic()) > 0:
        with suppress(queue.Empty):
            came = answer.get(timeout=min(left, 1.0))
    if came is None:
        late.set()
        end(thread)  # one that waits for bytes ends by the timeout of its read
        with suppress(queue.Empty):
            if isinstance(last := answer.get_nowait(), httpx2.Response):
                last.close()
        raise Transient(f"no complete answer came in {most:.0f} s", slow=True)
    if isinstance(came, BaseException):
        raise came
    return came, time.monotonic() - asked[0] if asked else 0.0


def _drain(response: httpx2.Response) -> None:
    """Read a short body that nobody wants, as it was sent (never unpacked), so that the connection can be used again."""
    if (whole(response.headers.get("Content-Length", "")) or MAX_DRAINED) >= MAX_DRAINED:
        return
    received = 0
    with suppress(Transient), paced(response, DRAINED, DRAINED, slow=True), translated():
        for chunk in response.iter_raw():
            received += len(chunk)
            if received > MAX_DRAINED:
                return


def _redirect(url: str, location: str, about: About) -> str:
    try:
        target = urljoin(url, location)
        scheme, was = origin(target)[0], urlsplit(url).scheme
    except ValueError as error:
        raise HubError(f"{about}: the server redirects to {location!r:.200}: {error}", "server") from None
    if scheme not in ("http", "https") or (was == "https" and scheme == "http"):
        raise HubError(f"{about}: the server redirects to {scheme}, which is not safe: {target}", "server")
    return target


HUBS = ("https://huggingface.co", "https://hf.co")


def trusted_origins() -> set[tuple[str, str | None, int | None]]:
    """The origins that a token is sent to."""
    return {origin(u) for u in (constants.ENDPOINT, *HUBS)}


def origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait: Retry-After (a number or a date) or the Hub's `RateLimit: ...;t=55`."""
    value = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, OverflowError):
            return None
    limit = re.search(r"r=0\s*;\s*t=([0-9]{1,9})(?![0-9])", response.headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


def _no_address(error: Exception) -> HubError:
    return HubError(f"not an address: {constants.ENDPOINT} ({error}). Check HF_ENDPOINT.", "network")


@contextmanager
def translated() -> Iterator[None]:
    """Network failures as Transient, or as HubError where trying again is no use."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise HubError(
            "HF_HUB_OFFLINE is set and this is not in the cache. Unset it and run this again.", "offline"
        ) from None
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError) as error:
        raise _no_address(error) from None
    except ImportError as error:  # a proxy that needs a package
        raise HubError(f"the proxy settings can't be used: {error}", "network") from None
    except httpx2.ConnectError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise HubError(
                f"the certificate of {constants.ENDPOINT} can't be verified: {error!s:.200}", "network"
            ) from None
        raise Transient(f"no connection ({error!s:.200})", unreachable=True) from None
    except (httpx2.ConnectTimeout, httpx2.ProxyError) as error:
        raise Transient(f"no connection ({str(error)[:200] or 'timed out'})", unreachable=True) from None
    except (httpx2.TimeoutException, TimeoutError):
        raise Transient(f"nothing came for {constants.HF_HUB_DOWNLOAD_TIMEOUT} s") from None
    except httpx2.RemoteProtocolError as error:
        cut = "disconnected" in str(error) or "closed" in str(error)  # else it is no HTTP, and will not be
        raise Transient(f"the connection broke ({error!s:.200})", slow=not cut) from None
    except (httpx2.TransportError, httpx2.DecodingError) as error:
        raise Transient(f"the connection broke ({str(error)[:200] or type(error).__name__})") from None
    except OSError as error:
        raise Transient(f"the connection broke ({error!s:.200})") from None
    except RuntimeError as error:
        if "closed" not in str(error):
            raise
        raise Transient("the session was closed") from None
