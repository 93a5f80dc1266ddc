"""Why a checkpoint has no plan: everything unexpected, missing or of another shape, and what it looks like."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from zoo.errors import ZooError
from zoo.families import Family
from zoo.formats import sets, wrapped
from zoo.formats.base import Checkpoint
from zoo.mapping.fold import fold, span
from zoo.mapping.match import Match, match
from zoo.untrusted.alike import alike

ADAPTED = re.compile(
    r"\.(lora_(A|B|magnitude_vector)|lora_embedding_[AB]|base_layer|original_module|modules_to_save|vera_lambda_[bd]|hada_w[12]_[ab]"
    r"|oft_[rR]|ia3_l)(\.|$)"
)
"""Parts of names that only peft's modules have: the base and what is to be added to it lie side by side."""


_NUMBER = re.compile(r"\.([0-9]{1,8})\.")
_FIRST = re.compile(r"(?:^|\.)([0-9]{1,8})(?:\.|$)")


class PlanError(ZooError):
    """The tensors and the rules do not account for each other. `match` holds the details. `known`: whether one cause explains all
    of it, which the message then is."""

    def __init__(self, ckpt: Checkpoint, family: Family, m: Match, tried: Iterable[Match] = ()) -> None:
        """`m`: the match that fits best, of those that were `tried`, one for each naming of the family."""
        self.match = m
        missing = _missing(m)
        said = (
            _cut_short(ckpt, missing)
            or _adapted(ckpt)
            or _trainers(ckpt, m)
            or _other_rows(ckpt, m)
            or _other_numbers(ckpt, m)
            or next(
                filter(None, (_renamed(ckpt, family, x) for x in (m, *(x for x in tried if x is not m)))),
                None,
            )
        )
        self.known = said is not None
        if said is not None:
            super().__init__(said)
            return
        lost, over = fold(missing), fold(m.unexpected)
        lines = [
            f"{ckpt.root}: its tensors do not fit family {family.name} ({m.naming} names); nothing was written",
            *_other_depth(m),
        ]
        if missing:
            lines.append(f"missing ({len(missing)}):")
            near = _nearest(lost, over or fold(ckpt.tensors))
            for text, first in lost:
                hint = near.get(first)
                lines.append(f"  {text}" + (f"   nearest: {hint}" if hint else ""))
            if set(m.missing) == {"head.weight"}:
                lines.append(
                    "  (if the head is the embedding, say so in config.json: tie_word_embeddings true)"
                )
        if m.unexpected:
            lines.append(f"unexpected ({len(m.unexpected)}): no rule uses them")
            near = _nearest(over, lost)
            for text, first in over:
                ref, hint = ckpt.tensors[first], near.get(first)
                lines.append(
                    f"  {text} {list(ref.shape)} in {ref.file}" + (f"   nearest: {hint}" if hint else "")
                )
        for wrong, at in m.misshapen.items():
            files = dict(at)
            lines += [
                (f"{text} in {files[first]}" if text == first else text) + wrong
                for text, first in fold(files)
            ]
        lines += _alike(m.problems)
        super().__init__("\n".join(lines))


def _other_rows(ckpt: Checkpoint, m: Match) -> str | None:
    """Where all that does not fit is the number of rows of the embedding and the head: that, and what to do."""
    at = [(name, file) for found in m.misshapen.values() for name, file in found]
    if not at or m.missing or m.unexpected or m.problems:
        return None
    v, d = m.spec.vocab_size, m.spec.d_model
    shapes = {ckpt.tensors[name].shape for name, _ in at}
    if len(shapes) > 1 or not {"embed.weight", "head.weight"}.isdisjoint(m.outputs):
        return None
    (shape,) = shapes
    if len(shape) != 2 or shape[1] != d or len(at) > 2:
        return None
    n = shape[0]
    names = " and ".join(f"{name} in {file}" for name, file in at)
    fewer = "the model would lack tokens" if n < v else f"{n - v} are padding, or tokens that were added"
    return (
        f"{ckpt.root}: {names}: {n} rows, but the config's vocab_size is {v} ({fewer}). Upstream doesn't load this "
        f"either. If these weights are the model, set vocab_size to {n} in config.json; nothing was written"
    )


def _cut_short(ckpt: Checkpoint, missing: list[str]) -> str | None:
    """Where tensors are missing and the files are numbered, but not all of their numbers are here: that."""
    away = sets.incomplete(ckpt.files) if missing else None
    return (
        f"{ckpt.root}: {away}, nor an index that names others: the download is not complete" if away else None
    )


def _adapted(ckpt: Checkpoint) -> str | None:
    """Where tensors of adapters lie among the model's: that, and what to do."""
    if not ADAPTED.search(".\n".join(ckpt.tensors)):  # one look, of most checkpoints
        return None
    found = [name for name in ckpt.tensors if ADAPTED.search(name)]
    if not found:
        return None
    return (
        f"{ckpt.root}: {len(found)} of {len(ckpt.tensors)} tensors are an adapter's that was not merged ({found[0]}): merge it (peft: "
        "model.merge_and_unload()), save the result, and convert that; nothing was written"
    )


