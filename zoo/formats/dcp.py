"""torch.distributed.checkpoint folders, which trainers write: `.metadata` and `__0_0.distcp`, ... in pieces by rank.

They hold no config, so they are read beside a canonical folder that has one (`zoo convert DCP DST --like CANON`).

Unusual: `.metadata` is a pickle, and torch's own reader runs whatever is in it. Here nothing of it is run: the few classes
that such a file names become records of what the file says of them, and any other name is refused. A piece is a file of
`torch.save` in a file, and is read with `weights_only`.
"""

from __future__ import annotations

import io
import os
import pickle
import uuid
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.formats.base import TensorRef, files_below, inside
from zoo.model.load import DTYPES

METADATA = ".metadata"
MAX_METADATA = 256 << 20
"""Bytes; a checkpoint of 100,000 tensors in 64 pieces each has some 500 MB of it in memory and 100 here."""
_CALLED = {dtype: name for name, dtype in DTYPES.items()}


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
            part = self._read(name, piece)
            if part.dtype != out.dtype or tuple(part.shape) != piece.sizes:
                raise ZooError(
                    f"{self.root / piece.file}: {name} at {list(piece.offsets)} is {part.dtype} {list(part.shape)}, expected "
                    f"{out.dtype} {list(piece.sizes)}"
                )
            at = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes))
            out[at] = part
        return out

    def _read(self, name: str, piece: Piece) -> Tensor:
        path = inside(self.root, piece.file, METADATA)
        with open(path, "rb") as f:
            f.seek(piece.at)
            raw = f.read(piece.length)
        try:
            part = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
        except Exception as e:  # torch raises several kinds for what is damaged or refused
            raise ZooError(f"{path}: {name} at byte {piece.at} cannot be read ({e!r:.200})") from None
        if not isinstance(part, Tensor):
            raise ZooError(f"{path}: {name} at byte {piece.at} is a {type(part).__name__}, expected a tensor")
        return part


def detect(path: Path) -> bool:
    return path.is_dir() and (path / METADATA).is_file()


def open_saved(path: Path) -> Saved:
    """Open the folder at `path` by its metadata. Raises ZooError if it is none, or not whole."""
    if not detect(path):
        raise ZooError(f"{path}: not a folder of torch.distributed.checkpoint (no {METADATA})")
    told = _unpickled(path / METADATA)
    try:
        where = {
            (index.fqn, getattr(index, "offset", None)): info for index, info in told.storage_data.items()
        }
        out = Saved(path, {}, {}, [])
        for name, entry in told.state_dict_metadata.items():
            if type(entry).__name__ == "BytesStorageMetadata":
                out.other.append(name)
                continue
            _add(out, name, entry, where)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ZooError(
            f"{path / METADATA}: not as torch.distributed.checkpoint writes it ({e!r:.200})"
        ) from None
    return out


def _add(out: Saved, name: str, entry: Any, where: Mapping[Any, Any]) -> None:
    who = f"{out.root / METADATA}: {name!r}"
    torch_dtype = entry.properties.state[0]
    if (dtype := _CALLED.get(torch_dtype)) is None:
        raise ZooError(f"{who} is {torch_dtype}, which no checkpoint holds")
    shape, pieces, n = tuple(entry.size), [], 0
    for chunk in entry.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        info = where[name, offsets]
        if getattr(info, "transform_descriptors", None):
            raise ZooError(
                f"{who} is stored in a form of its own ({info.transform_descriptors!r:.100}), which zoo does not read"
            )
        pieces.append(Piece(offsets, sizes, info.relative_path, int(info.offset), int(info.length)))
        if any(o < 0 or o + k > d for o, k, d in zip(offsets, sizes, shape, strict=True)):
            raise ZooError(
                f"{who} has a piece of {list(sizes)} at {list(offsets)}, outside of its {list(shape)}"
            )
        n += torch.Size(sizes).numel()
    if n != torch.Size(shape).numel():
        raise ZooError(
            f"{who} has {torch.Size(shape).numel()} elements, its pieces {n}: was a rank's file lost, or saved twice?"
        )
    ref = TensorRef(name, dtype, shape, pieces[0].file if pieces else METADATA, 0, n * DTYPES[dtype].itemsize)
    out.tensors[name], out.pieces[name] = ref, pieces


def write(state: Mapping[str, Tensor], dst: str | os.PathLike[str], force: bool = False) -> Path:
    """Tensors by name as such a folder, one after the other. Raises ZooError as `Folder` does."""
    from torch.distributed import checkpoint

    from zoo.mapping.folder import Folder

    with Folder(dst, {}, uuid.uuid4().hex, force=force, ours=_wrote) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of one process, which is meant
        try:
            writer = checkpoint.FileSystemWriter(folder.partial, thread_count=1, sync_files=False)
            checkpoint.save(dict(state), storage_writer=writer, no_dist=True)
        except (OSError, checkpoint.CheckpointException) as e:
            folder.discard()
            raise ZooError(f"{folder.dst}: cannot be written ({e!s:.300}); nothing is left of it") from e
        return folder.publish()


def _wrote(path: Path) -> bool:
    files = files_below(path)
    return METADATA in files and all(n == METADATA or n.endswith(".distcp") for n in files)


# ---------------------------------------------------------------------------------------------------
# The pickle


class _Record:
    """What a file says of an object: its attributes by name, or whatever else stands for it (`state`)."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


_HERE = "torch.distributed.checkpoint."
_RECORDS = {
    *((f"{_HERE}metadata", n) for n in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_HERE}filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath"), ("pathlib._local", "WindowsPath"),
}  # fmt: skip


def _size(lengths: Collection[Any] = ()) -> tuple[int, ...]:
    if not all(type(n) is int for n in lengths):
        raise pickle.UnpicklingError("a size of what are no numbers")
    return tuple(lengths)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return type(name, (_Record,), {})
        if (module, name) == ("torch", "Size"):
            return _size
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of such a file: not run")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to data elsewhere")


def _unpickled(path: Path) -> Any:
    if (size := path.stat().st_size) > MAX_METADATA:
        raise ZooError(f"{path}: {size} bytes (limit {MAX_METADATA})")
    try:
        return _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as e:  # a damaged pickle raises anything
        raise ZooError(f"{path}: cannot be read ({e!r:.300})") from None
