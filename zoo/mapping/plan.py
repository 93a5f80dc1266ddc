"""Plan: rules x headers -> for every canonical tensor, which source elements make it. Nothing is read.

A conversion is a plan before it is an action: it can be printed, checked against the Spec, restricted to
some layers, and run by source file as the files arrive (`zoo.mapping.execute`). A checkpoint that the rules
do not account for to the last tensor has no plan: the error lists everything unexpected, missing or of
another shape, with the nearest names.

Unusual here: a rule is compiled once per kind of layer, not per layer. What the layers share is a `Recipe`;
an `Output` adds the names. That is what makes the plan of 92,000 tensors a matter of a second.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zoo import families
from zoo.errors import ZooError
from zoo.families import Family
from zoo.formats.base import FLOATS, ITEMSIZE, Checkpoint, TensorRef
from zoo.layout import Slot, layout
from zoo.mapping.rules import Box, Expr, Fit, Rule, RuleSet, Target, respell
from zoo.spec import Layer, Spec

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""What a user may ask for -> safetensors' name."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A compiled rule: where the elements of each source tensor lie in the canonical one. Names still
    hold `{i}`; one recipe serves every layer of a kind."""

    names: str  # one per line
    fits: tuple[Fit, ...]

    def sources(self, layer: int | None) -> list[str]:
        return self.names.replace("{i}", str(layer)).split("\n")


@dataclass(frozen=True, slots=True)
class Output:
    """A canonical tensor and its making: source tensor `sources[k]` gives the elements `fits[k]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layer: int | None
    sources: tuple[str, ...]
    fits: tuple[Fit, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass
class Plan:
    """A conversion, before it is one.

    `outputs` in the order in which they are stored; `extras`: source tensors kept aside, with the reason;
    `dtype`: what floating-point tensors are converted to (safetensors' name), None: as released.
    `layers`: the ones planned for, where that is not all of them.
    """

    checkpoint: Checkpoint
    family: Family
    naming: str
    prefix: tuple[tuple[str, str], ...]
    spec: Spec
    outputs: dict[str, Output]
    extras: dict[str, str]
    dtype: str | None = None
    quant: dict[str, str] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def carried(self) -> tuple[str, ...]:
        return (*self.checkpoint.carried, *self.checkpoint.synthesised)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        extras = sum(self.checkpoint.tensors[n].nbytes for n in self.extras)
        return sum(o.nbytes for o in self.outputs.values()) + extras


# ---------------------------------------------------------------------------------------------------
# Making one


def make_plan(ckpt: Checkpoint, family: Family | None = None, dtype: str | None = None) -> Plan:
    """The plan of converting `ckpt`. `dtype`: "bf16", "fp16" or "fp32", or None to keep what is released.

    Raises ZooError if no family claims the config, or, with everything that does not fit listed
    (`PlanError`), if the rules and the tensors do not account for each other.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ZooError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    where = str(ckpt.root / "config.json")
    family = family or families.find(ckpt.config, where)
    spec = families.spec_of(ckpt.config, family, where)
    namings = [n for n in ckpt.naming if n in family.rules]
    if not namings:
        raise ZooError(
            f"{ckpt.root}: family {family.name} has no rules for {ckpt.format} files (names of "
            f"{' or '.join(ckpt.naming)}); it has rules for {', '.join(family.rules)}"
        )
    best: Match | None = None
    for naming in namings:
        m = match(spec, family.rules[naming], ckpt.tensors, ckpt.n_ranks, naming)
        if best is None or m.n_problems < best.n_problems:
            best = m
    assert best is not None
    if best.n_problems:
        raise PlanError(ckpt, family, best)
    asked = DTYPES[dtype] if dtype else ckpt.default_dtype
    return Plan(ckpt, family, best.naming, best.prefix, spec, best.outputs, best.extras, asked)


@dataclass
class Match:
    """A spec's layout, filled from tensors by a rule set; and what does not fit."""

    naming: str
    prefix: tuple[tuple[str, str], ...]
    outputs: dict[str, Output] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)  # canonical name -> source names not there
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # anything else, one line each

    @property
    def n_problems(self) -> int:
        return sum(map(len, self.missing.values())) + len(self.unexpected) + len(self.problems)


def match(
    spec: Spec, ruleset: RuleSet, tensors: Mapping[str, TensorRef], n_ranks: int = 1, naming: str = "hf"
) -> Match:
    """Fill the layout of `spec` from `tensors`. Never raises for tensors that do not fit: they are listed."""
    prefix = _prefix(ruleset, tensors)
    spell = respell(ruleset, prefix)
    out = Match(naming, prefix)
    kinds: dict[Layer, int] = {}
    kind_of = [kinds.setdefault(layer, len(kinds)) for layer in spec.layers]
    recipes: dict[tuple[str, int, int | None], Recipe | str] = {}
    used: set[str] = set()
    for slot in layout(spec).values():
        layer = None if slot.layer is None else spec.layers[slot.layer]
        key = slot_key(slot)
        chosen: tuple[list[str], Recipe, int] | None = None
        failures: list[str] = []
        for n, rule in enumerate(ruleset.by_key.get(key, ())):
            if rule.when is not None and not rule.when(layer, spec):
                continue
            at = (key, n, None if slot.layer is None else kind_of[slot.layer])
            if at not in recipes:
                try:
                    recipes[at] = compile_rule(rule, slot, spec, spell, n_ranks)
                except ZooError as e:
                    recipes[at] = f"{slot.name}: {e}"
            recipe = recipes[at]
            if isinstance(recipe, str):
                failures.append(recipe)
                continue
            sources = recipe.sources(slot.layer)
            n_missing = sum(name not in tensors for name in sources)
            if chosen is None or n_missing < chosen[2]:
                chosen = (sources, recipe, n_missing)
            if not n_missing:
                break
        if chosen is None:
            reason = "; ".join(failures) or f"{slot.name}: no rule of this family fills it (key {key!r})"
            out.problems.append(reason)
            continue
        sources, recipe, n_missing = chosen
        used.update(sources)
        if n_missing:
            out.missing[slot.name] = [name for name in sources if name not in tensors]
            continue
        dtypes = set()
        for name, fit in zip(sources, recipe.fits, strict=True):
            ref = tensors[name]
            dtypes.add(ref.dtype)
            if ref.shape != fit.shape:
                out.problems.append(
                    f"{name} in {ref.file}: shape {list(ref.shape)}, expected {list(fit.shape)} "
                    f"(for {slot.name} {list(slot.shape)})"
                )
        out.outputs[slot.name] = Output(
            slot.name, _common(dtypes), slot.shape, slot.layer, tuple(sources), recipe.fits
        )
    _sort_rest(out, spec, ruleset, spell, tensors, used)
    return out


