"""The canonical layout on disk: `zoo.json` and `model-*.safetensors` under canonical names.

Reading checks that the tensors are those the Spec in `zoo.json` calls for, so that whoever loads a
canonical folder (decoder, export, verifier) need not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from zoo.errors import ZooError
from zoo.formats.base import (
    COUNTS,
    FLOATS,
    RELEASED,
    TensorRef,
    add_tensors,
    files_below,
    inside,
    leads_out,
    place_of,
    read_json,
    refuse_crowd,
)
from zoo.formats.safetensors import INDEX, check_index, parse_header, read_header
from zoo.formats.sets import weight_map
from zoo.layout import VERSION, Slot, layout
from zoo.quant.blocks import is_one
from zoo.quant.schemes import grid, scheme
from zoo.soundness import refuse_unsound
from zoo.spec import Spec
from zoo.url import is_url, not_here

JSON = "zoo.json"
SOURCE = "source.zip"  # headers of the released files, for export
BESIDE = (SOURCE, "parity.json", "model.sig")
VALUES = "values"  # the source's format, of a folder whose values are not those of a release: `source.values` says whose


@dataclass
class Canonical:
    """An opened canonical checkpoint.

    `tensors` by canonical name (`X.weight`, and `X.scale` etc. of quantised ones); `extra_tensors` by the
    source's names. `quant`: slot without `.weight` -> scheme. `source`: where it was converted from.
    `extras`: source name -> why it is not part of the model. `layers`: the ones present, None: all.
    """

    root: Path
    spec: Spec
    quant: dict[str, str]
    tensors: dict[str, TensorRef]
    extra_tensors: dict[str, TensorRef]
    source: dict[str, Any]
    extras: dict[str, str]
    layers: tuple[int, ...] | None
    json: Mapping[str, Any] = field(repr=False)

    def path(self, ref: TensorRef) -> Path:
        return self.root / ref.file

    @property
    def codes(self) -> dict[str, str]:
        """Of `quant`, what can be written as it is or not at all: but ggml's blocks, which are expanded for formats that have none."""
        return {slot: how for slot, how in self.quant.items() if not is_one(scheme(how))}

    @property
    def files(self) -> list[str]:
        """The safetensors files, model and extras."""
        return sorted({t.file for t in (*self.tensors.values(), *self.extra_tensors.values())})


def detect(path: Path) -> bool:
    return path.is_dir() and (path / JSON).exists()


def wrote(path: Path) -> bool:
    """Whether the folder holds a canonical checkpoint and nothing but what zoo put there: it may be replaced."""
    try:
        described = read_json(path / JSON, "")
        shards = read_json(path / INDEX, "")["weight_map"].values()
        names = {
            JSON,
            INDEX,
            *BESIDE,
            "report.html",
            *shards,
            *described["carried"],
        }
        names.add(RELEASED)
    except (ZooError, LookupError, TypeError, AttributeError):  # damaged: then what is whose can't be told
        return False
    return files_below(path) <= names


def open(path: Path) -> NoReturn:
    """A canonical folder is not a source: says so."""
    raise ZooError(
        f"{path}: is a canonical checkpoint already (it has {JSON}); `zoo export` gives back the release, "
        "`zoo verify` checks it"
    )


