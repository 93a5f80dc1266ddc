"""From files to a GPU as fast as the disk gives: threads read into pinned memory while the copy engine empties it.

Unusual: the mapped file is not used. A page fault at a time, it gives a tenth of what large reads do. And the system is told
what lies behind a piece before the piece is read, so that the disk does not rest between two: 9 GB at 0.99 of the rate at
which they can be read, 0.95 without (medians of 4 rounds on the machine of an H100, 1.6 GB/s).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

BUFFER, READERS, BUFFERS = 2**26, 8, 3


class Upload:
    """Copies byte ranges of files into tensors on a CUDA device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.buffers = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]
        self.emptied: list[torch.cuda.Event | None] = [None] * BUFFERS
        self.next = 0
        self.files: dict[Path, int] = {}
        self.pool = ThreadPoolExecutor(READERS)

    def __call__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor at `offset` of the file. Its copy may still be under way on the current stream."""
        out = torch.empty(shape, dtype=dtype, device=self.device)
        if out.numel() == 0:
            return out
        if path not in self.files:
            self.files[path] = os.open(path, os.O_RDONLY)
        raw = out.view(-1).view(torch.uint8)
        for start in range(0, len(raw), BUFFER):
            size = min(BUFFER, len(raw) - start)
            i, self.next = self.next, (self.next + 1) % BUFFERS
            if (event := self.emptied[i]) is not None:
                event.synchronize()
            self._read(self.files[path], offset + start, memoryview(self.buffers[i].numpy())[:size])  # type: ignore[arg-type]
            raw[start : start + size].copy_(self.buffers[i][:size], non_blocking=True)
            self.emptied[i] = torch.cuda.Event()
            self.emptied[i].record()  # type: ignore[union-attr]
        return out

    def _read(self, file: int, offset: int, into: memoryview) -> None:
        share = max(2**20, -(-len(into) // READERS))
        pieces = range(0, len(into), share)
        if len(pieces) > 1:
            self.pool.submit(os.posix_fadvise, file, offset + len(into), BUFFER, os.POSIX_FADV_WILLNEED)

        def read(at: int) -> None:
            end = min(at + share, len(into))
            while at < end:
                n = os.preadv(file, [into[at:end]], offset + at)
                if n == 0:
                    raise EOFError("the file is shorter than its header says")
                at += n

        list(self.pool.map(read, pieces) if len(pieces) > 1 else map(read, pieces))

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        self.pool.shutdown()
        for file in self.files.values():
            os.close(file)
