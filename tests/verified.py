"""Canonical folders of tiny variants, for the verifier's tests: made once per run, copied where one is damaged."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.spec import Spec
from zoo.verify.faults import CATALOGUE, Subject

_HOLDER = tempfile.TemporaryDirectory(prefix="zoo-tests-")
ROOT = Path(_HOLDER.name)


@functools.cache
def canonical(name: str, dtype: str = "float32") -> Path:
    """The variant, converted. Not to be changed: see `copy`."""
    source = tiny.make(name, ROOT / f"{name}-{dtype}-source", dtype=dtype)
    return zoo.convert(source, ROOT / f"{name}-{dtype}")


def copy(folder: Path, dst: Path) -> Path:
    shutil.copytree(folder, dst)
    return dst


def rewrite(folder: Path, change: Callable[[Subject], Subject]) -> Path:
    """Change the tensors or the Spec of a canonical folder on disk."""
    files = sorted(folder.glob("model-*.safetensors"))
    tensors = {k: t for f in files for k, t in load_file(f).items()}
    description = json.loads((folder / "zoo.json").read_text())
    new = change(Subject(Spec.from_dict(description["spec"]), tensors, description.get("quant", {})))
    for f in files:
        f.unlink()
    name = "model-00001-of-00001.safetensors"
    save_file({k: t.clone().contiguous() for k, t in new.tensors.items()}, folder / name)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    aside = {k: f for k, f in index["weight_map"].items() if f.startswith("extras-")}
    index["weight_map"] = dict.fromkeys(new.tensors, name) | aside
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    description["spec"] = new.spec.to_dict()
    (folder / "zoo.json").write_text(json.dumps(description))
    return folder


def broken(name: str, fault: str, dst: Path) -> Path:
    """A copy of the variant's canonical folder with one fault of the catalogue in it."""
    return rewrite(copy(canonical(name), dst), CATALOGUE[fault].inject)


def with_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    return rewrite(folder, lambda s: s.put({name: change(s.tensors[name])}))
