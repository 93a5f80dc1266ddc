"""The gallery's pages as HTML. What comes from a manifest or a config is escaped by `e`, and nowhere else."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from zoo import sizes
from zoo.describe import describe, published
from zoo.gallery.choices import CHOICES
from zoo.gallery.data import Release
from zoo.layout import layout
from zoo.order import MEANINGS, order
from zoo.spec import Spec
from zoo.untrusted.printable import printable

NEAR = 6
"""Releases of its family that the page of one without a drawing names."""

PAGES = (
    ("index.html", "Gallery"),
    ("compare.html", "Compare"),
    ("timeline.html", "Timeline"),
    ("fit.html", "What fits"),
)
NAVIGATION = "<nav aria-label=Pages>"
"""What the links of every page begin with: a site around the gallery puts its own before them."""


def e(x: Any) -> str:
    return html.escape(printable(str(x)))


def page(title: str, at: str, body: str, *, script: str = "", up: str = "") -> str:
    """A whole page. `at`: its place in the navigation; `up`: from it to the gallery's folder; `script`: what gallery.js does."""
    nav = "".join(
        f"<a href={up}{file}{' aria-current=page' if file == at else ''}>{name}</a>" for file, name in PAGES
    )
    needed = ["data.js", *["lines.js"] * (script == "compare"), "gallery.js"] if script else []
    scripts = "".join(f"<script src={up}{file}></script>" for file in needed)
    # There is a page a release: HTML lets out quotes of a word, <head>, and what ends with the page.
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{e(title)}</title>"
        "<meta name=viewport content=width=device-width>"
        f"<link rel=stylesheet href={up}gallery.css><body{f' data-page={script}' if script else ''}>"
        f"<a class=skip href=#main>Skip to the content</a><header>{NAVIGATION}{nav}</nav></header>"
        f"<main id=main>{body}</main>{scripts}\n"
    )


# ---- pages that gallery.js fills


def index(releases: list[Release]) -> str:
    groups = "".join(_select(group, group.capitalize()) for group in CHOICES)
    links = "".join(f"<li><a href=r/{e(r.manifest.name)}.html>{e(r.manifest.name)}</a>" for r in releases)
    drawn = sum(r.spec is not None for r in releases)
    copies = sum(r.base is not None for r in releases)
    as_base = f", {copies} as the release that they are a quantised copy of" if copies else ""
    return page(
        "LLM architectures, drawn from their configs",
        "index.html",
        f"<h1>LLM architectures, drawn from their configs</h1><p class=muted>{len(releases)} releases, {drawn} of them drawn{as_base}: "
        "what a picture says, the config says. The data: "
        '<a href="gallery.json">gallery.json</a>, <a href="gallery.schema.json">its schema</a>.</p>'
        '<form class="ask" id="ask" role="search"><label class="wide">Search names, vendors, licences, fact sheets'
        '<input type="search" name="search" id="search" placeholder="e.g. MLA 2026"></label>'
        '<details class="wide" id="filters" open><summary>Filters and order<span id="filtered"></span></summary><div class="ask">'
        f"{_select('vendor', 'Vendor')}{_select('year', 'Year')}{groups}{_select('proven', 'Proven')}{_select('sort', 'Sort by')}"
        '<button type="reset">Clear all</button></div></details></form>'
        '<p id="count" role="status" aria-live="polite"></p>'
        f'<ul id="cards"></ul><div id="bar" role="status" hidden></div><noscript><ul>{links}</ul></noscript>',
        script="gallery",
    )


def _select(name: str, label: str) -> str:
    return f'<label>{e(label)}<select name="{e(name)}" id="{e(name)}"></select></label>'


def compare() -> str:
    return page(
        "Compare", "compare.html",
        '<h1>Compare two to four</h1><form class="ask" id="ask"></form><div class="scroll" tabindex="0"><table id="table"></table></div>'
        '<h2>Drawings</h2><p class=muted>Lines that not all of them have are <span class="mark">marked</span>. As one picture: '
        "<code>zoo show A B --svg FILE</code></p>"
        '<div class="pictures" id="pictures"></div>',
        script="compare",
    )  # fmt: skip


def fit() -> str:
    return page(
        "What fits", "fit.html",
        "<h1>What fits on which card</h1><p class=muted>Weights, KV cache and recurrent state, counted from the Spec. In fp8 and int4 the "
        "matrices are quantised and the rest is bf16; scales, activations and the runtime are not counted: a tenth of each card is left "
        "for them. A tensor-parallel set may hold parts of the cache twice.</p>"
        '<form class="ask" id="ask"><label class="wide">Release<select id="release"></select></label><label>Weights in'
        '<select id="dtype"></select></label><label>Tokens of context<input id="context" type="number" min="1" value="32768"></label>'
        '<label>Sequences at once<input id="batch" type="number" min="1" value="1"></label><label>KV cache in<select id="kv"></select>'
        '</label></form><p id="said" role="status"></p><div class=two><div><h2>Needed</h2><table><caption>In GB of 10<sup>9</sup> bytes</caption><tbody id="needs">'
        "</tbody></table></div><div><h2>Cards</h2><table><tbody id=hardware></tbody></table></div></div>",
        script="fit",
    )  # fmt: skip


