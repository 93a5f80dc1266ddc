"""Several sets of weights in one folder: which one is read, and how to say which.

transformers' `from_pretrained` takes the first of `ORDER` that is there (modeling_utils, 5.23), unless the config
names another (`transformers_weights`). zoo takes the same, and says what else lies there: an older save beside a newer
one, a variant (`model.fp16.safetensors`), the vendor's own files, GGUFs. Any of them can be named with `--file`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import MAX_TENSORS, Checkpoint, inside, read_json
from zoo.untrusted.printable import decimal

ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX = re.compile(r".+\.(safetensors|bin)\.index(\.[^.]+)?\.json")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".gguf")
_NO_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|rng_state|scaler|adapter_model|mmproj)\b.*|.*mmproj.*|openvino_.*|\._.*"
)

MAX_INDICES = 24 << 20
"""Bytes of the indices beside the one that is read; that of the largest release has 10 MB."""
MAX_SHARDS = 10_000
"""Of a set, each of which is looked up."""


def is_index(name: str, suffix: str) -> bool:
    """Whether a file is called as an index of shards with this suffix is, a variant's too."""
    m = _INDEX.fullmatch(name)
    return m is not None and f".{m[1]}" == suffix


def taken(root: Path, config: dict[str, Any] | None = None) -> str | None:
    """The file of weights, or the index, that `from_pretrained(root)` opens; None if it would find none."""
    if config is None and (root / "config.json").is_file():
        config = read_json(root / "config.json", "a checkpoint needs its config to be understood")
    if (told := (config or {}).get("transformers_weights")) is not None:
        if not isinstance(told, str) or not (told.endswith(".safetensors") or is_index(told, ".safetensors")):
            raise ZooError(
                f"{root / 'config.json'}: transformers_weights is {told!r:.100}; expected a *.safetensors file or its index"
            )
        inside(root, told, str(root / "config.json"))
        return told
    return next((name for name in ORDER if (root / name).is_file()), None)


def members(root: Path, entry: str) -> list[str]:
    """The files of weights of a set: itself, or those that it, an index, names."""
    if not _INDEX.fullmatch(entry):
        return [entry]
    return sorted({*weight_map(root / entry).values()})


def weight_map(index: Path, why: str = "it lists the shards") -> dict[str, str]:
    """Of each tensor that an index names the file, without a "./" in front. `why` it is read, for the error."""
    said = read_json(index, why).get("weight_map")
    if not isinstance(said, dict) or not all(isinstance(v, str) for v in said.values()):
        raise ZooError(f"{index}: expected an object 'weight_map' of tensor names to file names")
    if len(said) > MAX_TENSORS:  # before it is gone over, which is more than once
        raise ZooError(f"{index}: names {len(said)} tensors (limit {MAX_TENSORS}): no release has as many")
    if (n := len(set(said.values()))) > MAX_SHARDS:
        raise ZooError(f"{index}: names {n} files (limit {MAX_SHARDS}): no release has as many")
    return {name: file.removeprefix("./") for name, file in said.items()}


def names(root: Path, index: str, files: Iterable[str]) -> bool:
    """Whether an index is of these files. One that can't be read is of none: it is not what is read."""
    try:
        return set(members(root, index)) == set(files)
    except ZooError:
        return False


def others(ckpt: Checkpoint) -> list[str]:
    """The other sets of weights beside the one that was opened, each by the name that `--file` takes."""
    named: set[str] = set(ckpt.files)
    found = []
    files_of = _some(ckpt.root)
    opened = ckpt.chosen
    if opened is None and ckpt.format in ("safetensors", "pickle"):
        opened = taken(ckpt.root, ckpt.config)
    for path in sorted(ckpt.root.iterdir()):
        if path.name == opened or not _INDEX.fullmatch(path.name) or not path.is_file():
            continue
        try:
            files = set(files_of(path.name))
        except ZooError:  # not the one that is read
            continue
        if files != set(ckpt.files) and any((ckpt.root / f).is_file() for f in files):
            found.append(path.name)
        named |= files
    for path in sorted(ckpt.root.iterdir()):
        weights = path.suffix in _WEIGHTS and path.is_file() and not _NO_WEIGHTS.fullmatch(path.name)
        if weights and path.name not in named:
            found.append(path.name)
    return found


def note(ckpt: Checkpoint, chosen: str | None) -> str | None:
    """What to say where a folder holds more than the set that was opened; None where it does not."""
    if not (found := others(ckpt)):
        return None
    listed = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
    if chosen is not None:
        return f"weights: {chosen}, as asked for; also here and not read: {listed}"
    entry = taken(ckpt.root, ckpt.config if ckpt.format in ("safetensors", "pickle") else {})
    files = next(iter(ckpt.files)) if len(ckpt.files) == 1 else f"{len(ckpt.files)} files"
    if entry is not None and set(members(ckpt.root, entry)) == set(ckpt.files):
        why = f"weights: {entry}, which transformers' from_pretrained takes"
    else:
        why = f"weights: {files} ({ckpt.format})"
    return f"{why}; also here and not read: {listed}; to take one of them, name it with --file"