def _trainers(ckpt: Checkpoint, m: Match) -> str | None:
    """Where no embedding is found, and the names are known as a trainer's own: that, and what to do."""
    foreign = "hf" in ckpt.naming and "embed.weight" not in m.outputs
    whose = wrapped.trainers(ckpt.tensors) if foreign else None
    return f"{ckpt.root}: {whose}; nothing was written" if whose else None


def _missing(m: Match) -> list[str]:
    return [name for names in m.missing.values() for name in names]


def _other_numbers(ckpt: Checkpoint, m: Match) -> str | None:
    """Where whole layers are missing and as many are there under numbers beyond the last: that, and what to do."""
    if len(_missing(m)) != len(m.unexpected):
        return None
    n = m.spec.n_layers
    gone = {i for i in map(_layer, m.missing) if i is not None}
    over = {int(found[1]) for name in m.unexpected if (found := _NUMBER.search(name))}
    if not gone or len(gone) != len(over) or min(over) < n or m.misshapen or m.problems:
        return None
    if {i for i in map(_layer, m.outputs) if i is not None} & gone:
        return None
    there = _numbers(map(str, sorted({*range(n)} - gone | over)))
    return (
        f"{ckpt.root}: the config has {n} layers (num_hidden_layers), 0-{n - 1}, and the files hold as many under other numbers: {there}. "
        "Layers were taken out, and those behind not numbered anew: name them in order; nothing was written"
    )


def _renamed(ckpt: Checkpoint, family: Family, m: Match) -> str | None:
    """Where all fits that is not expected, once one prefix of it, always the same, is another's: that."""
    missing = _missing(m)
    if not missing or not m.unexpected or m.naming not in family.rules:
        return None
    first = m.unexpected[0]
    tail, want = max(((_tail(first, w), w) for w in set(missing)), key=lambda x: len(x[0]))
    if not tail:
        return None
    theirs, ours = first.removesuffix(tail), want.removesuffix(tail)
    odd = {n: ours + n.removeprefix(theirs) for n in m.unexpected if n.startswith(theirs)}
    named = {odd.get(n, n): t for n, t in ckpt.tensors.items()}
    if len(odd) < len(m.unexpected) or len(named) < len(ckpt.tensors):
        return None
    if match(m.spec, family.rules[m.naming], named, ckpt.n_ranks, m.naming, None, ckpt.config).n_problems:
        return None
    fit = (
        f"where family {family.name} has {ours!r}, and fit otherwise"
        if ours
        else f"without which they fit family {family.name}"
    )
    return (
        f"{ckpt.root}: names of tensors begin with {theirs!r}, {fit}: a wrapper's, or another tool's, which is none that zoo looks "
        "through. If it is the model that is meant, save it from inside the wrapper, or give the canonical folder of what was trained: `--like "
        "CANON` takes it below any name; nothing was written"
    )


def _tail(name: str, of: str) -> str:
    """The last parts that two names have in common, but for the first part of `name`."""
    parts = name.split(".")[1:]
    same = itertools.takewhile(lambda ab: ab[0] == ab[1], zip(reversed(parts), reversed(of.split("."))))
    n = sum(1 for _ in same)
    return ".".join(parts[len(parts) - n :])


def _other_depth(m: Match) -> list[str]:
    """A line where whole layers are missing, or more than the config has are there."""
    there, n = {_layer(name) for name in m.outputs}, m.spec.n_layers
    gone = sorted({i for i in map(_layer, m.missing) if i is not None} - there)
    said = f"layers by the config (num_hidden_layers): {n}; "
    if gone:
        return [f"{said}of {_numbers(map(str, gone))} the files hold nothing"]
    numbers = []
    for name in m.unexpected:
        found = _FIRST.search(name)
        if not found or int(found[1]) < n:
            return []
        numbers.append(found[1])
    return [f"{said}the files hold {_numbers(numbers)} too"] if numbers else []


def _numbers(numbers: Iterable[str]) -> str:
    first, _, last = (said := span(numbers).strip("{}")).partition("-")
    return first if first == last else said


def _layer(name: str) -> int | None:
    """The layer of a canonical tensor."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


def _alike(problems: Iterable[str]) -> list[str]:
    """Of problems that differ in the layer's number only the first, and how many there are."""
    groups: dict[str, list[str]] = {}
    for text in dict.fromkeys(problems):  # what is wrong with the config is wrong for each weight
        groups.setdefault(re.sub(r"\blayers\.\d+\.", "layers.*.", text), []).append(text)
    return [g[0] + (f" (and {len(g) - 1} more like it)" if len(g) > 1 else "") for g in groups.values()]


def _nearest(groups: list[tuple[str, str]], among: list[tuple[str, str]]) -> dict[str, str]:
    """For the first name of each group, as `fold` has them, the name most like it."""
    candidates = [first for _, first in among][:200]
    near = {}
    for _, first in groups[:50]:
        if found := alike(first, candidates, 1, 0.75):
            near[first] = found[0]
    return near
