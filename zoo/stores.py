"""Files in object stores (`s3://`, `gs://`, `memory://`, ...), through fsspec: listed, read by ranges, fetched and sent.

Bytes in flight are bounded for the whole process: `AT_ONCE` blocks of `BLOCK` bytes on their way in, or `SENDING` files on
their way out, of each of which its client holds at most two parts of `PART` bytes. A client may have a second copy of a
block while it puts it together: 128 MiB in, 102 MiB out.

Who talks to the store, with which credentials, endpoint and retries, is its client's business: it reads them from where it
always does. No message here holds any of them. How long the client may take, and of how much memory, is zoo's: what it does is ended
after that.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import is_stray, leads_out
from zoo.mapping.ways import write
from zoo.untrusted.patience import patience
from zoo.untrusted.within import Grown, Late, started, wait
from zoo.url import without_secrets

BLOCK, AT_ONCE = 8 << 20, 8
PART, SENDING = 16 << 20, 3
"""S3 takes 10,000 parts of a file: 167 GB."""
MOST_FILES = 10_000
LISTED = 60.0  # seconds for a list of files, whose pages are one after the other
ASKED = 30.0  # seconds for anything else, and one more for each `SLOWEST` bytes of it
SLOWEST = 8 << 10
GROWTH = 256 << 20  # bytes of memory that a list of files may take
INCOMPLETE = "zoo-incomplete.json"
"""The object that says that a conversion into this place has not ended: written first, removed last."""

Chunks = Callable[[int, int], Iterable[bytes]]
"""The bytes [start, end) of something, in order."""

_reading = threading.BoundedSemaphore(AT_ONCE)


@dataclass(frozen=True)
class Stored:
    """A file: its name below the store's root, and bytes. `tag`: what changes when it is written again. `hash`: what the
    store says of its bytes, a kind and hex digits: "md5", "sha256", "git", git's SHA-1 of a blob, or "parts", S3's MD5 of the
    MD5s of the parts that it came in, with their number."""

    name: str
    size: int
    tag: str
    hash: tuple[str, str] | None


class Store:
    """What lies below `url`. Raises ZooError, naming it, for whatever the store or its client answers with."""

    def __init__(self, url: str) -> None:
        self.url = without_secrets(url).rstrip("/")
        protocol = url.partition("://")[0]
        if protocol in ("file", "local"):
            raise ZooError(f"{self.url}: a place on this disk: give its path, without {protocol}://")
        if protocol in ("http", "https"):
            raise ZooError(
                f"{self.url}: a web server, which lists no files: name a repository of the Hub as owner/name, or download it first"
            )
        from fsspec.core import url_to_fs

        self.fs: Any
        try:
            self.fs, root = url_to_fs(url, **_bounded(protocol))
        except ImportError:
            how = "install zoo-weights[stores]" if protocol in ("s3", "s3a") else "install its fsspec client"
            raise ZooError(f"{self.url}: the client of {protocol}:// is not installed: {how}") from None
        except Exception as e:
            raise self._error("cannot be reached", e) from None
        self.root = str(root).rstrip("/")

    def __str__(self) -> str:
        return self.url

    def path(self, name: str) -> str:
        if leads_out(name):
            raise ZooError(f"{self.url}: a file called {name!r} would lie outside of it: refused")
        return f"{self.root}/{name}"

    def files(self) -> dict[str, Stored]:
        """The files in it and in the folders right below, by name."""
        with self._told("cannot be listed"):
            self.fs.invalidate_cache()
            try:
                found = self._ask("find", self.root, maxdepth=2, detail=True, seconds=LISTED, growth=GROWTH)
            except FileNotFoundError:
                found = {}
            if len(found) > MOST_FILES:
                raise ZooError(f"{self.url}: holds {len(found):,} files, too many for a checkpoint: refused")
            out = {}
            above = self.root.lstrip("/")
            for path, info in sorted(found.items()):
                name = path.lstrip("/").removeprefix(above).lstrip("/")
                if name and not name.endswith("/") and not is_stray(os.path.basename(name)):
                    out[name] = self._stored(name, info)
        return out

    def _stored(self, name: str, info: Mapping[str, Any]) -> Stored:
        """What the store told of a file. Raises ZooError, or what its client's answer is not made for."""
        self.path(name)
        if name.count("/") > 1 or not 0 <= (size := int(info["size"])) < 1 << 63:
            raise ZooError(f"{self.url}: tells of {name!r:.200} of {info['size']} bytes: refused")
        return Stored(name, size, _tag(info), self._hash(info))

    def file(self, name: str) -> Stored:
        """A file that was written just now."""
        with self._told(f"{name} cannot be asked for"):
            self.fs.invalidate_cache()
            return self._stored(name, self._ask("info", self.path(name)))

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, all of them; for more than `BLOCK` see `blocks`."""
        with _reading, self._told(f"{name} cannot be read"):
            data: bytes = self._ask(
                "cat_file", self.path(name), start=start, end=end, bytes_of_it=end - start
            )
            if not isinstance(data, bytes | bytearray | memoryview) or len(data) != end - start:
                raise ZooError(
                    f"{self.url}: {name} gave {len(data):,} bytes where {end - start:,} were asked for"
                )
        return data

    def blocks(
        self, name: str, start: int, end: int, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, bytes]]:
        """Bytes [start, end) of a file in order, as (offset, at most `BLOCK` bytes), `AT_ONCE` read ahead at most."""

        def block(at: int) -> bytes:
            if stopped():
                raise ZooError(f"{self.url}: stopped")
            return self.read(name, at, min(at + BLOCK, end))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for first in range(start, end, AT_ONCE * BLOCK):
                starts = range(first, min(first + AT_ONCE * BLOCK, end), BLOCK)
                yield from zip(starts, pool.map(block, starts))

    def span(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file in memory, however many."""
        return b"".join(data for _, data in self.blocks(name, start, end))

    def fetch(
        self,
        file: Stored,
        fd: int,
        advance: Callable[[int], None] = lambda n: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """The whole file, into `fd`; whether the store told a hash of it. Raises ZooError if the bytes have another."""
        os.ftruncate(fd, file.size)

        def block(at: int) -> None:
            if stopped():
                raise ZooError(f"{self.url}: stopped")
            data = self.read(file.name, at, min(at + BLOCK, file.size))
            advance(len(data))
            write(fd, data, at)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(block, range(0, file.size, BLOCK)):
                pass
        agrees = self.agrees(file, of_file(fd))
        if agrees is False:
            raise ZooError(
                f"{self.url}: {file.name}: the bytes that came are not those of the store's hash ({file.tag}): not used; "
                "run it again"
            )
        return agrees is True

    def agrees(self, file: Stored, chunks: Chunks) -> bool | None:
        """Whether `chunks` have the hash that the store tells of `file`; None: it tells none."""
        if file.hash is None:
            return None
        kind, want = file.hash
        if kind == "parts":
            step = self._part_size(file)
            if step is None:
                return None
            md5s = [
                _digest("md5", chunks(at, min(at + step, file.size))).digest()
                for at in range(0, file.size, step)
            ]
            found = f"{_digest('md5', md5s).hexdigest()}-{len(md5s)}"
        elif kind == "git":
            found = _digest("sha1", chain([b"blob %d\0" % file.size], chunks(0, file.size))).hexdigest()
        else:
            found = _digest(kind, chunks(0, file.size)).hexdigest()
        if found == want:
            return True
        return None if kind in ("md5", "parts") and self._is_no_md5(file.name) else False

    def holds(self, file: Stored, fd: int) -> bool:
        """Whether `file` has the bytes of `fd`: by the store's own hash, else by reading it."""
        if os.fstat(fd).st_size != file.size:
            return False
        if (agrees := self.agrees(file, of_file(fd))) is not None:
            return agrees
        return self.sha256(file) == str(_digest("sha256", of_file(fd)(0, file.size)).hexdigest())

    def chunks(self, name: str, advance: Callable[[int], None] = lambda n: None) -> Chunks:
        """The bytes of a file, as they are read from the store."""

        def of(start: int, end: int) -> Iterator[bytes]:
            for _, data in self.blocks(name, start, end):
                advance(len(data))
                yield data

        return of

    def send(self, name: str, fd: int, advance: Callable[[int], None] = lambda n: None) -> None:
        """The bytes of `fd`, under this name; not yet compared (see `holds`)."""
        with self._told(f"{name} cannot be written"):
            out = self._limited(lambda: self.fs.open(self.path(name), "wb", block_size=PART), PART)
            try:
                at = 0
                while data := os.pread(fd, BLOCK, at):
                    self._limited(functools.partial(out.write, data), 2 * PART)
                    at += len(data)
                    advance(len(data))
            except BaseException:  # closing it would make a file of what was written so far
                with suppress(Exception):
                    self._limited(out.discard)
                with suppress(AttributeError):
                    out.closed = True
                raise
            self._limited(out.close, 2 * PART)

    def put(self, name: str, data: bytes) -> None:
        """A small file."""
        with self._told(f"{name} cannot be written"):
            self._ask("pipe_file", self.path(name), data, bytes_of_it=len(data))

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with self._told(f"{name} cannot be removed"):
                self._ask("rm_file", self.path(name))

    def sha256(self, file: Stored, advance: Callable[[int], None] = lambda n: None) -> str:
        """The hash of a file, read whole."""
        return str(_digest("sha256", self.chunks(file.name, advance)(0, file.size)).hexdigest())

    def _ask(
        self,
        method: str,
        *what: Any,
        bytes_of_it: int = 0,
        seconds: float | None = None,
        growth: int | None = None,
        **how: Any,
    ) -> Any:
        """What a method of the client gives, within its limits: a client that has an event loop is asked there, and what it was at
        is cancelled."""
        if not self.fs.async_impl:
            call = functools.partial(getattr(self.fs, method), *what, **how)
            return self._limited(call, bytes_of_it, seconds, growth)
        asked = asyncio.run_coroutine_threadsafe(getattr(self.fs, f"_{method}")(*what, **how), self.fs.loop)
        return wait(asked, asked.cancel, _seconds(seconds, bytes_of_it), growth)

    def _limited(
        self,
        call: Callable[[], Any],
        bytes_of_it: int = 0,
        seconds: float | None = None,
        growth: int | None = None,
    ) -> Any:
        return wait(*started(call), _seconds(seconds, bytes_of_it), growth)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except ZooError:
            raise
        except Late:
            raise ZooError(
                f"{self.url}: {what}: no whole answer came in time. Run it again, or with ZOO_PATIENCE=4 for a slow network"
            ) from None
        except Grown:
            raise ZooError(
                f"{self.url}: {what}: the answer takes over {GROWTH >> 20} MiB of memory, more than any of a checkpoint: refused"
            ) from None
        except Exception as e:  # every client has errors of its own
            raise self._error(what, e) from None

    def _error(self, what: str, error: Exception) -> ZooError:
        return ZooError(without_secrets(f"{self.url}: {what}: {type(error).__name__}: {error}"))

    # ---- S3's hashes

    def _hash(self, info: Mapping[str, Any]) -> tuple[str, str] | None:
        if isinstance(given := info.get("md5Hash"), str):  # Google's
            return "md5", base64.b64decode(given).hex()
        if (lfs := info.get("lfs")) is not None:  # the Hub's, of large files
            sha256 = lfs.get("sha256") if isinstance(lfs, Mapping) else getattr(lfs, "sha256", None)
            return ("sha256", sha256) if isinstance(sha256, str) else None
        if isinstance(blob := info.get("blob_id"), str) and re.fullmatch(
            "[0-9a-f]{40}", blob
        ):  # and git's, of others
            return "git", blob
        tag = str(info.get("ETag", "")).strip('"')
        if not hasattr(self.fs, "call_s3"):
            return None
        if re.fullmatch("[0-9a-f]{32}", tag):
            return "md5", tag
        return ("parts", tag) if re.fullmatch("[0-9a-f]{32}-[0-9]{1,5}", tag) else None

    def _head(self, name: str, **how: Any) -> Mapping[str, Any]:
        bucket, _, key = self.path(name).partition("/")
        with self._told(f"{name} cannot be asked for"):
            return dict(self._ask("call_s3", "head_object", Bucket=bucket, Key=key, **how))

    def _part_size(self, file: Stored) -> int | None:
        """Bytes of the parts that a file came in, but for the last; None where the store does not say, or they differ."""
        assert file.hash is not None
        n = int(file.hash[1].partition("-")[2])
        if n == 1:
            return max(file.size, 1)
        size = self._head(file.name, PartNumber=1).get("ContentLength")
        if not isinstance(size, int):
            return None
        return size if 0 < size < file.size and -(-file.size // size) == n else None

    def _is_no_md5(self, name: str) -> bool:
        """Whether S3 keeps this file under its owner's key, or in a directory bucket: an ETag there is no MD5."""
        if not hasattr(self.fs, "call_s3"):
            return False
        head = self._head(name)
        return (
            head.get("ServerSideEncryption", "AES256") != "AES256"
            or "SSECustomerAlgorithm" in head
            or head.get("StorageClass") == "EXPRESS_ONEZONE"
        )


def _seconds(said: float | None, bytes_of_it: int) -> float:
    return ((ASKED if said is None else said) + bytes_of_it / SLOWEST) * patience()


def _bounded(protocol: str) -> dict[str, Any]:
    """What S3's client is given so that it reads no more of an answer than a block: for how people configured it, see fsspec."""
    if protocol not in ("s3", "s3a"):
        return {}
    from fsspec.config import conf

    try:
        limited = _session()
    except ImportError:  # that of the client itself says what to install
        return {}
    return {"config_kwargs": {**conf.get(protocol, {}).get("config_kwargs", {}), "http_session_cls": limited}}


@functools.cache
def _session() -> Any:
    """One class, or the client would be made anew each time."""
    from zoo.s3 import session

    return session(BLOCK)


def of_file(fd: int) -> Chunks:
    """The bytes of an open file."""

    def chunks(start: int, end: int) -> Iterator[bytes]:
        while start < end and (data := os.pread(fd, min(1 << 20, end - start), start)):
            yield data
            start += len(data)

    return chunks


def _digest(kind: str, chunks: Iterable[bytes]) -> Any:
    digest = hashlib.new(kind, usedforsecurity=False)
    for data in chunks:
        digest.update(data)
    return digest


def _tag(info: Mapping[str, Any]) -> str:
    keys = ("ETag", "etag", "generation", "VersionId", "blob_id", "LastModified", "mtime", "created")
    return next((str(info[k]).strip('"') for k in keys if info.get(k)), "")
