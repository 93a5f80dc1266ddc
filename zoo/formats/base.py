"""What every reader gives: a `Checkpoint`, i.e. its config and its tensors by name, each a byte range.

A reader looks at headers only. Nothing in this module reads a weight.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shlex
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.untrusted.bounded import parse_json
from zoo.untrusted.plain import open_file

ITEMSIZE = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element by safetensors dtype name. Sub-byte types travel packed, as U8 or I32."""

FLOATS = ("F64", "F32", "F16", "BF16")
COUNTS = ("I64", "I32")
"""Of a table of whole numbers (`Slot.counts`)."""
HF_NAMINGS = ("hf", "transformers", "saved")
"""Names that files of Hugging Face's kind may have, in the order in which they are tried: a release's; those that transformers' classes
have in memory; what `save_pretrained` writes where that is neither, each spelling (`RuleSet.prefixes`) at the place of the
release's that it stands for."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor's bytes in a file: `nbytes` from absolute `offset`, row-major.

    `dtype` is a safetensors dtype name; for a GGUF block type it is the ggml name (`Q4_K`), `shape`
    is then the logical one. `shape` is [out, in] order, as torch prints it.
    `strides` (elements) is set only where a pickle holds a non-contiguous view.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str  # relative to the checkpoint's folder, forward slashes
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass
class Checkpoint:
    """A released checkpoint, opened: names and byte ranges, no data.

    `format` is what the files are ("safetensors", "gguf", "pickle", "meta", "mistral", ...); a
    family's rules are looked up by `naming`. `config` is in Hugging Face terms, whatever the format's own.
    `carried` are the files taken along verbatim (tokenizer, templates, generation settings, config).
    `headers` holds the raw header of each safetensors file so that export can give it back to the byte; `around`, of files
    with more than one, all that is no tensor's (`zoo.formats.around`).
    `synthesised` are small files the reader makes from what the format embeds (a GGUF's tokenizer).
    """

    root: Path
    format: str
    naming: tuple[str, ...]
    config: dict[str, Any]
    tensors: dict[str, TensorRef]
    files: dict[str, int]  # weight files and their sizes in bytes
    carried: tuple[str, ...] = ()
    headers: dict[str, bytes] = field(default_factory=dict)
    around: dict[str, bytes] = field(default_factory=dict)
    synthesised: dict[str, bytes] = field(default_factory=dict)
    n_ranks: int = 1
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    chosen: str | None = None  # the file or index that was named, where not the folder was

    def path(self, file: str) -> Path:
        return self.root / file


LFS = b"version https://git-lfs"
"""How a pointer begins that a clone without git-lfs has in a file's place."""


COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"7z\xbc\xaf": "7-Zip",
}


def refuse_pointer(start: bytes, who: str, text: bool = False) -> None:
    """Raises ZooError where a file's first bytes (at least 4; better 64) are those of what was saved in its place: a git-lfs
    pointer, a web page or another answer of a server, zeros of a download that was not written, a compressed file.
    `text`: the file itself is one, so that only what no JSON begins with counts."""
    if start.lstrip().startswith(b"<"):
        raise ZooError(
            f"{who}: a web page, of an error or of a login, that was saved in the file's place: fetch it again"
        )
    if len(start) >= 4 and LFS.startswith(start[: len(LFS)]):
        raise ZooError(
            f"{who}: a git-lfs pointer of some 130 bytes, not the file itself: `git lfs install && git lfs pull` in its folder"
        )
    if not start.strip() and text:
        raise ZooError(f"{who}: empty: fetch it again")
    if len(start) >= 8 and not any(start):
        raise ZooError(
            f"{who}: begins with zeros, where a download reserved the space and did not end: fetch it again"
        )
    if (
        how := next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), None)
    ) is not None:
        raise ZooError(f"{who}: compressed ({how}): unpack it first")
    if len(start) >= 8 and not text and all(32 <= c < 127 or c in b"\t\r\n" for c in start):
        raise ZooError(
            f"{who}: a text (it begins {start[:40].decode()!r}), an answer that was saved in the file's place: fetch it again"
        )


MAX_NAME = 512
"""Characters of a tensor's name; released ones have some 100."""
MAX_NAMES = 32 << 20
"""Of all names of a checkpoint, which are gone over many times; the largest releases have some 10 million."""
MAX_TENSORS = 1 << 18
"""Of a checkpoint, and so of each of its files; the largest releases have some 210,000."""
MAX_HEADERS = 128 << 20
"""Bytes of the headers of a checkpoint's files, which are kept for the round trip; those of the largest release are 15 MB."""
MAX_JSON = 256 << 20
"""Bytes of a config or an index; the largest releases have some 10 MB."""


