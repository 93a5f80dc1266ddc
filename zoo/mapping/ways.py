"""How runs of bytes are copied from file to file: several ways, and which of them is the fastest here.

- in the kernel (`copy_file_range`): the only way by which a file system may share blocks. Where the two sides lie otherwise in
  their pages, it copies piece by piece of both; that takes an EPYC 1.4 times as long as through memory;
- through a buffer that stays in a core's cache: two copies in memory, of which the second is quick. While one thread writes into a
  file, where there is room for one, another reads;
- from memory that the source is mapped to: one copy, and pages to be mapped.

Which is the fastest, and whether several threads are faster than one (two may be halves of one core), depends on the processor, the
kernel, and the file system. So a `Chooser` has the first few hundred MB copied by each in turn, and the rest by the fastest;
whatever it chooses, the bytes are the same. Where the source and the destination lie alike within their pages, it is always the kernel.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

from zoo.errors import ZooError

log = logging.getLogger("zoo")

PAGE, LINE = mmap.PAGESIZE, 64
# Bytes written by a call at most. Larger writes make the page cache ask for larger runs of free memory; on a
# virtual machine those may be untouched yet, and then cost several times the copy.
BUFFER = 512 << 10
WINDOW = 4 << 20  # bytes of a source that are mapped at a time
TRIAL = 32 << 20  # bytes that each thread copies to try a way
ROUNDS = 2  # trials of each; the better one counts, since other processes disturb
GAIN = 1.2  # as many times faster must several threads be: they cost more of the processor
STRETCH = 2 << 30  # bytes copied before the rate is looked at again

Step = Callable[[int, int, int, int, int, AbstractContextManager[Any]], int]
"""(source's descriptor, byte there, destination's descriptor, byte there, bytes, what is held while it writes) -> bytes copied, at
least one and perhaps not all; 0: the source ends here. Raises Unfit where this cannot be done between the two files."""

ALONE = nullcontext()
"""Where no other thread writes."""


class Unfit(Exception):
    """A way that does not work between two files."""


def in_kernel() -> Step:
    def step(
        src: int, src_at: int, dst: int, dst_at: int, n: int, writing: AbstractContextManager[Any]
    ) -> int:
        try:
            with writing:
                done = os.copy_file_range(src, dst, n, src_at, dst_at)
        except OSError as e:
            if e.errno not in _UNSUPPORTED:
                raise
            raise Unfit from None
        if done == 0 and os.fstat(src).st_size > src_at:  # some file systems say so
            raise Unfit
        return done

    return step


def through_buffer() -> Step:
    # From the beginning of a page. Some processors copy at half their speed to where, counted from the beginning of a page, is a
    # few bytes behind the source (an EPYC 7003: up to 31); so it begins where in its own page the source does.
    memory = memoryview(mmap.mmap(-1, BUFFER + PAGE))

    def step(
        src: int, src_at: int, dst: int, dst_at: int, n: int, writing: AbstractContextManager[Any]
    ) -> int:
        begin = src_at % PAGE // LINE * LINE
        piece = memory[begin : begin + min(n, _to_page_end(dst_at))]
        piece = piece[: os.preadv(src, [piece], src_at)]
        with writing:
            write(dst, piece, dst_at)
        return len(piece)

    return step


def from_mapped() -> Step:
    """Valid while the descriptors of its sources stay open: it knows them by number."""
    held: tuple[int, int, memoryview] | None = None  # source, first byte, bytes

    def step(
        src: int, src_at: int, dst: int, dst_at: int, n: int, writing: AbstractContextManager[Any]
    ) -> int:
        nonlocal held
        if held is None or held[0] != src or not held[1] <= src_at < held[1] + len(held[2]):
            held = None
            begin = src_at - src_at % mmap.ALLOCATIONGRANULARITY
            length = min(WINDOW, os.fstat(src).st_size - begin)
            if length <= src_at - begin:
                return 0
            try:
                pages = mmap.mmap(src, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=begin)
                pages.madvise(mmap.MADV_SEQUENTIAL)  # as `read` reads ahead
            except (OSError, ValueError):  # no file to be mapped; cut short since its size was asked for
                raise Unfit from None
            held = src, begin, memoryview(pages)
        at = src_at - held[1]
        try:
            # The kernel reads the pages, not this process: one that cannot be read any more is an error here, not a signal.
            with writing:
                return os.pwrite(dst, held[2][at : at + min(n, _to_page_end(dst_at))], dst_at)
        except OSError as e:
            if e.errno != errno.EFAULT:
                raise
            raise Unfit from None  # reading says what is wrong

    return step


KERNEL, BUFFERED, MAPPED = "in the kernel", "through a buffer", "from mapped memory"
WAYS: dict[str, Callable[[], Step]] = {BUFFERED: through_buffer, MAPPED: from_mapped}
if hasattr(os, "copy_file_range"):
    WAYS[KERNEL] = in_kernel
_UNSUPPORTED = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
}  # two file systems, or an old kernel


def _to_page_end(at: int) -> int:
    """Bytes from `at` that end with a page: whole pages are then written."""
    return BUFFER - at % PAGE


def copy(
    step: Step,
    src: int,
    src_at: int,
    dst: int,
    dst_at: int,
    n: int,
    name: str,
    writing: AbstractContextManager[Any] = ALONE,
) -> None:
    """Copy `n` bytes; `writing` is held while some of them are written, not while they are read. Raises ZooError if the source,
    called `name`, ends early, and Unfit as the step does."""
    if hasattr(os, "posix_fadvise"):  # all of it is read ahead, whichever way it goes
        os.posix_fadvise(src, src_at, n, os.POSIX_FADV_WILLNEED)
    while n:
        done = step(src, src_at, dst, dst_at, n, writing)
        if done == 0:
            raise ZooError(
                f"{name}: ends at byte {src_at}, {n} more were expected: it changed or is truncated"
            )
        src_at, dst_at, n = src_at + done, dst_at + done, n - done


class Clock:
    """Seconds of this thread since then, without those in which it could have run but others had the processor: what is measured
    on a busy machine then holds for a quiet one. (Linux; elsewhere all seconds.)"""

    def __init__(self) -> None:
        self._since = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        waited = 0
        with suppress(OSError, ValueError, IndexError), open("/proc/thread-self/schedstat") as f:
            waited = int(f.read().split()[1])
        return time.perf_counter(), waited / 1e9, time.thread_time()

    @property
    def seconds(self) -> float:
        passed, waited, worked = (b - a for a, b in zip(self._since, self._now(), strict=True))
        return max(passed - waited, worked)


def write(fd: int, data: Any, at: int) -> None:
    """All of a buffer (bytes, an array that lies in one piece), from byte `at` of the file."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], at + done)