# ---- pages that are whole


def timeline(releases: list[Release]) -> str:
    """When each choice appeared, and what share of each year's releases made it."""
    dated = [r for r in releases if r.spec is not None and r.base is None and r.manifest.released]
    years = sorted({(r.manifest.released or "")[:4] for r in dated})
    of_year = {y: [r for r in dated if (r.manifest.released or "").startswith(y)] for y in years}
    body = ""
    for group, names in CHOICES.items():
        made = {c: [r for r in dated if c in r.counted["choices"].get(group, [])] for c in names}
        body += f"<tbody><tr><th colspan={len(years) + 1} scope=rowgroup class=group>{e(group.capitalize())}"
        for choice in sorted(
            (c for c in names if made[c]), key=lambda c: min(r.manifest.released or "" for r in made[c])
        ):
            first = min(made[choice], key=lambda r: (r.manifest.released or "", r.manifest.name)).manifest
            cells = "".join(
                _share(sum(r in of_year[y] for r in made[choice]), len(of_year[y])) for y in years
            )
            body += (
                f"<tr><th scope=row><span>{e(choice)}</span> <small>{e(first.released)} "
                f'<a href="r/{e(first.name)}.html">{e(first.name)}</a></small>{cells}'
            )
        body += "</tbody>"
    heads = "".join(f"<th scope=col class=share>{y} <small>of {len(of_year[y])}</small></th>" for y in years)
    return page(
        "Timeline", "timeline.html",
        "<h1>Which choice appeared when</h1><p>Open models differ in a few structural choices. This is when each first appears among the "
        f"{len(dated)} releases here whose date and config are public, and how many of a year's releases made it. It is computed from their "
        "Specs; a choice may be older than the first release that is here.</p>"
        f'<div class=scroll tabindex=0><table class="timeline"><thead><tr><th scope=col>Choice, and where it is first here{heads}</thead>'
        f"{body}</table></div>",
    )  # fmt: skip


def _share(n: int, of: int) -> str:
    shade = round(100 * n / of) if of else 0
    return f"<td{f' style=--share:{shade // 2}%' if n else ''}>{n or '·'}"


def release(r: Release, others: Sequence[Release] = ()) -> str:
    """A release's own page. `others`: those that the site has, of which one that is not drawn names its family's."""
    m = r.manifest
    facts = {
        "Vendor": m.vendor, "Released": m.released, "Family": m.family, "Licence": m.licence, "Weights": m.quantization or m.dtype,
        "Also called": ", ".join(m.aliases), "From": " ".join(dict.fromkeys(map(str, m.sources))), "Published size": published(m, r.spec),
    }  # fmt: skip
    said = describe(r.spec) if r.spec is not None else {}
    for shown_elsewhere in ("family", "parts", "layers"):
        said.pop(shown_elsewhere, None)
    sheet = _table(
        [(k, e(v)) for k, v in facts.items() if v] + [(k[0].upper() + k[1:], e(v)) for k, v in said.items()]
    )
    links = "".join(
        f'<li><a href="{e(url)}">{e(kind)}</a>' for kind, url in m.links.items() if url.startswith("https://")
    )
    there = r.base is not None and any(o.manifest.name == r.base.name for o in others)
    original = "" if r.base is None else e(r.base.name)
    if there:
        original = f"<a href={original}.html>{original}</a>"
    if r.drawing:
        picture = (
            f"<object type=image/svg+xml tabindex=-1 data=../svg/{r.drawing} aria-label='Block diagram of {e((r.base or m).name)}'>"
            f"</object><p><a href=../svg/{r.drawing}>The drawing alone</a> · "
            f"<a href=../compare.html#{e(m.name)}>Compare</a> · <a href=../fit.html#{e(m.name)}>What it fits on</a></p>"
        )
    else:
        family = [
            o.manifest.name for o in others if o.drawing and o.base is None and o.manifest.family == m.family
        ]
        near = ", ".join(f"<a href={e(name)}.html>{e(name)}</a>" for name in family[:NEAR])
        picture = (
            f"<p class=muted>Not drawn: {e(r.row.get('not_drawn', ''))}. Who may read it: <code>zoo show {e(m.repo or m.name)} --svg FILE</code></p>"
            + (f"<p class=muted>Drawn of its family, {e(m.family)}: {near}</p>" if near else "")
        )
    if r.base is not None:
        picture += (
            f"<p>Drawn as {original}, of which it is a quantised copy ({e(m.quantization)}): no public copy of its own config is known. "
            "The drawing, and what is counted, are those of that release.</p>"
        )
    proofs = {
        "weights": "Conversions of this release are proven with its real weights, against upstream.",
        "rules": "Its family's rules and decoder are proven against upstream, on small random checkpoints.",
        None: "Not proven: the family's rules are not what they were when they were proven, or never were.",
    }
    commands = (
        f"# fetch, check, convert\nzoo pull {m.name}\n# compare with upstream; the certificate and its page\nzoo verify {m.name}\n"
        f"zoo report {m.name}\nzoo show {m.name} --svg FILE"
    )
    body = (
        f"<h1>{e(m.name)}</h1><div class=two><div>{picture}</div><div><h2>Fact sheet</h2>{sheet}"
        f"<h2>Commands</h2><pre tabindex=0>{e(commands)}</pre><h2>Proof</h2><p>{proofs[r.row.get('proven')]}</p>"
        + (f"<h2>Sources</h2><ul>{links}</ul>" if links else "")
        + "</div></div>"
    )
    if there:
        body += f"<p>Parameters by part, the order of layers and canonical tensors: see {original}.</p>"
    elif r.spec is not None:
        body += _parts(r.spec) + _layers(r.spec) + _tensors(r.spec)
    return page(m.name, "", body, up="../")


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return f"<table>{''.join(f'<tr><th>{k}<td>{v}' for k, v in rows)}</table>"


