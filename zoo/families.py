"""The families zoo can convert: found by what a config says it is, never by name.

A family is a module with a `FAMILY`: in the package `converters`, or in any installed package that names
it in the entry-point group `zoo.families`. Nothing here or elsewhere in `zoo` knows which there are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoo import blame, plugins, unread
from zoo.config import Config
from zoo.disagreements import Disagreement
from zoo.errors import ZooError
from zoo.formats.base import MAX_TENSORS
from zoo.mapping.rules import RuleSet
from zoo.quant.base import SAID
from zoo.soundness import refuse_unsound
from zoo.spec import MAX_LAYERS, Spec

if TYPE_CHECKING:
    from zoo.formats.gguf_fields import Fields

OwnReading = Callable[[Config, Collection[str]], dict[str, Any] | None]
"""(the vendor's config, names of the tensors) -> config.json in Hugging Face terms, or None: not of this family."""
GGUFReading = Callable[["Fields", dict[str, Any]], dict[str, Any] | None]
"""(the architecture's fields, the config they share) -> what this family adds to it, or None: not of this family."""


@dataclass(frozen=True)
class Family:
    """A family is data: `spec` (config -> Spec), and `rules`, one set per naming of its tensors ("hf", "meta",
    "mistral", "gguf", ...; the reader says which namings a checkpoint may have).

    `model_types` and `architectures` are what its configs say in those fields. A config that has
    `architectures` goes by them; one that has none, or a decoder's without its head (`...Model`), by its
    `model_type`. A wrapper's architecture may be claimed by several families: its text model's `model_type` decides.

    A naming whose files have no config in Hugging Face's terms also has a reading of the config they have:
    `own`, by naming, for a vendor's (`params.json`); `gguf`, by the architecture's name, for a GGUF's metadata.
    Neither file says which family it is of, so several may have a reading of one kind: the first that does not
    answer None is taken.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    spec: Callable[[Config], Spec]
    rules: Mapping[str, RuleSet] = field(repr=False)
    own: Mapping[str, OwnReading] = field(repr=False, default_factory=dict)
    gguf: Mapping[str, GGUFReading] = field(repr=False, default_factory=dict)
    disagreements: tuple[Disagreement, ...] = field(repr=False, default=())


@functools.cache
def _built_in() -> dict[str, Family]:
    import pkgutil  # slow to import, and `get` seldom needs it

    from zoo.shipped import converters

    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(converters.__path__):
        try:
            family = _load(f"zoo.converters.{module.name}")
        except ZooError as error:
            _broken[f"zoo.converters.{module.name}"] = str(error)
            warnings.warn(str(error), stacklevel=2)
        else:
            found[family.name] = family
    return found


_broken: dict[str, str] = {}
"""Families that could not be imported, by module, and why."""


def _load(module: str) -> Family:
    """The family of a module. Raises ZooError, naming file and line, if it can't be imported; ModuleNotFoundError if
    there is no such module."""
    try:
        family = importlib.import_module(module).FAMILY
    except ModuleNotFoundError as e:
        if e.name == module:
            raise
        raise _unreadable(module, e) from e
    except Exception as e:
        raise _unreadable(module, e) from e
    if not isinstance(family, Family):
        raise ZooError(f"{module}: FAMILY is a {type(family).__name__}; expected a zoo.family.Family")
    return family


def _unreadable(module: str, e: Exception) -> ZooError:
    """A syntax error's place is its own, another one's is where its traceback left `zoo` last."""
    from zoo import blame  # and in `blamed`: only a failure needs it

    at = f"{e.filename}:{e.lineno}" if isinstance(e, SyntaxError) else blame.place(e) or module
    return ZooError(
        f"{at}: the family in {module} can't be imported ({type(e).__name__}: {e}); its file is at fault"
    )


@functools.cache
def _plugged_in() -> dict[str, Family]:
    """The families of other packages, by name. One that breaks is named, and breaks nothing else."""
    found: dict[str, Family] = {}
    for entry in plugins.entries("zoo.families"):
        whose = f"package {entry.package}, family {entry.name}"
        try:
            family = entry.load()
            if not isinstance(family, Family):
                raise ZooError(f"{entry.value} is a {type(family).__name__}; expected a zoo.family.Family")
        except Exception as e:
            _broken[whose] = f"{whose}: {entry.value} can't be imported ({type(e).__name__}: {e})"
            warnings.warn(_broken[whose], stacklevel=2)
            continue
        if family.name not in _built_in() and f"zoo.converters.{family.name}" not in _broken:
            found.setdefault(family.name, family)
            _package.setdefault(family.name, entry.package)
    return found


_package: dict[str, plugins.Package] = {}
"""The package that a family of another package came from, by the family's name."""


@functools.cache
def families() -> dict[str, Family]:
    """All families by name: the package `converters`, then entry points. A name of ours is never another's."""
    return _built_in() | _plugged_in()


def refresh() -> None:
    """Look again: packages were installed or taken away since this process first asked."""
    for cached in (families, _plugged_in, _built_in, plugins.entries):
        cached.cache_clear()
    _broken.clear()
    _package.clear()


def package_of(name: str) -> plugins.Package | None:
    """The package that brought the family called `name`; None for one of zoo's own."""
    return _package.get(name) if name in _plugged_in() else None


def get(name: str, package: Any = None) -> Family:
    """The family called `name`. `package`: what zoo.json says it came with (`name`, `version`). Raises ZooError if
    there is none, with the known ones, or with the package to install."""
    if name.isidentifier() and name[0] != "_":
        try:
            return _load(f"zoo.converters.{name}")  # one file, not all of them
        except ModuleNotFoundError:
            pass
    if name in families():
        return families()[name]
    if isinstance(package, Mapping):
        of = package.get("name")
        raise ZooError(
            f"family {name!r} comes with the package {of}, which is not installed here or does not have it any more: "
            f"pip install '{of}=={package.get('version')}'{_also_broken()}"
        )
    raise ZooError(f"no family is called {name!r}; known: {', '.join(sorted(families()))}{_also_broken()}")


def _also_broken() -> str:
    return "".join(f"\n  not counted: {why}" for why in _broken.values())


def own_config(naming: str, own: Any, tensors: Collection[str], where: str) -> dict[str, Any]:
    """config.json in Hugging Face terms of a vendor's own (`own`), by the first family with this naming that knows it.

    `tensors`: the names that the files hold. Raises ZooError, naming `where`, if none does or a value makes no model.
    """
    _refuse_many(own, where)
    for group in (_built_in, _plugged_in):  # another package's are not even imported where ours will do
        for family in group().values():
            if naming in family.own:
                with blamed(family, where, "model"):
                    if (out := family.own[naming](Config(own, where), tensors)) is not None:
                        return out
    asked = ", ".join(f.name for f in families().values() if naming in f.own)
    raise ZooError(
        f"{where}: no family knows this model (files in {naming}'s own naming: {asked}){_also_broken()}"
    )


def naming_gguf(architecture: Any, where: str) -> list[tuple[Family, GGUFReading]]:
    """The families that have a reading for a GGUF of this architecture, ours first, and it. Raises ZooError if none has."""
    if isinstance(architecture, str):
        named = [(f, f.gguf[architecture]) for f in families().values() if architecture in f.gguf]
        if named:
            return named
    known = sorted({a for f in families().values() for a in f.gguf})
    raise ZooError(
        f"{where}: GGUF architecture {str(architecture)[:80]!r} is not supported; supported: {', '.join(known)}"
    )


@contextlib.contextmanager
def blamed(family: Family, where: str, model: str) -> Iterator[None]:
    """What breaks inside is an error of the config at `where`, a value that makes no `model`, or of the family's code."""
    try:
        yield
    except ZooError:
        raise
    except Exception as e:
        code = getattr(family.spec, "__code__", None)  # where it begins, for what it returned
        at = f"{code.co_filename}:{code.co_firstlineno}" if code is not None else family.name
        raise blame.error(e, family.name, at, where, model) from e


_NO_LOGITS = ("Classification", "QuestionAnswering", "MultipleChoice", "MaskedLM", "RewardModel")


def _named(config: Mapping[str, Any]) -> list[str]:
    """The model's classes by a config. What a trainer wraps one in (FSDP's, peft's, trl's class) says nothing of it."""
    listed = config.get("architectures")
    named = [a for a in listed if isinstance(a, str)] if isinstance(listed, list) else []
    return [a.removeprefix("FSDP") for a in named if not a.startswith(("PeftModel", "AutoModel"))]


MAX_FIELDS = 10_000
"""Of an object in a config, and entries of a list: some 50 are usual, one for each layer, and each family looks at all of them."""
MAX_ENTRIES = 100_000
"""Of all that is in a config."""
MAX_FIELD = 256
"""Characters of a field's name: what it says is looked for by patterns."""
MAX_ARCHITECTURES = 100
"""That a config names; releases name one. Each is looked for in each family."""


class NoFamily(ZooError):
    """No family claims a config: `who` it says it is, and `known`, those that are claimed and what to do. `near`: which
    could read it."""

    def __init__(self, who: str, known: str, near: str = "") -> None:
        super().__init__(f"{who}. {near}{known}")
        self.who, self.known = who, known


def find(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a config. Raises NoFamily for one that no family claims."""
    _refuse_many(config, where)
    named = _named(config)
    model_type, text = config.get("model_type"), config.get("text_config")
    kind = text.get("model_type") if named and isinstance(text, Mapping) else model_type

    def claims(among: Mapping[str, Family]) -> list[Family]:
        by_name = [f for f in among.values() if any(a in f.architectures for a in named)]
        headless = all(a.endswith("Model") and not a.endswith(_NO_LOGITS) for a in named)  # or none is named
        if not by_name and headless:
            return [f for f in among.values() if model_type in f.model_types]
        return sorted(by_name, key=lambda f: kind not in f.model_types)

    found = claims(_built_in())
    if not found or kind not in found[0].model_types:  # one of another package may fit better
        found = claims(families())
    if found:
        return found[0]
    if other := [a for a in named if a.endswith(_NO_LOGITS)]:
        raise ZooError(
            f"{where}: {other[0]} gives no logits of the next token; zoo reads language models, with their head"
        )
    known = sorted(a for f in families().values() for a in f.architectures)
    raise NoFamily(
        f"{where}: no family for architectures {named or 'absent'}, model_type {model_type!r}",
        f"Known architectures: {', '.join(known)}. See CONTRIBUTING.md to add a family, or name one with --family.{_also_broken()}",
        _near(config, where),
    )


def _refuse_many(config: Mapping[str, Any], where: str) -> None:
    """Raises ZooError for a config of more fields, entries of lists, or names of its class, than any release has. What it says of
    quantised weights may name each of them."""
    if isinstance(listed := config.get("architectures"), list) and len(listed) > MAX_ARCHITECTURES:
        raise ZooError(f"{where}: {len(listed)} architectures; at most {MAX_ARCHITECTURES} are read")
    left: list[tuple[Any, bool]] = [(dict(config), False)]
    counts = {False: 0, True: 0}
    while left:
        part, quantised = left.pop()
        counts[quantised] += len(part)
        most, in_all = (MAX_TENSORS, 2 * MAX_TENSORS) if quantised else (MAX_FIELDS, MAX_ENTRIES)
        if len(part) > most or counts[quantised] > in_all:
            what = "fields" if isinstance(part, dict) else "entries in a list"
            n = counts[quantised]
            raise ZooError(
                f"{where}: {len(part)} {what}, {n} with those before; at most {most}, and {in_all} in all, are read"
            )
        if not isinstance(part, dict):
            left += [(x, quantised) for x in part if isinstance(x, dict | list)]
            continue
        if (
            longest := max((len(k) for k in part if isinstance(k, str)), default=0)
        ) > MAX_FIELD and not quantised:
            raise ZooError(f"{where}: a field's name has {longest} characters (limit {MAX_FIELD})")
        left += [(x, quantised or key in SAID) for key, x in part.items() if isinstance(x, dict | list)]


def _near(config: Mapping[str, Any], where: str) -> str:
    """A sentence on the families that could read a config which none claims, those first that leave least of it unread, and
    of those Llama, the plainest; none where no family could. By fields alone: whether the model computes so, they don't say."""
    unread: dict[str, int] = {}
    for family in families().values():
        try:
            fields = Config(config, where)
            family.spec(fields)
            read(config, family, where)
        except (ZooError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            continue
        unread[family.name] = len(fields.unread())
    names = sorted(unread, key=lambda n: (unread[n], n != "llama", n))
    if not names:
        return ""
    near = ", ".join(n for n in names[:4] if unread[n] == unread[names[0]])
    return f"Nearest by its fields: {near}; if it computes so, say --family {names[0] if near == names[0] else 'NAME'}. "


def spec_of(config: Mapping[str, Any], family: Family | None = None, where: str = "config.json") -> Spec:
    """The Spec of a config, by the family that claims it (or the one given).

    Raises ZooError, naming `where`, for a field that is missing, unsupported, or of a value that makes no
    model: a size below 1, a text where a number should be; and for one that changes numbers and that the family
    does not read.
    """
    return read(config, family, where)[0]


def read(
    config: Mapping[str, Any], family: Family | None = None, where: str = "config.json"
) -> tuple[Spec, list[str]]:
    """`spec_of`, and notes on the fields that nobody read and zoo does not know."""
    _refuse_many(config, where)
    family = family or find(config, where)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if part.get("is_causal", True) is not True:
            raise ZooError(
                f"{where}: is_causal is {part['is_causal']!r}; a token here sees those before it only"
            )
        for key in ("num_hidden_layers", "n_layer"):
            if isinstance(n := part.get(key), int) and not 0 < n <= MAX_LAYERS:
                raise ZooError(f"{where}: {key} is {str(n)[:40]}; expected 1 to {MAX_LAYERS}")
    fields = Config(config, where)
    try:
        spec = _spec(fields, family)
    except blame.Unnamed as e:
        raise blame.named(
            e, lambda other: _spec(Config(other, where), family), config, fields.leaves(), where
        ) from e
    return spec, [*_torn(config, family), *unread.judge(fields, spec)]


def _spec(fields: Config, family: Family) -> Spec:
    """The Spec that `family` reads. Raises Unnamed where a value is to blame and nobody has said which."""
    where = fields.where
    with blamed(family, where, f"{family.name} model"):
        said = family.spec(fields).to_dict()
    try:
        spec = Spec.from_dict(said)  # checks the types of all it holds
        refuse_unsound(spec, where)
    except ZooError as e:
        why = str(e).removeprefix("zoo.json: ").removeprefix(f"{where}: ")
        raise blame.Unnamed(f"{where}: {why}") from None
    return spec


def _torn(config: Mapping[str, Any], family: Family) -> list[str]:
    """A note where `architectures` say one family and `model_type` others, none of which claims that architecture too:
    transformers' Auto classes go by the latter."""
    kind = config.get("model_type")
    named = next((a for a in _named(config) if a in family.architectures), None)
    if named is None or kind in family.model_types:  # and the other families are not even imported
        return []
    others = [f for f in families().values() if kind in f.model_types]
    if not others or any(named in f.architectures for f in others):
        return []
    return [
        f"the config's architectures say {named}, which is {family.name}, and its model_type {kind!r}, which is "
        f"{', '.join(sorted(f.name for f in others))}: taken for {family.name}; transformers' AutoModelForCausalLM goes by "
        "model_type. --family says which is meant"
    ]


def unread_keys(config: Mapping[str, Any], family: Family) -> list[str]:
    """A sentence with all that `family` leaves unread of `config`, however little it says; none if there is nothing."""
    fields = Config(config)
    family.spec(fields)
    keys = ", ".join(f"{k} ({str(v)[:40]})" for k, v in fields.unread().items())
    return [f"of the config, the family {family.name} does not read {keys}"] if keys else []


def disagreements(spec: Spec) -> list[Disagreement]:
    """Where upstream and the vendor are known to differ about the model of `spec`."""
    family = families().get(spec.family)
    return [d for d in family.disagreements if d.applies(spec)] if family else []