# ---------------------------------------------------------------------------------------------------
# Choosing


class Choice(NamedTuple):
    way: str
    threads: int

    def __str__(self) -> str:
        return f"{self.way}, {self.threads} thread{'s' * (self.threads > 1)}"


class Chooser:
    """Which of `ways` to copy by, with `most` threads at most.

    Whoever copies asks for the `next` choice and how many bytes to copy by it, and says how long they took (`took`).
    """

    def __init__(self, ways: list[str], most: int) -> None:
        self.ways, self.most = list(ways), most
        self.rates: dict[Choice, float] = {}  # bytes per second
        self._trials: list[Choice] = []
        self._look()

    def _look(self) -> None:
        """Each way by one thread; then (see `next`) the fastest by more."""
        self.rates = {}
        self._trials = [Choice(way, 1) for way in self.ways] * ROUNDS
        self._spread = sorted({n for n in (2, self.most) if 1 < n <= self.most})

    def next(self) -> tuple[Choice, int]:
        if not self._trials and self._spread:
            # Of a buffer they may be faster where only one can write at a time, however the ways compare by one thread.
            some = dict.fromkeys((self.best.way, *({BUFFERED} & {*self.ways})))
            self._trials = [Choice(way, n) for way in some for n in self._spread] * ROUNDS
            self._spread = []
        if self._trials:
            return self._trials[0], TRIAL * self._trials[0].threads
        return self.best, STRETCH

    def took(self, choice: Choice, nbytes: int, seconds: float) -> None:
        """`nbytes` were copied in as many seconds (of `Clock`, by the thread that took longest) by what `next` gave. What was cut short says nothing: it is tried again."""
        rate = nbytes / max(seconds, 1e-9)
        if self._trials:
            if choice == self._trials[0] and nbytes >= TRIAL * choice.threads // 2:
                del self._trials[0]
                self.rates[choice] = max(rate, self.rates.get(choice, 0))
                if not self._trials and not self._spread:
                    self._say()
        elif nbytes >= TRIAL and rate < self.rates[choice] / 3:  # from memory before, from a disk now
            log.debug("copying %s: %.1f GB/s now; trying all again", choice, rate / 1e9)
            self._look()

    @property
    def best(self) -> Choice:
        """The fastest; more threads only where they are clearly faster."""
        found = max((c for c in self.rates if c.threads == 1), key=lambda c: self.rates[c])
        for c in sorted(self.rates, key=lambda c: c.threads):
            if self.rates[c] > self.rates[found] * (GAIN if c.threads > found.threads else 1):
                found = c
        return found

    def drop(self, way: str) -> None:
        """It does not work here."""
        if way in self.ways and len(self.ways) > 1:
            self.ways.remove(way)
            self._look()

    def _say(self) -> None:
        if not log.isEnabledFor(logging.DEBUG):
            return
        best = self.best
        others = ", ".join(f"{c}: {r / 1e9:.1f}" for c, r in self.rates.items() if c != best)
        log.debug("copying %s: %.1f GB/s%s", best, self.rates[best] / 1e9, f" ({others})" * bool(others))
