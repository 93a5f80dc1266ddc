"""What is special about a family's upstream and its releases: the facts its tests need, in one value.

A family's test module makes one `FamilyCase`; everything that is tested of every family is in `suite.py` and asks
the case. Each field has the value that most families have, so a case says only what is unusual.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

from .variant import Config, Settings, Tensor, Tensors, Variant


def _as_it_is(config: Settings) -> Settings:
    return config


def _no_fields(config: Config) -> Settings:
    return {}


def _as_they_are(tensors: Tensors, config: Config) -> Tensors:
    return tensors


@dataclass(frozen=True, eq=False)
class Gguf:
    """What llama.cpp's converter makes of a family's release: one of the architectures in its `Family.gguf`.

    Attributes:
        arch: the architecture's name.
        fields: config.json -> the metadata beside, or other than, what `zoo.testing.gguf.metadata` has for every architecture;
            keys without the architecture's name, None for what is not written.
        variant: whose weights; the first of the case where not given.
        settings: changes to the variant, where the format cannot express what it has.
        weights: (tensors of the release, experts stacked; config.json) -> tensors under names that gguf-py's map knows.
        interleaved: rows of q and k of each head are put in pairs.
        plus_one: norm weights w are stored as 1 + w.
        tables: config.json -> tensors of constants that are no weights, by their names in the file.
        silent: fields that some converter writes besides, and that change nothing.
        refused: fields that no zoo reads: the last of each says what would be ignored, and is refused by its name.
        idle: fields that the converter copies from config.json though no number depends on them; no Spec has them.
        written: zoo exports to this form; of two that llama.cpp reads, to that which is made of Hugging Face's layout.
    """

    arch: str
    fields: Callable[[Config], Settings] = _no_fields
    variant: str = ""
    settings: Settings = field(default_factory=dict, repr=False)
    weights: Callable[[Tensors, Config], Tensors] = _as_they_are
    interleaved: bool = False
    plus_one: bool = False
    tables: Callable[[Config], Mapping[str, Sequence[float]]] = _no_fields
    silent: Settings = field(default_factory=dict)
    refused: tuple[Settings, ...] = ()
    idle: tuple[str, ...] = ()
    written: bool = True


@dataclass(frozen=True)
class Listed:
    """A list of the tensors in a release's own files, and what of them the rules set aside.

    Attributes:
        stem: whose config (`<stem>.config.json`).
        extras: first components of the names set aside; None: any.
    """

    stem: str
    extras: frozenset[str] | None = frozenset()


@dataclass(frozen=True, eq=False)
class FamilyCase:
    """What the shared tests need to know of one family.

    Attributes:
        name: the family's, as its `Family` says it.
        variants: its tiny checkpoints. The first is the plainest.
        main: the variant that uses most of what the family can do; the first where not given.
        without_upstream: why transformers has no class, and what the family is held to instead.

    Of its upstream:

    Attributes:
        classes: model_type -> model class, where transformers' own tables have none or another.
        alone: its wrapper cannot be built here; the language model is built alone, from the wrapper's text_config.
        upstream_keys: changes a config's keys into those that mean the same to upstream's class.
        grouped: several query heads share a key/value head. False for MHA and MLA.
        layer_kinds: the kinds that `layer_types` must show over all variants, where layers alternate by it.
        sums_rounded: upstream's loop over experts rounds each sum to the model's dtype.
        kept_in_fp32: last names of tensors that releases and upstream keep in fp32 in a bf16 checkpoint.

    Of its releases:

    Attributes:
        released_text: what `save_pretrained` writes into config.json -> the keys of a release, for the language model's part.
        released_wrapper: the same for what is around it.
        keeps: model_type -> keys of transformers 5 that its releases, being younger, have too.
        released: (case, saved tensors, config) -> the tensors of a release, where `save_pretrained` writes others.
        mtp: (case, config, count) -> multi-token-prediction layers under the names of the releases.
        mtp_layers: config stem -> prediction layers in the files, where the config does not count them.
        never_quantised: components of names of weights that quantised releases keep, though their config does not say so.
        stored: (name, tensor) -> what quantised releases hold of it, where that is not as their config says it.
        packed_otherwise: config stem -> why its tensors can't be listed from upstream's class; a test of the family's
            module accounts for them.
        listed: tensor list (`tests/data/tensors/<name>.tensors.json`) -> the release it is of.
        without_effect: endings of names of tensors on which no logit depends, with the reason.
        optional_rules: keys of rules that no layout of a variant or release asks for, with the reason.
        refused: (config stem, changes, what the error says): configs that must be refused.
        gguf: its GGUFs, by llama.cpp's names of the architecture.
        disputes: what a `Disagreement` of the family is about -> a function that asserts that the installed upstream still does
            as the entry says; what upstream mends is noticed so.
    """

    name: str
    variants: tuple[Variant, ...] = ()
    main: str = ""
    without_upstream: str = ""

    classes: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False
    upstream_keys: Callable[[Settings], Settings] = _as_it_is
    grouped: bool = True
    layer_kinds: frozenset[str] = frozenset()
    sums_rounded: bool = True
    kept_in_fp32: frozenset[str] = frozenset()

    released_text: Callable[[Settings], Settings] = _as_it_is
    released_wrapper: Callable[[Settings], Settings] = _as_it_is
    keeps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    released: Callable[[FamilyCase, dict[str, Tensor], Config], dict[str, Tensor]] | None = None
    mtp: Callable[[FamilyCase, Config, int], dict[str, Tensor]] | None = None
    mtp_layers: Mapping[str, int] = field(default_factory=dict)
    never_quantised: tuple[str, ...] = ()
    stored: Callable[[str, Tensor], dict[str, Tensor]] | None = None
    packed_otherwise: Mapping[str, str] = field(default_factory=dict)
    listed: Mapping[str, Listed] = field(default_factory=dict)
    without_effect: Mapping[str, str] = field(default_factory=dict)
    optional_rules: Mapping[str, str] = field(default_factory=dict)
    refused: tuple[tuple[str, Settings, str], ...] = ()
    gguf: tuple[Gguf, ...] = ()
    disputes: Mapping[str, Callable[[], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mine = tuple(dataclasses.replace(v, family=self.name) for v in self.variants)
        object.__setattr__(self, "variants", mine)

    def variant(self, name: str) -> Variant:
        """The variant of this name. Raises KeyError if the family has none."""
        return {v.name: v for v in self.variants}[name]

    @property
    def main_variant(self) -> Variant:
        return self.variant(self.main) if self.main else self.variants[0]


def cases(package: ModuleType) -> dict[str, FamilyCase]:
    """The `CASE` of every module in `package`, by the name of its family."""
    found: dict[str, FamilyCase] = {}
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        case = getattr(importlib.import_module(module.name), "CASE", None)
        if isinstance(case, FamilyCase):
            found[case.name] = case
    return found