def read_json(path: Path, what: str, *, given: bool = False) -> dict[str, Any]:
    """Parse a JSON object from `path`, or say what is wrong with it. A link that leads out of its folder is refused, unless the file
    itself was `given` by the user."""
    raw = b""
    try:
        if not given and path.is_symlink() and path.exists():
            inside(path.parent, path.name, str(path.parent))
        found = os.stat(path)
        if stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode) or found.st_size > MAX_JSON:
            raise ZooError(f"{path}: no file of JSON, or one of over {MAX_JSON >> 20} MiB; {what}")
        with open(path, "rb") as f:
            raw = f.read()
        data = parse_json(raw)
    except FileNotFoundError:
        raise ZooError(f"{path}: {leads_nowhere(path) or 'missing'}; {what}") from None
    except ValueError as e:  # bad UTF-8, bad JSON, more of it than any release has
        refuse_pointer(raw[:64], str(path), text=True)
        raise ZooError(f"{path}: not valid JSON ({e}); {what}") from None
    except OSError as e:
        raise ZooError(f"{path}: {e.strerror}; {what}") from None
    if not isinstance(data, dict):
        raise ZooError(f"{path}: expected a JSON object, found {type(data).__name__}; {what}")
    return data


def leads_nowhere(path: Path) -> str | None:
    """What to say of a link to nothing, as a cache has whose blobs were removed or not copied; None of any other path."""
    with contextlib.suppress(OSError):
        if path.is_symlink() and not path.exists():
            return f"a link to {os.readlink(path)}, where there is nothing: was it copied without the files, or are they on another disk?"
    return None


def encoded(data: Any, **how: Any) -> bytes:
    """JSON in UTF-8; escaped where that can't hold a name (of a file, say, in another encoding)."""
    try:
        return json.dumps(data, ensure_ascii=False, **how).encode()
    except UnicodeEncodeError:
        return json.dumps(data, **how).encode()


RELEASED = "config.released.json"
"""What a canonical folder calls the release's config.json. Under its own name transformers would take the folder for the
release, and go on with random weights under names that it does not find."""


def kept_as(name: str) -> str:
    """What a file of the release is called in a canonical folder."""
    return RELEASED if name == "config.json" else name


def place_of(root: Path, name: str) -> Path:
    """Where a release's file lies in a folder: the release's own, or a canonical one."""
    return path if (path := root / name).exists() else root / kept_as(name)


MAX_SMALL = 256 << 20
"""Bytes of a file that lies beside weights and goes along."""


def read_small(root: Path, name: str) -> bytes:
    """A file that goes along, of a release or a canonical folder. It was looked at before, and may be another by now: no link out of
    the folder is followed, no pipe waited for, and nothing read that is larger than any. Raises ZooError."""
    path = inside(root, place_of(root, name).relative_to(root).as_posix(), str(root))
    try:
        with open(open_file(path), "rb") as f:
            found = os.fstat(f.fileno())
            if found.st_size > MAX_SMALL or not os.path.samestat(found, path.stat()):
                raise ZooError(
                    f"{path}: it was changed meanwhile, or has more than {MAX_SMALL >> 20} MiB: start again"
                )
            return f.read()
    except OSError as e:
        raise ZooError(f"{path}: cannot be read: {e.strerror}") from None


def leads_out(name: str) -> bool:
    """Whether a file's name is not that of a file below the folder that it is put in."""
    parts = Path(name).parts
    return Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name or not parts


def inside(root: Path, name: str, who: str) -> Path:
    """`root / name`, refused unless it is a plain file name below `root` that doesn't lead out of it.

    The Hub's cache links files from `snapshots/` to `blobs/` of the same model: that is allowed.
    """
    path = root / name
    if leads_out(name):
        raise ZooError(f"{who} names {name!r}, which is outside the checkpoint's folder: refused")
    try:
        there = path.exists() or path.is_symlink()
    except OSError as e:  # a name longer than names can be
        raise ZooError(f"{who} names {name!r:.200}, which can't be opened: {e.strerror}") from None
    if not there:
        raise ZooError(
            f"{who} names {name!r}, but there is no such file in {root}: is the download complete?"
        )
    try:
        real, base = path.resolve(), root.resolve()
    except (OSError, RuntimeError):  # the latter up to Python 3.12
        raise ZooError(f"{path} is a symlink that leads in a circle") from None
    allowed = [base]
    for snapshot in (base, base.parent):  # or a folder in one
        if snapshot.parent.name == "snapshots":
            allowed.append(snapshot.parent.parent / "blobs")
    if not any(real.is_relative_to(a) for a in allowed):
        # A repository can hold links, too, and a carried file is copied: nothing tells a hostile link from one's own.
        raise ZooError(
            f"{path} is a symlink to {real}, outside the checkpoint's folder: refused, as files that were downloaded "
            f"could lead anywhere. If the links are your own, give the folder that they lead to, or one without links: "
            f"`cp -rL {shlex.quote(str(root))} COPY` (`cp -rlL` takes no space on the same disk)"
        )
    if not real.is_file():
        kind = "a folder, where a file is expected" if real.is_dir() else "not a regular file"
        raise ZooError(f"{path} is {leads_nowhere(path) or kind}")
    return path


