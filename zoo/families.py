"""The families zoo can convert: found by what a config says it is, never by name.

A family is a module with a `FAMILY`: in the package `converters`, or in any installed package that names
it in the entry-point group `zoo.families`. Nothing here or elsewhere in `zoo` knows which there are.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo import unread
from zoo.config import Config
from zoo.errors import ZooError
from zoo.layout import layout
from zoo.mapping.rules import RuleSet
from zoo.spec import (
    MLP,
    Attention,
    DeltaNet,
    Indexer,
    MoE,
    Norm,
    QueryScale,
    Rope,
    RopeScaling,
    Router,
    Spec,
)

MAX_LAYERS = 4096
MAX_EXPERTS = 1 << 16
MAX_SIZE = 1 << 40
"""Beyond these a config is broken: the deepest release has 126 layers, the most experts of one 512, the widest axis
262,400 entries."""


@dataclass(frozen=True)
class Family:
    """A family is two pieces of data: `spec` (config -> Spec), and `rules`, one set per naming of its
    tensors ("hf", "meta", "mistral", "gguf", ...; the reader says which namings a checkpoint may have).

    `model_types` and `architectures` are what its configs say in those fields. A config that has
    `architectures` goes by them; one that has none, or a decoder's without its head (`...Model`), by its
    `model_type`. A wrapper's architecture may be
    claimed by several families: its text model's `model_type` decides.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    spec: Callable[[Config], Spec]
    rules: Mapping[str, RuleSet] = field(repr=False)


@functools.cache
def _built_in() -> dict[str, Family]:
    import pkgutil  # slow to import, and `get` seldom needs it

    import converters

    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(converters.__path__):
        if not module.name.startswith("_"):
            family = importlib.import_module(f"converters.{module.name}").FAMILY
            found[family.name] = family
    return found


@functools.cache
def families() -> dict[str, Family]:
    """All families by name: the package `converters`, then entry points."""
    from importlib.metadata import entry_points  # slower still: `find` asks for it when it must

    found = dict(_built_in())
    for entry in entry_points(group="zoo.families"):
        family = entry.load()
        found.setdefault(family.name, family)
    return found


def get(name: str) -> Family:
    """The family called `name`. Raises ZooError, with the known ones, if there is none."""
    if name.isidentifier() and name[0] != "_":
        try:
            family: Family = importlib.import_module(f"converters.{name}").FAMILY  # one file, not all of them
            return family
        except ModuleNotFoundError as e:
            if e.name != f"converters.{name}":
                raise
    if name not in families():
        raise ZooError(f"no family is called {name!r}; known: {', '.join(sorted(families()))}")
    return families()[name]


