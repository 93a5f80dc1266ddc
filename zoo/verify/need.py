"""What a verification will need, said before it begins: memory, what is read and, from a short measurement, how long.

An estimate: products by the rate of one product, metrics by those of a few tokens, reading by the hash of one piece of a file.
Where the memory is more than can be had, the model is streamed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zoo.formats.canonical import Canonical
from zoo.layout import active_params, layout, total_params
from zoo.spec import Spec
from zoo.untrusted.printable import decimal
from zoo.verify import inputs
from zoo.verify.against import recorded_source
from zoo.verify.certificate import READERS, cores
from zoo.verify.device import available
from zoo.verify.golden import is_golden
from zoo.verify.metrics import LogitMetrics, references
from zoo.verify.oracle import DTYPES, Oracle, from_pretrained_files, upstream_available
from zoo.verify.settings import Settings
from zoo.verify.stage import Stage

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


def foreseen(
    folder: Canonical,
    against: str | os.PathLike[str] | Oracle | None,
    how: Settings,
    may_stream: bool,
    ranks: int = 1,
) -> tuple[Need | None, str | None]:
    """What the run will need, and said; and why the two models are streamed after all, where that is left open (`may_stream`).
    None where upstream is not run here. `ranks`: how many have a part of ours each."""
    path = recorded_source(folder) if against is None else against
    if not isinstance(path, str | os.PathLike) or not (source := Path(path)).exists() or is_golden(source):
        return None, None
    if not upstream_available():
        return None, None
    need = needed(folder, source, how, ranks)
    if need.fits or not may_stream:
        how.say(Stage(str(need), seconds=need.seconds))
        return need, None
    what = f"both sides take {decimal(need.memory)} in {how.dtype}, and {decimal(need.available or 0)} can be had"
    if not _can_stream(source):
        how.say(
            f"{what}; only folders of safetensors, and GGUF files, are streamed without being asked to (--stream)"
        )
        return need, None
    need = needed(folder, source, replace(how, stream=True))
    how.say(Stage(f"{need}: streaming, since {what}", seconds=need.seconds))
    return need, what


def _can_stream(path: Path) -> bool:
    """Whether it is a GGUF file, or a folder where upstream would read safetensors files."""
    if path.is_file():
        return path.suffix == ".gguf"
    if not (path / "config.json").is_file():
        return False
    names = from_pretrained_files(path)
    return names is not None and all(n.endswith(".safetensors") for n in names)


def needed(folder: Canonical, source: Path | None, how: Settings, ranks: int = 1) -> Need:
    """Of both sides of a comparison of logits, streamed or with both models whole. `source`: what upstream reads, if it is
    here. `ranks`: how many share ours, whole."""
    spec, size = folder.spec, DTYPES[how.dtype].itemsize
    crossed = [n for n in inputs.limits(spec, how.dtype).values() if n < how.max_length]
    rows = [max(crossed) + 64, min(crossed) + 2] if crossed else []
    tokens, longest = TEXT + sum(rows), max(sum(rows), 4 * 64)
    logits = 3 * longest * spec.vocab_size * size  # upstream's, both ways, and ours
    files = sum(folder_size(x) for x in (folder.root, source) if x is not None)
    theirs = total_params(spec) * size
    ours = folder_size(folder.root) if folder.quant else theirs  # quantised weights stay so
    # Hashed; and read once in a pass, or compared and then loaded.
    return Need(
        memory=logits + (largest_part(spec) * size if how.stream else theirs + ours // ranks),
        available=available(how.device),
        reads=files * (2 if how.stream else 3),
        seconds=_seconds(folder, files, how, tokens),
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


def _seconds(folder: Canonical, files: int, how: Settings, tokens: int) -> float | None:
    spec, device = folder.spec, how.device
    if total_params(spec) < WORTH_IT:
        return None
    active, dtype = active_params(spec), DTYPES[how.dtype]
    total = 2 * files / _hashing(folder)  # comparing bytes takes about as long
    n = 2048
    many, one, w = (torch.randn(m, n, device=device, dtype=dtype) for m in (256, 1, n))
    total += 3 * tokens * active * _took(lambda: many @ w, device) / (256 * n * n)
    total += 2 * tokens * _metrics_of_one(spec.vocab_size, device)
    if "decode" in how.wanted and not how.stream:
        total += STEPS * active * _took(lambda: one @ w, device) / (n * n)
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