def is_stray(name: str) -> bool:
    """Whether a file of this name is one that systems strew about: no part of a checkpoint."""
    return name in (".DS_Store", "Thumbs.db", "desktop.ini") or name.startswith("._")


def named(folder: Path, pattern: str) -> list[str]:
    """The names of the files in a folder that match, in order; stray ones (`._model.safetensors`) are not among them."""
    return sorted(p.name for p in folder.glob(pattern) if not is_stray(p.name))


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".ckpt")
TEMPLATES = "additional_chat_templates"
"""The one folder beside the weights whose files are carried."""
_CARRY_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md", ".tiktoken", ".jsonl")


MAX_BESIDE = 20_000
"""Files and folders in a checkpoint's folder, which are gone through for each thing that may be there."""


def refuse_crowd(folder: Path) -> None:
    """Raises ZooError for a folder of more than any release has."""
    with os.scandir(folder) as entries:
        if next(itertools.islice(entries, MAX_BESIDE, None), None) is not None:
            raise ZooError(
                f"{folder}: more than {MAX_BESIDE} files lie in it: give a folder of the model's own, or name its file"
            )


MAX_DEPTH = 64
"""Folders in folders."""


def files_below(folder: Path) -> set[str]:
    """Names of all files in a folder and those in it, links included. Raises ZooError for folders without end."""
    left, found = [(str(folder), "", 0)], set[str]()
    while left:
        path, name, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ZooError(f"{path:.200}...: more than {MAX_DEPTH} folders in one another: refused")
        with os.scandir(path) as entries:
            for e in entries:
                if e.is_dir(follow_symlinks=False):
                    left.append((e.path, f"{name}{e.name}/", depth + 1))
                else:
                    found.add(name + e.name)
    return found


def add_tensors(
    tensors: dict[str, TensorRef], refs: Iterable[TensorRef], file: Path, most: int | None = None
) -> None:
    """Add those of one file to those of the others. Raises ZooError for a name that two files have, and for more of them all
    than any release has (`most`; MAX_TENSORS)."""
    for ref in refs:
        if (other := tensors.get(ref.name)) is not None:
            raise ZooError(
                f"{file}: tensor {ref.name!r} is also in {other.file}; which one is meant? Say it with --file"
            )
        tensors[ref.name] = ref
    if len(tensors) > (most := MAX_TENSORS if most is None else most):
        raise ZooError(
            f"{file}: with its own the files have {len(tensors)} tensors (limit {most}): no release has as many"
        )


MAX_SMALL_FILES = 2_000
"""Of them; a release has some 20."""


def carried_files(root: Path) -> tuple[str, ...]:
    """Small files beside the weights that belong to the model: config, tokenizer, templates, licence.
    Code is never carried (`*.py` of repositories with remote code). Raises ZooError for more of them than any release has."""
    out: list[str] = []
    for p in sorted([*root.iterdir(), *(root / TEMPLATES).glob("*.jinja")]):
        keep = p.suffix in _CARRY_SUFFIXES or p.name.upper().startswith(
            ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "TOKENIZER.MODEL.V")
        )
        if (
            keep
            and not is_stray(p.name)
            and p.suffix not in WEIGHT_SUFFIXES
            and p.is_file()
            and p.stat().st_size < MAX_SMALL
        ):
            if p.name not in ("zoo.json", "parity.json"):
                name = p.relative_to(root).as_posix()
                inside(root, name, str(root))
                out.append(name)
                if len(out) > MAX_SMALL_FILES:
                    raise ZooError(
                        f"{root}: more than {MAX_SMALL_FILES} small files lie beside the weights ({name} is one), and each would be carried "
                        "along: give a folder of the model's own"
                    )
    return tuple(out)
