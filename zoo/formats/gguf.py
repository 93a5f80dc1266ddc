"""GGUF, llama.cpp's format: one file (or a split set) that holds everything, tokenizer included.

- Names and hyperparameters are llama.cpp's own; the config is rebuilt from them in Hugging Face terms
  (`gguf_config.py`, and the family that names the architecture), and the tokenizer's files are synthesised (`gguf_tokenizer.py`).
- Shapes are stored innermost first; here they are [out, in] as everywhere.
- Most tensors are of block types, which have no safetensors dtype: a conversion carries those of `zoo/quant/blocks.py` as bytes;
  others (`zoo/quant/ggml.py`) are dequantised to fp32, which is exact, and so are all where a dtype is asked for.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.formats import gguf_config, gguf_tokenizer, sets
from zoo.formats.around import taken
from zoo.formats.base import (
    ITEMSIZE,
    Checkpoint,
    TensorRef,
    add_tensors,
    encoded,
    inside,
    named,
    refuse_pointer,
)
from zoo.formats.gguf_fields import shortest
from zoo.quant import ggml
from zoo.untrusted.bounded import uncollected

MAGIC = b"GGUF"

# ggml's numbers of element types. What is not among ggml.TYPES or _PLAIN is refused by name.
TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
_PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8")

# Types of metadata values, as struct formats; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MAX_VALUES = 1 << 21
"""Of all arrays of a set's headers: the largest vocabularies have 1.3 million, tokens, scores, types and merges together."""

MAX_TENSORS, MAX_FIELDS = 1 << 16, 1 << 12
"""Of a set: the largest releases have two thousand tensors (experts are stacked) and some sixty fields."""

_SPLIT = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