def find(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a config. Raises ZooError for one that no family claims."""
    listed = config.get("architectures")
    named = [a for a in listed if isinstance(a, str)] if isinstance(listed, list) else []
    model_type, text = config.get("model_type"), config.get("text_config")
    kind = text.get("model_type") if named and isinstance(text, Mapping) else model_type

    def claims(among: Mapping[str, Family]) -> list[Family]:
        by_name = [f for f in among.values() if any(a in f.architectures for a in named)]
        headless = all(a.endswith("Model") for a in named)  # or none is named
        if not by_name and headless:
            return [f for f in among.values() if model_type in f.model_types]
        return sorted(by_name, key=lambda f: kind not in f.model_types)

    found = claims(_built_in())
    if not found or kind not in found[0].model_types:  # one of another package may fit better
        found = claims(families())
    if found:
        return found[0]
    known = sorted(a for f in families().values() for a in f.architectures)
    raise ZooError(
        f"{where}: no family for architectures {named or 'absent'}, model_type {model_type!r}. Known architectures: "
        f"{', '.join(known)}. See CONTRIBUTING.md to add a family, or name one with --family."
    )


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
        said = family.spec(fields).to_dict()
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as e:
        raise ZooError(
            f"{where}: a field has a value that makes no {family.name} model ({type(e).__name__}: {e})"
        ) from e
    try:
        spec = Spec.from_dict(said)  # checks the types of all it holds
    except ZooError as e:
        raise ZooError(f"{where}: {str(e).removeprefix('zoo.json: ')}") from None
    refuse_unsound(spec, where)
    return spec, unread.judge(fields, spec)


def unread_keys(config: Mapping[str, Any], family: Family) -> list[str]:
    """A sentence with all that `family` leaves unread of `config`, however little it says; none if there is nothing."""
    fields = Config(config)
    family.spec(fields)
    keys = ", ".join(f"{k} ({str(v)[:40]})" for k, v in fields.unread().items())
    return [f"of the config, the family {family.name} does not read {keys}"] if keys else []


def refuse_unsound(spec: Spec, where: str) -> None:
    """Raises ZooError, naming `where`, for a Spec that can be written down but not computed with."""
    if (why := next(_unsound(spec, "spec"), None)) is not None:
        raise ZooError(f"{where}: {why}")
    odd = next((s for s in layout(spec).values() if not 0 < min(s.shape) <= max(s.shape) < MAX_SIZE), None)
    if odd is not None:
        raise ZooError(f"{where}: its sizes give {odd.name} the shape {list(odd.shape)}"[:400])
    if spec.context_length < 1:
        raise ZooError(f"{where}: its context is {spec.context_length} positions")


def _unsound(x: Any, name: str) -> Iterator[str]:
    """What in a Spec can be written down but not computed with, one sentence each."""
    if isinstance(x, float) and not math.isfinite(x):
        yield f"{name} comes to {x}"
    elif isinstance(x, tuple):
        for n, part in enumerate(dict.fromkeys(x)):
            yield from _unsound(part, f"{name}[{n}]")
    elif dataclasses.is_dataclass(x):
        for f in dataclasses.fields(x):
            yield from _unsound(getattr(x, f.name), f.name)
    match x:
        case Norm(eps=eps) if eps < 0:
            yield f"the eps of a norm is {eps}"
        case Attention(n_heads=q, n_kv_heads=kv) if kv < 1 or q % kv:
            yield f"{q} query heads cannot share {kv} key/value heads"
        case DeltaNet(n_v_heads=v, n_k_heads=k) if k < 1 or v % k:
            yield f"{v} value heads cannot share {k} key heads"
        case Attention(window=int(n)) | Attention(chunk=int(n)) if n < 1:
            yield f"a window or chunk of {n} positions shows nothing"
        case Rope(theta=theta) if theta <= 0 or (theta == 1 and x.scaling is not None):
            yield f"rope_theta is {theta}"
        case Rope(dim=dim) if dim < 2 or dim % 2:
            yield f"RoPE needs pairs of channels, and would rotate {dim}"
        case RopeScaling(factor=factor) if factor <= 0:
            yield f"the factor of scaled RoPE is {factor}"
        case RopeScaling(kind="llama3", low_freq_factor=low, high_freq_factor=high) if low <= 0 or high < low:
            yield f"high_freq_factor {high} should not be below low_freq_factor {low}, and both above 0"
        case RopeScaling(kind="yarn" | "llama3", original_context=n) if n < 1:
            yield f"the original context of scaled RoPE is {n}"
        case MoE(n_experts=n) if n > MAX_EXPERTS:
            yield f"{n} experts are more than {MAX_EXPERTS}"
        case MLP(sparsity=share) if not 0 <= share < 1:
            yield f"a share of {share} of activations cannot be left out"
        case QueryScale(period=period) if period <= 0:
            yield f"queries are scaled by positions over {period}"
        case Indexer(top_k=n) if n < 1:
            yield f"an index of {n} keys shows nothing"
        case RopeScaling(kind="yarn", beta_fast=a, beta_slow=b) if min(a, b) <= 0:
            yield f"the betas of YaRN are {a} and {b}"
        case MoE(n_experts=n, router=Router(top_k=k)) if not 0 < k <= n:
            yield f"{k} of {n} experts cannot be chosen"
        case Attention(head_dim=d, rope=Rope(dim=dim)) if dim > d:
            yield f"RoPE would rotate {dim} of {d} channels"
        case MoE(n_experts=n, router=Router(n_groups=g, group_top=t)) if g > 1 and not n % g and n // g < t:
            yield f"groups of {n // g} experts cannot be judged by their best {t}"
        case MoE(n_experts=n, router=Router(n_groups=g, top_groups=t)) if g < 1 or n % g or not 0 < t <= g:
            yield f"{n} experts in {g} groups, of which {t} are eligible: they do not divide"
