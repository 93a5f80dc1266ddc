"""Rules x headers -> what makes every canonical tensor, and all that does not fit. Nothing is read.

A `Match` is a proposal: `zoo.mapping.plan` takes it as a plan where nothing is left over, and `zoo.mapping.unmatched` says what is.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import COUNTS, FLOATS, ITEMSIZE, TensorRef
from zoo.layout import Slot, layout
from zoo.mapping.fold import fold, fold_one
from zoo.mapping.recipe import Output, Recipe, beside, compile_rule, fuses, stored, transposes
from zoo.mapping.rules import Fit, Rule, RuleSet, respell
from zoo.quant import blocks
from zoo.quant.base import Component, Scheme, Unread
from zoo.quant.schemes import CACHE_SCALE, coded, detect, leaf_of
from zoo.spec import Layer, Spec


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
        _sort_rest(self.out, self.spec, self.rules, self.spell, self.tensors, self.used, self.config)
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
        if self.dtype is not None or not self.of_ggml:
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
        self,
        rule: Rule,
        n: int,
        slot: Slot,
        scheme: Scheme | None,
        part: Component | None,
        own: tuple[int, ...] = (),
    ) -> Recipe | str:
        """The rule compiled for a slot (or a component of it), or why it does not apply. `own`: the shape of a component that is a
        `constant`."""
        kind = None if slot.layer is None else self.kind_of[slot.layer]
        key = (slot.key, n, kind, scheme and scheme.name, part and part.name, own)
        if (found := self.recipes.get(key)) is None:
            try:
                if part is None:
                    found = compile_rule(rule, slot, self.spec, self.spell, self.n_ranks)
                    if scheme is not None and scheme.turned:
                        found = replace(found, fits=tuple(stored(fit, "io") for fit in found.fits))
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

    def constant(self, rule: Rule, slot: Slot, part: Component) -> TensorRef | None:
        """The first source tensor of a component that is a constant of each, whose shape is its own; None of any other."""
        if part.unit is not None:
            return None
        leaf = self.spell(next(rule.expr.leaves()).name({"i": str(slot.layer), "e": 0, "r": 0}))
        return next((self.tensors[s] for s in part.names(leaf) if s in self.tensors), None)

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
            own: tuple[int, ...] = ()
            if (ref := self.constant(rule, slot, part)) is not None:
                own = ref.shape
                try:
                    part.refuse_constant(ref.shape, slot.shape, len(slot.parts))
                except ZooError as e:  # even where it may be absent
                    self.out.problems.append(f"{ref.name} in {ref.file}: {e}")
                    self.use(slot, rule, n, scheme)
                    return
            found = self.recipe(rule, n, slot, scheme, part, own)
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
            if rule.when is not None and not rule.when(layer, self.spec) or not fuses(rule.expr):
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
            made.append((codes, stored(fit, "io") if how.turned else fit, how.name, names))
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
            if self.dtype is not None and dtype in FLOATS and not (self.keep_fp32 and dtype == "F32"):
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


TIED = "a copy of the embedding: the config ties the head to it"


VALUE_HEAD = re.compile(r"(v_head|value_head|critic_head|reward_head|score)\.(summary\.)?(weight|bias)")
"""trl's, DeepSpeed-Chat's, OpenRLHF's, of one number for each token; upstream's language models have none."""
FREQUENCIES = re.compile(r".*\.rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)")
"""Buffers of RoPE, as versions of before 2024 and vendors' own code save them."""


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
    out: Match,
    spec: Spec,
    ruleset: RuleSet,
    spell: Any,
    tensors: Mapping[str, TensorRef],
    used: set[str],
    config: Mapping[str, Any],
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
            elif FREQUENCIES.fullmatch(name):
                out.extras[name] = "rotary frequencies; computed from the config"
            elif VALUE_HEAD.fullmatch(name) and tensors[name].shape[:1] == (1,):
                out.extras[name] = "a value head, which reinforcement learning trains beside the model's own"
            else:
                out.unexpected.append(name)
    if not out.unexpected:
        return
    # What stands beside the codes of a weight that is kept aside, and codes that are not called as it is.
    of = {name: leaf_of(names[0]) for _, names in coded(tensors, config) for name in names}
    for name in out.unexpected:
        for e in extras:
            if name in of and e.matches(of[name], spec, tensors):
                out.extras[name] = e.reason
                break
    out.unexpected[:] = [name for name in out.unexpected if name not in out.extras]
