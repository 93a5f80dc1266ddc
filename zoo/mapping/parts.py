"""One conversion by many processes, on one machine or many that share a file system.

The output files are divided into runs of neighbours, of which the largest is as small as it can be: neighbours come from
the same source files. Every process makes the whole plan and moves what belongs to the files of its part. They meet in
`<name>.partial`:

    .zoo-state.json            what is being converted, and in how many parts: all must say the same
    .zoo-part-2-of-8.jsonl     the finished steps of a part; locked by the process that does it
    .zoo-turn                  locked by whoever joins or publishes
    whole/                     the folder in the making; renamed to its final name by the last to finish

Publishing is that one rename, so the final name is complete or absent whoever is killed, and when. What is left of the
partial folder is removed afterwards, by the same process or the next one started.

Locks are flock's: of all processes of a machine, and of several machines where the file system knows it (NFS, Lustre with
`flock`, GPFS, CephFS). Where locks hold on one machine only, two that finish at once still can't both publish: the
second finds nothing to rename. With `--force` it might put aside what the first has published: use a file system that
knows locks.

A part on one of several machines syncs its files before it is called finished: whoever publishes can't tell whether
another machine crashed with pages of them unwritten.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from zoo.errors import ZooError
from zoo.mapping.folder import (
    MAX_STEPS,
    STATE,
    WHOLE,
    Folder,
    boot,
    clear_held,
    in_the_way,
    own,
    put,
    recover,
    steps_of,
    too_long,
)
from zoo.untrusted.bounded import parse_json, whole
from zoo.untrusted.plain import open_plain

TURN = ".zoo-turn"
_NEW = STATE + ".new"
MOST = 65_536  # parts; more than files that any release has


@dataclass(frozen=True)
class Part:
    """`number` (from 1) of `of` parts. `together`: all of them run on this machine."""

    number: int
    of: int
    together: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of <= MOST:
            raise ZooError(f"part {self.number} of {self.of}: expected 1 <= k <= n <= {MOST}")

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"


def parse(text: str) -> Part:
    """The part that `k/n` names, k from 1. Raises ZooError if it names none."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and len(text) < 16):
        raise ZooError(f"{text!r} is not a part: expected k/n, such as 2/8 for the second of eight")
    return Part(int(k), int(n))


# rank, number of ranks, and what equals the third where all are on this machine
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", None),  # torchrun
    # srun; SLURM_NTASKS would be there in a batch script, too, of which there is one
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "1"),
)


def of_process(environment: Mapping[str, str]) -> tuple[Part, str] | None:
    """The part of this process among those that torchrun or srun started, and the variables that say so; None if it is
    the only one. Raises ZooError for variables that make no sense."""
    for rank, world, local, here in _LAUNCHERS:
        if rank not in environment or world not in environment:
            continue
        said = f"{rank}={environment[rank]}, {world}={environment[world]}"
        r, n = whole(environment[rank], 9), whole(environment[world], 9)
        if r is None or n is None or r >= n:
            raise ZooError(f"{said}: expected a rank from 0, below the number of processes")
        if n > 1:
            together = environment.get(local) == (environment[world] if here is None else here)
            return Part(r + 1, n, together), said
    return None


def shares(sizes: Mapping[str, int], n: int) -> list[list[str]]:
    """`sizes` in this order, cut into `n` runs (some may be empty) of which the largest is as small as it can be, and
    the others as even as that leaves them."""
    items = list(sizes.items())
    low, high = max(sizes.values(), default=0), sum(sizes.values())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _runs(items, middle) <= n else (middle + 1, high)
    out: list[list[str]] = []
    left = sum(sizes.values())
    at = 0
    for parts in range(n, 0, -1):
        mine: list[str] = []
        size = 0
        while at < len(items) and size + items[at][1] <= low:
            name, nbytes = items[at]
            enough = size + nbytes / 2 > left / parts
            if mine and enough and _runs(items[at:], low) <= parts - 1:
                break
            mine.append(name)
            size += nbytes
            at += 1
        out.append(mine)
        left -= size
    assert at == len(items)
    return out


def _runs(items: Iterable[tuple[str, int]], limit: int) -> int:
    """How many runs of at most `limit` bytes; no item is larger."""
    n, room = 0, -1
    for _, nbytes in items:
        if nbytes > room:
            n, room = n + 1, limit
        room -= nbytes
    return n


