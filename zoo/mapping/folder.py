"""A folder that appears whole or not at all.

Everything is written into `<name>.partial` beside the destination and renamed at the end, so that whatever
happens (Ctrl-C, kill -9, a full disk) the final name is complete or does not exist. Running again goes on
from where the same job stopped: a state says which job a partial folder belongs to, and which steps of
it are finished. A partial of another job is thrown away. A folder of that name that no run of zoo began is
never touched.

The folder in the making is held by its descriptor (`dir_fd`), and no link in it is followed: who can write beside the
destination may swap the folder or plant a link at any moment, and gets nothing written or deleted elsewhere.

A finished step is believed after a crash of the machine only if it was synced (`durable`); after the death of
the process alone, the pages are still the kernel's and always believed: the boot is noted to tell the two apart.
Without `durable` nothing is synced, as with `cp`: syncing 3 GB takes as long as copying it, and to sync one small file
beside them makes some file systems write all of it (ext4 took 1.2 s).

Blocks of a large file are reserved, where the file system can, when it is its turn to be filled: writing into them
takes ext4 0.6 of the time. (All at the beginning would tell of a disk that others fill; but to find the blocks ext4
reads its maps of them, half a second that the other threads can use.)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zoo.errors import ZooError
from zoo.formats.base import leads_out
from zoo.system import libc
from zoo.untrusted.bounded import parse_json
from zoo.untrusted.plain import by_descriptor, open_plain

STATE, JOURNAL = ".zoo-state.json", ".zoo-steps.jsonl"  # names that no file of a checkpoint has
WHOLE = "whole"  # in a partial folder that several processes fill: the folder in the making (see parts.py)
MAX_STEPS = 256 << 20  # bytes of what a run has written down
_SLACK = 8 << 20  # bytes for folders and inodes


class Folder:
    """The folder `dst` in the making; a context manager that holds its lock.

    `sizes`: the large files that will be in it. `job` identifies what is being done: the same job may go on
    with what an earlier run left. `ours(path)` says whether an existing folder is of the kind that `force`
    may replace. Raises ZooError if it exists, cannot be written, does not fit on the disk, or is being written
    by another process.
    """

    def __init__(
        self,
        dst: str | os.PathLike[str],
        sizes: Mapping[str, int],
        job: str,
        *,
        force: bool = False,
        ours: Callable[[Path], bool] = lambda _: False,
        durable: bool = False,
    ) -> None:
        for name in sizes:
            self._refuse_outside(name)
        self.dst = Path(os.path.abspath(dst))
        self.partial = self.dst.with_name(self.dst.name + ".partial")
        self.sizes, self.job, self.force, self.ours, self.durable = dict(sizes), job, force, ours, durable
        self.done: set[str] = set()
        self.said: list[str] = []  # by the finished steps
        self.published = False
        self._lock: int | None = None
        self._fds: dict[str, int] = {}
        self._reserved: set[str] = set()
        self._reserving = {name: threading.Lock() for name in self.sizes}

    def __enter__(self) -> Self:
        self._check_destination()
        try:
            self.dst.parent.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.partial, self.dst)
        except OSError as e:
            raise ZooError(f"{self.dst}: cannot be written: {e.strerror} ({e.filename})") from None
        try:
            recover(self.dst)
            self._check_destination()
            self._refuse_parts()
            self._resume()
            self._check_space()
            if not self._has(STATE):  # first: it says that the folder is ours to throw away
                self.write(STATE, json.dumps({"job": self.job, "boot": boot()}).encode())
            for name, size in self.sizes.items():
                fd = self._open(name, os.O_RDWR | os.O_CREAT)
                self._fds[name] = fd
                os.ftruncate(fd, size)
        except OSError as e:
            self._close()
            raise ZooError(f"{self.partial}: cannot be written: {e.strerror}") from None
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._close()

    def fd(self, name: str) -> int:
        """The descriptor of a large file, to be filled now. Raises OSError if its blocks cannot be reserved."""
        with self._reserving[name]:
            if name not in self._reserved:
                libc.reserve(self._fds[name], self.sizes[name])
                self._reserved.add(name)
        return self._fds[name]

    def head(self, name: str, data: bytes, at: int = 0) -> None:
        """Bytes of a large file that are no tensor's: its first ones, or those from `at` on."""
        os.pwrite(self._fds[name], data, at)

    def write(self, name: str, data: bytes) -> None:
        """A small file. Raises ZooError for a name that leads out of the folder."""
        self._refuse_outside(name)
        with open(self._open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as f:
            f.write(data)
            f.flush()
            if self.durable:
                os.fsync(f.fileno())

    def mark(self, step: str, said: Sequence[str] = ()) -> None:
        """`step` is finished, and need not be repeated; what it `said` is kept for the run that publishes."""
        if self.durable:
            self.sync()
        self._append({"step": step, "said": said, "synced": self.durable})
        self.done.add(step)
        self.said += said

    def _append(self, step: Mapping[str, Any]) -> None:
        """A line of the journal."""
        with open(self._open(JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a", encoding="utf-8") as f:
            f.write(json.dumps(step) + "\n")
            f.flush()
            if step["synced"]:
                os.fsync(f.fileno())

    def sync(self) -> None:
        for fd in self._fds.values():
            os.fdatasync(fd)

    @contextmanager
    def last(self) -> Iterator[bool]:
        """Everything of this process is written. Whether nothing is left to be written by others (there are none)."""
        yield True

    def publish(self) -> Path:
        """Make the folder appear under its final name; with `force`, in place of an old one."""
        if self.durable:
            self.sync()
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}
        for name in (JOURNAL, STATE):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._held)
        if self.durable:
            os.fsync(self._held)
        self._check_destination()
        if not os.path.samestat(os.fstat(self._held), os.lstat(self.partial)):
            raise ZooError(f"{self.partial}: somebody put another folder in its place: not published")
        put(self.partial, self.dst, durable=self.durable)
        self.published = True
        return self.dst

    @property
    def here(self) -> Path:
        """A path of the folder in the making, for libraries that open files by path."""
        return by_descriptor(self._held, self.partial)

    @property
    def _held(self) -> int:
        """The descriptor of the folder in the making; it holds the lock, too."""
        assert self._lock is not None
        return self._lock

    def _open(self, name: str, flags: int) -> int:
        """A plain file in the folder, or in folders below it that are made where they are missing."""
        *above, last = Path(name).parts
        at = os.dup(self._held)
        try:
            for part in above:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=at)
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
                os.close(at)
                at = below
            return open_plain(last, flags, dir_fd=at)
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self.partial / name)) from None
        finally:
            os.close(at)

    def _has(self, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return stat.S_ISREG(os.stat(name, dir_fd=self._held, follow_symlinks=False).st_mode)
        return False

    def _read(self, name: str) -> bytes:
        with open(self._open(name, os.O_RDONLY), "rb") as f:
            if (size := os.fstat(f.fileno()).st_size) > MAX_STEPS:
                raise ZooError(too_long(self.partial / name, size))
            return f.read()

    def _refuse_outside(self, name: str) -> None:
        if leads_out(name):
            raise ZooError(f"a file called {name!r} would lie outside of the folder it belongs in: refused")

    # --- before the first byte ------------------------------------------------------------------------------

    def _check_destination(self) -> None:
        check_destination(self.dst, self.force, self.ours)

    def _resume(self) -> None:
        # Without a state: nobody's, or complete and killed before it was renamed.
        if not self._has(STATE) and os.listdir(self._held):
            ours = self.ours(self.partial)
            if not ours or not os.path.samestat(os.fstat(self._held), os.lstat(self.partial)):
                raise ZooError(in_the_way(self.partial))
        try:
            state = parse_json(self._read(STATE))
            same = state["job"] == self.job
            rebooted = state["boot"] != boot()
        except (OSError, ValueError, KeyError, TypeError):
            same, rebooted = False, True
        if same:
            try:
                steps = [s for s in steps_of(self._read(JOURNAL)) if s["synced"] or not rebooted]
                self.done = {s["step"] for s in steps}
                self.said = [text for s in steps for text in s["said"]]
                if all(self._stat(n).st_size == size for n, size in self.sizes.items()):
                    return
            except (OSError, ValueError, KeyError, TypeError):
                pass
        self.done, self.said = set(), []
        clear_held(self._held, STATE)

    def _refuse_parts(self) -> None:
        """Other machines, which no lock here stops, may be at work in a folder that was begun in parts."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            parts = parse_json(self._read(STATE)).get("parts")
            if parts is not None and stat.S_ISDIR(self._stat(WHOLE).st_mode):
                raise ZooError(
                    f"{self.partial}: was begun by a conversion in parts: start the missing ones again (--part k/n), or "
                    "remove that folder"
                )

    def _stat(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self._held, follow_symlinks=False)

    def _check_space(self) -> None:
        there = 0
        for name in self.sizes:
            with contextlib.suppress(FileNotFoundError):
                there += min(self._stat(name).st_blocks * 512, self.sizes[name])
        need = sum(self.sizes.values()) - there + _SLACK
        disk = os.fstatvfs(self._held)
        free = disk.f_bavail * disk.f_frsize
        if need > free:
            if not there:
                self.discard()
            raise ZooError(
                f"{self.dst}: needs {need:,} bytes, its disk has {free:,} free: {need - free:,} too few; "
                "nothing was written"
            )

    def discard(self) -> None:
        """Remove what has been written so far."""
        with contextlib.suppress(OSError):
            clear_held(self._held, STATE)
            self.partial.rmdir()

    def _close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}
        if self._lock is not None:
            os.close(self._lock)  # gives the lock back
            self._lock = None


def locked(partial: Path, dst: Path) -> int:
    """A descriptor of the folder in which `dst` is made, itself made where it is missing, that holds its lock. Raises ZooError where
    another process holds it, or the folder is a link or another user's."""
    if partial.is_symlink():
        raise ZooError(in_the_way(partial))
    while True:
        partial.mkdir(exist_ok=True)
        fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            own(partial, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.lstat(partial)):
                    return fd
        except BlockingIOError:
            os.close(fd)
            raise ZooError(f"{dst}: another process is writing it ({partial} is locked)") from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # it was published or removed between the two calls


def check_destination(dst: Path, force: bool, ours: Callable[[Path], bool]) -> None:
    """Raises ZooError if `dst` exists, or with `force` if it is not a folder of the kind that is `ours`."""
    if not os.path.lexists(dst):
        return
    if not force:
        raise ZooError(f"{dst}: exists already; choose another destination, or replace it with --force")
    empty = dst.is_dir() and not any(dst.iterdir())
    if dst.is_symlink() or not dst.is_dir() or not (empty or ours(dst)):
        raise ZooError(f"{dst}: exists and holds what zoo did not write: not replaced, even with --force")


def put(new: Path, dst: Path, durable: bool = False, new_in: int | None = None) -> None:
    """Give the folder `new` (below the folder `new_in`) the name `dst`, in place of what is there."""
    old = _aside(dst)
    if dst.exists():
        os.rename(dst, old)
    os.rename(new, dst, src_dir_fd=new_in)
    if durable:
        _sync_folder(dst.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(dst: Path) -> None:
    """A run that was killed between the two renames of `put` leaves the old folder aside: put it back."""
    old = _aside(dst)
    if os.path.lexists(old):
        own(old)
        if dst.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, dst)


def _aside(dst: Path) -> Path:
    return dst.with_name(f".{dst.name}.zoo-replaced")  # a name that nobody gives to a folder of theirs


def is_ours(folder: Path, mark: str) -> bool:
    """Whether zoo may delete what is in `folder`: nothing, or what lies beside a file called `mark`."""
    marked = folder / mark
    return (marked.is_file() and not marked.is_symlink()) or not any(folder.iterdir())


def in_the_way(path: Path) -> str:
    return f"{path}: is in the way, and zoo did not make it: move it elsewhere, or choose another destination"


def clear(folder: Path, mark: str) -> None:
    """Empty `folder`, its mark last: what a kill leaves is still ours. A link is removed, never followed."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        own(folder, fd)
        clear_held(fd, mark)
    finally:
        os.close(fd)


def clear_held(fd: int, mark: str) -> None:
    """`clear` for a folder by its descriptor."""
    for name in sorted(os.listdir(fd), key=lambda n: n == mark):
        if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=fd)
        else:
            os.unlink(name, dir_fd=fd)


def own(folder: Path, fd: int | None = None) -> None:
    """Raise ZooError for a link, or a folder of another user, who could change at any time what is written into it.

    Where a file system gives all files one owner (a network's, that of a USB stick), a new file has that owner, too.
    """
    if fd is None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return own(folder, fd)
        finally:
            os.close(fd)
    owner = os.fstat(fd).st_uid
    if owner == os.geteuid():
        return
    probe = f".zoo-owner-{os.getpid()}"
    new = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=fd)
    found = os.fstat(new).st_uid
    os.close(new)
    os.unlink(probe, dir_fd=fd)
    if found != owner:
        raise ZooError(f"{folder}: belongs to another user: {in_the_way(folder).partition(': ')[2]}")


def _is_step(x: Any) -> bool:
    """Whether it is a line that `_append` writes."""
    said = x.get("said", []) if isinstance(x, dict) else None
    return (
        isinstance(said, list)
        and all(isinstance(t, str) for t in [*said, x.get("step", "")])
        and ("step" not in x or "said" in x)
    )


def steps_of(journal: bytes) -> list[dict[str, Any]]:
    """The steps in a journal; a line that a kill cut short, or that zoo did not write, is none. Raises ValueError for what is no
    journal. All lines are parsed as one text: each by itself took 25 times as long, and their number had no limit."""
    steps = parse_json(b"[" + b",".join(journal.split(b"\n")[:-1]) + b"]")
    return [s for s in steps if _is_step(s)]


def too_long(path: Path, size: int) -> str:
    return f"{path}: {size} bytes (limit {MAX_STEPS}), which no conversion writes: remove the folder that it is in"


def boot() -> str:
    """What this machine's run since it was started is called."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"unknown {os.getpid()}"  # never the same again: unsynced steps are not believed


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
