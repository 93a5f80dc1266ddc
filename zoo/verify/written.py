"""A GGUF against the canonical folder that it was written of, which is the release here: `zoo verify x.gguf --against CANON`.

- plan: the file describes the folder's Spec, and every tensor of one has its place in the other.
- bytes: every value of the file is the folder's, rounded as the tensor's type rounds; the ids of texts and the chat template.
- layers, logits, decode: upstream's own reading of the file. Only where its types hold the folder's values: what rounding
  does to a model is no fault of the file.

The folder is read through the rules' boxes, as by the bytes level of a conversion; a block is held to the largest step that
its type can take with the folder's own values, whoever quantised it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo import families
from zoo.errors import ZooError
from zoo.formats import gguf_out
from zoo.formats.base import Checkpoint, TensorRef, place_of
from zoo.formats.canonical import Canonical
from zoo.formats.gguf_fields import shortest
from zoo.formats.opening import open_checkpoint
from zoo.layout import layout
from zoo.mapping import changes
from zoo.mapping.plan import Plan, make_plan
from zoo.mapping.rules import Fit
from zoo.quant.floats import to_fp32
from zoo.quant.schemes import scheme
from zoo.spec import Spec
from zoo.verify.certificate import Check, Level
from zoo.verify.exact import Array, flat, flat_of, in_pieces, plan_level, rounded, spec_differences, view_of
from zoo.verify.limits import COARSE
from zoo.verify.reading import mapped, mapped_range

PLAIN = ("F32", "F16", "BF16")
_EPS16 = 2.0**-11  # of a scale in fp16
_TINY16 = 2.0**-25  # half of its smallest step


@dataclass(frozen=True)
class _Steps:
    """How far a type's quantised value may be from the value, in steps; a `block`'s range has `steps` of them.
    `signed`: the range is the largest magnitude; else from the least to the largest value, and the least is stored too."""

    steps: int
    off: float
    signed: bool
    block: int = 32

    def bound(self, blocks: Array) -> Array:
        """[..., 1] for blocks [..., block]. The scale's own rounding moves a value by up to `steps` times it."""
        low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
        least = np.zeros_like(low) if self.signed else np.abs(low)
        span = np.maximum(np.abs(low), np.abs(high)) if self.signed else high - low
        step = span / self.steps
        bound: Array = step * (self.off + self.steps * _EPS16) + least * _EPS16 + (self.steps + 1) * _TINY16
        return bound


# quantize_row_*_ref of ggml-quants.c. Of the signed ones with an even number of steps, the largest magnitude of the other
# sign has no code of its own and is a whole step off.
STEPS = {
    "Q8_0": _Steps(127, 0.5, True),
    "Q5_1": _Steps(31, 0.5, False),
    "Q5_0": _Steps(16, 1.0, True),
    "Q4_1": _Steps(15, 0.5, False),
    "Q4_0": _Steps(8, 1.0, True),
    "TQ1_0": _Steps(1, 0.5, True, 256),
    "TQ2_0": _Steps(1, 0.5, True, 256),
}


def of(folder: Canonical, file: Path) -> Plan:
    """The plan of reading `file` as a model of the folder's family, in fp32."""
    ckpt = open_checkpoint(file)
    if ckpt.format != "gguf":
        raise ZooError(
            f"{file}: a file of format {ckpt.format}; of files only a GGUF is held against a folder"
        )
    family = families.get(folder.spec.family, folder.source.get("package"))
    return make_plan(ckpt, gguf_out.form_of(family), "fp32")


def _as_written(folder: Canonical) -> Spec:
    """The folder's Spec, of the family in whose form files of it are."""
    family = families.get(folder.spec.family, folder.source.get("package"))
    return replace(folder.spec, family=gguf_out.form_of(family).name)


def rounded_types(folder: Canonical, plan: Plan) -> list[str]:
    """The types in the file that do not hold every value of the folder's tensors."""
    out = set()
    for name, output in plan.outputs.items():
        own = _quant(folder, name) or folder.tensors[name].dtype.lower()
        kinds = {plan.checkpoint.tensors[s].dtype for s in output.sources}
        out |= {k for k in kinds if k != "F32" and k.lower() != own}
    return sorted(out)