def read(path: str | os.PathLike[str]) -> Canonical:
    """Open the canonical folder at `path` by its headers.

    Raises ZooError if it is none, is written by a newer zoo, or its tensors are not those of its Spec.
    """
    if is_url(path):
        raise ZooError(not_here(path, "a model is read"))
    root = Path(path)
    if not root.exists():
        raise ZooError(f"{root}: no such folder; `zoo pull` or `zoo convert` makes canonical checkpoints")
    if not (root / JSON).exists():
        raise ZooError(f"{root}: not a canonical checkpoint (no {JSON}); make one with `zoo convert`")
    refuse_crowd(root)
    j = read_json(root / JSON, "it describes the checkpoint")
    if j.get("layout_version") != VERSION:
        raise ZooError(
            f"{root / JSON}: layout version {j.get('layout_version')!r}, this zoo reads {VERSION}; "
            "convert again, or use a newer zoo"
        )
    try:
        spec, quant, source = Spec.from_dict(j["spec"]), dict(j.get("quant", {})), dict(j.get("source", {}))
        extras = dict(j.get("extras", {}))
        layers = tuple(j["layers"]) if j.get("layers") is not None else None
        _as_written(j, spec, layers)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as e:
        raise ZooError(f"{root / JSON}: not as zoo writes it ({e!r:.300})") from None
    refuse_unsound(spec, str(root / JSON))
    try:
        for name in (*j.get("carried", ()), *BESIDE):
            if os.path.lexists(place := place_of(root, name)):  # it is copied from here: no link may lead out
                inside(root, place.relative_to(root).as_posix(), JSON)
    except OSError as e:  # a name longer than names can be
        raise ZooError(
            f"{root / JSON}: carried names {name!r:.200}, which can't be opened: {e.strerror}"
        ) from None
    index = weight_map(root / INDEX, "a canonical checkpoint has one")
    files = {name: inside(root, name, INDEX) for name in sorted({*index.values()})}
    _refuse_more_than(root, spec, layers)
    tensors: dict[str, TensorRef] = {}
    for name, file in files.items():
        add_tensors(tensors, parse_header(read_header(file), name, file.stat().st_size, str(file)), file)
    check_index(index, tensors, root / INDEX)
    aside = {n: t for n, t in tensors.items() if t.file.startswith("extras-")}
    model = {n: t for n, t in tensors.items() if not t.file.startswith("extras-")}
    canonical = Canonical(root, spec, quant, model, aside, source, extras, layers, j)
    _check(canonical)
    return canonical


def _check_quantised(c: Canonical, slot: Slot, how: str) -> None:
    """The components of a quantised weight are there, in the types and shapes of its scheme."""
    name = slot.name.removesuffix(".weight")
    for part in scheme(how).components:
        ref = c.tensors.get(f"{name}.{part.name}")
        if ref is None:
            if part.optional:
                continue
            raise ZooError(f"{c.root}: tensor '{name}.{part.name}' is missing; convert again")
        if ref.dtype not in part.dtypes:
            raise ZooError(
                f"{c.root / ref.file}: {ref.name} is {ref.dtype}; {how} has {' or '.join(part.dtypes)} there"
            )
        if part.unit is None:
            try:
                part.refuse_constant(ref.shape, slot.shape, len(slot.parts))
            except ZooError as e:
                raise ZooError(f"{c.root / ref.file}: {ref.name}: {e}; convert again") from None
        else:
            rows, rest = grid(part, slot.parts, slot.shape[-1])
            want = (*slot.shape[:-2], sum(rows), *rest)
            if len(slot.shape) < 2 or ref.shape != want:
                raise ZooError(
                    f"{c.root / ref.file}: {ref.name} has shape {list(ref.shape)}, {how} of {list(slot.shape)} needs {list(want)}"
                )


MAX_CARRIED = 10_000
MAX_RANKS = 256  # that a release was cut for: Meta's have up to 16
NEEDED = ("format", "family", "naming", "prefix", "config", "n_ranks")
"""Of `source`, what merging, exporting and saving ask for."""


def _is_pair(x: object) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(isinstance(t, str) and _short_text(t) for t in x)


def _short_text(x: object) -> bool:
    return x is None or (isinstance(x, str) and len(x) < 4096)