# ---------------------------------------------------------------------------------------------------
# What there is to choose from


class Ambiguous(ZooError):
    """A folder or a repository holds several sets of weights, and nothing says which one is meant."""


@dataclass(frozen=True)
class WeightSet:
    """Weights that are opened together. `name`: what `--file` takes; `nbytes`: of all its files; `quantisation`: what its
    name says (Q4_K_M, fp16), "" where it says nothing."""

    name: str
    files: tuple[str, ...]
    nbytes: int

    @property
    def quantisation(self) -> str:
        found = _QUANTISATION.findall(self.name)
        return found[-1].upper() if found and self.name.endswith(".gguf") else found[-1] if found else ""

    def __str__(self) -> str:
        what = f", {self.quantisation}" if self.quantisation else ""
        return f"{self.name} ({decimal(self.nbytes)}{what})"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "files": len(self.files), "bytes": self.nbytes} | (
            {"quantisation": self.quantisation} if self.quantisation else {}
        )


_PART = re.compile(r"(?P<stem>.*)-\d{5}-of-\d{5}(?P<suffix>\.\w+)")
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<at>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.\w+)")
_QUANTISATION = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4\w*|NVFP4|BF16|F(?:P)?(?:8|16|32)|INT[48]|[48]bit))(?![A-Za-z0-9])",
    re.I,
)


def listed(
    sizes: Mapping[str, int], index: Callable[[str], Collection[str]] | None = None
) -> list[WeightSet]:
    """The sets of weights among files, given by path and size. `index`: the files that an index names, by its path; without
    it shards are known by their numbers."""
    left = {
        path: n
        for path, n in sizes.items()
        if path.endswith(_WEIGHTS) and not _NO_WEIGHTS.fullmatch(path.rpartition("/")[2])
    }
    found: list[tuple[str, list[str]]] = []
    for path in sorted(sizes):
        folder, slash, name = path.rpartition("/")
        if index is None or not _INDEX.fullmatch(name):
            continue
        try:
            mine = [folder + slash + file for file in index(path)]
        except ZooError:  # one that can't be read is of no set
            continue
        if mine and all(file in left for file in mine) and mine != [path.removesuffix(".index.json")]:
            found.append((path, mine))
    for file in {file for _, mine in found for file in mine}:
        left.pop(file, None)
    parts: dict[str, list[str]] = {}
    for path in sorted(left):
        m = _PART.fullmatch(path)
        ranks = re.sub(r"consolidated\.\d\d\.pth$", "", path) if path.endswith(".pth") else path
        key = m["stem"] + m["suffix"] if m else ranks
        parts.setdefault(key, []).append(path)
    for key, mine in parts.items():
        whole = f"{key}.index.json"
        folder = key.rstrip("/") if key.endswith("/") else ""  # Meta's ranks are opened by their folder
        found.append((folder or (whole if whole in sizes and _PART.fullmatch(mine[0]) else mine[0]), mine))
    return sorted(
        (WeightSet(name, tuple(mine), sum(sizes[f] for f in mine)) for name, mine in found),
        key=lambda s: s.name,
    )


def here(root: Path) -> list[WeightSet]:
    """The sets of weights in a folder and in the folders in it."""
    paths = [p for pattern in ("*", "*/*") for p in root.glob(pattern) if p.is_file()]
    sizes = {p.relative_to(root).as_posix(): p.stat().st_size for p in paths}
    return listed(sizes, _some(root))


def _some(root: Path) -> Callable[[str], list[str]]:
    """`members` of the indices below a folder, which raises ZooError from there on where these are too large together."""
    left = MAX_INDICES

    def files_of(path: str) -> list[str]:
        nonlocal left
        index = root / path
        if (left := left - index.stat().st_size) < 0:
            raise ZooError(f"{index}: with those before it over {MAX_INDICES >> 20} MiB of indices: not read")
        return members(index.parent, index.name)

    return files_of


def incomplete(files: Collection[str]) -> str | None:
    """What is missing of files that are numbered shards, by their names; None if nothing is, or they are not numbered."""
    numbered = [m for f in files if (m := _NUMBERED.fullmatch(f))]
    if not numbered or len(numbered) != len(files):
        return None
    total = int(numbered[0]["total"])
    here = {int(m["at"]) for m in numbered}
    away = [n for n in range(1, min(total, 1000) + 1) if n not in here]
    if not away:
        return None
    first = f"{numbered[0]['stem']}-{away[0]:05d}-of-{total:05d}{numbered[0]['suffix']}"
    return f"{len(here)} of {total} shards are here ({first} is not)"


def which(where: str, among: Collection[WeightSet]) -> Ambiguous:
    """The refusal to guess, which names the sets and the flag."""
    shown = ", ".join(map(str, list(among)[:12])) + (
        f" and {len(among) - 12} more" if len(among) > 12 else ""
    )
    return Ambiguous(f"{where}: {len(among)} sets of weights; say with --file which one is meant: {shown}")
