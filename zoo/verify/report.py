"""A certificate as one page for people: self-contained HTML, pictures as inline SVG, readable in print.

Everything in it comes from `parity.json`; nothing is computed again.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from zoo.errors import ZooError
from zoo.printable import printable

Json = Mapping[str, Any]
INK, OURS, SPREAD, BOUND, GRID = "#1d2733", "#1f5fa8", "#8a94a0", "#b3382c", "#d9dee4"


def page(cert: Json) -> str:
    """The report of a certificate (as its JSON). Raises ZooError if matplotlib is not installed."""
    cert = _escaped(cert)
    parts = [
        _verdict(cert), _checks(cert), _layers(cert), _logits(cert), _decode(cert), _diagnosis(cert), _faults(cert),
        _not_checked(cert), _provenance(cert),
    ]  # fmt: skip
    title = f"Parity of {_name(cert)}: {cert['verdict']}"
    body = "\n".join(p for p in parts if p)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_e(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n'
        "</main>\n</body>\n</html>\n"
    )


def _escaped(x: Any) -> Any:
    """A certificate with every text in it escaped, once and for all: it may be somebody else's."""
    if isinstance(x, Mapping):
        return {html.escape(printable(k)): _escaped(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_escaped(v) for v in x]
    return html.escape(printable(x)) if isinstance(x, str) else x


def _e(x: Any) -> str:
    """Text for the page; what is escaped already stays as it is."""
    return html.escape(html.unescape(printable(str(x))))


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


def _only(cert: Json) -> str | None:
    """The last level that passed, where it says nothing of logits."""
    only = cert.get("rests_on")
    return str(only) if cert["verdict"] == "passed" and only in ("plan", "bytes", "layers") else None


def _headline(cert: Json) -> str:
    only = _only(cert)
    return str(cert["verdict"]) if only is None else f"{cert['verdict']} ({only} only)"


def _verdict(cert: Json) -> str:
    o = cert["oracle"]
    who = (
        f"transformers {o['version']} ({o['class']})"
        if o["kind"] == "transformers"
        else o.get("name") or o["kind"]
    )
    inputs = cert.get("inputs")
    tokens = f", on {inputs['tokens']:,} tokens" if inputs else ""
    said = "agrees with" if cert["verdict"] == "passed" else "does not agree with"
    if cert["verdict"] != "passed" and {n: x["verdict"] for n, x in cert["levels"].items()} == {
        "plan": "passed"
    }:
        said = "was compared only in the shapes of its tensors, not in their values, with"
    if (only := _only(cert)) is not None:
        said = f"agrees in its {only} with the source; its logits were not compared with those of"
    levels = "".join(f'<li class="{x["verdict"]}">{_e(n)}</li>' for n, x in cert["levels"].items())
    return (
        f'<header><p class="verdict {cert["verdict"]}">{_e(_headline(cert))}</p><h1>{_e(_name(cert))}</h1>'
        f"<p>The converted checkpoint {said} {_e(who)}, computed in {_e(cert['dtype'])}{tokens}. {_e(cert['created'])}</p>"
        f'<ul class="levels">{levels}</ul></header>'
    )


def _checks(cert: Json) -> str:
    rows = []
    for name, level in cert["levels"].items():
        for n, c in enumerate(level["checks"]):
            margin = f"{c['margin']:.3g}×" if c["margin"] is not None else ""
            relation = "≤" if c["relation"] == "<=" else "≥"
            rows.append(
                f'<tr class="{"ok" if c["passed"] else "bad"}"><th scope="row">{_e(name) if n == 0 else ""}</th>'
                f"<td>{_e(c['name'])}</td><td class=n>{_num(c['value'])}</td><td class=n>{relation} {_num(c['bound'])}</td>"
                f"<td class=n>{margin}</td><td>{'' if c['passed'] else '<b>failed</b>: '}{_e(c['why'])}</td></tr>"
            )
    notes = [f"<li>{_e(n)}: {_e(t)}</li>" for n, level in cert["levels"].items() for t in level["notes"]]
    notes += [
        f"<li>disputed: {_e(d['about'])}: upstream {_e(d['upstream'])}, the vendor {_e(d['vendor'])}; zoo follows "
        f"{_e(d['follows'])}, the oracle was taken {_e(d['oracle'])}</li>"
        for d in cert.get("disagreements", [])
    ]
    return (
        "<section><h2>What was checked</h2><table><thead><tr><th>level</th><th>check</th><th class=n>value</th>"
        "<th class=n>bound</th><th class=n>margin</th><th>where the bound comes from</th></tr></thead><tbody>"
        + "".join(rows)
        + "</tbody></table>"
        + (f"<ul>{''.join(notes)}</ul>" if notes else "")
        + "</section>"
    )


# ---------------------------------------------------------------------------------------------------
# Pictures


def _svg(width: float, height: float, draw: Callable[[Any], None], title: str) -> str:
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise ZooError(
            "the report draws with matplotlib: pip install matplotlib (or 'zoo-weights[report]')"
        ) from None
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "zoo", "font.family": "sans-serif", "font.size": 9,
        "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6,
        "axes.axisbelow": True, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # Every picture has its own ids, or the clip paths of one would apply to another.
    tag = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{tag}-\1"', svg)
    svg = re.sub(r'(url\(#|xlink:href="#|href="#)', rf"\1{tag}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_e(title)}" ', 1)


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_e(caption)}</figcaption></figure>"


def _layers(cert: Json) -> str:
    level = cert["levels"].get("layers")
    if not level or not level["figures"].get("layers"):
        return ""
    figures = level["figures"]
    rows = figures["layers"]
    x = [r["layer"] for r in rows]
    tiny = 1e-9

    def draw(ax: Any) -> None:
        ax.plot(x, [r["bound"] for r in rows], color=BOUND, ls="--", lw=1.2, label="bound")
        if any(r["spread"] for r in rows):
            ax.plot(
                x,
                [max(r["spread"] or 0, tiny) for r in rows],
                color=SPREAD,
                lw=1.2,
                label="upstream against itself",
            )
        ax.plot(
            x,
            [_finite(r["value"]) for r in rows],
            color=OURS,
            lw=1.6,
            marker="o",
            ms=3,
            label=f"ours, {figures['which']}",
        )
        ax.plot(
            x,
            [max(_finite(r["p50"]), tiny) for r in rows],
            color=OURS,
            lw=0.9,
            ls=":",
            label="ours, median token",
        )
        first = figures["first_departing"]
        if first is not None:
            ax.axvline(first, color=BOUND, lw=0.8)
            ax.annotate(f" layer {first} departs", (first, ax.get_ylim()[1]), color=BOUND, va="top")
        ax.set_yscale("log")
        ax.set_xlabel("after layer")
        ax.set_ylabel("relative error of the hidden state")
        ax.set_xlim(min(x) - 0.5, max(x) + 0.5)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)

    caption = "How far ours is from upstream after each layer, beside how far two runs of upstream itself are apart."
    return f"<section><h2>Error over the layers</h2>{_figure(_svg(7.2, 3.8, draw, 'error over layers'), caption)}</section>"


