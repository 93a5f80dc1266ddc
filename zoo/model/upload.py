"""From files to a GPU as fast as the disk gives: threads read runs of files into pinned memory while the copy engine
empties it.

Unusual: the mapped file is not used. A page fault at a time, it gives a tenth of what large reads do. And each thread
reads a long run of its own, by a handle of its own: the system reads ahead per handle, and threads that share out a short
range make it read less.

Margin on the machine of an H100, 9 GB, against reading the files from first to last: 1.00 of it cold (medians of 7 rounds,
1.8 GB/s), 3.4 warm (25 GB/s); pieces of 8 MB shared out among 8 threads 0.90 and 2.5, `safetensors` 0.9 and 0.9 (buffers of 16
MiB). Of 6 layers of a 70B, on two H200 at once, warm: 41 GB/s with buffers of 4 MiB, which stay in the caches of the cores, 34
with 8 and 23 with 16; 16 threads are no faster.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.split import Piece

READERS, RUN, BUFFER = 8, 2**28, 2**22
GAP = 2**16
"""Bytes between rows, up to which they are read along rather than asked about: a call for each row costs Python's lock, for
which all readers queue, some 5 us; a gap costs its copy, 5 us for 64 KB, which no other waits for."""
FILES = 8
"""That a thread keeps open: of hundreds of shards and 16 threads each, a process may not have as many handles (1024, as a rule)."""
SPARED = 2**12
"""Bytes between rows, from which they are taken one by one out of a file in memory (see `Mapped`)."""
VECTOR = 1024  # buffers that one call fills, at most (IOV_MAX)


class Lanes:
    """Threads that fill tensors on a CUDA device from files, by copies on `stream`."""

    def __init__(self, stream: torch.cuda.Stream, readers: int, buffer: int) -> None:
        """`readers`: how many threads. `buffer`: bytes that one reads at a time."""
        self.stream, self.readers, self.buffer = stream, readers, buffer
        self.pool = ThreadPoolExecutor(readers)
        # The one used last comes first: buffers are made for those in use.
        self.lanes: LifoQueue[_Lane] = LifoQueue()
        for _ in range(readers):
            self.lanes.put(_Lane(stream, buffer))

    def fill(self, path: Path, offset: int, into: Tensor, stored: torch.dtype, *rows: int) -> Future[None]:
        """As `_Lane.run`. Once the future is done, all copies are in the stream."""
        return self.pool.submit(self._run, path, offset, into, stored, *rows)

    def _run(self, path: Path, offset: int, into: Tensor, stored: torch.dtype, *rows: int) -> None:
        lane = self.lanes.get()
        try:
            lane.run(path, offset, into, stored, *rows)
        finally:
            self.lanes.put(lane)

    def close(self, cancel: bool = False) -> None:
        """Wait for what was begun (and, unless `cancel`, for what was not)."""
        self.pool.shutdown(cancel_futures=cancel)
        self.stream.synchronize()
        while not self.lanes.empty():
            self.lanes.get().close()


class Upload:
    """Copies byte ranges of files into tensors on a CUDA device. As a context: at its end all tensors are whole, or it
    raises what went wrong."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.lanes = Lanes(torch.cuda.current_stream(self.device), READERS, BUFFER)
        self.asked: list[tuple[Any, ...]] = []
        self.runs: list[Future[None]] = []

    def reserve(self, sizes: Iterable[int]) -> None:
        """Have torch ask for the memory of tensors of so many bytes at once, where the device has that in one piece: it gives them
        their parts of it later. A call of the driver for each takes up to a millisecond, in which nobody copies."""
        large = [-(-n // 512) * 512 for n in sizes if n > 1 << 20]  # others are kept apart
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(sum(large), dtype=torch.uint8, device=self.device)

    def __call__(
        self,
        path: Path,
        offset: int,
        shape: tuple[int, ...],
        stored: torch.dtype,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The tensor at `offset` of the file, cast to `dtype` if given. It is filled by the end of the context."""
        whole = Piece(offset, math.prod(shape) * stored.itemsize)
        return self.cut(path, [whole], shape, stored, dtype)

    def cut(
        self,
        path: Path,
        pieces: Sequence[Piece],
        shape: tuple[int, ...],
        stored: torch.dtype,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The tensor that these pieces of the file are, one after the other, as above."""
        out = torch.empty(shape, dtype=dtype or stored, device=self.device)
        flat, at = out.view(-1), 0
        for p in pieces:
            row = p.nbytes // stored.itemsize
            if p.rows > 1 and p.nbytes <= self.lanes.buffer:  # many short ones to a run
                step = RUN // p.nbytes
                for first in range(0, p.rows, step):
                    into = flat[at + first * row : at + min(first + step, p.rows) * row]
                    self._fill(path, p.offset + first * p.stride, into, stored, row, p.stride)
            else:
                step = RUN // stored.itemsize
                for r in range(p.rows):
                    for start in range(0, row, step):
                        into = flat[at + r * row :][start : min(start + step, row)]
                        self._fill(path, p.offset + r * p.stride + start * stored.itemsize, into, stored)
            at += p.rows * row
        return out

    def _fill(self, path: Path, offset: int, into: Tensor, stored: torch.dtype, *rows: int) -> None:
        self.asked.append((path, offset, into, stored, *rows))

    def start(self) -> None:
        """Begin with what was asked for. Threads that read already would keep whoever asks from Python's lock: of the 291 tensors of an
        8B, two milliseconds each."""
        asked, self.asked = self.asked, []
        self.runs += [self.lanes.fill(*run) for run in asked]

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.start()
        self.lanes.close(cancel=error is not None)
        if error is None:
            for run in self.runs:
                run.result()


class _Lane:
    """What one thread reads with: its handles, and two pinned buffers, one read into while the other is copied."""

    def __init__(self, stream: torch.cuda.Stream, buffer: int) -> None:
        self.stream, self.buffer = stream, buffer
        self.buffers: list[_Buffer] = []
        self.files: dict[Path, int] = {}
        self.mapped: dict[Path, Mapped] = {}

    def run(
        self, path: Path, offset: int, into: Tensor, stored: torch.dtype, row: int = 1, stride: int = 0
    ) -> None:
        """Fills `into` [N], of any dtype, from N numbers of dtype `stored` at `offset` of the file; with a `stride` (bytes)
        from rows of `row` numbers that begin so far apart."""
        file, size = self._opened(path), stored.itemsize
        at_once, stride = self.buffer // size // row * row, stride or row * size
        with torch.cuda.stream(self.stream):
            if not self.buffers:
                self.buffers = [_Buffer(self.stream, self.buffer) for _ in range(2)]
            for start in range(0, len(into), at_once):
                n = min(at_once, len(into) - start)
                buffer, start_of = self.buffers[0], offset + start // row * stride
                self.buffers.reverse()
                buffer.wait()
                read_rows(
                    path, file, start_of, buffer.view[: n * size], row * size, stride, self._mapped(path)
                )
                buffer.empty(into, start, n, stored)

    def _opened(self, path: Path) -> int:
        """A handle on the file. The one opened first is closed for it, where there are many."""
        if path not in self.files:
            if len(self.files) >= FILES:
                oldest = next(iter(self.files))
                os.close(self.files.pop(oldest))
                self.mapped.pop(oldest, None)
            self.files[path] = os.open(path, os.O_RDONLY)
            os.posix_fadvise(self.files[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self.files[path]

    def _mapped(self, path: Path) -> Mapped:
        if path not in self.mapped:
            self.mapped[path] = Mapped(self.files[path])
        return self.mapped[path]

    def close(self) -> None:
        for file in self.files.values():
            os.close(file)
        self.files.clear()
        self.mapped.clear()


class _Buffer:
    """Pinned memory, and when it was last emptied."""

    def __init__(self, stream: torch.cuda.Stream, size: int) -> None:
        self.stream, self.runtime = stream, _runtime()
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.view = memoryview(self.memory.numpy())  # type: ignore[arg-type]
        # Waited for asleep: threads that spin would take the cores from those that read.
        self.emptied = torch.cuda.Event(blocking=True)
        self.emptied.record(stream)
        self.raw = self.memory.data_ptr(), stream.cuda_stream, self.emptied.cuda_event

    def wait(self) -> None:
        """Until it is empty."""
        if self.runtime is not None:
            if not self.runtime.cudaEventQuery(self.raw[2]):
                return
            self.runtime.cudaGetLastError()  # that it is not ready is no error
        self.emptied.synchronize()

    def empty(self, into: Tensor, start: int, n: int, stored: torch.dtype) -> None:
        """Begin to copy its first `n` numbers of dtype `stored` to `into[start:]`. The stream is the current one."""
        size = stored.itemsize
        if self.runtime is not None and into.dtype == stored:
            memory, stream, event = self.raw
            to = into.data_ptr() + start * size
            error = self.runtime.cudaMemcpyAsync(to, memory, n * size, TO_DEVICE, stream)
            error = error or self.runtime.cudaEventRecord(event, stream)
            if error:
                raise RuntimeError(f"CUDA error {error} at a copy of {n * size} bytes to {into.device}")
            return
        read = self.memory[: n * size].view(stored)
        if into.dtype != stored:
            read = read.to(into.device, non_blocking=True)
        into[start : start + n].copy_(read, non_blocking=True)
        self.emptied.record(self.stream)


TO_DEVICE = 1  # cudaMemcpyHostToDevice


@functools.cache
def _runtime() -> Any:
    """The CUDA library that torch runs with, called without letting go of Python's lock; None where it is not found.

    torch lets go of it to copy, and who does so waits for all others that read, as does who starts kernels meanwhile. These calls
    return at once. Margin: 8 threads with buffers of 4 MiB 38 GB/s to one H200, and 20 by torch's copies (of a machine with half
    the cores); a thread that starts kernels beside them 21,000 and 11,000 a second, of 135,000 and 88,000 alone."""
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    try:
        runtime = ctypes.PyDLL(f"libcudart.so.{(torch.version.cuda or '').split('.')[0]}")
        runtime.cudaMemcpyAsync.argtypes = pointer, pointer, size, ctypes.c_int, pointer
        runtime.cudaEventRecord.argtypes = pointer, pointer
        runtime.cudaEventQuery.argtypes = (pointer,)
    except (OSError, AttributeError):
        return None
    return runtime


class Mapped:
    """An opened file, mapped when rows are first taken out of it by one call (Linux's process_vm_readv, of this process
    itself). That copies what lies between rows nowhere, and what the file has no more is no signal, as it would be to who reads the
    map, but a short answer."""

    def __init__(self, file: int) -> None:
        self.file, self.size = file, os.fstat(file).st_size
        self.start: int | None = None

    def rows(self, offset: int, into: memoryview, row: int, stride: int) -> bool:
        """Whether `into` was filled with rows of `row` bytes that begin `stride` apart. Not where the last one is not in the
        system's cache: a disk is read faster from first to last."""
        last = offset + len(into) - row + (len(into) // row - 1) * (stride - row)
        call = _vectored()
        if call is None or last + row > self.size or not self._cached(last + row - 1):
            return False
        if self.start is None:
            self.map = np.frombuffer(mmap.mmap(self.file, self.size, access=mmap.ACCESS_READ), np.uint8)
            self.start = self.map.ctypes.data
        there = np.empty((len(into) // row, 2), np.uint64)
        there[:, 0] = self.start + offset + np.arange(len(there), dtype=np.uint64) * np.uint64(stride)
        there[:, 1] = row
        here = np.array([np.frombuffer(into, np.uint8).ctypes.data, len(into)], np.uint64)
        return int(call(os.getpid(), here.ctypes.data, 1, there.ctypes.data, len(there), 0)) == len(into)

    def _cached(self, at: int) -> bool:
        try:
            return os.preadv(self.file, [bytearray(1)], at, os.RWF_NOWAIT) == 1
        except OSError:  # it would wait, or the file system cannot tell
            return False


@functools.cache
def _vectored() -> Any:
    """process_vm_readv, which lets go of Python's lock; None where there is none, or a sandbox forbids it."""
    try:
        call = ctypes.CDLL(None).process_vm_readv
    except (OSError, AttributeError):
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_ulong
    call.argtypes, call.restype = (ctypes.c_int, pointer, size, pointer, size, size), ctypes.c_ssize_t
    word = np.arange(1, dtype=np.uint64)
    to = np.ones(1, np.uint64)
    iov = [np.array([x.ctypes.data, 8], np.uint64) for x in (to, word)]
    worked = call(os.getpid(), iov[0].ctypes.data, 1, iov[1].ctypes.data, 1, 0) == 8 and to[0] == 0
    return call if worked and hasattr(os, "RWF_NOWAIT") else None


def read_rows(
    path: Path, file: int, offset: int, into: memoryview, row: int, stride: int, mapped: Mapped | None = None
) -> None:
    """Fill `into` with rows of `row` bytes that begin `stride` apart, from `offset` of the opened file at `path` on (`mapped`: the same
    file). Raises ZooError if it ends before."""
    gap, starts = stride - row, range(0, len(into), row)
    if gap == 0:
        _read(path, file, offset, into)
        return
    taken = mapped is not None and gap >= SPARED
    at_once = VECTOR if taken else VECTOR // 2 if gap <= GAP else 1
    skipped = memoryview(bytearray(gap if gap <= GAP else 0))
    for first in range(0, len(starts), at_once):
        some = into[first * row : (first + at_once) * row]
        start = offset + first * stride
        if taken and mapped is not None and mapped.rows(start, some, row, stride):
            continue
        _read_along(path, file, start, some, row, stride, skipped)


def _read_along(
    path: Path, file: int, start: int, into: memoryview, row: int, stride: int, skipped: memoryview
) -> None:
    """The rows, and what lies between them into `skipped`, where that has room for it."""
    gap, at_once = stride - row, VECTOR // 2 if skipped else 1
    for first in range(0, len(into), at_once * row):
        rows = [into[at : at + row] for at in range(first, min(first + at_once * row, len(into)), row)]
        at = start + first // row * stride
        if len(rows) > 1:
            along = [x for one in rows for x in (one, skipped)][:-1]
            if os.preadv(file, along, at) == len(rows) * stride - gap:
                continue
        for n, one in enumerate(rows):
            _read(path, file, at + n * stride, one)


def _read(path: Path, file: int, offset: int, into: memoryview) -> None:
    at = 0
    while at < len(into):
        n = os.preadv(file, [into[at:]], offset + at)
        if n == 0:
            raise ZooError(
                f"{path}: ends at byte {offset + at}, in the middle of a tensor; was it cut while being read?"
            )
        at += n
