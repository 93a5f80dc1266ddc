"""torch.distributed.checkpoint folders, which trainers write: `.metadata` and `__0_0.distcp`, ... in pieces by rank.

They hold no config, so they are read beside a canonical folder that has one (`zoo convert DCP DST --like CANON`).

Unusual: `.metadata` is a pickle, and torch's own reader runs whatever is in it. Here nothing of it is run, and it is read in
a process of its own (zoo.formats.dcp_metadata). A piece is a file of `torch.save` in a file: a byte range of it, found as in
any other pickle of weights. All that is claimed is held to the files before there is room made for a tensor.
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.formats import dcp_metadata, pickle
from zoo.formats.base import TensorRef, files_below, inside
from zoo.model.load import DTYPES

METADATA = ".metadata"
MAX_METADATA = 256 << 20
"""Bytes; a checkpoint of 350,000 pieces has some 50 MB of it."""
SECONDS = 30
"""Reading it may take so long by the clock; by its own CPU time less (zoo.formats.dcp_metadata)."""
MAX_CELLS = 1 << 20
"""Of the grid that the edges of a tensor's pieces make; each piece is one of them in what trainers write."""
_CALLED = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """Elements [offsets, offsets + sizes) of a tensor, `length` bytes from `at` in `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    at: int
    length: int


@dataclass
class Saved:
    """An opened folder: tensors by name, and the names of what is none (a step, a scheduler)."""

    root: Path
    tensors: dict[str, TensorRef]
    pieces: dict[str, list[Piece]]
    other: list[str]

    def get(self, name: str) -> Tensor:
        """A tensor, put together. Raises ZooError for a piece that is not what `.metadata` says."""
        ref = self.tensors[name]
        out = torch.empty(ref.shape, dtype=DTYPES[ref.dtype])
        for piece in self.pieces[name]:
            part = self._read(name, ref.dtype, piece)
            out[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes))] = part
        return out

    def _read(self, name: str, dtype: str, piece: Piece) -> Tensor:
        path = self.root / piece.file  # which was looked at when the folder was opened
        with open(path, "rb") as f:
            f.seek(piece.at)
            raw = bytearray(f.read(piece.length))
        who = f"{path}: {name} at byte {piece.at}"
        part = pickle.read_tensor(io.BytesIO(raw), who)
        if part.dtype != dtype or part.shape != piece.sizes:
            raise ZooError(
                f"{path}: {name} at {list(piece.offsets)} is {part.dtype} {list(part.shape)}, expected {dtype} {list(piece.sizes)}"
            )
        if not part.size:
            return torch.empty(part.shape, dtype=DTYPES[dtype])
        flat = torch.frombuffer(raw[part.offset : part.offset + part.nbytes], dtype=DTYPES[dtype])
        return flat.view(part.shape) if part.strides is None else flat.as_strided(part.shape, part.strides)


def detect(path: Path) -> bool:
    return path.is_dir() and (path / METADATA).is_file()


def open_saved(path: Path) -> Saved:
    """Open the folder at `path` by its metadata. Raises ZooError if it is none, or not whole."""
    if not detect(path):
        raise ZooError(f"{path}: not a folder of torch.distributed.checkpoint (no {METADATA})")
    told = _told(path / METADATA)
    out = Saved(path, {}, {}, told["other"])
    for name, entry in told["tensors"].items():
        _add(out, name, entry)
    _refuse_what_files_do_not_hold(out)
    return out


def _add(out: Saved, name: str, entry: Mapping[str, Any]) -> None:
    who = f"{out.root / METADATA}: {name!r:.200}"
    if (dtype := _CALLED.get(entry["dtype"])) is None:
        raise ZooError(f"{who} is {entry['dtype']}, which no checkpoint holds")
    shape = tuple(entry["shape"])
    pieces = [Piece(tuple(o), tuple(s), file, at, length) for o, s, file, at, length in entry["pieces"]]
    for p in pieces:
        ranked = len(p.offsets) == len(p.sizes) == len(shape)
        if not ranked or any(o + k > d for o, k, d in zip(p.offsets, p.sizes, shape)):
            raise ZooError(
                f"{who} has a piece of {list(p.sizes)} at {list(p.offsets)}, outside of its {list(shape)}"
            )
        if p.length < math.prod(p.sizes) * DTYPES[dtype].itemsize:
            raise ZooError(f"{who} has a piece of {list(p.sizes)} {dtype} in {p.length} bytes")
    n = sum(math.prod(p.sizes) for p in pieces)
    if n != math.prod(shape) or not _apart(pieces, len(shape), who):
        raise ZooError(
            f"{who} has {math.prod(shape)} elements, its pieces {n}: was a rank's file lost, or saved twice?"
        )
    ref = TensorRef(name, dtype, shape, pieces[0].file if pieces else METADATA, 0, n * DTYPES[dtype].itemsize)
    out.tensors[name], out.pieces[name] = ref, pieces


def _apart(pieces: list[Piece], rank: int, who: str) -> bool:
    """Whether no two pieces have an element in common: in the grid of all their edges each cell is in one of them."""
    if len(pieces) < 2:
        return True
    edges = [
        np.unique([e for p in pieces for e in (p.offsets[a], p.offsets[a] + p.sizes[a])]) for a in range(rank)
    ]
    if math.prod(map(len, edges)) > max(MAX_CELLS, 4 * len(pieces)):
        raise ZooError(f"{who} is cut into {len(pieces)} pieces whose edges make no grid: not read")
    taken = np.zeros([len(e) for e in edges], bool)
    for p in pieces:
        cells = tuple(slice(*np.searchsorted(e, (o, o + n))) for e, o, n in zip(edges, p.offsets, p.sizes))
        if taken[cells].any():
            return False
        taken[cells] = True
    return True


def _refuse_what_files_do_not_hold(saved: Saved) -> None:
    """Raises ZooError for a piece that lies outside of its file, and for bytes that two pieces are made of: a few of them
    could stand for tensors without end."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for pieces in saved.pieces.values():
        for p in pieces:
            ranges.setdefault(p.file, []).append((p.at, p.at + p.length))
    for file, found in ranges.items():
        path = inside(saved.root, file, str(saved.root / METADATA))
        end = 0
        for start, stop in sorted(found):
            if start < end:
                raise ZooError(
                    f"{saved.root / METADATA}: two pieces are made of the bytes at {start} of {file}"
                )
            end = stop
        if end > (size := path.stat().st_size):
            raise ZooError(f"{path}: {size} bytes, {METADATA} says {end}: truncated, fetch it again")


