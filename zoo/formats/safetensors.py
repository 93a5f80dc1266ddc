"""Hugging Face safetensors: one file, or shards with `model.safetensors.index.json`.

The header is parsed here rather than by the library so that its bytes can be kept for the round trip,
and every way in which it can lie is named. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.formats import sets
from zoo.formats.base import (
    HF_NAMINGS,
    ITEMSIZE,
    MAX_HEADERS,
    MAX_NAME,
    MAX_TENSORS,
    Checkpoint,
    TensorRef,
    add_tensors,
    carried_files,
    encoded,
    inside,
    named,
    read_json,
    refuse_pointer,
)
from zoo.untrusted.bounded import parse_json, uncollected

MAX_HEADER = 100 << 20  # bytes; the reference implementation's own limit
MAX_RANK = 64  # axes of a tensor
INDEX = "model.safetensors.index.json"


def detect(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".safetensors" or sets.is_index(path.name, ".safetensors")
    if (path / INDEX).exists() or (path / "model.safetensors").exists():
        return True
    pickled = any((path / name).is_file() for name in sets.ORDER)  # before other names, for transformers too
    return bool(named(path, "*.safetensors")) and not pickled


def open(path: Path) -> Checkpoint:
    """Open a folder with `config.json` and safetensors files (or one such file, or an index, beside a config)."""
    root = path if path.is_dir() else path.parent
    config = read_json(root / "config.json", "a checkpoint needs its config to be understood")
    entry = path.name if path.is_file() else sets.taken(root, config)
    if entry is None or not (entry.endswith(".safetensors") or sets.is_index(entry, ".safetensors")):
        entry = None
    if entry is None or not sets.is_index(entry, ".safetensors"):
        return open_files(root, weight_files(root) if entry is None else [entry], config, entry)
    index = sets.weight_map(root / entry)
    return open_files(root, sorted({*index.values()}), config, entry, index)


def open_files(
    root: Path,
    names: Iterable[str],
    config: dict[str, Any],
    entry: str | None = None,
    index: Mapping[str, str] | None = None,
) -> Checkpoint:
    """The checkpoint that is made of these files of a folder; `entry`: the index that names them, or the file; `index`: what that says,
    if it was read."""
    tensors: dict[str, TensorRef] = {}
    files: dict[str, int] = {}
    headers: dict[str, bytes] = {}
    kept = 0
    for name in names:
        file = inside(root, name, INDEX)
        files[name] = file.stat().st_size
        headers[name] = raw = read_header(file)
        refuse_long(kept := kept + len(raw), file)
        add_tensors(tensors, parse_header(raw, name, files[name], str(file)), file)
    if entry is not None and entry not in files:
        check_index(sets.weight_map(root / entry) if index is None else index, tensors, root / entry)
    # The index of another set would describe files that the copy does not have.
    carried = tuple(n for n in carried_files(root) if n != INDEX or n == entry or sets.names(root, n, files))
    return Checkpoint(root, "safetensors", HF_NAMINGS, config, tensors, files, carried, headers)


def weight_files(root: Path) -> list[str]:
    """The weight files of a folder: `model.safetensors`, else those the index names, else all `*.safetensors` if they
    are one set. Raises ZooError for an index that is not one or names files elsewhere."""
    names = named(root, "*.safetensors")
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if (root / INDEX).exists():
        return sets.members(root, INDEX)
    if len(names) > 1 and any("-of-" in n for n in names):
        raise ZooError(f"{root}: {len(names)} shards but no {INDEX}: is the download complete?")
    return names


def check_index(weight_map: Mapping[str, str], tensors: dict[str, TensorRef], index: Path) -> None:
    """The index and the shards' headers must tell the same story."""
    for name, file in weight_map.items():
        ref = tensors.get(name)
        if ref is None:
            raise ZooError(f"{index}: says {name!r} is in {file}, but that file does not have it")
        if ref.file != file:
            raise ZooError(f"{index}: says {name!r} is in {file}, but it is in {ref.file}")
    # A tensor that is in a shard but not in the index is kept: the files are what was released.


def read_header(file: Path) -> bytes:
    """The raw JSON header of a safetensors file, length-checked against the file."""
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        n = header_length(start, size, str(file))
        raw = f.read(n)
    if len(raw) != n:
        raise ZooError(f"{file}: header of {n} bytes ends after {len(raw)}: truncated file, fetch it again")
    return raw


