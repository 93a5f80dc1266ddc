"""The families zoo can convert: found by what a config says it is, never by name.

A family is a module with a `FAMILY`: in the package `converters`, or in any installed package that names
it in the entry-point group `zoo.families`. Nothing here or elsewhere in `zoo` knows which there are.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.config import Config
from zoo.errors import ZooError
from zoo.layout import layout
from zoo.mapping.rules import RuleSet
from zoo.spec import Spec


@dataclass(frozen=True)
class Family:
    """A family is two pieces of data: `spec` (config -> Spec), and `rules`, one set per naming of its
    tensors ("hf", "meta", "mistral", "gguf", ...; the reader says which namings a checkpoint may have).

    `model_types` and `architectures` are what its configs say in those fields. A config that has
    `architectures` goes by them; one that has none, by its `model_type`. A wrapper's architecture may be
    claimed by several families: its text model's `model_type` decides.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    spec: Callable[[Config], Spec]
    rules: Mapping[str, RuleSet] = field(repr=False)


@functools.cache
def families() -> dict[str, Family]:
    """All families by name: the package `converters`, then entry points."""
    from importlib.metadata import entry_points  # slow to import, and `get` seldom needs it

    import converters

    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(converters.__path__):
        if not module.name.startswith("_"):
            family = importlib.import_module(f"converters.{module.name}").FAMILY
            found[family.name] = family
    for entry in entry_points(group="zoo.families"):
        family = entry.load()
        found.setdefault(family.name, family)
    return found


def get(name: str) -> Family:
    """The family called `name`. Raises ZooError, with the known ones, if there is none."""
    if name.isidentifier() and name[0] != "_" and importlib.util.find_spec(f"converters.{name}") is not None:
        family: Family = importlib.import_module(f"converters.{name}").FAMILY  # one file, not all of them
        return family
    if name not in families():
        raise ZooError(f"no family is called {name!r}; known: {', '.join(sorted(families()))}")
    return families()[name]


def find(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a config. Raises ZooError for one that no family claims."""
    listed = config.get("architectures")
    named = [a for a in listed if isinstance(a, str)] if isinstance(listed, list) else []
    model_type = config.get("model_type")
    claims = [f for f in families().values() if any(a in f.architectures for a in named)]
    if claims:
        text = config.get("text_config")
        kind = text.get("model_type") if isinstance(text, Mapping) else model_type
        return next((f for f in claims if kind in f.model_types), claims[0])
    if not named:
        for family in families().values():
            if model_type in family.model_types:
                return family
    known = sorted(a for f in families().values() for a in f.architectures)
    raise ZooError(
        f"{where}: no family for architectures {named or 'absent'}, model_type {model_type!r}. Known architectures: "
        f"{', '.join(known)}. See CONTRIBUTING.md to add a family, or name one with --family."
    )


def spec_of(config: Mapping[str, Any], family: Family | None = None, where: str = "config.json") -> Spec:
    """The Spec of a config, by the family that claims it (or the one given).

    Raises ZooError, naming `where`, for a field that is missing, unsupported, or of a value that makes no
    model: a size below 1, a text where a number should be.
    """
    family = family or find(config, where)
    try:
        said = family.spec(Config(config, where))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise ZooError(
            f"{where}: a field has a value that makes no {family.name} model ({type(e).__name__}: {e})"
        ) from e
    try:
        spec = Spec.from_dict(said.to_dict())  # checks the types of all it holds
    except ZooError as e:
        raise ZooError(f"{where}: {str(e).removeprefix('zoo.json: ')}") from None
    odd = next((s for s in layout(spec).values() if min(s.shape) < 1), None)
    if odd is not None:
        raise ZooError(f"{where}: its sizes give {odd.name} the shape {list(odd.shape)}")
    return spec
