"""The names under which canonical tensors go out: by a family's rules, read from right to left."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from zoo import families
from zoo.errors import ZooError
from zoo.families import Family
from zoo.formats.base import HF_NAMINGS
from zoo.formats.canonical import Canonical
from zoo.layout import Slot, layout
from zoo.mapping.recipe import Output, compile_rule
from zoo.mapping.rules import Rule, RuleSet, respell
from zoo.quant.blocks import is_one
from zoo.quant.schemes import scheme


def family_of(c: Canonical) -> Family:
    """The family whose rules the folder was converted by. Raises ZooError if there is none here of that name, with the package to install."""
    return families.get(c.source["family"], c.source.get("package"))


def rules_of(family: Family, naming: str = "hf") -> RuleSet:
    """The rules of the names that Hugging Face's files have, or, with naming "transformers", its classes in memory."""
    if "hf" not in family.rules:
        raise ZooError(f"family {family.name} has no Hugging Face names; it has {', '.join(family.rules)}")
    return family.rules.get(naming, family.rules["hf"])


Prefix = tuple[tuple[str, str], ...]
WITHIN: Prefix = (("model.", "model.language_model."),)
"""Where transformers 5 has the language model of a class that sees images."""


def prefix_of(c: Canonical, rules: RuleSet, naming: str = "hf") -> Prefix:
    """How these rules, which are `rules_of` this naming, spell the beginnings of names where the source spelt them as it did, as far as
    it is known."""
    spelt = _as_the_source(c, rules)
    if naming != "transformers":
        return spelt
    # Cut short: a file of the class below the one with a head.
    if spelt and all(len(new) < len(old) for old, new in spelt):
        return ()
    wrapped = any(new.startswith("language_model.") for _, new in spelt)
    return WITHIN if wrapped and WITHIN in rules.prefixes else spelt


def _as_the_source(c: Canonical, rules: RuleSet) -> Prefix:
    said, naming = tuple((a, b) for a, b in c.source["prefix"]), c.source["naming"]
    if naming not in HF_NAMINGS:
        return rules.prefixes[0]
    theirs = family_of(c).rules[naming]
    if rules is theirs:
        return said
    if len(theirs.prefixes) != len(rules.prefixes):  # one has some of the other's
        return said if said in rules.prefixes else rules.prefixes[0]
    other = said if naming == "saved" else rules.prefixes[0]
    return dict(zip(theirs.prefixes, rules.prefixes, strict=True)).get(said, other)


def aside_of(c: Canonical, rules: RuleSet) -> dict[str, str]:
    """The tensors kept aside that have names among Hugging Face's: as the folder has them -> as a release would. Of those that
    transformers' classes hold in memory, what the release has without `model.` before it."""
    if c.source["naming"] not in HF_NAMINGS:
        return {}
    if c.source["naming"] == "hf":
        return {name: name for name in c.extra_tensors}

    def released(name: str) -> str:
        spellings = (name, name.removeprefix("model."))
        return next(
            (n for n in spellings if any(e.matches(n, c.spec, c.extra_tensors) for e in rules.extras)), name
        )

    return {name: released(name) for name in c.extra_tensors}


def held_aside(c: Canonical) -> dict[str, str]:
    """The same tensors as the folder has them -> as transformers has them in memory; "": it has others in their place."""
    names = c.extra_tensors
    if c.source["naming"] != "hf":  # they are called so already, or have no such names
        return {name: name for name in names} if c.source["naming"] in HF_NAMINGS else {}
    rules = rules_of(family_of(c))
    spelt = dict[str, str]()
    for group in rules.beside:
        if all(any(name.startswith(old) for name in names) for old, _ in group):
            spelt |= group
    other = tuple(old for old, new in spelt.items() if not new)
    called = respell(rules, tuple(spelt.items()))
    return {name: "" if name.startswith(other) else called(name) for name in names}


def outputs_of(
    c: Canonical, rules: RuleSet, spell: Any, released: Collection[str] = (), called: str = "Hugging Face"
) -> Iterator[Output]:
    """Canonical tensors with the names and shapes of the first rule that applies to each; of several that do, of the first
    whose names were released."""
    for slot in layout(c.spec).values():
        layer = None if slot.layer is None else c.spec.layers[slot.layer]
        reason = "no rule fills it"
        first: list[Output] = []
        for rule in rules.by_key.get(slot.key, ()):
            if rule.when is not None and not rule.when(layer, c.spec):
                continue
            try:
                made = list(by_rule(c, rule, slot, spell, released))
            except (ZooError, IndexError) as e:
                reason = str(e) or "its codes have no name there"
                continue
            first = first or made
            if all(name in released for o in made for name in o.sources):
                first = made
                break
            if not released:
                break
        if not first:
            raise ZooError(f"{c.root}: {slot.name} has no {called} form: {reason}; convert with --dtype")
        yield from first


def by_rule(
    c: Canonical, rule: Rule, slot: Slot, spell: Any, released: Collection[str] = ()
) -> Iterator[Output]:
    """A canonical tensor, or the components of a quantised one, by this rule; of a component's spellings (scales end in `_scale_inv` or
    `_scale`, and each quantiser's loader knows its own) that which was `released`. Raises ZooError or IndexError if it does not apply."""
    how = c.quant.get(slot.name.removesuffix(".weight")) if slot.name.endswith(".weight") else None
    if how is not None and is_one(scheme(how)):  # no other format has them: as numbers
        recipe = compile_rule(rule, slot, c.spec, spell, 1)
        sources = tuple(recipe.names[0].replace("{i}", str(slot.layer)).split("\n"))
        yield Output(slot.name, "F32", slot.shape, slot.layer, sources, recipe.fits)
        return
    for part in scheme(how).components if how else (None,):
        name = slot.name if part is None else f"{slot.name.removesuffix('.weight')}.{part.name}"
        if (ref := c.tensors.get(name)) is None:
            continue  # an optional component
        recipe = compile_rule(rule, slot, c.spec, spell, 1, part)
        if part is not None and part.unit is None and recipe.shape != ref.shape:
            # a constant of each released tensor, which is a list there: an int4 weight's shape, a scale [1]
            recipe = compile_rule(rule, slot, c.spec, spell, 1, part, ref.shape[-1:])
        sources = tuple(recipe.sources(slot.layer, released))
        if recipe.shape != ref.shape:
            raise ZooError(f"{name} is {list(ref.shape)}, expected {list(recipe.shape)}")
        yield Output(name, ref.dtype, recipe.shape, slot.layer, sources, recipe.fits)
