"""What a file of weights holds around its tensors, kept so that the file can be given back to the byte.

A safetensors file is a header and tensors. A pickle is an archive: entries' headers before each tensor, paddings, checksums, a
directory at the end; older ones have a length before each. Whatever it is, all bytes that are no tensor's are `taken` as they
lie. `Hollow` is then the file without its tensors: what reads such files reads it as it read them, and finds the tensors' places.
"""

from __future__ import annotations

import bisect
import io
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import ZooError
from zoo.formats.base import MAX_TENSORS, TensorRef

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

MAX_AROUND = 32 << 20
"""Bytes, of all files of a checkpoint together. A tensor takes some 200; more than this is an optimiser's state, say."""
MOST = MAX_AROUND + 16 * MAX_TENSORS
"""Of them as they are kept, with the places where they lie."""
_TAIL = 1 << 17  # an archive's directory is looked for in the last 64 KB, tensors or not


def taken(files: Iterable[tuple[Path, str]], tensors: Iterable[TensorRef]) -> dict[str, bytes]:
    """The bytes of each file (path, name) that are no tensor's, and where they lie. Nothing, where they are too many or a tensor
    does not lie in one piece: then the files cannot be given back."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for t in tensors:
        if t.strides is not None:
            return {}
        spans.setdefault(t.file, []).append((t.offset, t.offset + t.nbytes))
    out: dict[str, bytes] = {}
    left = MAX_AROUND
    for path, name in files:
        gaps = list(_gaps(spans.get(name, []), path.stat().st_size))
        if (left := left - sum(end - start for start, end in gaps)) < 0:
            return {}
        with path.open("rb") as f:
            pieces = [_read(f, start, end) for start, end in gaps]
        table = (struct.pack("<QQ", start, end - start) for start, end in gaps)
        out[name] = b"".join([struct.pack("<Q", len(gaps)), *table, *pieces])
    return out


def _gaps(spans: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    at = 0
    for start, end in [*sorted(spans), (size, size)]:
        if start > at:
            yield at, start
        at = max(at, end)


def _read(f: io.BufferedReader, start: int, end: int) -> bytes:
    f.seek(start)
    return f.read(end - start)


class Hollow(io.RawIOBase):
    """A file of `size` bytes of which those are there that were `taken`; zeros stand for the tensors.

    `pieces`: (offset, bytes). Raises ZooError if `raw` is not what `taken` gives for such a file.
    """

    def __init__(self, raw: bytes, size: int, who: str) -> None:
        super().__init__()
        self.size, self.pieces = size, list[tuple[int, bytes]]()
        self._at = 0
        try:
            (n,) = struct.unpack_from("<Q", raw)
            if 17 * n > len(raw):  # each holds a byte
                raise OverflowError
            table = list(struct.iter_unpack("<QQ", raw[8 : 8 + 16 * n]))
        except (struct.error, OverflowError):
            n, table = -1, []
        start, last = 8 + 16 * len(table), 0
        for at, length in table:
            self.pieces.append((at, raw[start : start + length]))
            if at < last or not length:
                last = size + 1
                break
            start, last = start + length, at + length
        if (len(table), start) != (n, len(raw)) or last > size:
            raise ZooError(f"{who}: not as zoo writes it; convert again")
        self._starts = [at for at, _ in self.pieces]
        self._most = len(raw) + _TAIL

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, at: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, at + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def readinto(self, buffer: Buffer, /) -> int:
        out, begin = memoryview(buffer).cast("B"), self._at
        n = max(0, min(len(out), self.size - begin))
        if n > self._most:
            raise OSError(f"{n} bytes are asked for, where not as many are kept")
        out[:n] = bytes(n)
        for k in range(max(0, bisect.bisect(self._starts, begin) - 1), len(self.pieces)):
            at, data = self.pieces[k]
            if at >= begin + n:
                break
            a, b = max(at, begin), min(at + len(data), begin + n)
            if a < b:
                out[a - begin : b - begin] = data[a - at : b - at]
        self._at += n
        return n