def read_otherwise(folder: Canonical, config: Mapping[str, Any]) -> str | None:
    """Why upstream's model of the file is no judge of it: the config that its loader made says something else. Its numbers are
    those of fp32 fields."""
    try:
        theirs = families.spec_of(_decimal(config))
    except ZooError as e:
        return f"upstream's loader makes a config of the file that is none of a known model: {e}"
    apart = [
        x
        for x in spec_differences(_as_written(folder), theirs)
        if not x.startswith(("context_length", "notes"))
    ]
    return (
        f"upstream's loader reads the file otherwise: {apart[0].replace('by the source', 'there')}"
        if apart
        else None
    )


def _decimal(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {k: _decimal(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_decimal(v) for v in x]
    return shortest(x) if isinstance(x, float) else x


def written_plan_level(folder: Canonical, plan: Plan) -> Level:
    """Slots of the folder, and the file's tensors and description against them."""
    level = plan_level(folder, None, "the file is the folder's: its own source is not looked at")
    slots = layout(plan.spec)
    lost = sorted(set(layout(folder.spec)) ^ set(slots))
    used = {s for o in plan.outputs.values() for s in o.sources}
    aside = [n for n in plan.checkpoint.tensors if n not in used and n not in plan.extras]
    apart = spec_differences(_as_written(folder), plan.spec)
    held, fields = len(plan.checkpoint.tensors), len(flat(plan.spec.to_dict()))
    level.checks += [
        Check("tensors of one alone", len(lost), 0, f"the file makes {len(plan.outputs)} tensors", len(slots)),
        Check("tensors of the file unaccounted for", len(aside), 0, f"the file has {held}", held),
        Check("Spec differs from the file's", len(apart), 0, "Spec made from the file's fields", fields),
    ]  # fmt: skip
    level.figures |= {"file_tensors": len(plan.checkpoint.tensors), "rules": plan.rules_version}
    level.notes += lost[:5] + aside[:5] + [f"Spec: {text}" for text in apart[:5]]
    return level


# ---------------------------------------------------------------------------------------------------
# Values


@dataclass(frozen=True)
class _Piece:
    name: str
    fit: Fit


def written_bytes_level(folder: Canonical, plan: Plan) -> Level:
    """Every element of the file against the folder's, and what texts become by both."""
    level = Level("bytes")
    pieces: dict[str, list[_Piece]] = {}
    for name, o in plan.outputs.items():
        for k, source in enumerate(o.sources):
            pieces.setdefault(source, []).append(_Piece(name, o.fits[k]))
    wrong: dict[str, int] = {}
    beyond: dict[str, float] = {}
    coarse: dict[str, float] = {}
    counted = {"rounded to nearest": 0, "in steps": 0, "coarse": 0}
    for source, made in pieces.items():
        ref = plan.checkpoint.tensors[source]
        if ref.dtype in PLAIN:
            wrong[source] = sum(_plain_differs(folder, plan.checkpoint, ref, p) for p in made)
            counted["rounded to nearest"] += ref.size
            continue
        want, found = _expected(folder, made), _found(plan.checkpoint, ref)
        if ref.dtype == "MXFP4" and all(_quant(folder, p.name) == "mxfp4" for p in made):
            wrong[source] = int((want != found).sum())
            counted["rounded to nearest"] += ref.size
        elif ref.dtype in STEPS:
            steps = STEPS[ref.dtype]
            blocks = want.reshape(-1, steps.block)
            far = np.abs(found.reshape(-1, steps.block) - blocks) / steps.bound(blocks)
            beyond[source] = float(far.max(initial=0.0))
            counted["in steps"] += ref.size
        else:
            size = float(np.sqrt(np.square(want, dtype=np.float64).mean())) or 1.0
            apart = float(np.sqrt(np.square(found - want, dtype=np.float64).mean()))
            coarse[source] = apart / size
            counted["coarse"] += ref.size
    n = counted["rounded to nearest"]
    level.count(
        "elements other than the folder's, rounded to their type",
        sum(wrong.values()),
        n,
        f"{n:,} elements compared",
    )
    for values, bound, what, why in (
        (beyond, 1.0, "furthest element of a block", "the largest rounding of its type, of {:,} elements"),
        (coarse, COARSE, "difference of a tensor against its size", "a type of llama.cpp's quantiser, {:,} elements"),
    ):  # fmt: skip
        if values:
            n = counted["in steps"] if values is beyond else counted["coarse"]
            level.checks.append(Check(what, max(values.values()), bound, why.format(n), n))
            level.notes += [f"{n}: {v:.3g}" for n, v in values.items() if not v <= bound][:8]
    level.notes += [f"{n}: {c:,} elements differ" for n, c in wrong.items() if c][:8]
    level.figures = {"elements": sum(counted.values()), "differing": {n: c for n, c in wrong.items() if c}}
    _add_texts(level, folder, plan.checkpoint)
    return level


def _quant(folder: Canonical, name: str) -> str | None:
    return folder.quant.get(name.removesuffix(".weight")) if name.endswith(".weight") else None


def _values(folder: Canonical, name: str) -> tuple[Array, str]:
    """A canonical tensor flat, and its dtype: as it lies, or in fp32 if it is codes."""
    ref, how = folder.tensors[name], _quant(folder, name)
    if how is None:
        return flat_of(mapped_range, folder.path(ref), ref), ref.dtype
    from zoo.quant import dequantise

    stem = name.removesuffix(".weight")
    stored = {c.name: folder.tensors.get(f"{stem}.{c.name}") for c in scheme(how).components}
    parts = {part: mapped(folder.path(r), r) for part, r in stored.items() if r is not None}
    rows = layout(folder.spec)[name].parts
    return dequantise(how, parts, rows, torch.float32).numpy().reshape(-1), "F32"


def _plain_differs(folder: Canonical, ckpt: Checkpoint, ref: TensorRef, p: _Piece) -> int:
    values, dtype = _values(folder, p.name)
    mine, theirs = (
        view_of(values, p.fit.canonical),
        view_of(flat_of(mapped_range, ckpt.path(ref.file), ref), p.fit.source),
    )
    if dtype == ref.dtype and not p.fit.change:
        return sum(int((a.view(b.dtype) != b).sum()) for a, b in in_pieces(mine, theirs))
    wrong = 0
    for a, b in in_pieces(mine, theirs):
        x = to_fp32(np.ascontiguousarray(a), dtype).astype(np.float32, copy=False)
        x = changes.stored(x, p.fit.change)
        wrong += int((rounded(x, ref.dtype) != b).sum())
    return wrong


def _expected(folder: Canonical, made: list[_Piece]) -> Array:
    """The file's tensor in fp32, as the folder has it."""
    out = np.empty(made[0].fit.shape, np.float32).reshape(-1)
    for p in made:
        values, dtype = _values(folder, p.name)
        sizes, strides = p.fit.source.flat()
        at = np.lib.stride_tricks.as_strided(out[p.fit.source.offset :], sizes, tuple(4 * s for s in strides))
        at[...] = to_fp32(np.ascontiguousarray(view_of(values, p.fit.canonical)), dtype)
    return out


def _found(ckpt: Checkpoint, ref: TensorRef) -> Array:
    from zoo.quant import ggml

    raw = np.asarray(np.memmap(ckpt.path(ref.file), np.uint8, "r", ref.offset, (ref.nbytes,)))
    return np.asarray(ggml.dequantise(raw, ref.dtype, ref.shape)).reshape(-1)


# ---------------------------------------------------------------------------------------------------
# Texts


def _add_texts(level: Level, folder: Canonical, ckpt: Checkpoint) -> None:
    """Ids of the verifier's texts, and the chat template, by the folder's files and by the file's fields."""
    from zoo.text import Text, template
    from zoo.verify.inputs import TEXTS

    try:
        mine = Text(folder.root)
    except ZooError as e:
        level.notes.append(f"texts were not compared: {e}")
        return
    with tempfile.TemporaryDirectory(prefix="zoo-verify-") as holder:
        for name, data in ckpt.synthesised.items():
            place_of(Path(holder), name).write_bytes(data)
        apart = []
        try:
            theirs = Text(Path(holder))
            apart = [label for label, said in TEXTS if mine.encode(said) != theirs.encode(said)]
            theirs.close()
        except ZooError as e:
            apart, note = [label for label, _ in TEXTS], str(e).replace(holder, "the file")
            level.notes.append(note)
        same = template.find(folder.root) == template.find(Path(holder))
    mine.close()
    level.checks += [
        Check("texts with other ids", len(apart), 0, f"{len(TEXTS)} texts, by the folder's tokenizer and the file's", len(TEXTS)),
        Check("another chat template", int(not same), 0, "the folder's", 1),
    ]  # fmt: skip
    level.notes += apart[:8]
