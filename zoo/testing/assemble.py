"""The canonical tensors of a checkpoint, put together the slow and obvious way.

An oracle for the executor, and a source of weights for tests that need no converted folder: every source
tensor is loaded whole by the safetensors library, and each `Fit` of the plan is one strided assignment.
Shares nothing with `zoo.mapping.execute`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from safetensors import safe_open

from zoo.formats import open_checkpoint
from zoo.formats.base import Checkpoint
from zoo.mapping.plan import Plan, make_plan
from zoo.mapping.rules import Box

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
}  # fmt: skip


def view(flat: torch.Tensor, box: Box) -> torch.Tensor:
    """The elements of `box`, every sub-axis an axis."""
    sizes, strides = box.flat()
    return torch.as_strided(flat, sizes, strides, box.offset)


def assemble(
    source: str | os.PathLike[str] | Checkpoint, plan: Plan | None = None
) -> dict[str, torch.Tensor]:
    """Canonical name -> tensor, for a checkpoint of safetensors files."""
    ckpt = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    plan = plan or make_plan(ckpt)
    files = {f: safe_open(ckpt.path(f), "pt") for f in ckpt.files}
    out = {}
    for o in plan.outputs.values():
        made = torch.zeros(o.shape, dtype=TORCH[o.dtype])
        filled = torch.zeros(o.shape, dtype=torch.bool)
        for name, fit in zip(o.sources, o.fits, strict=True):
            tensor = files[ckpt.tensors[name].file].get_tensor(name)  # type: ignore[no-untyped-call]
            if fit.copy:
                assert torch.equal(view(made.view(-1), fit.canonical), view(tensor.reshape(-1), fit.source))
                continue
            view(made.view(-1), fit.canonical).copy_(view(tensor.reshape(-1), fit.source))
            assert not view(filled.view(-1), fit.canonical).any(), f"{o.name}: {name} overlaps another"
            view(filled.view(-1), fit.canonical).fill_(True)
        assert filled.all(), f"{o.name}: {int((~filled).sum())} elements come from nowhere"
        out[o.name] = made
    return out


def in_other_names(
    folder: Path, tensors: dict[str, torch.Tensor], naming: str, n_ranks: int = 1
) -> Checkpoint:
    """A checkpoint of these tensors with the config of `folder`, as a reader of that naming would open it."""
    from safetensors.torch import save_file

    new = folder.with_name(f"{folder.name}-{naming}{n_ranks}")
    new.mkdir()
    (new / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole = {k: t.clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    save_file(whole, new / "model.safetensors")
    return dataclasses.replace(open_checkpoint(new), naming=(naming,), n_ranks=n_ranks)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal names and values."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
