"""PyTorch's pickles, written: the archive that `torch.save` makes of a dict of tensors, in any amount of data.

The archive is laid out before there is data: its pickle, and where each tensor will lie. What fills the tensors' places is
the caller's; `seal` then writes the checksums. So a file of any size costs the memory of its names.

Source: torch/csrc/jit/serialization (records `data.pkl`, `byteorder`, `version`, `data/N`; data begin at multiples of 64
bytes), and PKWARE's APPNOTE for zip and zip64.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import ITEMSIZE

_STORAGES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "I64": "LongStorage",
    "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage", "BOOL": "BoolStorage",
}  # fmt: skip
_ALIGNED = 64
_FULL = 0xFFFFFFFF  # of a field of 4 bytes: the number is among the extra fields, in 8
_CHUNK = 8 << 20
_DATE = 1 << 5 | 1  # 1980-01-01, the first that zip has


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    size: int  # elements


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    def persistent_id(self, x: Any) -> Any:
        if not isinstance(x, _Storage):
            return None
        import torch

        return "storage", getattr(torch, _STORAGES[x.dtype]), x.key, "cpu", x.size

    def reducer_override(self, x: Any) -> Any:
        if not isinstance(x, _Tensor):
            return NotImplemented
        import torch

        stride, strides = 1, list[int]()
        for n in reversed(x.shape):
            strides.insert(0, stride)
            stride *= n
        return torch._utils._rebuild_tensor_v2, (
            x.storage, 0, x.shape, tuple(strides), False, OrderedDict(),
        )  # fmt: skip


@dataclass(frozen=True)
class _Record:
    name: bytes
    header: int  # where its local header begins
    start: int  # and its data
    size: int

    def sums(self, directory: int) -> tuple[int, int]:
        """Where its checksum belongs: in its header, and in its entry of the directory, which begins at `directory`."""
        return self.header + 14, directory + 16


class Archive:
    """The archive `file` of `tensors` (name, dtype, shape), and of other names for some of them (`also`: name -> name).

    `pieces`: (offset, bytes) of all that is not tensors. `place`: name -> offset of its data. `size`: of the file.
    """

    def __init__(
        self, file: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]], also: Mapping[str, str]
    ) -> None:
        self._stem = Path(file).stem
        self.pieces: list[tuple[int, bytes]] = []
        self.place: dict[str, int] = {}
        self.nbytes = 0
        """Of tensors."""
        self._at = 0
        self._records: list[_Record] = []
        held: dict[str, _Tensor] = {}
        for k, (name, dtype, shape) in enumerate(tensors):
            if dtype not in _STORAGES:
                raise ZooError(
                    f"{name} is {dtype}, which {file} has no storage for; convert again with --dtype"
                )
            held[name] = _Tensor(_Storage(dtype, str(k), math.prod(shape)), shape)
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump(held | {new: held[name] for new, name in also.items()})
        self._small("data.pkl", pickled.getvalue())
        self._small("byteorder", b"little")
        for name, t in held.items():
            nbytes = t.storage.size * ITEMSIZE[t.storage.dtype]
            self.place[name] = self._record(f"data/{t.storage.key}", nbytes)
            self.nbytes += nbytes
        self._small("version", b"3\n")
        self._directory()

    def _record(self, name: str, size: int, crc: int = 0) -> int:
        """The local header of an entry; where its `size` bytes begin."""
        path = f"{self._stem}/{name}".encode()
        wide = struct.pack("<HHQQ", 1, 16, size, size) if size >= _FULL else b""
        fixed = self._at + 30 + len(path) + len(wide) + 4
        pad = -fixed % _ALIGNED
        extra = wide + b"FB" + struct.pack("<H", pad) + b"Z" * pad
        short = min(size, _FULL)
        head = struct.pack(
            "<4sHHHHHIIIHH", b"PK\x03\x04", 45 if wide else 20, 0, 0, 0, _DATE, crc, short, short, len(path), len(extra)
        )  # fmt: skip
        self.pieces.append((self._at, head + path + extra))
        record = _Record(path, self._at, fixed + pad, size)
        self._records.append(record)
        self._at = record.start + size
        return record.start

    def _small(self, name: str, data: bytes) -> None:
        self.pieces.append((self._record(name, len(data), zlib.crc32(data)), data))

    def _directory(self) -> None:
        start, entries = self._at, list[bytes]()
        self._entries: list[int] = []  # where each begins
        small = dict(self.pieces)
        for r in self._records:
            numbers = [n for n in (r.size, r.size, r.header) if n >= _FULL]
            wide = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
            size = min(r.size, _FULL)
            self._entries.append(start + sum(map(len, entries)))
            entries.append(
                struct.pack(
                    "<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 45, 45 if wide else 20, 0, 0, 0, _DATE, zlib.crc32(small.get(r.start, b"")),
                    size, size, len(r.name), len(wide), 0, 0, 0, 0, min(r.header, _FULL),
                ) + r.name + wide
            )  # fmt: skip
        listed, n = sum(map(len, entries)), len(entries)
        end = b""
        if n >= 0xFFFF or start + listed >= _FULL:
            end = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, n, n, listed, start)
            end += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + listed, 1)
        end += struct.pack(
            "<4sHHHHIIH", b"PK\x05\x06", 0, 0, min(n, 0xFFFF), min(n, 0xFFFF), min(listed, _FULL), min(start, _FULL), 0
        )  # fmt: skip
        self.pieces.append((start, b"".join(entries) + end))
        self.size = start + listed + len(end)

    def seal(self, fd: int) -> None:
        """Write the checksums of the tensors, which lie in the open file `fd`."""
        filled = set(self.place.values())
        for record, entry in zip(self._records, self._entries, strict=True):
            if record.start not in filled:
                continue
            crc = 0
            for at in range(record.start, record.start + record.size, _CHUNK):
                crc = zlib.crc32(os.pread(fd, min(_CHUNK, record.start + record.size - at), at), crc)
            for at in record.sums(entry):
                os.pwrite(fd, struct.pack("<I", crc), at)
