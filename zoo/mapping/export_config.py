"""config.json of an exported Hugging Face checkpoint: the source's own, with what the export changes.

Two things in it speak of more than sizes. `quantization_config` names modules; where the exported tensors have other names than the
source's (what transformers saved under names of its own gets the release's back), so do these. And a config in the words of
transformers 5 is read by 4.x without a word as something else, which is told.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import HF_NAMINGS, encoded, place_of, read_json
from zoo.formats.canonical import Canonical
from zoo.mapping.recipe import Output
from zoo.untrusted.patterns import LONGEST, LONGEST_NAME, endless

LISTS = (
    "modules_to_not_convert", "modules_to_convert", "ignore", "exclude_modules", "llm_int8_skip_modules", "ignored_layers", "targets",
)  # fmt: skip
"""Keys of lists of modules, whoever quantised: names, parts of names, patterns with `*`, or regular expressions after `re:`."""
MAX_LISTED = 10_000
"""Of them, each of which is held against every module."""
MODULES = ("quantized_layers",)
"""Keys of objects by module."""

Modules = Mapping[str, Collection[str]]


def config_of(c: Canonical, carried: Collection[str], embed: str, cast: bool, modules: Modules) -> bytes:
    """`embed`: the dtype of the embedding; `cast`: whether the export changes dtypes; `modules`: see `renamed`."""
    source = c.source
    given = place_of(c.root, "config.json")
    has_own = source["naming"] in HF_NAMINGS and "config.json" in carried
    same = has_own and source.get("dtype") is None and not cast
    config = read_json(given, "it is the release's config") if has_own else {}
    config = config or dict(source["config"])
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    dtype = names.get(embed)
    changed = False
    for part in _parts(config):
        if c.codes:
            changed |= _respell(part.get("quantization_config"), modules)
        elif not same:
            part.pop("quantization_config", None)
        if dtype and not same and (part is config or "dtype" in part or "torch_dtype" in part):
            part["dtype" if "dtype" in part else "torch_dtype"] = dtype
    return given.read_bytes() if same and not changed else encoded(config, indent=2) + b"\n"


def misread(config: Mapping[str, Any]) -> str | None:
    """What versions of transformers before 5 take for something else in this config, without a word; None: nothing known.
    (Its 5.0 put `rope_theta`, `rope_scaling` and `partial_rotary_factor` into `rope_parameters`, which 4.x does not read.)"""
    parts = [p for p in _parts(config) if p.get("rope_parameters") and "rope_theta" not in p]
    if not parts:
        return None
    return (
        "config.json says of RoPE what transformers 5 reads (rope_parameters): 4.x opens it without a word, and computes with "
        "its class' default theta, and no scaling. For 4.x, write rope_theta and rope_scaling beside it"
    )


def _parts(config: Any) -> list[dict[str, Any]]:
    """The config, and that of its language model."""
    if not isinstance(config, dict):
        return []
    return [config, *(v for v in (config.get("text_config"),) if isinstance(v, dict))]


# ---------------------------------------------------------------------------------------------------
# Names of modules


def renamed(before: Iterable[Output], after: Iterable[Output]) -> dict[str, set[str]]:
    """Modules by the names in `before` -> what they are called in `after`, which makes the same canonical tensors; modules around
    them too, as far as names go on alike. {}: nothing has another name."""
    there = {o.name: o.sources for o in after}
    found: dict[str, set[str]] = {}
    for o in before:
        theirs = there.get(o.name, ())
        pairs = (
            zip(o.sources, theirs, strict=True)
            if len(o.sources) == len(theirs)
            else ((a, b) for a in o.sources for b in theirs)
        )
        for a, b in pairs:
            old, new = _module(a), _module(b)
            found.setdefault(old, set()).add(new)
            while old and new and old.rpartition(".")[2] == new.rpartition(".")[2]:
                old, new = old.rpartition(".")[0], new.rpartition(".")[0]
                if old and new:
                    found.setdefault(old, set()).add(new)
    return {} if all(new == {old} for old, new in found.items()) else found


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _respell(q: Any, modules: Modules) -> bool:
    """Give what is listed in a `quantization_config` the names that modules have now; whether any changed."""
    changed = False
    if not modules or not isinstance(q, dict):
        return changed
    for key, value in q.items():
        if key in LISTS and isinstance(value, list):
            if len(value) > MAX_LISTED:
                raise ZooError(
                    f"quantization_config of config.json lists {len(value)} of {key} (limit {MAX_LISTED}): no release has as many"
                )
            new = [n for entry in value for n in _entry(entry, modules)]
            if changed_here := new != value:
                q[key] = list(dict.fromkeys(new))
        elif key in MODULES and isinstance(value, dict):
            q[key] = {n: how for entry, how in value.items() for n in _entry(entry, modules)}
            changed_here = [*q[key]] != [*value]
        else:
            changed_here = _respell(value, modules)
        changed |= changed_here
    return changed


def _entry(entry: Any, modules: Modules) -> list[Any]:
    """An entry of a list, for the modules' names now: itself, where it means the same ones."""
    if not isinstance(entry, str):
        return [entry]
    meant = {n for old, new in modules.items() if _fits(entry, old) for n in new}
    if meant <= (now := {n for new in modules.values() for n in new if _fits(entry, n)}) and now <= meant:
        return [entry]
    return sorted(modules.get(entry) or meant)


def _fits(entry: str, module: str) -> bool:
    """Whether an entry means this module, itself or as a part of what it names."""
    if entry.startswith("re:"):
        if endless(entry[3:]) or len(module) > LONGEST_NAME:
            raise ZooError(
                f"quantization_config of config.json has {entry!r:.80}, which could be matched without end: refused"
            )
        try:
            return re.match(entry[3:], module) is not None
        except (re.error, OverflowError, RecursionError):
            return False
    if "*" in entry and len(entry) <= LONGEST:
        return fnmatch.fnmatchcase(module, entry)
    return f".{entry}." in f".{module}."
