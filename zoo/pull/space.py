"""What a pull fetches and writes, in bytes: refused before the first one where it does not fit."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from zoo.errors import ZooError
from zoo.mapping.plan import Plan
from zoo.pull.source import Opened


def to_write(plan: Plan) -> int:
    return plan.nbytes + (64 << 20)  # tokenizers and the like


def to_fetch(opened: Opened, cached: bool) -> tuple[int, int]:
    """Bytes to fetch, and how many of them the Hub's cache has (if it is used)."""
    from zoo.hub import cache

    assert opened.remote is not None
    if opened.plan.layers is not None:
        return sum(n for spans in ranges_of(opened.plan).values() for _, n in spans), 0
    snapshot, files = opened.remote.snapshot, opened.remote.files
    there = 0
    for file in files if cached else ():
        if cache.find(snapshot, file) is not None:
            there += file.size
        else:
            with contextlib.suppress(OSError):
                there += cache.part_path(snapshot.repo, file).stat().st_size
    return sum(f.size for f in files), there


def ranges_of(plan: Plan) -> dict[str, list[tuple[int, int]]]:
    """File -> (start, length) of its header and of every tensor that the plan reads."""
    ckpt, tensors = plan.checkpoint, plan.checkpoint.tensors
    names = {n for o in plan.outputs.values() for k in range(len(o.sources)) for n in plan.sources_of(o, k)}
    ranges: dict[str, list[tuple[int, int]]] = {file: [] for file in plan.files_needed()}
    for name in names:
        ref = tensors[name]
        ranges[ref.file].append((ref.offset, ref.nbytes))
    for file, spans in ranges.items():
        start = min(r.offset for r in tensors.values() if r.file == file)
        spans.append((0, min(start, ckpt.files[file])))
    return ranges


def check_space(target: Path, need: dict[Path, int]) -> None:
    """Refuse before the first byte what can't fit: the needs of places on one disk are added up."""
    disks: dict[int, list[tuple[Path, int]]] = {}
    for path, n in need.items():
        disks.setdefault(os.stat(existing(path)).st_dev, []).append((path, n))
    partials = [target.with_name(target.name + end) for end in (".partial", ".source")]
    for places in disks.values():
        here = [p for p, _ in places]
        total = sum(n for _, n in places)
        if target in here:
            total -= sum(_used(p) for p in partials)
        free = shutil.disk_usage(existing(here[0])).free
        if total > free:
            from zoo.hub.errors import bytes_text

            raise ZooError(
                f"{bytes_text(total)} more are needed in {' and '.join(map(str, here))}, and the disk has "
                f"{bytes_text(free)} free; nothing was fetched. Make room, set HF_HOME or --to to a larger disk, or use "
                "--stream, which keeps no copy of the source."
            )


def existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    path = Path(os.path.abspath(path))
    while not path.is_dir():
        path = path.parent
    return path


def _used(path: Path) -> int:
    """Bytes on disk of what an earlier run left."""
    return sum(f.stat().st_blocks * 512 for f in path.rglob("*") if f.is_file()) if path.is_dir() else 0
