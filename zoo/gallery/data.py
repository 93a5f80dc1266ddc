"""What the gallery knows of each release, as one JSON: gallery.json. docs/gallery.md describes its fields."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from zoo import draw, families, manifest, sizes
from zoo.describe import describe
from zoo.gallery.choices import CHOICES, choices
from zoo.gallery.copies import base
from zoo.layout import active_params, layout, total_params
from zoo.manifest import Manifest
from zoo.order import order, pattern
from zoo.spec import Spec

VERSION = 2

CARDS = {
    "RTX 4090": 24, "RTX 5090": 32, "L40S": 48, "A100 40 GB": 40, "A100 80 GB": 80, "H100": 80, "RTX PRO 6000": 96,
    "H200": 141, "B200": 180, "MI300X": 192, "MI355X": 288,
}  # fmt: skip
"""Memory in GB (10^9 bytes), as the makers name it."""


GATED = "its repository is gated, and no public copy of its config is known"
NOT_PUBLIC = "no public copy of its config is known"


@dataclass(frozen=True)
class Release:
    """A release, its Spec where zoo has its config, and its picture by the name of its file: equal pictures are one.

    `base`: the release whose config and Spec these are, where `manifest` has none and is a quantised copy of it (copies.py).
    """

    manifest: Manifest
    spec: Spec | None
    svg: str
    drawing: str | None
    row: dict[str, Any]  # in `releases` of gallery.json
    counted: dict[str, Any] = field(default_factory=dict)  # in its `architectures`, by `drawing`
    facts: draw.Facts = field(default_factory=lambda: draw.Facts(""))
    base: Manifest | None = None


def collect(names: Iterable[str] = ()) -> list[Release]:
    """The releases of these names, or all, newest first. Errors: no release is called that."""
    chosen = [manifest.find(name) for name in names] or list(manifest.load_all())
    made: dict[str, Release] = {}

    def of(m: Manifest) -> Release:
        if m.name not in made:
            original = base(m) if m.config is None else None
            if original is None or original.config is None:
                made[m.name] = _release(m)
            else:
                drawn = of(original)
                row = _row(m) | {"drawing": drawn.drawing, "drawn_as": original.name}
                made[m.name] = replace(drawn, manifest=m, row=row, base=original)
        return made[m.name]

    found = [of(m) for m in {m.name: m for m in chosen}.values()]
    return sorted(found, key=lambda r: r.manifest.released or "", reverse=True)


def document(releases: list[Release]) -> dict[str, Any]:
    """gallery.json."""
    return {
        "version": VERSION,
        "choices": {group: list(of) for group, of in CHOICES.items()},
        "cards": CARDS,
        "bits": sizes.BITS,
        "kv_bytes": sizes.KV_BYTES,
        "architectures": {r.drawing: r.counted for r in releases if r.drawing is not None},
        "releases": [r.row for r in releases],
    }


def lines(releases: list[Release]) -> dict[str, Any]:
    """What compare.html marks: of each drawing its height, then for each line that is compared its place in `texts` (the text
    and its width), its left end and its baseline."""
    texts: dict[tuple[str, int], int] = {}
    at: dict[str, list[int]] = {}
    for r in releases:
        if r.spec is None or r.drawing is None or r.drawing in at:
            continue
        height, found = draw.lines(r.spec, r.facts)
        at[r.drawing] = [round(height)]
        for text, x, y, width in found:
            at[r.drawing] += [texts.setdefault((text, round(width)), len(texts)), round(x), round(y)]
    return {"texts": [list(x) for x in texts], "at": at}


def _row(m: Manifest) -> dict[str, Any]:
    """What its manifest says."""
    row: dict[str, Any] = {
        "name": m.name,
        "aliases": list(m.aliases),
        "vendor": m.vendor,
        "family": m.family,
        "released": m.released,
        "licence": m.licence,
        "gated": m.gated,
        "repo": m.repo,
        "weights": m.quantization or m.dtype,
        "proven": manifest.proof(m),
        "published_params": m.params_total,
        "published_active": m.params_active,
    }
    return {k: v for k, v in row.items() if v not in (None, [])}


def _release(m: Manifest) -> Release:
    config, row = m.config, _row(m)
    if config is None:
        return Release(m, None, "", None, row | {"not_drawn": GATED if m.gated else NOT_PUBLIC})
    family = families.get(m.family)
    spec = families.spec_of(config, family, f"{m.name}: config.json")
    facts = draw.Facts("", (), draw.ahead(config, family))
    counted = _counted(spec)
    svg = draw.drawing(spec, facts, about=f"{m.family}: see the page")
    # Equal names: what is drawn and what is counted are equal.
    drawing = hashlib.sha256((svg + json.dumps(counted)).encode()).hexdigest()[:12] + ".svg"
    return Release(m, spec, svg, drawing, row | {"drawing": drawing}, counted, facts)


def _counted(spec: Spec) -> dict[str, Any]:
    o = order(spec)
    return {
        "params": total_params(spec),
        "active": active_params(spec),
        "matrices": sum(s.size for s in layout(spec).values() if s.multiplies),
        "layers": spec.n_layers,
        "d_model": spec.d_model,
        "vocabulary": spec.vocab_size,
        "context": spec.context_length,
        "pattern": "; ".join([pattern(o.letters)] + ([pattern(o.feeding)] if o.feeding_varies else [])),
        "kv_per_token": sizes.kv_bytes_per_token(spec),
        "cache": _cache(spec),
        "state": [sizes.state_bytes(spec, 0), sizes.state_bytes(spec, 1) - sizes.state_bytes(spec, 0)],
        "choices": {group: made for group, made in choices(spec).items() if made},
        "about": {k: v for k, v in describe(spec).items() if k in ABOUT},
    }


ABOUT = ("attention", "positions", "norm", "QK-norm", "feed-forward")
"""What `describe` says that is compared, and found by searching."""


def _cache(spec: Spec) -> list[list[int]]:
    """[numbers a token, tokens kept (0: all)] for each kind of cache: bytes follow for any context and dtype."""
    found: dict[int, int] = {}
    for layer in spec.layers:
        for m in layer.mixers:
            for n, kept in sizes.caches(m):
                if n:
                    found[kept] = found.get(kept, 0) + n
    return [[n, kept] for kept, n in found.items()]
