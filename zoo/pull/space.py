"""What a pull fetches and writes, in bytes: refused before the first one where it does not fit."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import ZooError
from zoo.mapping.parts import Part, shares
from zoo.mapping.plan import Plan
from zoo.pull.source import Opened

if TYPE_CHECKING:
    from zoo.hub.files import RemoteFile
    from zoo.mapping.execute import Sheet


def to_write(plan: Plan, part: Part | None = None) -> int:
    return written(plan, part) + (64 << 20)  # tokenizers and the like


def written(plan: Plan, part: Part | None) -> int:
    """Bytes of tensors that this part writes."""
    if part is None:
        return plan.nbytes
    sheet, mine = _share(plan, part)
    return sum(sheet.sizes[f] - len(sheet.headers[f]) for f in mine)


def files_of(plan: Plan, part: Part | None) -> list[str]:
    """The source's files that this part's output files are made of; of no part, all that the plan reads."""
    if part is None:
        return list(plan.files_needed())
    sheet, mine = _share(plan, part)
    names = {n for n in plan.extras if sheet.place[n][0] in mine}
    for o in plan.outputs.values():
        if sheet.place[o.name][0] in mine:
            names |= {n for k in range(len(o.sources)) for n in plan.sources_of(o, k)}
    return sorted({plan.checkpoint.tensors[n].file for n in names})


def _share(plan: Plan, part: Part) -> tuple[Sheet, set[str]]:
    from zoo.mapping.execute import sheet_of

    sheet = sheet_of(plan)
    return sheet, set(shares(sheet.sizes, part.of)[part.number - 1])


def to_fetch(opened: Opened, cached: bool, files: Iterable[RemoteFile] | None = None) -> tuple[int, int]:
    """Bytes to fetch of `files` (None: all), and how many of them the Hub's cache has (if it is used)."""
    from zoo.hub import cache

    assert opened.remote is not None
    if opened.plan.layers is not None:
        return sum(n for spans in ranges_of(opened.plan).values() for _, n in spans), 0
    snapshot, files = opened.remote.snapshot, list(opened.remote.files if files is None else files)
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
