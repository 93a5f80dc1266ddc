"""Plan: rules x headers -> for every canonical tensor, which source elements make it. Nothing is read.

A conversion is a plan before it is an action: it can be printed, checked against the Spec, restricted to
some layers, and run by source file as the files arrive (`zoo.mapping.execute`). A checkpoint that the rules
do not account for to the last tensor has no plan: the error lists everything unexpected, missing or of
another shape, with the nearest names.

Unusual here: a rule is compiled once per kind of layer, not per layer. What the layers share is a `Recipe`;
an `Output` adds the names. That is what makes the plan of 92,000 tensors a matter of a second.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zoo import families
from zoo.alike import alike
from zoo.errors import ZooError
from zoo.families import Family
from zoo.formats import sets
from zoo.formats.base import COUNTS, FLOATS, ITEMSIZE, Checkpoint, TensorRef
from zoo.formats.safetensors import INDEX
from zoo.layout import Slot, layout
from zoo.mapping.moves import restride
from zoo.mapping.rules import Box, Cat, Expr, Fit, Rule, RuleSet, Stack, Target, Transpose, respell
from zoo.quant import blocks, foreign
from zoo.quant.base import Component, Scheme, Unread, grid
from zoo.quant.schemes import CACHE_SCALE, detect
from zoo.quant.schemes import scheme as scheme_called
from zoo.spec import Layer, Spec

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""What a user may ask for -> safetensors' name."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A compiled rule: where the elements of each source tensor lie in the canonical one. Names still
    hold `{i}`; one recipe serves every layer of a kind."""

    names: tuple[str, ...]  # each: one name per line; alternatives where a component has several spellings
    shape: tuple[int, ...]
    fits: tuple[Fit, ...]

    def sources(self, layer: int | None, tensors: Container[str]) -> list[str]:
        """The source names, in the first spelling that exists (by its first name), else in the first."""
        found = [names.replace("{i}", str(layer)).split("\n") for names in self.names]
        return next((names for names in found if names[0] in tensors), found[0])