def _parts(spec: Spec) -> str:
    parts, active = sizes.params_by_part(spec), sizes.active_by_part(spec)
    total = sum(parts.values())
    colour = {part: f"c{n}" for n, part in enumerate(sizes.PARTS)}  # gallery.css has them
    bars = "".join(
        f"<i class={colour[p]} style=width:{100 * n / total:.1f}%></i>"
        for p, n in parts.items()
        if n > total / 500
    )
    some = active != parts  # of a dense model a token visits all
    rows = "".join(
        f"<tr><th><i class={colour[p]}></i>{p}<td>{n:,}<td>{100 * n / total:.1f}%"
        + (f"<td>{active.get(p, 0):,}" if some else "")
        for p, n in parts.items()
    )
    heads = "Parameters<th>Share<th>Active per token" if some else "Parameters, all active per token<th>Share"
    return (
        f"<h2>Parameters by part</h2><div class=bars aria-hidden=true>{bars}</div><div class=scroll tabindex=0><table class=numbers><tr><th>Part"
        f"<th>{heads}{rows}</table></div>"
    )


def _layers(spec: Spec) -> str:
    o = order(spec)
    of: dict[tuple[str, str], list[str]] = {}  # a kind of layer -> which are of it
    for kind, group in itertools.groupby(range(spec.n_layers), lambda n: (o.mixing[n], o.feeding[n])):
        at = list(group)
        of.setdefault(kind, []).append(f"{at[0]}–{at[-1]}" if len(at) > 1 else str(at[0]))
    used = [x for x in (*o.mixers, *o.ffns) if x != "-"]
    key = ", ".join(f"{x}: {'other ' if x.islower() else ''}{MEANINGS.get(x.upper(), '?')}" for x in used)
    rows = "".join(f"<tr><td>{mixer}<td>{ffn}<td>{', '.join(layers)}" for (mixer, ffn), layers in of.items())
    strip = f"<p class=letters>{o.letters}</p>" + (
        f"<p class=letters>{o.feeding}</p>" if o.feeding_varies else ""
    )
    table = f"<details><summary>As a table</summary><table><tr><th>Mixer<th>Feed-forward<th>Layers{rows}</table></details>"
    return f"<h2>Layers</h2>{strip}<p class=muted>{e(key)}</p>{table if len(of) > 1 else ''}"


def _tensors(spec: Spec) -> str:
    found: dict[tuple[str, tuple[int, ...]], int] = {}
    for slot in layout(spec).values():
        found[slot.key, slot.shape] = found.get((slot.key, slot.shape), 0) + 1
    rows = "".join(
        f"<tr><td>{e(k)}<td>{' × '.join(map(str, shape)) or 'scalar'}<td>{n}"
        for (k, shape), n in found.items()
    )
    return (
        "<h2>Canonical tensors</h2><details><summary>Names and shapes of a converted checkpoint</summary><div class=scroll tabindex=0><table class=tensors><tr>"
        f"<th>Tensor<th>Shape<th>Times{rows}</table></div></details>"
    )
