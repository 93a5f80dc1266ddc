"""Bytes from a snapshot: whole files into the Hub's cache or elsewhere, or ranges of them; hashed as they arrive."""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import re
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from huggingface_hub import is_offline_mode

from zoo.formats.base import MAX_HEADERS
from zoo.hub import cache
from zoo.hub.errors import About, Damaged, HubError, bytes_text
from zoo.hub.files import RemoteFile, Snapshot
from zoo.hub.http import Progress, Watch, stream
from zoo.untrusted.plain import open_plain

NOTED = 2 << 20  # bytes of a sparse file that may have to be fetched again after a kill, per connection
HEADER_GUESS = 256 << 10  # bytes of a shard's start that are asked for at once: most headers are shorter
MAX_NOTES = 16 << 20  # characters of the notes beside a sparse file

T = TypeVar("T")
R = TypeVar("R")

__all__ = [
    "Progress",
    "download",
    "download_ranges",
    "download_sparse",
    "download_to",
    "hashed",
    "read_headers",
    "read_range",
    "read_safetensors_header",
]


# ---- whole files


def download(
    snapshot: Snapshot,
    paths: Iterable[str],
    *,
    workers: int = 4,
    progress: Progress | None = None,
    verify: bool = True,
    cancel: threading.Event | None = None,
) -> Path:
    """Have the files `paths` of the snapshot, whole and verified, in the Hub's cache; the snapshot's folder.

    What is there already is hashed once (`verify`) and not fetched again; a part left by an earlier run goes on where
    it ended; `workers` files arrive at once. With everything there and verified, no request is made and nothing is
    written. Only one process at a time fetches from a repository; others wait and say so.

    Raises HubError: see `resolve`; also `content` (fetched twice and wrong both times), `disk`, `offline`.
    """
    watch = Watch(progress, cancel)
    files = [snapshot.file(path) for path in dict.fromkeys(paths)]
    watch.tell(lambda p: p.start(sum(f.size for f in files)))
    folder = cache.snapshot_folder(snapshot)

    def check(file: RemoteFile) -> bool:
        at = cache.find(snapshot, file)
        return at is not None and _is_there(at, file, watch, verify=verify)

    with _disk_errors(folder, snapshot.repo):
        watch.tell(lambda p: p.phase("checking"))
        there = dict(zip(files, _parallel(files, check, workers, watch), strict=True))
        missing: dict[str, list[RemoteFile]] = {}
        for file in files:
            if not there[file]:
                missing.setdefault(file.blob, []).append(file)
        unlinked = [f for f in files if there[f] and not cache.is_linked(snapshot, f)]
        if not missing and not unlinked:
            with suppress(OSError):  # a cache that can't be written is still good to read
                cache.write_tree(snapshot)
                cache.write_ref(snapshot)
            return folder
        if missing and is_offline_mode():
            raise HubError(
                f"HF_HUB_OFFLINE is set and {len(missing)} of the {len(files)} files needed from {snapshot.repo} are "
                f"not in the cache, or damaged there; {next(iter(missing.values()))[0].path} is the first. "
                "Unset it and run this again.",
                "offline",
            )

        def fetch(same: list[RemoteFile]) -> None:
            """One blob, under all its names."""
            file = same[0]
            about, blob = snapshot.about(file.path), cache.blob_path(snapshot.repo, file)
            with cache.locked(cache.lock_path(snapshot.repo, file.blob), str(about), watch):
                if not check(file):  # the one we waited for may have fetched it
                    part = cache.part_path(snapshot.repo, file)
                    _receive(file, snapshot.url(file.path), part, about, watch, verify=verify)
                    os.replace(part, blob)
                    if verify:
                        cache.mark_verified(blob, file, watch)
                for name in same:
                    cache.link(snapshot, name)
                watch.advance(file.size * (len(same) - 1))

        with cache.locked(cache.lock_path(snapshot.repo, "zoo"), snapshot.repo, watch):
            cache.plain_folders(folder, cache.folder(snapshot.repo))
            cache.write_tree(snapshot)
            for file in unlinked:
                cache.link(snapshot, file)
            if missing:
                watch.tell(lambda p: p.phase("downloading"))
                blobs = cache.folder(snapshot.repo) / "blobs"
                cache.plain_folders(blobs, cache.folder(snapshot.repo))
                largest_first = sorted(missing.values(), key=lambda same: -same[0].size)
                _check_space(blobs, [same[0] for same in largest_first], snapshot)
                _parallel(largest_first, fetch, workers, watch)
            cache.write_ref(snapshot)
    return folder