def detect(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".gguf"
    return bool(named(path, "*.gguf"))


@uncollected()
def open(path: Path) -> Checkpoint:
    """Open a GGUF file, the first file of a split set, or a folder that holds one of either."""
    root, names = (path.parent, files_of_set(path.name)) if path.is_file() else (path, _files_of(path))
    tensors: dict[str, TensorRef] = {}
    files: dict[str, int] = {}
    metadata: dict[str, Any] = {}
    values = MAX_VALUES
    for n, name in enumerate(names):
        file = inside(root, name, str(path))
        files[name] = file.stat().st_size
        fields, refs = read_header(file, name, values=values)
        values -= sum(len(v) for v in fields.values() if isinstance(v, list))
        metadata = metadata if n else fields
        add_tensors(tensors, refs, file, MAX_TENSORS)
    if (count := metadata.get("split.tensors.count", len(tensors))) != len(tensors):
        raise ZooError(
            f"{root / names[0]}: its set has {count} tensors, found {len(tensors)}: is the download complete?"
        )
    where = str(root / names[0])
    tables = {n: _read_table(root, tensors[n]) for n in gguf_config.CONSTANTS if n in tensors}
    config = gguf_config.config(metadata, tensors, tables, where)
    tokenizer, notes = gguf_tokenizer.files(metadata, where)
    synthesised = {"config.json": _json(config), "generation_config.json": _json(_generation(metadata))}
    return Checkpoint(
        root, "gguf", ("gguf",), config, tensors, files,
        synthesised=synthesised | tokenizer,
        notes=notes,
        around=taken(((root / n, n) for n in files), tensors.values()),
        metadata={k: v for k, v in metadata.items() if not isinstance(v, list) or len(v) < 64},
    )  # fmt: skip


def _files_of(folder: Path) -> list[str]:
    names = [n for n in named(folder, "*.gguf") if "mmproj" not in n]
    if not names:
        raise ZooError(f"{folder}: no *.gguf here")
    first = files_of_set(names[0])
    if set(names) - set(first):
        raise sets.which(str(folder), [s for s in sets.here(folder) if s.name.endswith(".gguf")])
    return first


def files_of_set(name: str) -> list[str]:
    """The files of the split set that `name` belongs to: `x-00001-of-00003.gguf` and so on."""
    if (m := _SPLIT.fullmatch(name)) is None:
        return [name]
    if not 0 < int(m["no"]) <= int(m["count"]):
        raise ZooError(f"{name}: calls itself number {int(m['no'])} of {int(m['count'])}: was it renamed?")
    return [f"{m['stem']}-{n + 1:05d}-of-{m['count']}.gguf" for n in range(int(m["count"]))]


def _read_table(root: Path, ref: TensorRef) -> tuple[float, ...]:
    """A small fp32 tensor of constants that belong to the config (factors of rotary frequencies)."""
    if ref.dtype != "F32" or ref.size > 4096:
        raise ZooError(
            f"{root / ref.file}: tensor {ref.name!r}: expected a small F32 table, found {ref.dtype} {ref.shape}"
        )
    with (root / ref.file).open("rb") as f:
        f.seek(ref.offset)
        table = struct.unpack(f"<{ref.size}f", f.read(ref.nbytes))
    if not any(table):
        raise ZooError(
            f"{root / ref.file}: tensor {ref.name!r} holds only zeros; if just the header was fetched, fetch all"
        )
    return table


def _generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json. A chat model ends its turn with `eot`, which may not be its `eos`."""
    ids = {k: metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos", "eot", "eom", "padding")}
    ends = list(dict.fromkeys(ids[k] for k in ("eos", "eot", "eom") if ids[k] is not None))
    out = {"bos_token_id": ids["bos"], "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}
    return {k: v for k, v in {**out, "pad_token_id": ids["padding"]}.items() if v is not None}


def _json(data: Mapping[str, Any]) -> bytes:
    return encoded(data, indent=2) + b"\n"


# ---------------------------------------------------------------------------------------------------
# The header


class HeaderGoesOn(ZooError):
    """The header goes on beyond the bytes that are here."""


class _Cursor:
    """Reads values one after the other from the first `have` bytes of a mapped file, and says where it ends too early."""

    def __init__(self, data: mmap.mmap | bytes, who: str, have: int, values: int = MAX_VALUES) -> None:
        self.data, self.at, self.who, self.have, self.values = data, 0, who, have, values

    def take(self, n: int) -> bytes:
        if n < 0 or self.at + n > len(self.data):
            raise ZooError(
                f"{self.who}: header needs {n} bytes at byte {self.at}, the file has {len(self.data)}: "
                "truncated, fetch it again"
            )
        if self.at + n > self.have:
            raise HeaderGoesOn(
                f"{self.who}: the header goes on after byte {self.have}, where what is here ends"
            )
        self.at += n
        return self.data[self.at - n : self.at]

    def scalar(self, fmt: str) -> Any:
        (value,) = struct.unpack("<" + fmt, self.take(struct.calcsize("<" + fmt)))
        return value

    def string(self) -> str:
        raw = self.take(int.from_bytes(self.take(8), "little"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise ZooError(
                f"{self.who}: a name at byte {self.at} is not UTF-8 ({e.reason}): damaged file"
            ) from None

    def _strings(self, count: int) -> list[str]:
        """The same of a million of them, in half of the time."""
        data, at, end, found = self.data, self.at, min(self.have, len(self.data)), list[str]()
        for _ in range(count):
            stop = at + 8 + int.from_bytes(data[at : at + 8], "little")
            if stop > end:
                break
            try:
                found.append(data[at + 8 : stop].decode())
            except UnicodeDecodeError:
                break
            at = stop
        self.at = at
        return found if len(found) == count else [*found, self.string()]  # which says what is wrong with it

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return shortest(self.scalar(_SCALARS[kind])) if kind == 6 else self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ZooError(
                f"{self.who}: {key!r} has a value of unknown type {kind}: damaged, or of a newer format"
            )
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner == _STRING:
            self._at_most(count, 8, key)
            return self._strings(count)
        if inner not in _SCALARS:
            raise ZooError(f"{self.who}: {key!r} is an array of type {inner}, which is not supported")
        self._at_most(count, struct.calcsize(_SCALARS[inner]), key)
        fmt = f"<{count}{_SCALARS[inner]}"
        return list(struct.unpack(fmt, self.take(struct.calcsize(fmt))))

    def _at_most(self, count: int, size: int, key: str) -> None:
        if count * size > len(self.data) - self.at:
            raise ZooError(f"{self.who}: {key!r} claims {count} values, more than the file holds: damaged")
        self.values -= count
        if self.values < 0:  # as Python's objects they take many times the file's bytes
            raise ZooError(
                f"{self.who}: its arrays have more than {MAX_VALUES} values (up to {key!r}): no model's header"
            )


def read_header(
    file: Path, name: str, have: int | None = None, values: int = MAX_VALUES
) -> tuple[dict[str, Any], list[TensorRef]]:
    """Metadata and tensors of one file. Every count, type and range is checked against the file.

    `have`: how many of its bytes are there, if not all are; HeaderGoesOn is raised if they don't suffice. `values`: how many its
    arrays may have together.
    """
    size = file.stat().st_size
    if size < 24:
        raise ZooError(f"{file}: {size} bytes is too short for a GGUF file: truncated, fetch it again")
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return parse_header(data, size, name, str(file), have, values)


def parse_header(
    data: mmap.mmap | bytes, size: int, name: str, who: str, have: int | None = None, values: int = MAX_VALUES
) -> tuple[dict[str, Any], list[TensorRef]]:
    """As `read_header`, of the first bytes of a file of `size` bytes that is called `name`."""
    c = _Cursor(data, who, len(data) if have is None else have, values)
    if c.take(4) != MAGIC:
        refuse_pointer(data[:64], who)
        raise ZooError(
            f"{who}: does not start with GGUF: not a GGUF file (older GGML files are not supported)"
        )
    version = c.scalar("I")
    if version not in (2, 3):
        big = " (big-endian file)" if version in (2 << 24, 3 << 24) else ""
        raise ZooError(f"{who}: GGUF version {version}{big}; supported: 2 and 3, little-endian")
    n_tensors, n_fields = c.scalar("Q"), c.scalar("Q")
    if n_tensors > MAX_TENSORS or n_fields > MAX_FIELDS:
        raise ZooError(
            f"{who}: claims {n_tensors} tensors and {n_fields} fields; the limits are {MAX_TENSORS} and {MAX_FIELDS}"
        )
    if 24 * n_tensors + 13 * n_fields > size:
        raise ZooError(
            f"{who}: claims {n_tensors} tensors and {n_fields} fields, more than it holds: damaged"
        )
    metadata: dict[str, Any] = {}
    for _ in range(n_fields):
        key = c.string()
        if key in metadata:
            raise ZooError(f"{who}: header has the field {key!r} twice; which one is meant?")
        metadata[key] = c.value(c.scalar("I"), key)
    infos = [_tensor_info(c) for _ in range(n_tensors)]
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or align < 1 or align & (align - 1):
        raise ZooError(f"{who}: general.alignment is {align!r}; expected a power of two")
    data_start = -(-c.at // align) * align
    return metadata, _place(infos, data_start, align, size, name, who)


def _tensor_info(c: _Cursor) -> tuple[str, str, tuple[int, ...], int]:
    """(name, type name, shape [out, in], offset in the data part)."""
    name, n_dims = c.string(), c.scalar("I")
    if n_dims > 4:
        raise ZooError(
            f"{c.who}: tensor {name!r} has {n_dims} dimensions (limit 4): damaged, or of a newer format"
        )
    shape = tuple(c.scalar("Q") for _ in range(n_dims))[::-1]
    number, offset = c.scalar("I"), c.scalar("Q")
    if number not in TYPE_NAMES:
        raise ZooError(f"{c.who}: tensor {name!r} is of unknown GGUF type {number}; a newer zoo may know it")
    return name, TYPE_NAMES[number], shape, offset


def _place(
    infos: list[tuple[str, str, tuple[int, ...], int]], start: int, align: int, size: int, file: str, who: str
) -> list[TensorRef]:
    refs, names, expected = [], set(), 0
    for name, dtype, shape, offset in infos:
        tensor = f"{who}: tensor {name!r}"
        n = math.prod(shape) * ITEMSIZE[dtype] if dtype in _PLAIN else ggml.nbytes(dtype, shape, tensor)
        if start + offset + n > size:
            raise ZooError(
                f"{tensor} ends at byte {start + offset + n}, the file has {size}: truncated, fetch it again"
            )
        if offset != expected:  # as ggml has it: another type or offset would be another tensor's bytes
            raise ZooError(
                f"{tensor} is at byte {offset} of the data, and those before it end at {expected}: damaged"
            )
        expected += -(-n // align) * align
        if name in names:
            raise ZooError(f"{who}: header names {name!r} twice")
        names.add(name)
        refs.append(TensorRef(name, dtype, shape, file, start + offset, n))
    return refs
