"""Safetensors cut for tensor-parallel ranks: `pytorch_model-NNNNN-TP-RRR.safetensors` (Grok 2.5).

One group of tensors per file number. `TP-common` holds them whole; `TP-000`, `TP-001`, ... each hold a slice
of the same tensors under the same names, called `rank{r}.<name>` here: the rules say along which axis.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from zoo.errors import ZooError
from zoo.formats.base import (
    HF_NAMINGS,
    Checkpoint,
    TensorRef,
    add_tensors,
    carried_files,
    inside,
    named,
    read_json,
)
from zoo.formats.safetensors import parse_header, read_header, refuse_long

_FILE = re.compile(r"(?P<group>.+)-TP-(?P<rank>\d{3}|common)\.safetensors")


def detect(path: Path) -> bool:
    return path.is_dir() and bool(named(path, "*-TP-*.safetensors"))


def open(path: Path) -> Checkpoint:
    """Open a folder with `config.json` and such files. Raises ZooError if ranks are missing or disagree."""
    root = path if path.is_dir() else path.parent
    config = read_json(root / "config.json", "a checkpoint needs its config to be understood")
    ranks = _groups(root)
    tensors: dict[str, TensorRef] = {}
    files: dict[str, int] = {}
    headers: dict[str, bytes] = {}
    kept = 0
    for group in ranks.values():
        first: dict[str, TensorRef] = {}
        for name in group.values():
            file = inside(root, name, str(root))
            files[name] = file.stat().st_size
            headers[name] = raw = read_header(file)
            refuse_long(kept := kept + len(raw), file)
            refs = {t.name: t for t in parse_header(raw, name, files[name], str(file))}
            first = first or refs
            _agree(first, refs, file)
            add_tensors(tensors, (replace(t, name=full_name(name, t.name)) for t in refs.values()), file)
    n_ranks = max((len(g) for g in ranks.values()), default=1)
    return Checkpoint(
        root, "sharded", HF_NAMINGS, config, tensors, files, carried_files(root), headers, n_ranks=n_ranks
    )  # fmt: skip


def full_name(file: str, tensor: str) -> str:
    """What a tensor of this file is called here: by its rank too, if it is a slice."""
    m = _FILE.fullmatch(file)
    return tensor if m is None or m["rank"] == "common" else f"rank{int(m['rank'])}.{tensor}"


def _groups(root: Path) -> dict[str, dict[int | None, str]]:
    """Files by group, then by rank (None: common). Every group that is cut must have the same ranks."""
    out: dict[str, dict[int | None, str]] = {}
    for name in named(root, "*-TP-*.safetensors"):
        if m := _FILE.fullmatch(name):
            rank = None if m["rank"] == "common" else int(m["rank"])
            out.setdefault(m["group"], {})[rank] = name
    n = max((r + 1 for group in out.values() for r in group if r is not None), default=1)
    for name, group in out.items():
        if None in group:
            if len(group) > 1:
                raise ZooError(f"{root}: {name} is both common and cut into ranks; which one is meant?")
            continue
        if missing := [r for r in range(n) if r not in group]:
            raise ZooError(
                f"{root}: {name}-TP-{missing[0]:03d}.safetensors is missing ({len(group)} of {n} ranks are there): "
                "is the download complete?"
            )
    return out


def _agree(first: dict[str, TensorRef], refs: dict[str, TensorRef], file: Path) -> None:
    if odd := sorted(set(first) ^ set(refs)):
        raise ZooError(f"{file}: the ranks disagree: {odd[0]!r} is not in every rank's file")
    for name, t in refs.items():
        if (t.shape, t.dtype) != (first[name].shape, first[name].dtype):
            raise ZooError(
                f"{file}: the ranks disagree: {name!r} is {t.dtype} {list(t.shape)} here and {first[name].dtype} "
                f"{list(first[name].shape)} in {first[name].file}"
            )