def write(state: Mapping[str, Tensor], dst: str | os.PathLike[str], force: bool = False) -> Path:
    """Tensors by name as such a folder, one after the other. Raises ZooError as `Folder` does."""
    from torch.distributed import checkpoint

    from zoo.mapping.folder import Folder

    with Folder(dst, {}, uuid.uuid4().hex, force=force, ours=_wrote) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of one process, which is meant
        try:
            writer = checkpoint.FileSystemWriter(folder.here, thread_count=1, sync_files=False)
            checkpoint.save(dict(state), storage_writer=writer, no_dist=True)
        except (OSError, checkpoint.CheckpointException) as e:
            folder.discard()
            why: BaseException = e
            if isinstance(e, checkpoint.CheckpointException):  # whose text is a traceback
                why = next((x for x, _ in e.failures.values()), e)
            raise ZooError(f"{folder.dst}: cannot be written ({why!s:.300}); nothing is left of it") from e
        return folder.publish()


def _wrote(path: Path) -> bool:
    files = files_below(path)
    return METADATA in files and all(n == METADATA or n.endswith(".distcp") for n in files)


def _told(path: Path) -> dict[str, Any]:
    """What the metadata says, by the process that reads it."""
    if (size := inside(path.parent, path.name, str(path.parent)).stat().st_size) > MAX_METADATA:
        raise ZooError(f"{path}: {size} bytes (limit {MAX_METADATA})")
    with open(path, "rb") as f:
        try:
            done = subprocess.run(
                [sys.executable, "-I", dcp_metadata.__file__], stdin=f, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, timeout=SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ZooError(f"{path}: takes too long to be read: refused") from None
    if done.returncode:
        why = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise ZooError(
            f"{path}: ended the process that read it ({why}): no checkpoint's metadata does, refused"
        )
    told: dict[str, Any] = json.loads(done.stdout)
    if "error" in told:
        raise ZooError(f"{path}: {told['error']}")
    return told