def _finite(x: Any) -> float:
    return float(x) if not isinstance(x, str) and math.isfinite(float(x)) else 1e3


def _logits(cert: Json) -> str:
    level = cert["levels"].get("logits")
    if not level:
        return ""
    f = level["figures"]
    pictures = []
    if f.get("scatter"):
        theirs, ours = [p[0] for p in f["scatter"]], [p[1] for p in f["scatter"]]

        def scatter(ax: Any) -> None:
            low, high = min(theirs + ours), max(theirs + ours)
            ax.plot([low, high], [low, high], color=SPREAD, lw=0.8)
            ax.scatter(theirs, ours, s=5, color=OURS, alpha=0.5, lw=0)
            ax.set_xlabel("upstream's logit")
            ax.set_ylabel("our logit")
            ax.set_aspect("equal")

        caption = f"{len(theirs):,} logits: the best of each token, and a sample of the rest."
        pictures.append(_figure(_svg(3.5, 3.3, scatter, "logit scatter"), caption))
    for key, what, label in (
        ("kl_histogram", "KL divergence", "Tokens by the KL divergence of their next-token distributions."),
        ("error_histogram", "|logit error|", "All logits by their absolute error."),
    ):
        if f.get(key) and f[key]["counts"]:
            pictures.append(_figure(_svg(3.5, 3.3, _histogram(f[key], what), key.replace("_", " ")), label))
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
    return f'<section><h2>Logits</h2>{_facts(facts)}<div class="row">{"".join(pictures)}</div></section>'


def _histogram(h: Json, what: str) -> Callable[[Any], None]:
    def draw(ax: Any) -> None:
        edges = [10**e for e in h["edges"]]
        ax.stairs(h["counts"], edges, fill=True, color=OURS, alpha=0.75)
        ax.set_xscale("log")
        ax.set_xlabel(what)
        ax.set_ylabel("count")
        ax.grid(axis="x", visible=False)

    return draw


# ---------------------------------------------------------------------------------------------------
# Words