def hashed(snapshot: Snapshot, paths: Iterable[str], *, progress: Progress | None = None) -> Snapshot:
    """The snapshot, with the sha256 of those of its files `paths` that came without a hash, of what the cache holds.

    That says what was read, so that a change is noticed. Whether it is what the Hub has, it can't say.
    """
    watch = Watch(progress)
    files = {path: file for path in paths if not (file := snapshot.file(path)).blob}
    if not files:
        return snapshot
    watch.tell(lambda p: p.phase("hashing"))
    for path, file in files.items():
        at = cache.find(snapshot, file)
        if at is None:
            raise HubError(f"{snapshot.about(path)}: it has gone from the cache; run this again.", "offline")
        with open(at, "rb", buffering=0) as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        files[path] = replace(file, sha256=found, hashed_here=True)
        cache.mark_verified(at, files[path], watch)
    watch.note(
        f"{snapshot.repo}: the cache holds no hash of {len(files)} files ({next(iter(files))}, ...): hash computed here, "
        "not compared with the Hub's"
    )
    return replace(snapshot, files=tuple(files.get(f.path, f) for f in snapshot.files))


def download_to(
    snapshot: Snapshot,
    path: str,
    dest: Path,
    *,
    progress: Progress | None = None,
    verify: bool = True,
    cancel: threading.Event | None = None,
) -> Path:
    """Have the file `path` of the snapshot, whole and verified, at `dest`, past the Hub's cache; `dest`.

    Continues `dest` + `.part` of an earlier run; does nothing if `dest` is there and right. Offline, the cache's own is
    copied. Advances `progress` by
    the file's bytes but doesn't start it: callers that fetch many files know the total. Raises HubError as `download`.
    """
    file, about, watch = snapshot.file(path), snapshot.about(path), Watch(progress, cancel)
    part = dest.with_name(dest.name + ".part")
    with _disk_errors(dest, str(about)):
        dest.parent.mkdir(parents=True, exist_ok=True)
        with cache.locked(dest.with_name(dest.name + ".lock"), str(about), watch):
            if not _is_there(dest, file, watch, verify=verify):
                at = cache.find(snapshot, file) if is_offline_mode() else None
                if at is not None and _is_there(at, file, watch, verify=verify):
                    part.unlink(missing_ok=True)
                    shutil.copyfile(at, part)
                else:
                    _receive(file, snapshot.url(path), part, about, watch, verify=verify)
                os.replace(part, dest)
                if verify:
                    cache.mark_verified(dest, file, watch)
            dest.with_name(dest.name + ".lock").unlink(missing_ok=True)
    return dest


def _is_there(at: Path, file: RemoteFile, watch: Watch, *, verify: bool) -> bool:
    """Whether `at` holds the file; if so, advances over it. What another tool put there may be damaged."""
    if not at.is_file() or at.stat().st_size != file.size:
        return False
    if not verify:
        watch.advance(file.size)
        return True
    if cache.identity(at, file) in watch.damaged:
        return False
    try:
        cache.verify(at, file, watch)
    except Damaged as damage:
        watch.damaged.add(cache.identity(at, file))
        watch.note(f"{at} is damaged ({damage}): it has to be fetched again")
        return False
    return True


def _receive(file: RemoteFile, url: str, part: Path, about: About, watch: Watch, *, verify: bool) -> None:
    """Fill `part` with the file, from where it ends, and check its hash; if that is wrong, once more from nothing."""
    first: Damaged | None = None
    while True:
        try:
            return _receive_once(file, url, part, about, watch, verify=verify, direct=first is None)
        except Damaged as damage:
            watch.advance(-part.lstat().st_size)
            part.unlink()
            if first is not None:
                raise HubError(
                    f"{about}: what the Hub sends is not what it lists. Expected {damage.expected}, found "
                    f"{first.found} and then {damage.found}. Nothing was kept of it. If running this again gives "
                    "the same, a proxy may change the file, or the repository is damaged: tell its owner.",
                    "content",
                ) from None
            first = damage
            watch.note(f"{about}: it arrived damaged ({damage}); fetching it once more")


