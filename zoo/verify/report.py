"""A certificate as one page for people: the verdict first, then the model, the numbers behind it, and where all came from.

Self-contained HTML in the gallery's style: pictures inside, no script, light and dark, readable on a phone and in print.

Unusual here: nothing is computed again, and nothing is escaped by hand. The page is the template report.html, whose environment
escapes every text that it prints; what passes as HTML are charts drawn here, and style sheets of ours. What the canonical folder
says beside its certificate (a drawing, sizes, the release, the continuation as text) is only taken from files that are
what the certificate hashed.
"""

from __future__ import annotations

import base64
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from zoo.errors import ZooError
from zoo.untrusted.printable import printable
from zoo.verify import certificate, charts

if TYPE_CHECKING:
    from zoo.formats.canonical import Canonical
    from zoo.manifest import Manifest

Json = Mapping[str, Any]
SHOWN = 5000
"""Of a list or an object, whose length is whoever's who wrote the certificate, so many entries: a model has 1,024 layers at most."""


@dataclass(frozen=True)
class Model:
    """What a folder says beside its certificate. `facts`: questions and answers; `picture`: SVG; `texts`: of the greedy
    continuation, ours and upstream's; `notes`: what could not be said, and why; `untold`: the same of `texts`."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    picture: str = ""
    texts: tuple[str, str] | None = None
    notes: list[str] = field(default_factory=list)
    untold: str = ""


def page(cert: Json, model: Model | None = None, doubts: Sequence[str] = ()) -> str:
    """The report of a certificate (as its JSON). `doubts`: why it proves nothing. Raises ValueError and the like for JSON that is no certificate."""
    cut: list[str] = []
    cert = _short(cert, "", cut)
    try:
        return _environment().get_template("report.html").render(_said(cert, model, [*doubts, *cut[:SHOWN]]))
    except jinja2.TemplateError as e:
        raise ValueError(f"{e}") from None


def _short(x: Any, where: str, cut: list[str]) -> Any:
    """The same with the first entries of what is longer than any of ours; of which `cut` then tells."""
    if not isinstance(x, dict | list):
        return x
    if len(x) > SHOWN:
        cut.append(f"{where}: {len(x):,} entries, of which {SHOWN:,} are shown")
    if isinstance(x, list):
        return [_short(y, where, cut) for y in x[:SHOWN]]
    return {
        k: _short(y, f"{where}.{k}" if where else str(k), cut) for k, y in itertools.islice(x.items(), SHOWN)
    }


def of_folder(root: Path, cert: Json) -> Model:
    """What the canonical folder `root` says of the model that `cert` is about."""
    from zoo.formats import canonical

    if (changed := _changed(root, cert, [canonical.JSON])) is not None:
        return Model(notes=[f"What the model is like is not said: {changed}."])
    try:
        c = canonical.read(root)
    except (ZooError, OSError) as e:
        return Model(notes=[f"What the model is like is not said: {e}"])
    texts, untold = _texts(root, cert)
    from zoo import draw
    from zoo.card import release_of

    return Model(_about(c, *release_of(c)), draw.drawing(c.spec, draw.Facts("")), texts, [], untold)


def _changed(root: Path, cert: Json, names: list[str]) -> str | None:
    """Why these files of the folder are not those that the certificate hashed; None: they are."""
    for name in names:
        recorded = cert["canonical"]["files"].get(name)
        if recorded is None:
            return f"{name} is not among the files of the certificate"
        if not (root / name).is_file():
            return f"{name} is not there any more"
        if certificate.sha256(root / name) != recorded["sha256"]:
            return f"{name} has changed since it was verified"
    return None


def _about(c: Canonical, m: Manifest | None, rounded: str | None) -> list[tuple[str, str]]:
    from zoo.describe import describe

    said = describe(c.spec)
    for elsewhere in ("family", "parts", "layers"):  # in the provenance, and in the drawing
        said.pop(elsewhere, None)
    release: dict[str, str | None] = {}
    if m is not None:
        name = m.name + (f", its weights rounded to {rounded}" if rounded else "")
        release = {
            "release": name,
            "vendor": m.vendor,
            "released": m.released,
            "licence": m.licence,
            "from": m.repo,
        }
    return [(k, v) for k, v in (release | said).items() if v]


def _texts(root: Path, cert: Json) -> tuple[tuple[str, str] | None, str]:
    """The greedy continuations as text, ours and upstream's; or why not."""
    figures = cert["levels"].get("decode", {}).get("figures", {})
    if "generated" not in figures:
        return None, ""
    if not (cert.get("inputs") or {}).get("tokenizer"):
        return None, "Not shown as text: it was verified without a tokenizer."
    from zoo.text import Text

    text = None
    try:
        text = Text(root)
        if (changed := _changed(root, cert, list(text.files))) is not None:
            return None, f"Not shown as text: {changed}."
        return (text.decode(figures["generated"]), text.decode(figures["oracle"])), ""
    except ZooError as e:
        return None, f"Not shown as text: {e}"
    finally:
        if text is not None:
            text.close()