def _as_written(j: Mapping[str, Any], spec: Spec, layers: tuple[int, ...] | None) -> None:
    """Raises ValueError for what zoo never writes: then what reads it later need not look."""
    if layers is not None and not all(type(i) is int and 0 <= i < spec.n_layers for i in layers):
        raise ValueError(f"layers are not those of a model of {spec.n_layers}")
    source = j.get("source", {})
    texts = ("path", "format", "family", "naming", "dtype", "plan")
    if not all(_short_text(source.get(k)) for k in texts):
        raise ValueError(f"of source, {', '.join(texts)} should be texts")
    if missing := [k for k in NEEDED if source.get(k) is None]:
        raise ValueError(f"source has no {missing[0]}")
    config, n, prefix = source["config"], source["n_ranks"], source["prefix"]
    if not isinstance(config, dict) or type(n) is not int or not 1 <= n <= MAX_RANKS:
        raise ValueError(
            f"of source, config should be an object, and n_ranks a number of ranks, 1 to {MAX_RANKS}"
        )
    if not isinstance(prefix, list) or not all(_is_pair(x) for x in prefix):
        raise ValueError("source.prefix should be pairs of short texts")
    if source.get("family_given", True) is not True:
        raise ValueError("source.family_given should be true, or absent")
    package = source.get("package") or {}
    if not isinstance(package, dict) or not all(_short_text(package.get(k)) for k in ("name", "version")):
        raise ValueError("the source's package should have a name and a version")
    values = source.get("values", {})
    if not isinstance(values, dict) or not all(
        isinstance(v, str) and _short_text(v) for v in values.values()
    ):
        raise ValueError("source.values should be short texts")
    files = source.get("files", {})
    if not isinstance(files, dict) or not all(type(n) is int and n >= 0 for n in files.values()):
        raise ValueError("source.files should be sizes of files, in bytes")
    for key in ("notes", "warnings"):
        said = j.get(key) or []
        if not isinstance(said, list) or not all(isinstance(text, str) for text in said):
            raise ValueError(f"{key} should be a list of texts")
    carried = j.get("carried", [])
    if not isinstance(carried, list) or not all(isinstance(n, str) and not leads_out(n) for n in carried):
        raise ValueError("of carried, expected names of files in the folder")
    if len(set(carried)) != len(carried) or len(carried) > MAX_CARRIED:
        raise ValueError(f"carried has {len(carried)} names; expected each once, and at most {MAX_CARRIED}")
    names = {*carried, JSON, INDEX}
    if above := next((n for n in carried for p in Path(n).parents if str(p) in names), None):
        raise ValueError(f"carried names {above!r:.100}, which is below a file")


def _refuse_more_than(root: Path, spec: Spec, layers: tuple[int, ...] | None) -> None:
    """Experts and layers are names in a small file, and each may stand for many; a layer has a tensor at least, and a
    tensor's entry in a header some 60 bytes, so the folder can't hold more layers than its bytes allow."""
    most = sum(p.stat().st_size for p in root.glob("*.safetensors") if p.is_file()) // 60
    if (n := spec.n_layers if layers is None else len(set(layers))) > most:
        raise ZooError(f"{root / JSON}: calls for {n} layers, more than the files beside it can hold")


def _check(c: Canonical) -> None:
    slots = layout(c.spec)
    for name, called in c.quant.items():
        if f"{name}.weight" not in slots or not isinstance(called, str):
            raise ZooError(
                f"{c.root / JSON}: quant says {name!r} is {called!r:.100}, which no weight of its Spec is"
            )
        scheme(called)
    present = None if c.layers is None else set(c.layers)
    for slot in slots.values():
        if present is not None and slot.layer is not None and slot.layer not in present:
            continue
        ref = c.tensors.get(slot.name)
        if ref is None:
            raise ZooError(f"{c.root}: tensor {slot.name!r} is missing; convert again")
        how = c.quant.get(slot.name.removesuffix(".weight")) if slot.name.endswith(".weight") else None
        if how is not None:
            _check_quantised(c, slot, how)
        elif slot.counts and ref.dtype not in COUNTS:
            raise ZooError(f"{c.root / ref.file}: {slot.name} is {ref.dtype}; expected {' or '.join(COUNTS)}")
        elif ref.dtype not in FLOATS and not slot.counts:
            raise ZooError(
                f"{c.root / ref.file}: {slot.name} is {ref.dtype}; expected one of {', '.join(FLOATS)}"
            )
        elif ref.shape != slot.shape:
            raise ZooError(
                f"{c.root / ref.file}: {slot.name} has shape {list(ref.shape)}, its Spec needs {list(slot.shape)}"
            )
    for name in c.tensors:
        if name not in slots and name.rsplit(".", 1)[0] not in c.quant:
            raise ZooError(f"{c.root}: tensor {name!r} is not one of its Spec")
