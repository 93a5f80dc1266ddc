"""Several sets of weights in one folder: which one is read, and how to say which.

transformers' `from_pretrained` takes the first of `ORDER` that is there (modeling_utils, 5.23), unless the config
names another (`transformers_weights`). zoo takes the same, and says what else lies there: an older save beside a newer
one, a variant (`model.fp16.safetensors`), the vendor's own files, GGUFs. Any of them can be named with `--file`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import Checkpoint, inside, read_json

ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX = re.compile(r".+\.(safetensors|bin)\.index(\.[^.]+)?\.json")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".gguf")
_NO_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|rng_state|scaler|adapter_model|mmproj)\b.*|.*mmproj.*"
)


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
    weight_map = read_json(root / entry, "it lists the shards").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ZooError(f"{root / entry}: expected an object 'weight_map' of tensor names to file names")
    return sorted(set(weight_map.values()))


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
    for path in sorted(ckpt.root.iterdir()):
        if not _INDEX.fullmatch(path.name) or not path.is_file():
            continue
        try:
            files = set(members(ckpt.root, path.name))
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


def below(root: Path) -> list[str]:
    """Files of weights in the folders of a folder, for one that holds none itself."""
    found = (p for p in root.glob("*/*") if p.suffix in (".gguf", ".safetensors") and p.is_file())
    return sorted(p.relative_to(root).as_posix() for p in found)