@dataclass(frozen=True, slots=True)
class Output:
    """A canonical tensor and its making: source tensor `sources[k]` gives the elements `fits[k]`.

    `scheme`: the source is quantised, and dequantised on the way; `components` are then the names of what
    stands beside each source (`components["scale"][k]`), and the fits are of logical elements. `mixed`: of each source its own
    scheme (None: it is plain) and what stands beside it, where they differ; ask `way` and `beside`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layer: int | None
    sources: tuple[str, ...]
    fits: tuple[Fit, ...]
    scheme: str | None = None
    components: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mixed: tuple[tuple[str | None, Mapping[str, str]], ...] = ()

    def way(self, k: int) -> str | None:
        """The scheme of the k-th source."""
        return self.mixed[k][0] if self.mixed else self.scheme

    def beside(self, k: int) -> Mapping[str, str]:
        """What stands beside the k-th source, by component."""
        return self.mixed[k][1] if self.mixed else {c: names[k] for c, names in self.components.items()}

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass
class Plan:
    """A conversion, before it is one.

    `outputs` in the order of the layout; `extras`: source tensors kept aside, with the reason.
    `dtype`: what floating-point tensors are converted to (safetensors' name), None: as released.
    `quant`: slot without `.weight` -> scheme, of weights that are carried quantised.
    `layers`: the ones planned for, where that is not all of them. `family_given`: the family was said, not found.
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
    family_given: bool = False

    @property
    def carried(self) -> tuple[str, ...]:
        """Files that go along as they are."""
        return tuple(sorted({*self.checkpoint.carried, *self.checkpoint.synthesised} - {INDEX}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        extras = sum(self.checkpoint.tensors[n].nbytes for n in self.extras)
        return sum(o.nbytes for o in self.outputs.values()) + extras

    @property
    def rules_version(self) -> str:
        return self.family.rules[self.naming].version

    @functools.cached_property
    def digest(self) -> str:
        """Hash of what the plan does: which elements of which source tensors go where, in which dtype.
        Equal digests mean equal canonical bytes from equal sources, whatever the rules are written like."""
        h = hashlib.sha256(repr((self.dtype, self.layers, sorted(self.extras))).encode())
        seen: dict[int, str] = {}
        for o in self.outputs.values():
            if id(o.fits) not in seen:
                seen[id(o.fits)] = repr(
                    [(f.shape, f.source, f.canonical, *((f.change,) if f.change else ())) for f in o.fits]
                )
                h.update(seen[id(o.fits)].encode())
            way = o.mixed or o.scheme
            h.update(repr((o.name, o.dtype, o.shape, way, o.sources, seen[id(o.fits)][:64])).encode())
        return h.hexdigest()[:32]

    def block_type(self, o: Output) -> str | None:
        """The type of ggml's blocks that an output holds as bytes; None if it holds none."""
        stem, _, part = o.name.rpartition(".")
        if (how := self.quant.get(stem)) is None or not blocks.is_one(s := scheme_called(how)):
            return None
        return blocks.type_of(s, part) if any(part == c.name for c in s.components) else None

    def sources_of(self, o: Output, k: int) -> list[str]:
        """All source tensors that the k-th fit of an output needs: the weight and what stands beside it."""
        return [o.sources[k], *o.beside(k).values()]

    def files_needed(self) -> dict[str, int]:
        """Source file -> bytes of it that this plan reads; files that it does not need are left out."""
        out: dict[str, int] = {}
        tensors = self.checkpoint.tensors
        names = {
            n for o in self.outputs.values() for k in range(len(o.sources)) for n in self.sources_of(o, k)
        }
        for name in {*names, *self.extras}:
            ref = tensors[name]
            out[ref.file] = out.get(ref.file, 0) + ref.nbytes
        return dict(sorted(out.items()))

    def restrict(self, layers: Collection[int]) -> Plan:
        """The plan of these layers and what belongs to none (embedding, final norm, head), without extras.

        Raises ZooError for a layer that the model does not have.
        """
        if bad := [i for i in layers if not 0 <= i < self.spec.n_layers]:
            raise ZooError(
                f"layer {bad[0]} does not exist: the model has layers 0 to {self.spec.n_layers - 1}"
            )
        keep = {n: o for n, o in self.outputs.items() if o.layer is None or o.layer in set(layers)}
        quant = {n: q for n, q in self.quant.items() if n + ".weight" in keep}
        return replace(self, outputs=keep, extras={}, quant=quant, layers=tuple(sorted(set(layers))))

    def summary(self) -> str:
        """What a person wants to know first, in a few lines."""
        c, refs = self.checkpoint, self.checkpoint.tensors
        n_sources = len({n for o in self.outputs.values() for n in o.sources})
        lines = [
            f"family     {self.family.name} ({self.naming} names, {c.format} files)",
            f"source     {len(refs):,} tensors in {len(c.files)} file(s), {sum(r.nbytes for r in refs.values()):,} bytes",
            f"canonical  {len(self.outputs):,} tensors of {n_sources:,} source tensors, "
            f"{sum(o.nbytes for o in self.outputs.values()):,} bytes",
            f"dtype      {self.dtype or self._kept()} ({', '.join(sorted({o.dtype for o in self.outputs.values()}))})",
        ]
        if self.quant:
            schemes: dict[str, int] = {}
            for q in self.quant.values():
                schemes[q] = schemes.get(q, 0) + 1
            lines.append("quantised  " + ", ".join(f"{n} weights {q}" for q, n in schemes.items()))
        if self.layers is not None:
            lines.append(f"layers     {_span(map(str, self.layers))} of {self.spec.n_layers}")
        if self.extras:
            reasons: dict[str, list[str]] = {}
            for name, reason in self.extras.items():
                reasons.setdefault(reason, []).append(name)
            lines += [f"extras     {len(names):,} tensors: {reason}" for reason, names in reasons.items()]
        return "\n".join([*lines, *(f"note       {n}" for n in (*c.notes, *self.notes))])

    def _kept(self) -> str:
        blocks_too = any(self.block_type(o) for o in self.outputs.values())
        return "blocks as released, all else in fp32" if blocks_too else "as released"

    def to_json(self) -> dict[str, Any]:
        """All of it, with one entry per canonical tensor."""
        return {
            "family": self.family.name,
            "family_given": self.family_given,
            "naming": self.naming,
            "format": self.checkpoint.format,
            "source": str(self.checkpoint.root),
            "rules": self.rules_version,
            "digest": self.digest,
            "dtype": self.dtype,
            "bytes": self.nbytes,
            "quant": self.quant,
            "layers": self.layers,
            "carried": self.carried,
            "notes": [*self.checkpoint.notes, *self.notes],
            "tensors": [
                {
                    "name": o.name,
                    "dtype": o.dtype,
                    "shape": o.shape,
                    "sources": o.sources,
                    "dequantised": o.scheme,
                }
                for o in self.outputs.values()
            ],
            "extras": self.extras,
        }


# ---------------------------------------------------------------------------------------------------
# Making one


def make_plan(ckpt: Checkpoint, family: Family | None = None, dtype: str | None = None) -> Plan:
    """The plan of converting `ckpt`. `dtype`: "bf16", "fp16" or "fp32", or None to keep what is released
    (of GGUF's block types those that can be carried; the others become fp32, which a note says).

    Raises ZooError if no family claims the config, or, with everything that does not fit listed
    (`PlanError`), if the rules and the tensors do not account for each other.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ZooError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    made_up = "config.json" in ckpt.synthesised  # of files of another kind, which say it themselves
    where = str(ckpt.root / (next(iter(ckpt.files), "") if made_up else "config.json"))
    family = family or found(ckpt, where)
    spec, unread = families.read(ckpt.config, family, where)
    namings = [n for n in ckpt.naming if n in family.rules]
    if not namings:
        raise ZooError(
            f"{ckpt.root}: family {family.name} has no rules for {ckpt.format} files (names of "
            f"{' or '.join(ckpt.naming)}); it has rules for {', '.join(family.rules)}"
        )
    asked = DTYPES[dtype] if dtype else None
    if asked is None and ckpt.format == "gguf" and not _has_blocks(ckpt):
        asked = "F32"  # which its norms are in, whatever the rest is
    best: Match | None = None
    for naming in namings:
        m = match(spec, family.rules[naming], ckpt.tensors, ckpt.n_ranks, naming, asked, ckpt.config)
        if spec.tied and m.head:
            m = _judge_head(ckpt, spec, family, m, asked)
        elif set(m.missing) == {"head.weight"} and _unsaid(ckpt.config):
            m = match(
                replace(spec, tied=True),
                family.rules[naming],
                ckpt.tensors,
                ckpt.n_ranks,
                naming,
                asked,
                ckpt.config,
            )
            m.notes.append("the config does not say whether the head is tied, and the files hold none: it is")
        if best is None or m.n_problems < best.n_problems:
            best = m
        if not m.n_problems:
            break
    assert best is not None
    if best.n_problems:
        if best.kept:
            raise ZooError(
                f"{ckpt.root}: {best.kept}; convert with --dtype bf16 (or fp16, fp32); nothing was written"
            )
        if best.unread:
            raise ZooError(
                f"{ckpt.root}: its weights are quantised in a way which zoo does not read: {best.unread}: {PLAIN}"
            )
        if (what := _coded(ckpt, best)) is not None:
            raise ZooError(
                f"{ckpt.root}: its weights are quantised as {what}, which zoo does not read: {PLAIN}"
            )
        raise PlanError(ckpt, family, best)
    if (words := foreign.said(ckpt.config)) is not None and not quantised(best, ckpt.tensors):
        best.notes.append(
            f"the config calls the weights quantised ({words}), but they are plain: taken as they are"
        )
    if best.blocks:  # they are moved as the bytes that they lie in
        refs = {n: blocks.as_bytes(r) if n in best.blocks else r for n, r in ckpt.tensors.items()}
        ckpt = replace(ckpt, tensors=refs)
    return Plan(
        ckpt, family, best.naming, best.prefix, best.spec, best.outputs, best.extras, asked, best.quant,
        notes=(*unread, *best.notes),
    )  # fmt: skip


def _has_blocks(ckpt: Checkpoint) -> bool:
    return any(t.dtype.lower() in blocks.TYPES for t in ckpt.tensors.values())


PLAIN = (
    "take the release that was not quantised, or have the tool that made this one write plain weights (transformers, where the "
    "config names a quant_method that it knows: from_pretrained(...).dequantize(), then save_pretrained)"
)


def _coded(ckpt: Checkpoint, m: Match) -> str | None:
    """What the weights that do not fit are quantised as, if zoo does not read it, in one phrase."""
    what = foreign.name_of(ckpt.config, ckpt.tensors)
    if what is None and not quantised(m, ckpt.tensors):
        shapes = (name for at in m.misshapen.values() for name, _ in at)
        missing = (name for names in m.missing.values() for name in names)
        what = foreign.codes_of(ckpt.config, ckpt.tensors, {*m.codes, *shapes, *missing})
    if what is None or foreign.said(ckpt.config) is not None or (told := foreign.beside(ckpt.root)) is None:
        return what
    return f"{what.partition(' (')[0]} ({told})"


def quantised(m: Match, tensors: Mapping[str, TensorRef]) -> bool:
    """Whether any weight of these is."""
    return (
        bool(m.quant)
        or any(o.scheme is not None for o in m.outputs.values())
        or any(tensors[n].dtype not in FLOATS for o in m.outputs.values() for n in o.sources)
    )


def given(config: Mapping[str, Any], family: Family) -> tuple[str, ...]:
    """A note for a family that was said and is not what the config says; none if it is."""
    try:
        claimed = families.find(config).name
    except ZooError:
        claimed = "no family's name"
    if claimed == family.name:
        return ()
    return (
        f"taken for {family.name}, as was said (--family): the config has {claimed} (architectures "
        f"{config.get('architectures')}, model_type {config.get('model_type')!r})",
    )


def found(ckpt: Checkpoint, where: str) -> Family:
    """The family of a checkpoint. One that none claims is refused with those that it fits in all but its name, or else
    with the one whose tensors it has most nearly."""
    try:
        return families.find(ckpt.config, where)
    except families.NoFamily as e:
        fitting: list[tuple[int, str]] = []
        near: dict[tuple[str, ...], list[str]] = {}  # what does not fit -> families
        for family in families.families().values():
            try:
                spec, unread = families.read(ckpt.config, family, where)
            except ZooError:
                continue
            for naming in ckpt.naming:
                if naming in family.rules:
                    m = match(
                        spec, family.rules[naming], ckpt.tensors, ckpt.n_ranks, naming, None, ckpt.config
                    )
                    if not m.n_problems:
                        fitting.append((len(unread), family.name))
                        break
                    near.setdefault(m.odd, []).append(family.name)
        odd = min(near, key=len, default=())
        if not fitting and 0 < len(odd) < len(ckpt.tensors) // 2:
            raise families.NoFamily(
                f"{e.who}. Nearest: {', '.join(near[odd])}, but for {len(odd)} tensor{'s' if len(odd) > 1 else ''} ({', '.join(odd[:3])}"
                f"{', ...' if len(odd) > 3 else ''}); --family {near[odd][0]} says more",
                e.known,
            ) from e
        if not fitting:  # its fields may be a family's, its tensors are none's
            raise families.NoFamily(e.who, e.known) from e
        names = [name for _, name in sorted(fitting)]
        raise ZooError(
            f"{where}: no family claims architectures {ckpt.config.get('architectures')}, model_type "
            f"{ckpt.config.get('model_type')!r}, but its fields and tensors fit {', '.join(names)}. If it computes as "
            f"{'that' if len(names) == 1 else 'one of those'} does, say --family {' or --family '.join(names)}"
        ) from e


@dataclass
class Match:
    """A spec's layout, filled from tensors by a rule set; and what does not fit."""

    spec: Spec
    naming: str
    prefix: tuple[tuple[str, str], ...]
    outputs: dict[str, Output] = field(default_factory=dict)
    quant: dict[str, str] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)  # canonical name -> source names not there
    unexpected: list[str] = field(default_factory=list)
    misshapen: dict[str, list[tuple[str, str]]] = field(
        default_factory=dict
    )  # what is wrong: (tensor, where)
    problems: list[str] = field(default_factory=list)  # anything else, one line each
    codes: list[str] = field(default_factory=list)  # tensors of codes that nothing here reads
    unread: str = ""  # why weights that are quantised are not read at all
    kept: str = ""  # why weights that are quantised can be dequantised only
    head: list[str] = field(default_factory=list)  # a stored head, although the spec says it is tied
    notes: list[str] = field(default_factory=list)
    blocks: set[str] = field(default_factory=set)  # tensors of ggml's blocks that are carried as bytes

    @property
    def odd(self) -> tuple[str, ...]:
        """The tensors that do not fit: over, of another shape, not there."""
        shapes = (name for at in self.misshapen.values() for name, _ in at)
        return (*self.unexpected, *shapes, *(name for names in self.missing.values() for name in names))

    @property
    def n_problems(self) -> int:
        listed = sum(map(len, self.missing.values())) + sum(map(len, self.misshapen.values()))
        return listed + len(self.unexpected) + len(self.problems) + bool(self.unread or self.kept)


def match(
    spec: Spec,
    ruleset: RuleSet,
    tensors: Mapping[str, TensorRef],
    n_ranks: int = 1,
    naming: str = "hf",
    dtype: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Match:
    """Fill the layout of `spec` from `tensors`. Never raises for tensors that do not fit: they are listed.

    `dtype` as in `Plan`; `config` tells of quantisation what shapes do not.
    """
    return _Matcher(spec, ruleset, tensors, n_ranks, naming, dtype, config or {}).run()


def _ranked(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading axes of one."""
    return tuple(itertools.dropwhile(lambda n: n == 1, shape))


MAX_LACKING = 50_000
"""Tensors that the files lack, beyond as many as they have, before the rest is not looked for."""


class _Matcher:
    def __init__(
        self,
        spec: Spec,
        ruleset: RuleSet,
        tensors: Mapping[str, TensorRef],
        n_ranks: int,
        naming: str,
        dtype: str | None,
        config: Mapping[str, Any],
    ) -> None:
        self.spec, self.rules, self.tensors, self.n_ranks = spec, ruleset, tensors, n_ranks
        self.dtype, self.config = dtype, config
        self.out = Match(spec, naming, _prefix(ruleset, tensors))
        self.spell = respell(ruleset, self.out.prefix)
        self.recipes: dict[tuple[Any, ...], Recipe | str] = {}
        self.used: set[str] = set()
        self.lacking = 0
        self.kinds: dict[Layer, int] = {}
        self.kind_of = [self.kinds.setdefault(layer, len(self.kinds)) for layer in spec.layers]
        # fp32 tensors beside narrower weights are those the vendor singled out: asking for bf16 keeps them.
        # (Not in a GGUF, which holds every norm in fp32, whatever it was released in.)
        narrow = any(t.dtype != "F32" and len(t.shape) > 1 for t in tensors.values())
        self.keep_fp32 = dtype in ("BF16", "F16") and narrow and naming != "gguf"
        # ggml has no rank: a file that it wrote lacks leading axes of one, which that of the converter has.
        self.of_ggml = naming == "gguf"
        self.widened: dict[str, str] = {}  # slots whose blocks cannot be carried, and why

    def run(self) -> Match:
        for slot in layout(self.spec).values():
            if not self.in_several_ways(slot) and (chosen := self.choose(slot)) is not None:
                self.fill(slot, *chosen)
            if self.lacking > len(self.tensors) + MAX_LACKING:  # a few bytes of config can ask for any number
                self.out.problems.append(
                    f"the config asks for more than {self.lacking} tensors that are not among the {len(self.tensors)} in "
                    f"the files (looked at up to {slot.name}): is it another model's?"
                )
                break
        if self.spec.tied:
            self.note_head()
        _sort_rest(self.out, self.spec, self.rules, self.spell, self.tensors, self.used)
        if self.dtype is None:
            self.out.blocks.update(n for n in self.out.extras if self.tensors[n].dtype not in ITEMSIZE)
        self.note_widened()
        return self.out

    def way(self, leaf: str) -> Scheme | None:
        """How the weight that a rule calls `leaf` is quantised. Blocks of ggml's count where they are carried: those that are dequantised
        are read as numbers of another dtype."""
        found = detect(leaf, self.tensors, self.config)
        return None if self.dtype is not None and blocks.is_one(found) else found

    def of_blocks(self, slot: Slot, rule: Rule, n: int) -> Scheme | None:
        """The scheme by which all of a slot's parts are carried as ggml's blocks; None where they cannot, which is noted."""
        if slot.stacked and rule.one_by_one and slot.shape[0] > len(self.tensors):
            return None
        plain = self.recipe(rule, n, slot, None, None)
        if isinstance(plain, str):
            return None
        names = plain.sources(slot.layer, self.tensors)
        if any(name not in self.tensors for name in names):
            return None
        kinds = _types_by_part(slot, plain.fits, [self.tensors[name].dtype for name in names])
        why = ""
        if any(len(k) > 1 for k in kinds):
            why = "experts of several types"
        elif odd := sorted({*itertools.chain(*kinds)} - {t.upper() for t in blocks.TYPES}):
            mixed = all(k in FLOATS for k in odd)
            why = (
                f"its parts are {' and '.join(sorted({*itertools.chain(*kinds)}))}"
                if mixed
                else _not_carried(odd)
            )
        elif not slot.codes:
            why = "neither a linear map nor a table of tokens"
        elif transposes(rule.expr):
            why = "blocks run along the inputs, which the file has for rows here"
        else:
            made = blocks.of_types([k.pop().lower() for k in kinds])
            found = (self.recipe(rule, n, slot, made, part) for part in made.components)
            why = next((text for text in found if isinstance(text, str)), "")
            if not why:
                return made
            why = why.removeprefix(f"{slot.name}: ").partition("; dequantise with")[0]
        self.widened[slot.name] = why
        return None

    def note_widened(self) -> None:
        """Says of blocks that are dequantised, though nothing was asked for, which and why."""
        if self.dtype is not None:
            return
        reasons: dict[str, list[str]] = {}
        for name, o in self.out.outputs.items():
            kinds = {self.tensors[s].dtype for s in o.sources} - {*ITEMSIZE}
            if kinds and not self.out.blocks.issuperset(o.sources):
                reasons.setdefault(self.widened.get(name) or _not_carried(sorted(kinds)), []).append(name)
        for why, names in reasons.items():
            said = ", ".join(text for text, _ in fold(names))
            self.out.notes.append(f"dequantised to fp32, which is exact: {said}: {why}")

    def recipe(
        self, rule: Rule, n: int, slot: Slot, scheme: Scheme | None, part: Component | None
    ) -> Recipe | str:
        """The rule compiled for a slot (or a component of it), or why it does not apply."""
        kind = None if slot.layer is None else self.kind_of[slot.layer]
        own: tuple[int, ...] = ()
        if part is not None and part.unit is None:  # a constant per source tensor: its shape is its own
            leaf = self.spell(next(rule.expr.leaves()).name({"i": str(slot.layer), "e": 0, "r": 0}))
            own = next((self.tensors[s].shape for s in part.names(leaf) if s in self.tensors), ())
        key = (slot.key, n, kind, scheme and scheme.name, part and part.name, own)
        if (found := self.recipes.get(key)) is None:
            try:
                if part is None:
                    found = compile_rule(rule, slot, self.spec, self.spell, self.n_ranks)
                    if scheme is not None and scheme.turned:
                        found = replace(found, fits=tuple(_stored(fit, "io") for fit in found.fits))
                elif self.dtype is None:
                    found = compile_rule(rule, slot, self.spec, self.spell, self.n_ranks, part, own)
                else:  # to be dequantised, tensor by tensor: how they are fused then is no matter
                    found = beside(compile_rule(rule, slot, self.spec, self.spell, self.n_ranks), part, own)
                if not found.names:
                    found = f"{slot.name}: its {part.name if part else 'weight'} has no name"
            except ZooError as e:
                found = f"{slot.name}: {e}"
            self.recipes[key] = found
        return found

    def rules_for(self, slot: Slot) -> tuple[Rule, ...]:
        """The rules for a slot. A tied file may have kept either name of the one matrix: the head's come last."""
        named = self.rules.by_key.get(slot.key, ())
        other = (
            self.rules.by_key.get("head.weight", ()) if slot.name == "embed.weight" and self.spec.tied else ()
        )
        return (*named, *other)

    def choose(self, slot: Slot) -> tuple[Rule, int, Scheme | None, Recipe, list[str]] | None:
        """The first rule for the slot whose source tensors all exist and have its shapes; else the first whose source tensors
        exist, or lack the fewest."""
        layer = None if slot.layer is None else self.spec.layers[slot.layer]
        best: tuple[Rule, int, Scheme | None, Recipe, list[str]] | None = None
        fewest = -1
        reasons: list[str] = []
        for n, rule in enumerate(self.rules_for(slot)):
            if rule.when is not None and not rule.when(layer, self.spec):
                continue
            scheme: Scheme | None = None
            if slot.name.endswith(".weight") and len(slot.shape) > 1:
                leaf = self.spell(next(rule.expr.leaves()).name({"i": str(slot.layer), "e": 0, "r": 0}))
                try:
                    scheme = self.way(leaf)
                    if blocks.is_one(scheme):
                        scheme = self.of_blocks(slot, rule, n)
                except Unread as e:
                    self.out.unread = self.out.unread or str(e)
                    return None
                except ZooError as e:
                    reasons.append(str(e))
                    self.out.codes.append(leaf)
                    self.used.add(leaf)
                    continue
            if scheme is not None and scheme.kept and self.dtype is None:
                self.out.kept = f"{leaf} is quantised ({scheme.name}), {scheme.kept}"
                return None
            if slot.stacked and slot.shape[0] > len(self.tensors) and rule.one_by_one:
                self.lacking += slot.shape[0]
                reasons.append(
                    f"{slot.name}: {slot.shape[0]} experts, and the files hold {len(self.tensors)} tensors"
                )
                continue
            recipe = self.recipe(rule, n, slot, scheme, scheme.components[0] if scheme else None)
            if isinstance(recipe, str):
                reasons.append(recipe)
                continue
            sources = recipe.sources(slot.layer, self.tensors)
            lacks = sum(name not in self.tensors for name in sources)
            if best is None or lacks < fewest:
                best, fewest = (rule, n, scheme, recipe, sources), lacks
            if not lacks and (scheme is not None or self.fit(recipe, sources)):
                return rule, n, scheme, recipe, sources
        if best is None or (reasons and fewest):
            self.out.problems.append(
                "; ".join(reasons) or f"{slot.name}: no rule of this family fills it (key {slot.key!r})"
            )
            return None
        return best

    def fit(self, recipe: Recipe, sources: list[str]) -> bool:
        """Whether the source tensors have the shapes that the recipe asks for."""
        shapes = ((self.tensors[s].shape, fit.shape) for s, fit in zip(sources, recipe.fits, strict=True))
        return all(self.same(is_, asked) for is_, asked in shapes)

    def same(self, shape: tuple[int, ...], asked: tuple[int, ...]) -> bool:
        return shape == asked or (self.of_ggml and _ranked(shape) == _ranked(asked))

    def fill(
        self, slot: Slot, rule: Rule, n: int, scheme: Scheme | None, recipe: Recipe, sources: list[str]
    ) -> None:
        if scheme is None:
            self.add(slot.name, slot, recipe, sources, None)
            return
        if self.dtype is None:
            if not slot.codes or not (slot.multiplies or scheme.by_rows):
                self.out.problems.append(
                    f"{slot.name}: {sources[0]} is quantised ({scheme.name}), which only linear maps can be run as, and tables of tokens "
                    "whose rows stand alone; convert with --dtype"
                )
            self.out.quant[slot.name.removesuffix(".weight")] = scheme.name
        components: dict[str, tuple[str, ...]] = {}
        for part in scheme.components:
            found = self.recipe(rule, n, slot, scheme, part)
            if isinstance(found, str) and part.optional:
                continue  # if it is there all the same, no rule uses it, which is said
            if isinstance(found, str):
                self.out.problems.append(found)
                self.use(slot, rule, n, scheme)
                return
            names = found.sources(slot.layer, self.tensors)
            if part.optional and not any(name in self.tensors for name in names):
                continue
            name = f"{slot.name.removesuffix('.weight')}.{part.name}"
            n_before = len(self.out.problems)
            if not self.add(name, slot, found, names, part, keep=self.dtype is None):
                if len(self.out.problems) == n_before and name not in self.out.missing:
                    self.use(slot, rule, n, scheme)
                if self.dtype is None and self.fits_released(rule, slot, part):
                    self.out.problems.append(
                        f"{slot.name}: its {part.name}s fit the released tensors, but not as these are arranged here; convert "
                        "with --dtype"
                    )
                return
            components[part.name] = tuple(names)
        if self.dtype is None:
            return
        logical = self.recipe(
            rule, n, slot, scheme, None
        )  # fits in logical elements, of the rule's own names
        if isinstance(logical, str):
            self.out.problems.append(logical)
            return
        codes = components.pop("weight")
        self.out.outputs[slot.name] = Output(
            slot.name, self.dtype, slot.shape, slot.layer, codes, logical.fits, scheme.name, components
        )

    def in_several_ways(self, slot: Slot) -> bool:
        """Whether the parts of a fused weight are stored in several ways, as in releases that give some modules more bits. Then it
        is planned here, to be dequantised part by part; as codes they cannot be one, which is a problem."""
        if not slot.name.endswith(".weight") or len(slot.shape) < 2:
            return False
        layer = None if slot.layer is None else self.spec.layers[slot.layer]
        for n, rule in enumerate(self.rules_for(slot)):
            if rule.when is not None and not rule.when(layer, self.spec) or not _fuses(rule.expr):
                continue
            leaves = [self.spell(x.name({"i": str(slot.layer), "e": 0, "r": 0})) for x in rule.expr.leaves()]
            try:
                ways = {x: self.way(x) for x in leaves}
            except ZooError:  # said where the rule is chosen
                return False
            if any(
                map(blocks.is_one, ways.values())
            ):  # of several types they are carried, too, each part as its own
                return False
            there = all(w is not None or x in self.tensors for x, w in ways.items())
            if not there or len({w and w.name for w in ways.values()}) < 2:
                continue
            plain = self.recipe(rule, n, slot, None, None)
            if isinstance(plain, str):
                return False
            if self.dtype is None:
                told = ", ".join(f"{x} {w.name if w else 'plain'}" for x, w in ways.items())
                self.out.problems.append(
                    f"{slot.name}: its parts are stored in several ways ({told}); convert with --dtype"
                )
                for leaf in plain.sources(slot.layer, ()):
                    way = ways.get(leaf) or detect(leaf, self.tensors, self.config)
                    self.used.update(
                        x for part in way.components for x in part.names(leaf)
                    ) if way else self.used.add(leaf)
                return True
            self.fill_by_part(slot, plain)
            return True
        return False

    def fill_by_part(self, slot: Slot, plain: Recipe) -> None:
        """An output whose sources are dequantised each by its own scheme, or plain."""
        assert self.dtype is not None
        made: list[tuple[str, Fit, str | None, Mapping[str, str]]] = []
        for leaf, fit in zip(plain.sources(slot.layer, ()), plain.fits, strict=True):
            alone = Recipe((leaf,), plain.shape, (fit,))
            try:
                how = detect(leaf, self.tensors, self.config)
            except ZooError as e:
                self.out.problems.append(str(e))
                return
            if how is None:
                if not self.add(slot.name, slot, alone, [leaf], None, keep=False):
                    return
                made.append((leaf, fit, None, {}))
                continue
            names: dict[str, str] = {}
            for part in how.components:
                source = next((x for x in part.names(leaf) if x in self.tensors), None)
                if source is None and part.optional:
                    continue
                source = source or part.names(leaf)[0]
                own = self.tensors[source].shape if source in self.tensors else ()
                try:
                    recipe = beside(alone, part, own)
                except ZooError as e:
                    self.out.problems.append(f"{slot.name}: {e}")
                    return
                if not self.add(
                    f"{slot.name.removesuffix('.weight')}.{part.name}",
                    slot,
                    recipe,
                    [source],
                    part,
                    keep=False,
                ):
                    return
                names[part.name] = source
            codes = names.pop("weight")
            made.append((codes, _stored(fit, "io") if how.turned else fit, how.name, names))
        ways = " + ".join(sorted({way for _, _, way, _ in made if way}))
        self.out.outputs[slot.name] = Output(
            slot.name, self.dtype, slot.shape, slot.layer, tuple(m[0] for m in made), tuple(m[1] for m in made), ways,
            mixed=tuple((way, names) for _, _, way, names in made),
        )  # fmt: skip

    def use(self, slot: Slot, rule: Rule, n: int, scheme: Scheme) -> None:
        """None of the components of a weight is unexpected, though one of them has another shape."""
        plain = self.recipe(rule, n, slot, None, None)
        leaves = [] if isinstance(plain, str) else plain.sources(slot.layer, ())
        self.used.update(name for leaf in leaves for part in scheme.components for name in part.names(leaf))

    def fits_released(self, rule: Rule, slot: Slot, part: Component) -> bool:
        """Whether such components have the shapes that the released tensors ask for."""
        if part.unit is None:
            return False
        made = beside(compile_rule(rule, slot, self.spec, self.spell, self.n_ranks), part, ())
        names = made.sources(slot.layer, self.tensors)
        found = [(self.tensors.get(n), f.shape) for n, f in zip(names, made.fits)]
        return all(t is not None and t.shape == shape and t.dtype in part.dtypes for t, shape in found)

    def add(
        self,
        name: str,
        slot: Slot,
        recipe: Recipe,
        sources: list[str],
        part: Component | None,
        keep: bool = True,
    ) -> bool:
        """Check the source tensors, and make of them an output unless they are only looked at."""
        self.used.update(sources)
        tensors = self.tensors
        if missing := [s for s in sources if s not in tensors]:
            self.out.missing[name] = missing
            self.lacking += len(missing)
            return False
        n_before, fits = len(self.out.problems), True
        dtypes: set[str] = set()
        for source, fit in zip(sources, recipe.fits, strict=True):
            ref = tensors[source]
            if part is not None and ref.dtype.lower() in blocks.TYPES:
                ref = blocks.as_bytes(ref)
                self.out.blocks.add(source)
            dtypes.add(ref.dtype)
            if part is None and slot.counts:
                if ref.dtype not in COUNTS:
                    self.out.problems.append(
                        f"{source} in {ref.file}: {ref.dtype}; expected whole numbers, I64 or I32"
                    )
            elif part is None and ref.dtype in ITEMSIZE and ref.dtype not in FLOATS:
                scaled = any(source + s in tensors for s in ("_scale", "_scale_inv"))
                what = "codes with scales are not supported" if scaled else "without scales is no weight"
                good = ", ".join((*FLOATS, "F8_E4M3 with scales") if scaled else FLOATS)
                self.out.codes.append(source)
                self.out.problems.append(f"{source} in {ref.file}: {ref.dtype} {what}; expected {good}")
            if not self.same(ref.shape, fit.shape) and not (part is not None and part.varies):
                of = f" (for {fold_one(name)} {list(recipe.shape)})" if keep else ""
                wrong = f": shape {list(ref.shape)}, expected {list(fit.shape)}{of}"
                self.out.misshapen.setdefault(wrong, []).append((source, ref.file))
                fits = False
        if part is not None and not dtypes <= set(part.dtypes):
            self.out.problems.append(
                f"{name}: its {part.name} is {', '.join(sorted(dtypes))} in {sources[0]}"
                f"{' and others' if len(sources) > 1 else ''}, expected {' or '.join(part.dtypes)}; if only some of "
                "its parts are quantised, zoo cannot fuse them: ask the vendor's tools for plain weights"
            )
        if not fits or len(self.out.problems) > n_before:
            return False
        if not keep:
            return True
        dtype = next(iter(dtypes)) if len(dtypes) == 1 else _common(dtypes)
        if part is None:
            if dtype not in ITEMSIZE or (self.of_ggml and dtype in FLOATS):
                dtype = "F32"  # unless asked otherwise
            is_float = dtype in FLOATS or dtype not in ITEMSIZE
            if self.dtype is not None and is_float and not (self.keep_fp32 and dtype == "F32"):
                dtype = self.dtype
        elif len(dtypes) > 1:
            self.out.problems.append(
                f"{name}: its parts have {part.name}s of {', '.join(sorted(dtypes))}: use --dtype"
            )
            return False
        self.out.outputs[name] = Output(name, dtype, recipe.shape, slot.layer, tuple(sources), recipe.fits)
        return True

    def note_head(self) -> None:
        for rule in self.rules.by_key.get("head.weight", ()):
            names = [
                self.spell(leaf.name({"r": r})) for leaf in rule.expr.leaves() for r in range(self.n_ranks)
            ]
            if names and all(name in self.tensors for name in names):
                if self.used.issuperset(names):
                    self.out.notes.append(
                        f"of the tied embedding and head the files kept {names[0]} only: it is both"
                    )
                else:
                    self.out.head = list(dict.fromkeys(names))
                return


def compile_rule(
    rule: Rule,
    slot: Slot,
    spec: Spec,
    spell: Callable[[str], str],
    n_ranks: int,
    part: Component | None = None,
    own: tuple[int, ...] = (),
) -> Recipe:
    """The rule's recipe for `slot` (of any layer of its kind), or for a component of it when quantised.
    `own`: the shape of a component that is a constant of each source tensor.

    Raises ZooError if it does not apply.
    """
    layer = None if slot.layer is None else spec.layers[slot.layer]
    axis = int(slot.stacked)
    shape, parts, unit = slot.shape, slot.parts, (1, 1)
    if part is not None:
        if part.unit is None:
            parts = (1,) * len(slot.parts)
            # one released stack has one constant, of its own shape
            lead = slot.shape[:axis] if _stacks(rule.expr) else ()
            shape = (*lead, *((len(parts),) if _fuses(rule.expr) else ()), *own)
        else:
            columns = slot.shape[-1]
            unit = (part.unit[0] or sum(slot.parts), part.unit[1] or columns)
            parts, rest = grid(part, slot.parts, columns)
            shape = (*slot.shape[:axis], sum(parts), *rest)
            if part.name == "weight" and (slot.shape[-1] % unit[1] or any(p % unit[0] for p in slot.parts)):
                raise ZooError(f"rows of {columns} elements do not divide into blocks of {unit[1]}")
            if not _fuses(rule.expr) and any(p % unit[0] for p in slot.parts[:-1]):
                raise ZooError(
                    f"parts of {'/'.join(map(str, slot.parts))} rows in one tensor are no whole blocks of {unit[0]}: one "
                    "scale would stand for rows of two; convert with --dtype"
                )
            if (part.trailing or part.axes != "oi") and transposes(rule.expr):
                raise ZooError("its blocks run along the input axis and cannot be transposed as they are")
    target = Target(
        Box.whole(shape), parts, slot.parts, axis, layer, spec,
        unit, part is not None and part.unit is None, {"i": "{i}"}, n_ranks,
    )  # fmt: skip
    fits = tuple(rule.expr.compile(target))
    if part is not None and part.holds is not None:  # of the others nothing
        fits = tuple(fit for fit in fits if math.prod(fit.canonical.shape))
    if sum(math.prod(f.canonical.shape) for f in fits if not f.copy) != math.prod(shape):
        raise ZooError(
            "its rule does not fill all of it"
            + (f"; its {part.name}s cannot be fused: use --dtype" if part else "")
        )
    leaves = [spell(f.name) for f in fits]
    if part is None:
        return Recipe(("\n".join(leaves),), shape, fits)
    if part.unit is not None and part.axes != "oi":
        fits = tuple(_stored(fit, part.axes) for fit in fits)
    return Recipe(_spelled(leaves, part), shape, fits)


def _stored(fit: Fit, axes: str) -> Fit:
    """The fit of a tensor [..., out, in] for one that is released with other axes (see `Component`)."""
    if axes == "o":
        return replace(fit, shape=fit.shape[:-1])
    *lead, rows, columns = fit.shape
    strides = [math.prod(fit.shape[k + 1 :]) for k in range(len(lead))]
    box = restride(fit.source, fit.shape, (*strides, 1, rows))
    return replace(fit, shape=(*lead, columns, rows), source=box)


def _types_by_part(slot: Slot, fits: Sequence[Fit], dtypes: Sequence[str]) -> list[set[str]]:
    """Of each part of a slot the dtypes of the tensors that its rows come from, the k-th of which gives the k-th fit."""
    ends = list(itertools.accumulate(slot.parts))
    found: list[set[str]] = [set() for _ in slot.parts]
    for fit, dtype in zip(fits, dtypes, strict=True):
        first = fit.canonical.offset // slot.shape[-1] % slot.shape[-2]
        rows = fit.canonical.shape[-2] if len(slot.parts) > 1 else slot.shape[-2]
        for k, end in enumerate(ends):
            if first < end and first + rows > end - slot.parts[k]:
                found[k].add(dtype)
    return found


def _not_carried(types: Iterable[str]) -> str:
    return f"blocks of type {' and '.join(types)} are not carried"


def _spelled(leaves: list[str], part: Component) -> tuple[str, ...]:
    """The names of a component of these weights, as `Recipe` has them."""
    return tuple(
        "\n".join(leaf.removesuffix(a) + b for leaf in leaves)
        for a, b in part.spellings
        if leaves[0].endswith(a)
    )


def beside(plain: Recipe, part: Component, own: tuple[int, ...]) -> Recipe:
    """Of the recipe of plain weights, that of a component of quantised ones, of which each belongs to a whole released
    tensor, along the axes of that. The fits say shapes only. `own` as in `compile_rule`.

    Raises ZooError for rows that are not whole blocks of codes.
    """
    shapes = [fit.shape if part.unit else own for fit in plain.fits]
    if part.unit is not None:
        for k, (*lead, rows, columns) in enumerate(shapes):
            (n,), rest = grid(part, (rows,), columns)
            shapes[k] = part.released((*lead, n, *rest))
            if part.name == "weight" and (columns % part.unit[1] or rows % part.unit[0]):
                raise ZooError(
                    f"{rows} rows of {columns} elements do not divide into blocks of {part.unit[0]} x {part.unit[1]}"
                )
    fits = tuple(replace(fit, shape=shape) for fit, shape in zip(plain.fits, shapes))
    return Recipe(_spelled(plain.names[0].split("\n"), part), plain.shape, fits)


def _within(expr: Expr) -> Iterator[Expr]:
    """An expression and all those it is made of."""
    yield expr
    for inner in (getattr(expr, "expr", None), *getattr(expr, "parts", ())):
        if isinstance(inner, Expr):
            yield from _within(inner)


def transposes(expr: Expr) -> bool:
    return any(isinstance(e, Transpose) for e in _within(expr))


def _fuses(expr: Expr) -> bool:
    return any(isinstance(e, Cat) for e in _within(expr))


def _stacks(expr: Expr) -> bool:
    return any(isinstance(e, Stack) for e in _within(expr))


TIED = "a copy of the embedding: the config ties the head to it"


VALUE_HEAD = re.compile(r"v_head\.(summary\.)?(weight|bias)")  # trl's; upstream's language models have none
ADAPTED = re.compile(
    r"\.(lora_(A|B|magnitude_vector)|lora_embedding_[AB]|base_layer|original_module|modules_to_save|vera_lambda_[bd]|hada_w[12]_[ab]"
    r"|oft_[rR]|ia3_l)(\.|$)"
)
"""Parts of names that only peft's modules have: the base and what is to be added to it lie side by side."""


def _unsaid(config: Mapping[str, Any]) -> bool:
    """A wrapper that leaves `tie_word_embeddings` to its class, which upstream calls tied."""
    text = config.get("text_config")
    return isinstance(text, Mapping) and all(c.get("tie_word_embeddings") is None for c in (config, text))


def _judge_head(ckpt: Checkpoint, spec: Spec, family: Family, m: Match, dtype: str | None) -> Match:
    """The config ties the head but the files hold one. Equal to the embedding it is a copy; else it is
    the head that was trained, and the spec is corrected (upstream loads it, too).

    The one place where a plan reads weights: no header can tell.
    """
    refs = (
        [ckpt.tensors[m.outputs["embed.weight"].sources[0]], ckpt.tensors[m.head[0]]]
        if "embed.weight" in m.outputs
        else []
    )
    if len(refs) < 2 or len(m.head) > 1 or not all(ckpt.path(r.file).exists() for r in refs):
        m.notes.append(f"{m.head[0]} is taken for a copy of the embedding (tied by the config); not compared")
        return m
    if refs[0].dtype == refs[1].dtype and refs[0].strides == refs[1].strides and _equal(ckpt, *refs):
        return m
    untied = match(
        replace(spec, tied=False),
        family.rules[m.naming],
        ckpt.tensors,
        ckpt.n_ranks,
        m.naming,
        dtype,
        ckpt.config,
    )
    untied.notes.append(
        f"the config ties the head, but {m.head[0]} differs from the embedding: kept as the head"
    )
    return untied


def _equal(ckpt: Checkpoint, a: TensorRef, b: TensorRef) -> bool:
    if a.nbytes != b.nbytes:
        return False
    with open(ckpt.path(a.file), "rb") as f, open(ckpt.path(b.file), "rb") as g:
        f.seek(a.offset)
        g.seek(b.offset)
        left, step = a.nbytes, 4 << 20
        while left:
            n = min(step, left)
            if f.read(n) != g.read(n):
                return False
            left -= n
    return True


def _common(dtypes: set[str]) -> str:
    """A dtype that holds all of these exactly."""
    return "F64" if "F64" in dtypes else "F32"


def _prefix(ruleset: RuleSet, tensors: Mapping[str, TensorRef]) -> tuple[tuple[str, str], ...]:
    """The first spelling of names under which the embedding (else the head) exists: as the rules have it, or without what
    comes first in it (`model.`), as a decoder saved without its head has it."""
    embed = next(
        (leaf.pattern for r in ruleset.by_key.get("embed.weight", ()) for leaf in r.expr.leaves()), ""
    )
    first = embed.partition(".")[0] + "."
    spellings = (*ruleset.prefixes, *([((first, ""),)] if embed.count(".") > 1 else []))
    for key in ("embed.weight", "head.weight"):  # a tied file may have kept the head alone
        there = [
            prefix
            for prefix in spellings
            if any(
                all(name in tensors for name in _sources(rule, respell(ruleset, prefix)))
                for rule in ruleset.by_key.get(key, ())
            )
        ]
        if there:  # where several have it, it is one under which there is a first layer
            return next((p for p in there if len(there) > 1 and _has_layer(ruleset, p, tensors)), there[0])
    return ruleset.prefixes[0]


def _sources(rule: Rule, spell: Callable[[str], str]) -> list[str]:
    """The names of a rule's sources in the first layer, of the first expert and rank."""
    patterns = (leaf.pattern for leaf in rule.expr.leaves())
    return [spell(p.replace("{i}", "0").replace("{e}", "0").replace("{r}", "0")) for p in patterns]


def _has_layer(
    ruleset: RuleSet, prefix: tuple[tuple[str, str], ...], tensors: Mapping[str, TensorRef]
) -> bool:
    spell = respell(ruleset, prefix)
    inside = (rule for key, rules in ruleset.by_key.items() if key.startswith("layers.") for rule in rules)
    return any(name in tensors for rule in inside for name in _sources(rule, spell))


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
        if name in out.head:
            out.extras[name] = TIED
            continue
        for e in extras:
            if e.matches(name, spec, tensors):
                out.extras[name] = e.reason
                break
        else:
            if CACHE_SCALE.search(name) and math.prod(tensors[name].shape) == 1:
                out.extras[name] = "a scale of cached keys or values, which are not quantised here"
            elif VALUE_HEAD.fullmatch(name):
                out.extras[name] = "a value head, which reinforcement learning trains beside the model's own"
            else:
                out.unexpected.append(name)


# ---------------------------------------------------------------------------------------------------
# What does not fit


class PlanError(ZooError):
    """The tensors and the rules do not account for each other. `match` holds the details."""

    def __init__(self, ckpt: Checkpoint, family: Family, m: Match) -> None:
        self.match = m
        missing = [name for names in m.missing.values() for name in names]
        said = (
            _cut_short(ckpt, missing)
            or _adapted(ckpt)
            or _other_rows(ckpt, m)
            or _renamed(ckpt, family, missing, m)
        )
        if said is not None:
            super().__init__(said)
            return
        lines = [
            f"{ckpt.root}: its tensors do not fit family {family.name} ({m.naming} names); nothing was written",
            *_other_depth(m),
        ]
        if missing:
            lines.append(f"missing ({len(missing)}):")
            near = _nearest(missing, m.unexpected or ckpt.tensors)
            for text, first in fold(missing):
                hint = near.get(first)
                lines.append(f"  {text}" + (f"   nearest: {hint}" if hint else ""))
            if set(m.missing) == {"head.weight"}:
                lines.append(
                    "  (if the head is the embedding, say so in config.json: tie_word_embeddings true)"
                )
        if m.unexpected:
            lines.append(f"unexpected ({len(m.unexpected)}): no rule uses them")
            near = _nearest(m.unexpected, missing)
            for text, first in fold(m.unexpected):
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
    found = [name for name in ckpt.tensors if ADAPTED.search(name)]
    if not found:
        return None
    return (
        f"{ckpt.root}: {len(found)} of {len(ckpt.tensors)} tensors are an adapter's that was not merged ({found[0]}): merge it (peft: "
        "model.merge_and_unload()), save the result, and convert that; nothing was written"
    )


def _renamed(ckpt: Checkpoint, family: Family, missing: list[str], m: Match) -> str | None:
    """Where every tensor that is not expected is one that is missing, under another prefix, always the same: that."""
    if not missing or len(missing) != len(m.unexpected) or m.misshapen or m.problems:
        return None
    wanted, first = set(missing), m.unexpected[0].split(".")
    tails = {".".join(first[i:]) for i in range(1, len(first))}
    tail, want = max(
        ((t, w) for w in wanted for t in tails if w == t or w.endswith("." + t)),
        key=lambda x: len(x[0]),
        default=("", ""),
    )
    if not tail:
        return None
    theirs, ours = m.unexpected[0].removesuffix(tail), want.removesuffix(tail)
    if not all(n.startswith(theirs) and ours + n.removeprefix(theirs) in wanted for n in m.unexpected):
        return None
    fit = (
        f"where family {family.name} has {ours!r}, and fit otherwise"
        if ours
        else f"without which they fit family {family.name}"
    )
    return (
        f"{ckpt.root}: names of tensors begin with {theirs!r}, {fit}: a wrapper's, or another tool's, which is none that zoo looks "
        "through. If it is the model that is meant, save it from inside the wrapper; nothing was written"
    )


def _other_depth(m: Match) -> list[str]:
    """A line where whole layers are missing, or more than the config has are there."""
    there, n = {_layer(name) for name in m.outputs}, m.spec.n_layers
    gone = sorted({i for i in map(_layer, m.missing) if i is not None} - there)
    said = f"layers by the config (num_hidden_layers): {n}; "
    if gone:
        return [f"{said}of {_numbers(map(str, gone))} the files hold nothing"]
    numbers = [next((p for p in name.split(".") if p.isascii() and p.isdigit()), "") for name in m.unexpected]
    if numbers and all(len(x) < 9 and x and int(x) >= n for x in numbers):
        return [f"{said}the files hold {_numbers(numbers)} too"]
    return []


def _numbers(numbers: Iterable[str]) -> str:
    first, _, last = (said := _span(numbers).strip("{}")).partition("-")
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


def fold_one(name: str) -> str:
    """A name with * for its layer."""
    return re.sub(r"^layers\.\d+\.", "layers.*.", name)


MOST_FOLDED = 100_000
"""Names that are looked at for a message; the largest release has 92,000 tensors."""
MOST_CHARACTERS = 8 << 20
"""Of them all."""


def fold(names: Iterable[str]) -> list[tuple[str, str]]:
    """(text, first name) per group of names that differ in their numbers only; of the first `MOST_FOLDED` names, as far as
    `MOST_CHARACTERS` go."""
    groups: dict[str, list[str]] = {}
    left = MOST_CHARACTERS
    for name in itertools.islice(names, MOST_FOLDED):
        if (left := left - len(name)) < 0:
            break
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    out = []
    for group in groups.values():
        if len(group) == 1:
            out.append((group[0], group[0]))
            continue
        words = zip(*(name.split(".") for name in group), strict=True)
        text = ".".join(w[0] if len(set(w)) == 1 else _span(w) for w in words)
        out.append((f"{text} ({len(group)} tensors)", group[0]))
    return out


def _span(numbers: Iterable[str]) -> str:
    numbers = list(numbers)
    if not all(n.isascii() and n.isdigit() and len(n) <= 9 for n in numbers):
        return "*"  # a name may have any number of digits, or a star of its own
    values = sorted(set(map(int, numbers)))
    if values[-1] - values[0] == len(values) - 1:
        return f"{{{values[0]}-{values[-1]}}}"
    return "{" + ",".join(map(str, values)) + "}"


def _nearest(names: Iterable[str], among: Collection[str]) -> dict[str, str]:
    """For the first name of each group, the name most like it."""
    candidates = [first for _, first in fold(among)][:200]
    near = {}
    for _, first in fold(names)[:50]:
        if found := alike(first, candidates, 1, 0.75):
            near[first] = found[0]
    return near