def refuse_long(kept: int, file: Path) -> None:
    """Raises ZooError where the headers of the files up to this one, `kept` bytes, are longer than any release's."""
    if kept > MAX_HEADERS:
        raise ZooError(
            f"{file}: with its header the files have {kept} bytes of headers (limit {MAX_HEADERS})"
        )


def header_length(first8: bytes, size: int, who: str) -> int:
    """Header length in bytes from a file's first 8, checked against the file's `size`."""
    if len(first8) < 8:
        refuse_pointer(first8, who)
        raise ZooError(f"{who}: {size} bytes is too short for a safetensors file: truncated, fetch it again")
    (n,) = struct.unpack("<Q", first8)
    if not 8 < 8 + n <= size:  # any other is a length: 15,392 begins as a web page may, with " <"
        refuse_pointer(first8, who)
    if n > MAX_HEADER:
        raise ZooError(f"{who}: claims a header of {n} bytes (limit {MAX_HEADER}): not a safetensors file?")
    if 8 + n > size:
        raise ZooError(f"{who}: claims a header of {n} bytes, the file has {size}: truncated, fetch it again")
    return int(n)


@uncollected()
def parse_header(raw: bytes, file: str, size: int, who: str) -> Iterable[TensorRef]:
    """Tensors of a header. Checks dtypes, shapes against byte counts, and that the ranges tile the
    data part of a file of `size` bytes without overlap or gap."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        d = dict(items)
        if len(d) != len(items):
            seen: set[str] = set()
            twice = next(k for k, _ in items if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ZooError(f"{who}: header names {twice!r} twice")
        return d

    if (objects := raw.count(b"{")) > 2 * MAX_TENSORS:  # before they are made; a name may have some, too
        raise ZooError(
            f"{who}: header names {objects - 1} tensors (limit {MAX_TENSORS}): no release's file has as many"
        )
    try:
        header = parse_json(raw, pairs)
    except ValueError as e:
        raise ZooError(f"{who}: header is not valid JSON ({e})") from None
    if not isinstance(header, dict):
        raise ZooError(f"{who}: header is not a JSON object")
    if len(header) > MAX_TENSORS + 1:
        raise ZooError(
            f"{who}: header names {len(header)} tensors (limit {MAX_TENSORS}): no release's file has as many"
        )
    data = 8 + len(raw)
    out = []
    for name, t in header.items():
        if name == "__metadata__":
            continue
        if len(name) > MAX_NAME:
            raise ZooError(
                f"{who}: a tensor's name has {len(name)} characters (limit {MAX_NAME}): {name:.100}"
            )
        try:
            dtype, shape, (begin, end) = t["dtype"], tuple(t["shape"]), t["data_offsets"]
            numbers = (*shape, begin, end)
            ok = type(dtype) is str and set(map(type, numbers)) == {int} and min(numbers) >= 0
            ok = ok and len(shape) <= MAX_RANK
        except (TypeError, KeyError, ValueError):
            ok = False
        if not ok:
            raise ZooError(
                f"{who}: tensor {name!r}: expected dtype, shape and data_offsets, found {t!r}"[:400]
            )
        if dtype not in ITEMSIZE:
            raise ZooError(f"{who}: tensor {name!r} has dtype {dtype!r}; known: {', '.join(ITEMSIZE)}")
        ref = TensorRef(name, dtype, shape, file, data + begin, end - begin)
        want = ref.size * ITEMSIZE[dtype]
        if end - begin != want:
            raise ZooError(
                f"{who}: tensor {name!r} {dtype} {list(shape)} needs {want} bytes, its offsets "
                f"[{begin}, {end}] hold {end - begin}"
            )
        if data + end > size:
            raise ZooError(
                f"{who}: tensor {name!r} ends at byte {data + end}, the file has {size}: truncated, fetch it again"
            )
        out.append(ref)
    at = data
    for ref in sorted(out, key=lambda r: (r.offset, r.nbytes)):
        if ref.offset != at:
            kind = (
                "overlaps another"
                if ref.offset < at
                else f"leaves {ref.offset - at} bytes unaccounted for before it"
            )
            raise ZooError(f"{who}: tensor {ref.name!r} at byte {ref.offset} {kind}")
        at = ref.offset + ref.nbytes
    if at != size:
        raise ZooError(f"{who}: tensors end at byte {at}, the file has {size}: {size - at} bytes too many")
    return out


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> bytes:
    """Header for tensors (name, dtype, shape) stored in this order, padded to 8 bytes, with its length
    in front: what a safetensors file starts with."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        n = ITEMSIZE[dtype]
        for d in shape:
            n *= d
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n]}
        at += n
    raw = encoded(header, separators=(",", ":"))
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
