"""Meta's own files: `consolidated.00.pth` and so on, one per tensor-parallel rank, and `params.json`.

- Each rank holds its slice of every matrix, and a copy of what is not cut (norms). Here a tensor of rank r
  is called `rank{r}.<name>`; the rules say along which axis it was cut.
- q and k rows are in interleaved RoPE order.
- A tied head (Llama 3.2) lies in them under its own name, as the embedding's bytes.
- The files do not say how many ranks there should be; the shapes do.

Mistral's first releases used the same container for one rank, with their own params.json.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from zoo import families
from zoo.errors import ZooError
from zoo.formats.around import taken
from zoo.formats.base import Checkpoint, TensorRef, carried_files, inside, read_json
from zoo.formats.pickle import Budget, read_pickle

_FILE = re.compile(r"consolidated\.([0-9]{1,5})\.pth")
# Cut along its input axis everywhere, and whole along it in sum: n_heads * head_dim.
_GAUGE = "layers.0.attention.wo.weight"


def detect(path: Path) -> bool:
    if path.is_file():
        return _FILE.fullmatch(path.name) is not None and (path.parent / "params.json").exists()
    return (path / "params.json").exists() and any(path.glob("consolidated.*.pth"))


def open(path: Path) -> Checkpoint:
    """Open the folder of `params.json` (or any of its rank files: the others are found)."""
    root = path if path.is_dir() else path.parent
    where = root / "params.json"
    params = read_json(where, "Meta's and Mistral's files need it to be understood")
    files = _rank_files(root)
    notes: list[str] = []
    budget = Budget()
    ranks = [own(read_pickle(inside(root, f, str(root)), f, notes, budget)) for f in files]
    sizes = {f: (root / f).stat().st_size for f in files}
    said = params.get("model", params)
    if not isinstance(said, dict):
        raise ZooError(f"{where}: model should be an object, found {type(said).__name__}")
    if "multiple_of" not in said:
        if len(files) > 1:
            raise ZooError(f"{where}: not Meta's (no multiple_of), but there are {len(files)} rank files")
        tensors = {t.name: t for t in ranks[0]}
        naming = "mistral"
    else:
        tensors = by_rank(ranks, root, files)
        _check_count(tensors, said, root, files)
        if said.get("vocab_size") in (None, -1):  # Llama 2's say -1
            said["vocab_size"] = _vocab_size(tensors, said, len(ranks))
        naming = "meta"
    config = families.own_config(naming, said, tensors, str(where))
    return Checkpoint(
        root, "meta", (naming,), config, tensors, sizes, carried_files(root),
        synthesised={"config.json": (json.dumps(config, indent=2) + "\n").encode()},
        n_ranks=len(files),
        notes=tuple(notes),
        around=taken(((root / f, f) for f in files), tensors.values()),
    )  # fmt: skip


def own(tensors: list[TensorRef]) -> list[TensorRef]:
    """Without a head that is the embedding's very bytes under another name: so Meta's files of a tied model have it, whose code
    asks for both."""
    at = {t.name: (t.offset, t.dtype, t.shape, t.strides) for t in tensors}
    tied = "output.weight" in at and at["output.weight"] == at.get("tok_embeddings.weight")
    return [t for t in tensors if not tied or t.name != "output.weight"]


def _rank_files(root: Path) -> list[str]:
    found: dict[int, str] = {}
    for name in sorted(p.name for p in root.glob("consolidated.*.pth")):
        if (m := _FILE.fullmatch(name)) and found.setdefault(int(m[1]), name) != name:
            raise ZooError(
                f"{root}: {found[int(m[1])]} and {name} are both of rank {int(m[1])}; which one is meant?"
            )
    if not found:
        raise ZooError(f"{root}: no consolidated.NN.pth here")
    for r in range(max(found) + 1):
        if r not in found:
            raise ZooError(
                f"{root}: consolidated.{r:02d}.pth is missing (found {len(found)} of at least {max(found) + 1} ranks): "
                "is the download complete?"
            )
    return [found[r] for r in range(len(found))]


def by_rank(ranks: list[list[TensorRef]], root: Path, files: list[str]) -> dict[str, TensorRef]:
    """All tensors as `rank{r}.<name>`. Ranks must hold the same tensors, of the same shapes and dtypes."""
    first = {t.name: t for t in ranks[0]}
    out: dict[str, TensorRef] = {}
    for r, tensors in enumerate(ranks):
        mine = {t.name: t for t in tensors}
        if odd := sorted(set(first) ^ set(mine)):
            has, lacks = (files[0], files[r]) if odd[0] in first else (files[r], files[0])
            raise ZooError(f"{root}: the ranks disagree: {odd[0]!r} is in {has} but not in {lacks}")
        for name, t in mine.items():
            if (t.shape, t.dtype) != (first[name].shape, first[name].dtype):
                raise ZooError(
                    f"{root}: the ranks disagree: {name!r} is {first[name].dtype} {list(first[name].shape)} in "
                    f"{files[0]} but {t.dtype} {list(t.shape)} in {files[r]}: are these files of one release?"
                )
            full = f"rank{r}.{name}"
            out[full] = TensorRef(full, t.dtype, t.shape, t.file, t.offset, t.nbytes, t.strides)
    return out


def _check_count(tensors: dict[str, TensorRef], params: dict[str, Any], root: Path, files: list[str]) -> None:
    """Whether these are all ranks: slices of the attention's output add up to the model's width."""
    ref, d = tensors.get("rank0." + _GAUGE), params.get("dim")
    if ref is None or not isinstance(d, int) or len(ref.shape) != 2:
        return  # the plan will say what is missing
    width = ref.shape[1]
    if width and d % width == 0 and d // width != len(files):
        n = d // width
        which = f"consolidated.{len(files):02d}.pth is missing" if n > len(files) else "there are too many"
        raise ZooError(
            f"{root}: {_GAUGE} has {width} columns of {d}, so this is a set of {n} rank files; found {len(files)}: {which}"
        )


def _vocab_size(tensors: dict[str, TensorRef], params: dict[str, Any], n_ranks: int) -> int:
    """Rows of the embedding. Ranks share its rows (Llama 3, 4) or, with all rows each, its columns (Llama 2)."""
    ref = tensors.get("rank0.tok_embeddings.weight")
    if ref is None or len(ref.shape) != 2:
        return -1  # the plan will say what is missing
    return ref.shape[0] * n_ranks if ref.shape[1] == params.get("dim") else ref.shape[0]