def _receive_once(
    file: RemoteFile, url: str, part: Path, about: About, watch: Watch, *, verify: bool, direct: bool
) -> None:
    """Go on with `part` to the file's end. Raises Damaged if the whole hasn't the listed hash."""
    digest = cache.hasher(file)
    with open(open_plain(part, os.O_RDWR | os.O_CREAT | os.O_APPEND), "ab", buffering=0) as f:
        have = f.seek(0, os.SEEK_END)
        if have > file.size:
            f.truncate(0)
            have = 0
        if verify:
            cache.hash_prefix(f.fileno(), have, digest, watch)
        else:
            watch.advance(have)

        def sink(chunk: bytes | memoryview) -> None:
            if verify:
                digest.update(chunk)
            _write(f.fileno(), chunk)
            watch.advance(len(chunk))

        stream(url, about, have, file.size, file.size, sink, watch, direct=direct)
    if verify and file.blob and digest.hexdigest() != file.blob:
        raise Damaged(file.blob, digest.hexdigest())


def _write(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _check_space(at: Path, files: Sequence[RemoteFile], snapshot: Snapshot) -> None:
    have = 0
    for file in files:
        with suppress(OSError):
            have += cache.part_path(snapshot.repo, file).lstat().st_size
    need, free = sum(f.size for f in files) - have, shutil.disk_usage(at).free
    if need > free:
        raise HubError(
            f"{snapshot.repo} needs {bytes_text(need)} more in {at}, which has {bytes_text(free)} free. "
            "Make room, or set HF_HOME to a larger disk.",
            "disk",
        )


@contextmanager
def _disk_errors(at: Path, what: str) -> Iterator[None]:
    """Failures to write as HubError: by now every other OSError has been turned into something else."""
    try:
        yield
    except OSError as error:
        where = error.filename or at
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HubError(
                f"the disk is full: {what} doesn't fit at {where}. Make room and run the same command again: "
                "what was fetched is kept.",
                "disk",
            ) from None
        raise HubError(f"can't write {what} at {where}: {error.strerror or error}.", "disk") from None


# ---- parts of files


def read_range(
    snapshot: Snapshot,
    path: str,
    start: int,
    length: int,
    *,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> bytes:
    """Bytes [start, start + length) of a file, by one range request, retried; no request if it is cached and verified.

    Tells `progress` of waits only. Raises HubError as `resolve`, and when the range isn't inside the file.
    """
    return _read_range(snapshot, path, start, length, Watch(progress, cancel))


def _read_range(snapshot: Snapshot, path: str, start: int, length: int, watch: Watch) -> bytes:
    file, about = snapshot.file(path), snapshot.about(path)
    if start < 0 or length < 0 or start + length > file.size:
        raise HubError(
            f"{about} has {file.size} bytes; bytes {start} to {start + length} were asked for.", "content"
        )
    if (at := _local(snapshot, file)) is not None:
        with open(at, "rb") as f:
            f.seek(start)
            return f.read(length)
    data = bytearray()
    try:
        stream(
            snapshot.url(path),
            about,
            start,
            start + length,
            file.size,
            data.extend,
            watch,
            direct=False,
        )
    except Damaged as damage:
        raise _resized(about, damage) from None
    return bytes(data)


def _local(snapshot: Snapshot, file: RemoteFile) -> Path | None:
    """The cached file if it can be read instead of asking the Hub: one that was verified, or offline any."""
    at = cache.find(snapshot, file)
    return at if at is not None and (is_offline_mode() or cache.is_verified(at, file)) else None


def read_safetensors_header(
    snapshot: Snapshot, path: str, max_header: int = 100 << 20, *, cancel: threading.Event | None = None
) -> tuple[bytes, int]:
    """The JSON header of a safetensors file, as bytes, and the offset at which its data starts. One or two requests.

    Raises HubError as `read_range`, and when the header claims more than the file has or `max_header` bytes.
    """
    return _safetensors_header(snapshot, path, max_header, Watch(cancel=cancel))


def _safetensors_header(
    snapshot: Snapshot,
    path: str,
    max_header: int,
    watch: Watch,
    claim: Callable[[str, int], None] = lambda path, length: None,
) -> tuple[bytes, int]:
    file, about = snapshot.file(path), snapshot.about(path)
    start = _read_range(snapshot, path, 0, min(file.size, HEADER_GUESS), watch)
    if len(start) < 8:
        raise HubError(f"{about} is no safetensors file: it has {file.size} bytes.", "content")
    (length,) = struct.unpack("<Q", start[:8])
    if length > min(max_header, file.size - 8):
        raise HubError(
            f"{about} is no safetensors file, or a hostile one: its header claims {length} bytes of a file of "
            f"{file.size} (limit {max_header}). Refused.",
            "content",
        )
    claim(path, length)  # before it is asked for
    header = start[8 : 8 + length]
    if len(header) < length:
        header += _read_range(snapshot, path, 8 + len(header), length - len(header), watch)
    return header, 8 + length


def read_headers(
    snapshot: Snapshot,
    paths: Iterable[str],
    workers: int = 16,
    max_header: int = 100 << 20,
    progress: Progress | None = None,
) -> dict[str, tuple[bytes, int]]:
    """`read_safetensors_header` of many files at once: path -> (header, data start). Tells `progress` of waits only."""
    watch, paths = Watch(progress), list(dict.fromkeys(paths))
    claimed = dict[str, int]()

    def claim(path: str, length: int) -> None:
        claimed[path] = length
        if (total := sum(list(claimed.values()))) > MAX_HEADERS:
            raise HubError(
                f"{snapshot.about(path)}: with its header the files have {total} bytes of headers (limit {MAX_HEADERS}). Refused.",
                "content",
            )

    def one(path: str) -> tuple[bytes, int]:
        return _safetensors_header(snapshot, path, max_header, watch, claim)

    return dict(zip(paths, _parallel(paths, one, workers, watch), strict=True))


def download_ranges(
    snapshot: Snapshot,
    path: str,
    ranges: Iterable[tuple[int, int]],
    write: Callable[[int, bytes | memoryview], object],
    *,
    workers: int = 4,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> None:
    """Hand the bytes of `ranges`, pairs (start, length), to `write(offset in the file, data)`.

    Ranges that touch or overlap become one request. Within one the data comes in order, but several arrive at once,
    so `write` is called from several threads (never twice for a byte; `data` is good during the call only). Advances
    `progress` by bytes. The parts of a file have no hash: only their length can be checked.

    Raises HubError as `read_range`; `disk` if `write` raises OSError.
    """
    file, about, watch = snapshot.file(path), snapshot.about(path), Watch(progress, cancel)
    merged = _merge(ranges, file, about)
    at = _local(snapshot, file)

    def fetch(span: tuple[int, int]) -> None:
        offset, stop = span

        def sink(chunk: bytes | memoryview) -> None:
            nonlocal offset
            write(offset, chunk)
            offset += len(chunk)
            watch.advance(len(chunk))

        if at is None:
            stream(snapshot.url(path), about, offset, stop, file.size, sink, watch)
            return
        with open(at, "rb", buffering=0) as f:
            f.seek(offset)
            while offset < stop:
                watch.check()
                data = f.read(min(1 << 20, stop - offset))
                if not data:
                    raise OSError(errno.EIO, "the cached file became shorter", str(at))
                sink(data)

    with _disk_errors(Path(path), str(about)):
        try:
            _parallel(merged, fetch, workers, watch)
        except Damaged as damage:
            raise _resized(about, damage) from None


def download_sparse(
    snapshot: Snapshot,
    path: str,
    ranges: Iterable[tuple[int, int]],
    dest: Path,
    *,
    workers: int = 4,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Path:
    """Have the bytes of `ranges` of a file at their own offsets in `dest`, a sparse file of the full size; `dest`.

    What reads the whole file can then read these parts of it. `dest` + `.ranges` notes, line by line, what has
    arrived, so that a run that was killed continues; it stays. Progress and errors as `download_ranges`.
    """
    file, about, watch = snapshot.file(path), snapshot.about(path), Watch(progress, cancel)
    notes, piece = dest.with_name(dest.name + ".ranges"), 64 << 20
    with _disk_errors(dest, str(about)):
        dest.parent.mkdir(parents=True, exist_ok=True)
        with cache.locked(dest.with_name(dest.name + ".lock"), str(about), watch):
            head = f"{file.blob} {file.size} {cache.boot()}\n"  # after a reboot what was written may be lost
            new = not dest.exists()
            with (
                open(open_plain(dest, os.O_RDWR | os.O_CREAT), "r+b", buffering=0) as f,
                open(
                    open_plain(notes, os.O_RDWR | os.O_CREAT), "r+", encoding="utf-8", errors="replace"
                ) as text,
            ):
                noted = [] if new else text.read(MAX_NOTES).splitlines(keepends=True)
                if noted[:1] != [head]:
                    noted = [head]
                    f.truncate(0)
                f.truncate(file.size)
                noted = [head, *(line for line in noted[1:] if _is_noted(line, file.size))]
                text.seek(0)
                text.truncate()
                text.write("".join(noted))
            done = _merge(((int(a), int(b)) for a, b in map(str.split, noted[1:])), file, about)
            wanted = _merge(ranges, file, about)
            todo = _subtract(wanted, done)
            watch.advance(sum(b - a for a, b in wanted) - sum(b - a for a, b in todo))
            spans = [(a, min(a + piece, stop)) for start, stop in todo for a in range(start, stop, piece)]
            with (
                open(open_plain(dest, os.O_RDWR), "r+b", buffering=0) as f,
                open(open_plain(notes, os.O_WRONLY | os.O_APPEND), "ab", buffering=0) as log,
            ):

                def write(offset: int, data: bytes | memoryview) -> None:
                    view = memoryview(data)
                    while view:
                        n = os.pwrite(f.fileno(), view, offset)
                        view, offset = view[n:], offset + n

                def fetch(span: tuple[int, int]) -> None:
                    start, noted = span[0], span[0]

                    def write_and_note(
                        offset: int, data: bytes | memoryview
                    ) -> None:  # in order, within a span
                        nonlocal noted
                        write(offset, data)
                        if (end := offset + len(data)) - noted >= NOTED or end == span[1]:
                            log.write(f"{noted} {end - noted}\n".encode())
                            noted = end

                    length = span[1] - start
                    download_ranges(
                        snapshot,
                        path,
                        [(start, length)],
                        write_and_note,
                        workers=1,
                        progress=relay,
                        cancel=watch.stop,
                    )

                relay = _Relay(watch)
                _parallel(spans, fetch, workers, watch)
    return dest


def _is_noted(line: str, size: int) -> bool:
    """Whether a line says what has arrived of a file of `size` bytes: one cut off by a kill does not."""
    match = re.fullmatch(r"([0-9]{1,19}) ([0-9]{1,19})\n", line)
    return match is not None and int(match[1]) + int(match[2]) <= size


class _Relay:
    """Passes progress of an inner transfer on to the outer one."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def start(self, total: int) -> None:
        pass

    def phase(self, name: str) -> None:
        pass

    def advance(self, n: int) -> None:
        self._watch.advance(n)

    def note(self, message: str) -> None:
        self._watch.note(message)


def _merge(ranges: Iterable[tuple[int, int]], file: RemoteFile, about: About) -> list[tuple[int, int]]:
    """(start, length) pairs -> disjoint (start, stop) spans in order. Raises HubError for what isn't in the file."""
    spans: list[tuple[int, int]] = []
    for start, length in sorted(ranges):
        if start < 0 or length < 0 or start + length > file.size:
            raise HubError(
                f"{about} has {file.size} bytes; bytes {start} to {start + length} were asked for.", "content"
            )
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], start + length))
        elif length:
            spans.append((start, start + length))
    return spans


def _subtract(wanted: list[tuple[int, int]], done: list[tuple[int, int]]) -> list[tuple[int, int]]:
    left: list[tuple[int, int]] = []
    for start, stop in wanted:
        for a, b in done:
            if b <= start or a >= stop:
                continue
            if a > start:
                left.append((start, a))
            start = max(start, b)
        if start < stop:
            left.append((start, stop))
    return left


def _resized(about: About, damage: Damaged) -> HubError:
    return HubError(
        f"{about}: the Hub lists {damage.expected} and serves {damage.found}. Run this again; if it stays so, the "
        "repository is damaged: tell its owner.",
        "content",
    )


# ---- threads


def _parallel(items: Sequence[T], work: Callable[[T], R], workers: int, watch: Watch) -> list[R]:
    """`work` of each item, in their order, by up to `workers` threads.

    The first failure, or Ctrl-C, stops the others at their next chunk and is raised at once: the threads are daemons,
    so not even one that waits for a silent server holds up the end of the process.
    """
    if len(items) <= 1 or workers <= 1:
        return [work(item) for item in items]
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(len(items)):
        todo.put(i)
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    results: dict[int, R] = {}

    def run() -> None:
        try:
            while not watch.stop.is_set():
                try:
                    i = todo.get_nowait()
                except queue.Empty:
                    break
                results[i] = work(items[i])
            done.put(None)
        except BaseException as error:
            done.put(error)

    threads = [
        threading.Thread(target=run, daemon=True, name="zoo-hub") for _ in range(min(workers, len(items)))
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            if (error := done.get()) is not None:
                raise error
    except BaseException:
        watch.stop.set()
        deadline = time.monotonic() + 1.0
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        raise
    watch.check()
    return [results[i] for i in range(len(items))]
