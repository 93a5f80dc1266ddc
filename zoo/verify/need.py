"""What a verification will need, said before it begins: memory, what is read and, from a short measurement, how long.

An estimate: products by the rate of one product, metrics by those of a few tokens, reading by the hash of one piece of a file.
Where the memory is more than can be had, the model is streamed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.formats.canonical import Canonical
from zoo.layout import active_params, layout, total_params
from zoo.printable import decimal
from zoo.spec import Spec
from zoo.verify import inputs
from zoo.verify.certificate import READERS, cores
from zoo.verify.device import available
from zoo.verify.metrics import LogitMetrics, references
from zoo.verify.oracle import DTYPES

TEXT = 500
"""Tokens of the standard inputs beside the rows that cross a model's limits."""
STEPS = 2 * (64 + 18)
"""Of decoding: tokens one by one, of both sides, and the pieces of a prompt."""
WORTH_IT = 50_000_000
"""Parameters from which a measurement of a tenth of a second is little beside the run."""
PIECE = 16 << 20
"""Bytes of a file that are hashed to see how fast that goes."""


@dataclass(frozen=True)
class Need:
    """`memory`, `available`, `reads`: bytes. `available` None: the system does not say; `seconds` None: not measured."""

    memory: int
    available: int | None
    reads: int
    seconds: float | None

    @property
    def fits(self) -> bool:
        return self.available is None or self.memory <= self.available

    def __str__(self) -> str:
        had = "" if self.available is None else f" of the {decimal(self.available)} that can be had"
        long = "" if self.seconds is None else f", about {self.seconds:.0f} s"
        return f"needs {decimal(self.memory)} of memory{had}, reads {decimal(self.reads)}{long}"

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def needed(
    folder: Canonical,
    source: Path | None,
    dtype: str,
    device: torch.device,
    streamed: bool,
    decodes: bool,
    max_length: int = inputs.MAX_CROSSED,
    ranks: int = 1,
) -> Need:
    """Of both sides of a comparison of logits, `streamed` or with both models whole. `source`: what upstream reads, if
    it is here. `decodes`: whether tokens are generated too. `ranks`: how many share ours, whole."""
    spec, size = folder.spec, DTYPES[dtype].itemsize
    crossed = [n for n in inputs.limits(spec, dtype).values() if n < max_length]
    rows = [max(crossed) + 64, min(crossed) + 2] if crossed else []
    tokens, longest = TEXT + sum(rows), max(sum(rows), 4 * 64)
    logits = 3 * longest * spec.vocab_size * size  # upstream's, both ways, and ours
    files = sum(folder_size(x) for x in (folder.root, source) if x is not None)
    theirs = total_params(spec) * size
    ours = folder_size(folder.root) if folder.quant else theirs  # quantised weights stay so
    # Hashed; and read once in a pass, or compared and then loaded.
    return Need(
        memory=logits + (largest_part(spec) * size if streamed else theirs + ours // ranks),
        available=available(device),
        reads=files * (2 if streamed else 3),
        seconds=_seconds(folder, files, dtype, device, tokens, decodes and not streamed),
    )


def largest_part(spec: Spec) -> int:
    """Parameters in memory at a time when a model is streamed: the largest layer, or embedding and head."""
    parts: dict[int | None, int] = {}
    for slot in layout(spec).values():
        parts[slot.layer] = parts.get(slot.layer, 0) + slot.size
    return max(parts.values())


def folder_size(path: Path) -> int:
    """Bytes of the files of a folder, or of one file."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.iterdir() if p.is_file())


def _seconds(
    folder: Canonical, files: int, dtype: str, device: torch.device, tokens: int, decodes: bool
) -> float | None:
    spec = folder.spec
    if total_params(spec) < WORTH_IT:
        return None
    active, size = active_params(spec), DTYPES[dtype].itemsize
    total = 2 * files / _hashing(folder)  # comparing bytes takes about as long
    n = 2048
    many, one, w = (torch.randn(m, n, device=device, dtype=DTYPES[dtype]) for m in (256, 1, n))
    total += 3 * tokens * active * _took(lambda: many @ w, device) / (256 * n * n)
    total += 2 * tokens * _metrics_of_one(spec.vocab_size, device)
    if decodes:
        total += STEPS * active * size * _took(lambda: one @ w, device) / (n * n * size)
    return total


def _hashing(folder: Canonical) -> float:
    """Bytes a second of all files at once."""
    largest = max((folder.root / f for f in folder.files), key=lambda p: p.stat().st_size)
    began = time.perf_counter()
    with open(largest, "rb") as f:
        done = f.read(PIECE)
        hashlib.sha256(done)
    threads = min(READERS, cores(), len(folder.files))
    return threads * len(done) / (time.perf_counter() - began)


def _metrics_of_one(vocab_size: int, device: torch.device) -> float:
    """Seconds that a token's logits take to be compared."""
    logits, following = torch.randn(4, vocab_size, device=device), torch.zeros(4, dtype=torch.int64)

    def compare() -> None:
        for at, reference in references(logits, following):
            LogitMetrics().add(logits[at] + 1e-6, reference)

    return _took(compare, device) / len(logits)


def _took(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the second time."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
