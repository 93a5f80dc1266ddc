"""The process that reads `.metadata` of a torch.distributed.checkpoint folder. Run by zoo.formats.dcp, never by people.

The file is a pickle, of one entry for each piece of each tensor: a million of them for a large model on many ranks, which
only Python's interpreter of pickles in C reads in seconds. Nothing of the file is run: the few classes that it names become
records of what it says of them, and any other name is refused. But that interpreter hashes whatever it is given, and a few
bytes make a key whose hash takes for ever, or ends the process. So this process has limits of time and memory, and what it
says is checked numbers and names, as JSON:

    {"tensors": {name: {"dtype", "shape", "pieces": [[offsets, sizes, file, at, length], ...]}}, "other": [name, ...]}

Unusual: it imports nothing but the standard library, so that it begins at once.
"""

from __future__ import annotations

import gc
import io
import json
import pickle
import re
import signal
import sys
from contextlib import suppress
from typing import Any

CPU_SECONDS, CPU_MIB, CPU_MOST = 1.0, 0.1, 4.0
"""More for each MiB, up to so much. 100,000 pieces, 15 MB, take 0.8."""
MEMORY = 1 << 30
MAX_ANSWER = 128 << 20
"""Bytes; a piece has some 60."""
MAX_COUNT = 1 << 62
MAX_RANK = 64


class Refused(Exception):
    """What is wrong with the file, to be said by the process that asked."""


class _Record:
    """What a file says of an object: its attributes by name."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class _Told(_Record):
    """One whose state is no dict."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Name(str):
    """Of a dtype: `bfloat16`."""

    __slots__ = ()


_HERE = "torch.distributed.checkpoint."
_RECORDS = {
    (module, name): type(name, (_Told if name == "TensorProperties" else _Record,), {})
    for module, names in {
        f"{_HERE}metadata": (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        f"{_HERE}filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("PosixPath", "WindowsPath"),
        "pathlib._local": ("PosixPath", "WindowsPath"),
    }.items()
    for name in names
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _RECORDS[module, name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and re.fullmatch(r"(bool|u?int|float|bfloat|complex)\w{0,20}", name):
            return _Name(name)
        raise Refused(f"it names {module:.100}.{name:.100}, which is no part of such a file: not run")

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("it refers to data elsewhere")


def table(raw: bytes) -> dict[str, Any]:
    """What the metadata says of each tensor. Raises Refused for what is no such file."""
    gc.disable()  # nothing is given up before the end
    try:
        told = _Unpickler(io.BytesIO(raw)).load()
    except Refused:
        raise
    except Exception as e:  # a damaged pickle raises anything
        raise Refused(f"it cannot be read ({type(e).__name__}: {e!s:.200})") from None
    try:
        where = {
            (_text(index.fqn), _counts(offset) if (offset := getattr(index, "offset", None)) is not None else None): info
            for index, info in told.storage_data.items()
        }  # fmt: skip
        tensors, other = {}, []
        for name, entry in told.state_dict_metadata.items():
            if type(entry).__name__ == "BytesStorageMetadata":
                other.append(_text(name))
            else:
                tensors[_text(name)] = _tensor(name, entry, where)
    except (AttributeError, IndexError, KeyError, TypeError) as e:
        raise Refused(
            f"not as torch.distributed.checkpoint writes it ({type(e).__name__}: {e!s:.200})"
        ) from None
    return {"tensors": tensors, "other": other}


def _tensor(name: str, entry: Any, where: dict[Any, Any]) -> dict[str, Any]:
    dtype = entry.properties.state[0]
    if not isinstance(dtype, _Name):
        raise Refused(f"{name!r:.200} has no dtype")
    pieces = []
    for chunk in entry.chunks:
        offsets, sizes = _counts(chunk.offsets), _counts(chunk.sizes)
        info = where[name, offsets]
        if getattr(info, "transform_descriptors", None):
            raise Refused(f"{name!r:.200} is stored in a form of its own, which zoo does not read")
        pieces.append([offsets, sizes, _text(info.relative_path), *_counts((info.offset, info.length))])
    return {"dtype": dtype, "shape": _counts(entry.size), "pieces": pieces}


def _counts(numbers: Any) -> tuple[int, ...]:
    """Raises TypeError for what are none."""
    if type(numbers) not in (tuple, list) or len(numbers) > MAX_RANK:
        raise TypeError("a size of what are no numbers")
    if not all(type(n) is int and 0 <= n < MAX_COUNT for n in numbers):
        raise TypeError("a size of what are no counts")
    return tuple(numbers)


def _text(name: Any) -> str:
    if type(name) is not str:
        raise TypeError("a name that is no text")
    return name


def main() -> None:
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        data = sys.stdin.buffer.read()
        with suppress(AttributeError):  # its signal ends the process, whatever it is in
            signal.setitimer(signal.ITIMER_PROF, min(CPU_SECONDS + CPU_MIB * (len(data) >> 20), CPU_MOST))
        said = json.dumps(table(data))
    except Refused as e:
        said = json.dumps({"error": str(e)})
    except (MemoryError, RecursionError):
        said = json.dumps({"error": "it takes more memory than a checkpoint's does"})
    if len(said) > MAX_ANSWER:
        said = json.dumps({"error": "it stands for more pieces than a checkpoint has"})
    sys.stdout.write(said)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
