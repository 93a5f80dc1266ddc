"""The next layer's bytes onto a GPU while one computes: read once by the threads of `zoo.model.upload` and copied on a stream of
their own. Ranks that share a pass each read a part of every weight, and put the parts together on the devices.

Unusual: memory for a layer is taken when its predecessor is entered, and threads fill it. What computes waits for the copies on
the device alone, and the copies for what was computed before in memory that is used again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from zoo.model.upload import Lanes
from zoo.verify.certificate import READERS, cores
from zoo.verify.device import available
from zoo.verify.reading import Range
from zoo.verify.sharing import Sharing

MOST_READERS, BUFFER = 16, 1 << 24
"""Measured on 32 cores, 6 layers of a 70B in memory: one H200 took a layer in 0.086 s, with 8 threads in 0.136. Buffers of 4 MiB,
which load faster by themselves, keep whoever starts kernels from Python's lock: 0.156."""


class Carrier:
    """Copies ranges of files to a CUDA device, a layer's at a time (a `reading.Ahead`)."""

    def __init__(self, device: torch.device, room: int, sharing: Sharing | None = None) -> None:
        """`room`: bytes of the device's memory that are left to whoever computes. `sharing`: the ranks that read together; they
        ask for the same."""
        self.device, self.room, self.sharing = device, room, sharing
        self.computing = torch.cuda.current_stream(device)
        self.copying, self.joining = torch.cuda.Stream(device), torch.cuda.Stream(device)
        ranks = 1 if sharing is None else sharing.n
        readers = min(MOST_READERS, max(READERS, cores() // ranks))
        self.lanes = Lanes(self.copying, readers, BUFFER)
        self.coming: dict[Range, Tensor] = {}
        self.joiner = ThreadPoolExecutor(1)
        self.joined: Future[None] | None = None

    def ask(self, ranges: Iterable[Range]) -> Collection[Range]:
        """Begin to copy those that there is room for, the first first: these."""
        self._take_memory([r for r in ranges if r[2]])
        self.copying.wait_stream(self.computing)
        self.joined = self.joiner.submit(self._bring, dict(self.coming))
        return list(self.coming)

    def _take_memory(self, ranges: list[Range]) -> None:
        free, total = available(self.device), 0
        sizes = [r[2] if self.sharing is None else self.sharing.room_for(r[2]) for r in ranges]
        with contextlib.suppress(torch.OutOfMemoryError):  # what is free may be in pieces
            for r, size in zip(ranges, sizes, strict=True):
                if free is not None and total + size > free - self.room:
                    break
                self.coming[r] = torch.empty(size, dtype=torch.uint8, device=self.device)
                total += size
        if self.sharing is not None:  # as far as all of them have room
            least = min(self.sharing.all(len(self.coming)))
            self.coming = dict(list(self.coming.items())[:least])

    def _bring(self, coming: Mapping[Range, Tensor]) -> None:
        """Have them all read, wait for each in turn and, of several ranks, put their parts together. Raises what went wrong."""
        runs = [self._read(r, into) for r, into in coming.items()]
        for (r, whole), parts in zip(coming.items(), runs, strict=True):
            for part in parts:
                part.result()
            if self.sharing is not None:
                with torch.cuda.device(self.device), torch.cuda.stream(self.joining):
                    self.joining.wait_stream(self.copying)
                    self.sharing.complete(whole, r[2])

    def _read(self, r: Range, into: Tensor) -> list[Future[None]]:
        """What this rank reads of a weight, by all threads: it is there before the next, and none is left with a long run in
        the end."""
        path, offset, nbytes = r
        own = slice(0, nbytes) if self.sharing is None else self.sharing.own(nbytes)
        buffers = -(-(own.stop - own.start) // BUFFER)
        step = max(1, -(-buffers // self.lanes.readers)) * BUFFER
        return [
            self.lanes.fill(path, offset + at, into[at : min(at + step, own.stop)], torch.uint8)
            for at in range(own.start, own.stop, step)
        ]

    def take(self) -> Mapping[Range, Tensor]:
        """What was asked for last, uint8 [nbytes] each. Raises what went wrong with it."""
        joined, self.joined = self.joined, None
        if joined is not None:
            joined.result()
        self.computing.wait_stream(self.copying)
        self.computing.wait_stream(self.joining)
        coming, self.coming = self.coming, {}
        return {r: whole[: r[2]] for r, whole in coming.items()}

    def close(self) -> None:
        self.lanes.close(cancel=True)
        self.joiner.shutdown()
        self.coming.clear()
