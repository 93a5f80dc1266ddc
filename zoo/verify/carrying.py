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

from zoo.model.upload import BUFFER, READERS, Lanes
from zoo.verify.certificate import cores
from zoo.verify.device import available
from zoo.verify.reading import Range
from zoo.verify.sharing import Sharing

MOST_READERS = 16
"""Measured on 32 cores, files in memory, to one H200 and to two at once: 16 threads 32 and 59 GB/s, 8 threads 18 and 35."""


class Carrier:
    """Copies ranges of files to a CUDA device, a layer's at a time (a `reading.Ahead`)."""

    def __init__(self, device: torch.device, room: int, sharing: Sharing | None = None) -> None:
        """`room`: bytes of the device's memory that are left to whoever computes. `sharing`: the ranks that read together; they
        ask for the same."""
        self.device, self.room, self.sharing = device, room, sharing
        self.computing = torch.cuda.current_stream(device)
        self.copying, self.joining = torch.cuda.Stream(device), torch.cuda.Stream(device)
        ranks = 1 if sharing is None else sharing.n
        self.readers = min(MOST_READERS, max(READERS, cores() // ranks))
        self.lanes = Lanes(device, self.copying, self.readers)
        self.coming: dict[Range, Tensor] = {}
        self.joiner = ThreadPoolExecutor(1)
        self.joined: Future[None] | None = None

    def ask(self, ranges: Iterable[Range]) -> Collection[Range]:
        """Begin to copy those that there is room for, the first first: these."""
        self._take_memory([r for r in ranges if r[2]])
        self.copying.wait_stream(self.computing)
        runs: dict[Range, list[Future[None]]] = {}
        for (path, offset, nbytes), into in self.coming.items():
            own = slice(0, nbytes) if self.sharing is None else self.sharing.own(nbytes)
            # All threads at a weight: it is there before the next, and none is left with a long run in the end.
            step = max(BUFFER, -(-(own.stop - own.start) // (self.readers * BUFFER)) * BUFFER)
            runs[path, offset, nbytes] = [
                self.lanes.fill(path, offset + at, into[at : min(at + step, own.stop)], torch.uint8)
                for at in range(own.start, own.stop, step)
            ]
        self.joined = self.joiner.submit(self._join, dict(self.coming), runs)
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

    def _join(self, coming: Mapping[Range, Tensor], runs: Mapping[Range, list[Future[None]]]) -> None:
        """Wait for each in turn and, of several ranks, put their parts together. Raises what went wrong."""
        for r, whole in coming.items():
            for run in runs[r]:
                run.result()
            if self.sharing is not None:
                with torch.cuda.device(self.device), torch.cuda.stream(self.joining):
                    self.joining.wait_stream(self.copying)
                    self.sharing.complete(whole, r[2])

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