# ---------------------------------------------------------------------------------------------------
# Words


@functools.cache
def _environment() -> jinja2.Environment:
    """Whatever a template prints is made fit for a terminal and a page: control characters shown, HTML escaped."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        finalize=lambda x: x if isinstance(x, Markup | jinja2.Undefined) else printable(str(x)),
    )  # fmt: skip
    made.filters |= {"number": _num, "times": _times, "sign": _sign, "over": _over}
    return made


def _said(cert: Json, model: Model | None, doubts: Sequence[str]) -> dict[str, Any]:
    """What the template is given."""
    from zoo import gallery

    sheets = (Path(gallery.__file__).with_name("gallery.css"), Path(__file__).with_name("report.css"))
    shown = model and {"facts": model.facts, "notes": model.notes, "picture": _data(model.picture)}
    return {
        "cert": {"diagnosis": None, "faults": None} | dict(cert),
        "css": Markup("".join(f.read_text(encoding="utf-8") for f in sheets)),
        "name": _name(cert),
        "headline": _headline(cert),
        "sentence": _sentence(cert),
        "nearest": _nearest(cert),
        "model": shown,
        "doubts": doubts,
        "notes": _notes(cert),
        "layers": _layers(cert),
        "logits": _logits(cert),
        "decode": _decode(cert, model),
        "provenance": _provenance(cert),
        "files": [
            (what, name, x)
            for what, of in (("canonical", cert["canonical"]), ("source", cert.get("source") or {}))
            for name, x in of.get("files", {}).items()
        ],
    }


def _data(svg: str) -> str:
    """An SVG as an address. As an image of its own it keeps its style sheet, and the page's, to themselves."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}" if svg else ""


def _name(cert: Json) -> str:
    return str(cert["canonical"]["path"]).rstrip("/").rsplit("/", 1)[-1]


def _num(x: Any) -> str:
    if x is None:
        return ""
    if isinstance(x, str):
        return x
    if isinstance(x, int) or float(x).is_integer():
        return f"{int(x):,}"
    return f"{x:.3g}"


def _times(x: float | None) -> str:
    """0.0312 -> '0.0312×'; 1249.6 -> '1,250×'."""
    if x is None:
        return ""
    return f"{float(f'{x:.3g}'):,.0f}×" if 100 <= x < 1e9 else f"{x:.3g}×"


def _sign(relation: str) -> str:
    return "≤" if relation == "<=" else "≥"


def _over(result: Json) -> str:
    """How many times its bound a seeded fault's value is."""
    return _times(_finite(result["value"]) / result["bound"]) if result["bound"] else ""


def _only(cert: Json) -> str | None:
    """The last level that passed, where it says nothing of logits."""
    only = cert.get("rests_on")
    return str(only) if cert["verdict"] == "passed" and only in ("plan", "bytes", "layers") else None


def _headline(cert: Json) -> str:
    only = _only(cert)
    return str(cert["verdict"]) if only is None else f"{cert['verdict']} ({only} only)"


def _sentence(cert: Json) -> str:
    o = cert["oracle"]
    upstream = o["kind"] == "transformers"
    who = f"transformers {o['version']} ({o['class']})" if upstream else o.get("name") or o["kind"]
    inputs = cert.get("inputs")
    tokens = f", on {inputs['tokens']:,} tokens" if inputs else ""
    said = "agrees with" if cert["verdict"] == "passed" else "does not agree with"
    if cert["verdict"] != "passed" and {n: x["verdict"] for n, x in cert["levels"].items()} == {
        "plan": "passed"
    }:
        said = "was compared only in the shapes of its tensors, not in their values, with"
    if (only := _only(cert)) is not None:
        said = f"agrees in its {only} with the source; its logits were not compared with those of"
    return f"The converted checkpoint {said} {who}, computed in {cert['dtype']}{tokens}."


def _nearest(cert: Json) -> Json | None:
    """Of the checks that passed, the one with the least margin; nothing where one failed, which says more."""
    checks = [c for level in cert["levels"].values() for c in level["checks"]]
    measured: list[Json] = [c for c in checks if c["margin"] is not None]
    if not measured or not all(c["passed"] for c in checks):
        return None
    return min(measured, key=lambda c: float(c["margin"]))


def _notes(cert: Json) -> list[str]:
    notes = [f"{n}: {t}" for n, level in cert["levels"].items() for t in level["notes"]]
    return notes + [
        f"disputed: {d['about']}: upstream {d['upstream']}, the vendor {d['vendor']}; zoo follows {d['follows']}, "
        f"the oracle was taken {d['oracle']}"
        for d in cert.get("disagreements", [])
    ]


