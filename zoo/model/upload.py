"""From files to a GPU as fast as the disk gives: threads read runs of files into pinned memory while the copy engine
empties it.

Unusual: the mapped file is not used. A page fault at a time, it gives a tenth of what large reads do. And each thread
reads a long run of its own, by a handle of its own: the system reads ahead per handle, and threads that share out a short
range make it read less.

Margin on the machine of an H100, 9 GB, against reading the files from first to last: 1.00 of it cold (medians of 7 rounds,
1.8 GB/s), 3.4 warm (25 GB/s); pieces of 8 MB shared out among 8 threads 0.90 and 2.5, `safetensors` 0.9 and 0.9. Two ranks
of an 8B, on two H200, 16 GB warm: 26 to 31 GB/s, and 6 with a call for each row of a matrix whose columns are shared out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue
from types import TracebackType

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.split import Piece

READERS, RUN, BUFFER = 8, 2**28, 2**24
GAP = 2**16
"""Bytes between rows, up to which they are read along rather than asked about: a call for each row costs Python's lock, for
which all readers queue, some 5 us; a gap costs its copy, 5 us for 64 KB, which no other waits for."""
VECTOR = 1024  # buffers that one call fills, at most (IOV_MAX)


class Lanes:
    """Threads that fill tensors on a CUDA device from files, by copies on `stream`."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream, readers: int = READERS) -> None:
        self.device, self.stream = device, stream
        self.pool = ThreadPoolExecutor(readers)
        self.lanes: LifoQueue[_Lane] = (
            LifoQueue()
        )  # the one used last comes first: buffers are made for those in use
        for _ in range(readers):
            self.lanes.put(_Lane(device, stream))

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
        self.lanes = Lanes(self.device, torch.cuda.current_stream(self.device))
        self.runs: list[Future[None]] = []

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
            if p.rows > 1 and p.nbytes <= BUFFER:  # many short ones to a run
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
        self.runs.append(self.lanes.fill(path, offset, into, stored, *rows))

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lanes.close(cancel=error is not None)
        if error is None:
            for run in self.runs:
                run.result()


class _Lane:
    """What one thread reads with: its handles, and two pinned buffers, one read into while the other is copied."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self.device, self.stream = device, stream
        self.buffers: list[Tensor] = []
        self.emptied = [torch.cuda.Event(), torch.cuda.Event()]
        self.files: dict[Path, int] = {}

    def run(
        self, path: Path, offset: int, into: Tensor, stored: torch.dtype, row: int = 1, stride: int = 0
    ) -> None:
        """Fills `into` [N], of any dtype, from N numbers of dtype `stored` at `offset` of the file; with a `stride` (bytes)
        from rows of `row` numbers that begin so far apart."""
        if not self.buffers:
            self.buffers = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True) for _ in self.emptied]
        if path not in self.files:
            self.files[path] = os.open(path, os.O_RDONLY)
            os.posix_fadvise(self.files[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        step = BUFFER // stored.itemsize // row * row
        stride = stride or row * stored.itemsize
        with torch.cuda.stream(self.stream):
            for start in range(0, len(into), step):
                part = into[start : start + step]
                self.buffers.reverse()
                self.emptied.reverse()
                self.emptied[0].synchronize()  # at once, if it was never recorded
                raw = self.buffers[0][: len(part) * stored.itemsize]
                into_raw = memoryview(raw.numpy())  # type: ignore[arg-type]
                read_rows(
                    path,
                    self.files[path],
                    offset + start // row * stride,
                    into_raw,
                    row * stored.itemsize,
                    stride,
                )
                read = raw.view(stored)
                if stored != part.dtype:
                    read = read.to(self.device, non_blocking=True)
                part.copy_(read, non_blocking=True)
                self.emptied[0].record()

    def close(self) -> None:
        for file in self.files.values():
            os.close(file)


def read_rows(path: Path, file: int, offset: int, into: memoryview, row: int, stride: int) -> None:
    """Fill `into` with rows of `row` bytes that begin `stride` apart, from `offset` of the opened file at `path` on. Raises
    ZooError if it ends before."""
    gap, starts = stride - row, range(0, len(into), row)
    if gap == 0:
        _read(path, file, offset, into)
        return
    at_once = VECTOR // 2 if gap <= GAP else 1
    skipped = memoryview(bytearray(gap if at_once > 1 else 0))
    for first in range(0, len(starts), at_once):
        rows = [into[at : at + row] for at in starts[first : first + at_once]]
        start = offset + first * stride
        if len(rows) > 1:
            along = [x for one in rows for x in (one, skipped)][:-1]
            if os.preadv(file, along, start) == len(rows) * stride - gap:
                continue
        for n, one in enumerate(rows):
            _read(path, file, start + n * stride, one)


def _read(path: Path, file: int, offset: int, into: memoryview) -> None:
    at = 0
    while at < len(into):
        n = os.preadv(file, [into[at:]], offset + at)
        if n == 0:
            raise ZooError(
                f"{path}: ends at byte {offset + at}, in the middle of a tensor; was it cut while being read?"
            )
        at += n
