"""The next layer's bytes onto a GPU while one computes: read once by the threads of `zoo.model.upload` and copied on a stream of
their own.

Unusual: memory for a layer is taken when its predecessor is entered, and threads fill it. What computes waits for the copies on
the device alone, and the copies for what was computed before in memory that is used again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future

import torch
from torch import Tensor

from zoo.model.upload import BUFFER, READERS, RUN, Lanes
from zoo.verify.device import available
from zoo.verify.reading import Range


class Carrier:
    """Copies ranges of files to a CUDA device, a layer's at a time (a `reading.Ahead`)."""

    def __init__(self, device: torch.device, room: int) -> None:
        """`room`: bytes of the device's memory that are left to whoever computes."""
        self.device, self.room = device, room
        self.computing = torch.cuda.current_stream(device)
        self.copying = torch.cuda.Stream(device)
        self.lanes = Lanes(device, self.copying)
        self.coming: dict[Range, Tensor] = {}
        self.runs: list[Future[None]] = []

    def ask(self, ranges: Iterable[Range]) -> Collection[Range]:
        """Begin to copy those that there is room for, the first first: these."""
        free, total = available(self.device), 0
        with contextlib.suppress(torch.OutOfMemoryError):  # what is free may be in pieces
            for r in ranges:
                if r[2] and (free is None or total + r[2] <= free - self.room):
                    self.coming[r] = torch.empty(r[2], dtype=torch.uint8, device=self.device)
                    total += r[2]
        self.copying.wait_stream(self.computing)
        # Runs as long as they can be with all threads at work.
        step = max(BUFFER, min(RUN, total // READERS))
        for (path, offset, nbytes), into in sorted(self.coming.items(), key=lambda x: x[0]):
            for at in range(0, nbytes, step):
                run = into[at : at + step]
                self.runs.append(self.lanes.fill(path, offset + at, run, torch.uint8))
        return list(self.coming)

    def take(self) -> Mapping[Range, Tensor]:
        """What was asked for last, uint8 [nbytes] each. Raises what went wrong with it."""
        runs, self.runs = self.runs, []
        for run in runs:
            run.result()
        self.computing.wait_stream(self.copying)
        coming, self.coming = self.coming, {}
        return coming

    def close(self) -> None:
        self.lanes.close(cancel=True)
        self.coming.clear()