def _decode(cert: Json, model: Model | None) -> dict[str, Any] | None:
    figures = cert["levels"].get("decode", {}).get("figures", {})
    if "generated" not in figures:
        return None
    ours, theirs = figures["generated"], figures["oracle"]
    sides = ("Both",) if ours == theirs else ("Ours", "Upstream's")
    texts = (model.texts if model else None) or ()
    return {
        "equal": figures["equal"], "oracle": theirs, "texts": list(zip(sides, texts)), "ids": list(zip(sides, (ours, theirs))),
        "note": model.untold if model else "", "prompt": figures.get("prompt_tokens"),
    }  # fmt: skip


def _provenance(cert: Json) -> list[tuple[str, Any]]:
    rules, source, inputs = cert.get("rules"), cert.get("source"), cert.get("inputs")
    facts: list[tuple[str, Any]] = [
        ("family", cert["canonical"]["family"]), ("layout version", cert["canonical"]["layout_version"]),
    ]  # fmt: skip
    if rules:
        by = " (said with --family, not found from the config)" if rules.get("family_given") else ""
        facts.append(("rules", f"{rules['family']}{by}, {rules['naming']} names, version {rules['version']}"))
    if source:
        facts.append(("source", f"{source['path']} ({source['format']})"))
    if inputs:
        limits = ", ".join(inputs["limits_crossed"]) or "none"
        facts += [("limits crossed", limits), ("tokenizer", inputs["tokenizer"] or "none: random ids only")]
        facts.append(("inputs", f"sha256 {inputs['sha256']}"))
    facts.append(("versions", ", ".join(f"{k} {v}" for k, v in cert["versions"].items())))
    facts.append(("machine", ", ".join(str(v) for v in cert["machine"].values())))
    facts.append(("device", ", ".join(f"{k} {v}" for k, v in (cert.get("device") or {}).items())))
    facts.append(("seconds", ", ".join(f"{k} {v:g}" for k, v in cert["timing"].items())))
    return [(k, v) for k, v in facts if v != ""]


# ---------------------------------------------------------------------------------------------------
# Charts


def _layers(cert: Json) -> Markup | None:
    level = cert["levels"].get("layers")
    if not level or not level["figures"].get("layers"):
        return None
    figures = level["figures"]
    rows = figures["layers"]

    def series(label: str, kind: str, key: str, dots: bool = False) -> charts.Series:
        return charts.Series(label, kind, [(r["layer"], max(_finite(r[key] or 0), TINY)) for r in rows], dots)

    shown = [series("bound", "bound", "bound")]
    if any(r["spread"] for r in rows):
        shown.append(series("upstream against itself", "spread", "spread"))
    shown += [
        series(f"ours, {figures['which']}", "ours", "value", dots=True),
        series("ours, median token", "median", "p50"),
    ]
    x = charts.Axis("after layer", min(r["layer"] for r in rows) - 0.5, max(r["layer"] for r in rows) + 0.5)
    y = charts.over("relative error of the hidden state", [v for s in shown for _, v in s.points], log=True)
    first = figures["first_departing"]
    mark = None if first is None else (first, f"layer {first} departs")
    return charts.lines("error over layers", x, y, shown, mark)


TINY = 1e-9
"""What a logarithmic chart shows in place of 0."""


def _finite(x: Any) -> float:
    return float(x) if not isinstance(x, str) and math.isfinite(float(x)) else 1e3


def _logits(cert: Json) -> dict[str, Any] | None:
    level = cert["levels"].get("logits")
    if not level:
        return None
    f = level["figures"]
    drawn = []
    if f.get("scatter"):
        points = [(float(theirs), float(ours)) for theirs, ours in (p[:2] for p in f["scatter"])]
        caption = f"{len(points):,} logits: the best of each token, and a sample of the rest."
        drawn.append((charts.scatter("logit scatter", points, "upstream's logit", "our logit"), caption))
    for key, what, label in (
        ("kl_histogram", "KL divergence", "Tokens by the KL divergence of their next-token distributions."),
        ("error_histogram", "|logit error|", "All logits by their absolute error."),
    ):
        if f.get(key) and f[key]["counts"]:
            chart = charts.histogram(key.replace("_", " "), f[key]["edges"], f[key]["counts"], what)
            drawn.append((chart, label))
    p = f.get("perplexity")
    facts = [
        ("top-1 agreement", f"{f['top1_agreement']:.2%}"), ("top-5 agreement", f"{f['top5_agreement']:.2%}"),
        ("largest |logit|", _num(f["largest_logit"])),
        ("|error| p50 / p99 / p99.9 / max", " / ".join(_num(f["error"][q]) for q in ("p50", "p99", "p99.9", "max"))),
    ]  # fmt: skip
    if p:
        facts.append(("perplexity, ours and upstream's", f"{p['ours']:.6g} and {p['oracle']:.6g}"))
    if f["near_ties"]["tokens"]:
        facts.append(("tokens at a near tie between experts", _num(f["near_ties"]["tokens"])))
    return {"facts": facts, "charts": drawn}