class Shared(Folder):
    """The folder `dst` in the making by several processes, of which this one does `part`.

    `every`: the large files that will be in it; `mine`: those of this part. `job`: what is being done, by name; every part
    must say the same. `made(path)`: whether the folder there is what this job makes: then there is nothing left to do
    (`published`). Raises ZooError as `Folder`, and if other parts do another job, or another process this part.
    """

    def __init__(
        self,
        dst: str | os.PathLike[str],
        every: Mapping[str, int],
        mine: Iterable[str],
        job: Mapping[str, str],
        part: Part,
        *,
        made: Callable[[Path], bool],
        force: bool = False,
        ours: Callable[[Path], bool] = lambda _: False,
        durable: bool = False,
    ) -> None:
        super().__init__(
            dst, {name: every[name] for name in mine}, "", force=force, ours=ours, durable=durable
        )
        self.part, self.every, self._made = part, dict(every), made
        self.says = {**job, "parts": str(part.of)}
        self.waiting: list[int] = []
        self._outer: int | None = None
        self._journal: int | None = None

    def __enter__(self) -> Self:
        try:
            self.dst.parent.mkdir(parents=True, exist_ok=True)
            while not self._join():
                self._close()
            if not self.published:
                self._read_steps()
                self._check_space()
                for name, size in self.sizes.items():
                    self._fds[name] = self._open(name, os.O_RDWR | os.O_CREAT)
                    if os.fstat(self._fds[name]).st_size != size:
                        os.ftruncate(self._fds[name], size)
        except OSError as e:
            self._close()
            raise ZooError(f"{self.dst}: cannot be written: {e.strerror} ({e.filename})") from None
        except BaseException:
            self._close()
            raise
        return self

    @contextmanager
    def last(self) -> Iterator[bool]:
        """This part is finished. Whether all others are: then this process describes the folder and publishes it."""
        if self.published:
            yield False
            return
        synced = self.durable or not self.part.together
        if synced:
            self.sync()
        self._append({"finished": True, "synced": synced})
        with self._turn() as turn:
            if turn and WHOLE in os.listdir(self._meeting):
                yield self._all_finished()
                return
            self.published = self._made(self.dst)  # by another part, meanwhile
            if not self.published:
                raise ZooError(f"{self.partial}: somebody removed it: start every part again")
            if turn:
                self._tidy()
            yield False

    def publish(self) -> Path:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}
        for name, size in self.every.items():
            if (found := self._stat(name).st_size) != size:
                raise ZooError(
                    f"{self.partial}: {name} has {found:,} bytes, expected {size:,}: it was changed"
                )
        self._check_destination()
        if not os.path.samestat(os.fstat(self._held), self._stat_outer(WHOLE)):
            raise ZooError(f"{self.partial}: somebody put another folder in its place: not published")
        put(Path(WHOLE), self.dst, durable=self.durable, new_in=self._meeting)
        self.published = True
        self._tidy()
        return self.dst

    def discard(self) -> None:
        """Nothing: the others may be at work."""

    # --- meeting the others -------------------------------------------------------------------------------------

    def _join(self) -> bool:
        """Whether this part has its place, or nothing is left to do; False: the others finished at this moment."""
        if self.partial.is_symlink():
            raise ZooError(in_the_way(self.partial))
        made = self._made(self.dst)
        if made and not self.partial.exists():
            self.published = True
            return True
        if not made:
            self._check_destination()
        self.partial.mkdir(exist_ok=True)
        try:
            self._outer = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        own(self.partial, self._outer)
        try:  # beside other parts, not beside a process that does it all
            fcntl.flock(self._outer, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ZooError(f"{self.dst}: another process is writing it ({self.partial} is locked)") from None
        with self._turn() as turn:
            if not turn:
                return False
            recover(self.dst)
            if self._made(self.dst):
                self.published = True
                self._tidy()
                return True
            self._check_destination()
            self._agree()
            self._journal = open_plain(
                self._steps(self.part.number), os.O_RDWR | os.O_CREAT | os.O_APPEND, dir_fd=self._outer
            )
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ZooError(f"{self.dst}: another process is writing {self.part}") from None
            with contextlib.suppress(FileExistsError):
                os.mkdir(WHOLE, dir_fd=self._outer)
            self._lock = os.open(
                WHOLE, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._outer
            )
            own(self.partial / WHOLE, self._lock)
        return True

    def _agree(self) -> None:
        """Say what is being done, or find that the others say the same."""
        if STATE not in (there := set(os.listdir(self._meeting))):
            if there - {TURN, _NEW}:
                raise ZooError(in_the_way(self.partial))
            with open(
                open_plain(_NEW, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, dir_fd=self._meeting), "wb"
            ) as f:
                f.write(json.dumps({"parts": self.says}).encode())
            os.rename(_NEW, STATE, src_dir_fd=self._meeting, dst_dir_fd=self._meeting)
            return
        try:
            theirs = parse_json(self._read_outer(STATE))
            theirs = theirs.get("parts") if isinstance(theirs, dict) else None
        except ValueError:
            theirs = None
        if not isinstance(theirs, dict):
            raise ZooError(
                f"{self.partial}: was begun by a conversion that is not in parts: let it finish, or remove it"
            )
        if differs := [k for k in self.says if theirs.get(k) != self.says[k]]:
            raise ZooError(
                f"{self.partial}: other parts convert something else: "
                + "; ".join(f"{k} is {theirs.get(k)}, that of {self.part} {self.says[k]}" for k in differs)
                + ". Start all parts with the same source, options and number of parts, or remove that folder."
            )

    def _all_finished(self) -> bool:
        self.waiting = []
        for k in range(1, self.part.of + 1):
            steps = self._believed(k)
            if not any(s.get("finished") for s in steps):
                self.waiting.append(k)
            self.said += [text for s in steps for text in s.get("said", ())]
        return not self.waiting

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """One process at a time; False where the partial folder is gone by then."""
        try:
            fd = open_plain(TURN, os.O_RDWR | os.O_CREAT, dir_fd=self._meeting)
        except FileNotFoundError:
            yield False
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                there = os.path.samestat(os.fstat(fd), self._stat_outer(TURN)) and os.path.samestat(
                    os.fstat(self._meeting), os.lstat(self.partial)
                )
            except FileNotFoundError:
                there = False
            yield there
        finally:
            os.close(fd)

    def _tidy(self) -> None:
        """Remove what is left of the partial folder, its state last."""
        with contextlib.suppress(OSError):
            clear_held(self._meeting, STATE)
            self.partial.rmdir()

    # --- the finished steps of a part ---------------------------------------------------------------------------

    def _steps(self, k: int) -> str:
        return f".zoo-part-{k}-of-{self.part.of}.jsonl"

    def _append(self, step: Mapping[str, Any]) -> None:
        assert self._journal is not None
        line = json.dumps({**step, "boot": boot()}).encode() + b"\n"
        try:
            whole = os.write(self._journal, line) == len(line)
        except OSError as e:
            raise ZooError(f"{self.partial}: cannot be written: {e.strerror}") from None
        if not whole:  # the disk is full; a line that was cut is not believed
            raise ZooError(f"{self.partial}: cannot be written: no space left")
        if step["synced"]:
            os.fsync(self._journal)

    def _read_steps(self) -> None:
        assert self._journal is not None
        if (size := os.fstat(self._journal).st_size) > MAX_STEPS:
            raise ZooError(too_long(self.partial / self._steps(self.part.number), size))
        data = os.pread(self._journal, os.fstat(self._journal).st_size, 0)
        os.ftruncate(self._journal, data.rfind(b"\n") + 1)  # a line that a kill left unfinished
        if not all(self._has(n) and self._stat(n).st_size == size for n, size in self.sizes.items()):
            os.ftruncate(self._journal, 0)
        steps = [s for s in self._believed(self.part.number) if "step" in s]
        self.done = {s["step"] for s in steps}
        self.said = [text for s in steps for text in s["said"]]

    def _believed(self, k: int) -> list[dict[str, Any]]:
        """The steps of part `k` whose bytes are certain to be there: synced, or this machine's since it started."""
        try:
            steps = steps_of(self._read_outer(self._steps(k)))
            return [s for s in steps if s["synced"] or s["boot"] == boot()]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    # --- files beside the folder in the making ------------------------------------------------------------------

    @property
    def _meeting(self) -> int:
        assert self._outer is not None
        return self._outer

    def _read_outer(self, name: str) -> bytes:
        with open(open_plain(name, os.O_RDONLY, dir_fd=self._meeting), "rb") as f:
            if (size := os.fstat(f.fileno()).st_size) > MAX_STEPS:
                raise ZooError(too_long(self.partial / name, size))
            return f.read()

    def _stat_outer(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self._meeting, follow_symlinks=False)

    def _close(self) -> None:
        super()._close()
        for fd in (self._journal, self._outer):
            if fd is not None:
                os.close(fd)
        self._journal = self._outer = None
