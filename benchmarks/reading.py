"""Files read to nowhere: the rate that others are held against."""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

RUN = 1 << 28
Piece = tuple[Path, int, int]
"""Of a file: the first byte, and the one after the last."""


def runs(files: Iterable[Path], part: int = 0, of: int = 1, run: int = RUN) -> list[Piece]:
    """The files from first to last, in runs; of several parts of each file one."""
    found = []
    for file in files:
        size = file.stat().st_size
        each = -(-size // of)
        start, end = part * each, min(size, (part + 1) * each)
        found += [(file, at, min(at + run, end)) for at in range(start, end, run)]
    return found


def seconds_of(pieces: Sequence[Piece], threads: int, buffer: int) -> float:
    """Seconds in which threads read these, each into a buffer of its own of that size."""

    def one(piece: Piece) -> None:
        file, at, end = piece
        into = memoryview(bytearray(buffer))
        with open(file, "rb", buffering=0) as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            f.seek(at)
            while at < end:
                at += f.readinto(into[: min(buffer, end - at)])

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, pieces))
    return time.perf_counter() - began