def slot_key(slot: Slot) -> str:
    return slot.key


def compile_rule(rule: Rule, slot: Slot, spec: Spec, spell: Any, n_ranks: int) -> Recipe:
    """The rule's recipe for `slot` (of any layer of its kind). Raises ZooError if it does not apply."""
    layer = None if slot.layer is None else spec.layers[slot.layer]
    names = {"i": "{i}"}
    target = Target(
        Box.whole(slot.shape), slot.parts, slot.parts, int(slot.stacked), layer, spec, names=names, n_ranks=n_ranks  # type: ignore[arg-type]
    )
    fits = tuple(rule.expr.compile(target))
    return Recipe("\n".join(spell(f.name) for f in fits), fits)


def _common(dtypes: set[str]) -> str:
    """The narrowest dtype that holds all of these exactly."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "F64" if "F64" in dtypes else "F32"


def _prefix(ruleset: RuleSet, tensors: Mapping[str, TensorRef]) -> tuple[tuple[str, str], ...]:
    """The first spelling of names under which the embedding exists."""
    for prefix in ruleset.prefixes:
        spell = respell(ruleset, prefix)
        for rule in ruleset.by_key.get("embed.weight", ()):
            names = [spell(leaf.pattern.replace("{r}", "0")) for leaf in rule.expr.leaves()]
            if names and all(n in tensors for n in names):
                return prefix
    return ruleset.prefixes[0]


def _sort_rest(
    out: Match, spec: Spec, ruleset: RuleSet, spell: Any, tensors: Mapping[str, TensorRef], used: set[str]
) -> None:
    """Tensors that no rule uses are extras, or unexpected."""
    extras = []
    for e in ruleset.extras:
        extras.append(e)
        if (respelled := spell(e.pattern)) != e.pattern:
            extras.append(replace(e, pattern=respelled))
    for name in tensors:
        if name in used:
            continue
        for e in extras:
            if e.matches(name, spec):
                out.extras[name] = e.reason
                break
        else:
            out.unexpected.append(name)


# ---------------------------------------------------------------------------------------------------
# What does not fit


class PlanError(ZooError):
    """The tensors and the rules do not account for each other. `match` holds the details."""

    def __init__(self, ckpt: Checkpoint, family: Family, m: Match) -> None:
        self.match = m
        lines = [f"{ckpt.root}: its tensors do not fit family {family.name} ({m.naming} names); nothing was written"]
        missing = [name for names in m.missing.values() for name in names]
        if missing:
            lines.append(f"missing ({len(missing)}):")
            near = _nearest(missing, m.unexpected or ckpt.tensors)
            for text, first in fold(missing):
                hint = near.get(first)
                lines.append(f"  {text}" + (f"   nearest: {hint}" if hint else ""))
        if m.unexpected:
            lines.append(f"unexpected ({len(m.unexpected)}): no rule uses them")
            near = _nearest(m.unexpected, missing)
            for text, first in fold(m.unexpected):
                ref, hint = ckpt.tensors[first], near.get(first)
                lines.append(f"  {text} {list(ref.shape)} in {ref.file}" + (f"   nearest: {hint}" if hint else ""))
        lines += m.problems
        super().__init__("\n".join(lines))


def fold(names: Iterable[str]) -> list[tuple[str, str]]:
    """(text, first name) per group of names that differ in their numbers only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(name)
    out = []
    for group in groups.values():
        if len(group) == 1:
            out.append((group[0], group[0]))
            continue
        numbers = [re.findall(r"(?<=\.)\d+(?=\.|$)", name) for name in group]
        spans = iter(_span(sorted({int(n[k]) for n in numbers})) for k in range(len(numbers[0])))
        text = re.sub(r"(?<=\.)\d+(?=\.|$)", lambda m: next(spans), group[0])
        out.append((f"{text} ({len(group)} tensors)", group[0]))
    return out


def _span(values: list[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if values[-1] - values[0] == len(values) - 1:
        return f"{{{values[0]}-{values[-1]}}}"
    return "{" + ",".join(map(str, values)) + "}"


def _nearest(names: Iterable[str], among: Collection[str]) -> dict[str, str]:
    """For the first name of each group, the name most like it."""
    candidates = [first for _, first in fold(among)][:200]
    near = {}
    for _, first in fold(names)[:50]:
        if found := difflib.get_close_matches(first, candidates, 1, 0.75):
            near[first] = found[0]
    return near