def _facts(items: list[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in items) + "</dl>"


def _decode(cert: Json) -> str:
    level = cert["levels"].get("decode")
    if not level or "generated" not in level["figures"]:
        return ""
    f = level["figures"]
    ours, theirs, same = f["generated"], f["oracle"], f["equal"]
    return (
        f"<section><h2>Greedy continuation</h2><p>{same} of {len(theirs)} token ids are the same, each side with its own "
        f'cache.</p><p class="ids">{_e(" ".join(map(str, ours)))}</p></section>'
    )


def _diagnosis(cert: Json) -> str:
    d = cert.get("diagnosis")
    if not d:
        return ""
    items = "".join(f"<li>{_e(s)}</li>" for s in d["suggestions"])
    return f"<section><h2>What departs first</h2><p><b>{_e(d['where'])}</b></p><ul>{items}</ul></section>"


def _faults(cert: Json) -> str:
    f = cert.get("faults")
    if not f:
        return "<section><h2>Seeded faults</h2><p>Not injected in this run: <code>zoo verify --self-test</code> does.</p></section>"
    rows = []
    for r in f["results"]:
        where = (
            f"{r['level']}" + (f", layer {r['layer']}" if r["layer"] is not None else "")
            if r["caught"]
            else "not caught"
        )
        times = f"{_finite(r['value']) / r['bound']:.2g}×" if r["bound"] else ""
        rows.append(
            f'<tr class="{"ok" if r["caught"] else "bad"}"><td>{_e(r["what"])}</td><td>{_e(r["kind"])}</td>'
            f"<td>{_e(where)}</td><td class=n>{times}</td></tr>"
        )
    silent = f", without effect here: {', '.join(f['without_effect'])}" if f.get("without_effect") else ""
    return (
        f"<section><h2>Seeded faults</h2><p>{f['caught']} of {f['applicable']} mistakes that this architecture allows were "
        f"injected into ours and caught{_e(silent)}.</p><table><thead><tr><th>mistake</th><th>in</th><th>caught at</th>"
        f"<th class=n>times the bound</th></tr></thead><tbody>{''.join(rows)}</tbody></table></section>"
    )


def _not_checked(cert: Json) -> str:
    if not cert["not_checked"]:
        return ""
    items = "".join(f"<li>{_e(x)}</li>" for x in cert["not_checked"])
    return f"<section><h2>What was not checked</h2><ul>{items}</ul></section>"


def _provenance(cert: Json) -> str:
    rules, source, inputs = cert.get("rules"), cert.get("source"), cert.get("inputs")
    facts = [
        ("family", cert["canonical"]["family"]),
        ("layout version", str(cert["canonical"]["layout_version"])),
    ]
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
    rows = []
    for what, files in (
        ("canonical", cert["canonical"]["files"]),
        ("source", (source or {}).get("files", {})),
    ):
        for name, x in files.items():
            rows.append(
                f"<tr><td>{what}</td><td>{_e(name)}</td><td class=n>{x['bytes']:,}</td><td class=hash>{x['sha256']}</td></tr>"
            )
    return (
        f"<section><h2>Provenance</h2>{_facts(facts)}<table><thead><tr><th>file of</th><th>name</th><th class=n>bytes</th>"
        f"<th>sha256</th></tr></thead><tbody>{''.join(rows)}</tbody></table></section>"
    )


CSS = f"""
:root {{ color-scheme: light; }}
body {{ margin: 0; background: #fff; color: {INK}; font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 1040px; margin: 0 auto; padding: 32px 24px 64px; }}
h1 {{ margin: 4px 0; font-size: 28px; }} h2 {{ margin: 36px 0 8px; font-size: 19px; border-bottom: 1px solid {GRID}; }}
.verdict {{ display: inline-block; margin: 0; padding: 2px 12px; border-radius: 3px; color: #fff; font-weight: 600;
  text-transform: uppercase; letter-spacing: .05em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
.verdict.passed {{ background: #23714a; }} .verdict.failed {{ background: {BOUND}; }}
.levels {{ list-style: none; padding: 0; display: flex; gap: 18px; }}
.levels li::before {{ content: "✓ "; color: #23714a; }} .levels li.failed::before {{ content: "✗ "; color: {BOUND}; }}
.levels li.skipped::before {{ content: "– "; color: {SPREAD}; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; }}
th, td {{ text-align: left; vertical-align: top; padding: 3px 10px 3px 0; border-bottom: 1px solid {GRID}; }}
thead th {{ border-bottom: 1px solid {INK}; font-weight: 600; }}
.n {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
tr.bad td {{ color: {BOUND}; }}
.hash, .ids {{ font: 11px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 8px 0; }}
dt {{ color: #5a6673; }} dd {{ margin: 0; overflow-wrap: anywhere; }}
figure {{ margin: 8px 0; }} figure svg {{ max-width: 100%; height: auto; }}
figcaption {{ color: #5a6673; font-size: 13px; }}
.row {{ display: flex; flex-wrap: wrap; gap: 12px; }} .row figure {{ flex: 1 1 300px; max-width: 336px; }}
@media print {{ main {{ max-width: none; padding: 0; }} body {{ font-size: 11px; }} table {{ font-size: 10px; }}
  figure, tr {{ break-inside: avoid; }} h2 {{ break-after: avoid; }} .row figure {{ flex: 0 0 31%; }} }}
@page {{ margin: 14mm; }}
"""
