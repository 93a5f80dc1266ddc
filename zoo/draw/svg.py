"""A canvas as SVG text: the only place where pictures are escaped and where their colours are."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from xml.sax.saxutils import escape, quoteattr

from zoo.draw.boxes import Canvas, Rect, Text
from zoo.untrusted.printable import printable

# style: fill and outline on white, fill and outline on black.
_BOXES = {
    "f": ("#f6f8fa", "#d0d7de", "#161b22", "#444c56"),  # a frame of layers
    "g": ("none", "#8c959f", "none", "#768390"),  # one of several
    "n": ("#eef1f4", "#8c959f", "#2d333b", "#768390"),  # norms
    "a": ("#dbeafe", "#3b82f6", "#172c4d", "#539bf5"),  # attention
    "h": ("#cffafe", "#0891b2", "#0b3540", "#39a5bd"),  # attention that does not see all
    "l": ("#dcfce7", "#16a34a", "#12351f", "#46954a"),  # linear mixers
    "d": ("#fef3c7", "#d97706", "#3d2c0a", "#c69026"),  # dense feed-forward
    "e": ("#f3e8ff", "#9333ea", "#2f1f47", "#986ee2"),  # experts
    "i": ("#fff", "#c084fc", "#21153a", "#8256d0"),  # inside experts
    "v": ("#ffe4e6", "#e11d48", "#43131d", "#e5534b"),  # vocabulary: embedding, head
}
_INK, _MUTED, _LINE, _RARE, _OTHER, _PAPER = (
    ("#1b1f24", "#e6edf3"), ("#57606a", "#9da7b1"), ("#6e7781", "#8b949e"), ("#b42318", "#ff938a"),
    ("#a21caf", "#f0abfc"), ("#fff", "#0d1117"),
)  # fmt: skip


# What a class is beside its colours.
_FORMS = {
    "b": "font-weight:600", "o": "text-decoration:underline", "g": "stroke-dasharray:4 3", "t": "fill:none;stroke-dasharray:4 3",
    "w": "fill:none", "q": "fill:none;stroke-opacity:.4", "s": "fill:none", "u": "fill:none;stroke-width:1.5", "c": "fill-opacity:.55",
    "y": "stroke-width:4;stroke-dasharray:4 2", "z": "stroke-width:2.5;stroke-dasharray:2.5 1.5",
    "j": "stroke-width:12;stroke-dasharray:1 13",
}  # fmt: skip


def _colours(dark: int) -> dict[str, str]:
    line, expert, attention = _LINE[dark], _BOXES["e"][2 * dark + 1], _BOXES["a"][2 * dark + 1]
    return {k: f"fill:{v[2 * dark]};stroke:{v[2 * dark + 1]}" for k, v in _BOXES.items()} | {
        "m": f"fill:{_MUTED[dark]}", "r": f"fill:{_RARE[dark]}", "o": f"fill:{_OTHER[dark]}", "p": f"fill:{_PAPER[dark]}",
        "w": f"stroke:{line}", "q": f"stroke:{line}", "t": f"stroke:{line}", "u": f"stroke:{line}",
        "k": f"fill:{_PAPER[dark]};stroke:{line}", "s": f"stroke:{expert}", "c": f"fill:{attention}",
    }  # fmt: skip


def _style(used: Collection[str]) -> str:
    """The style sheet, of the classes that a picture has. On paper the light colours hold."""

    def rules(of: dict[str, str]) -> str:
        alike: dict[str, list[str]] = {}
        for k, v in of.items():
            if k in used:
                alike.setdefault(v, []).append(f".{k}")
        return "".join(f"{','.join(names)}{{{v}}}" for v, names in alike.items())

    return (
        'text{white-space:pre}g{font-family:system-ui,"Segoe UI",Roboto,Arial,sans-serif;'
        f"fill:{_INK[0]}}}{rules(_colours(0))}{rules(_FORMS)}@media screen and (prefers-color-scheme:dark)"
        f"{{g{{fill:{_INK[1]}}}{rules(_colours(1))}}}"
    )


def number(x: float) -> str:
    """At most one digit behind the point."""
    return f"{x:.1f}".removesuffix(".0")


def document(
    parts: Sequence[tuple[float, Canvas, Collection[str]]],
    width: float,
    height: float,
    title: str,
    about: str,
) -> str:
    """The SVG document of canvases side by side: where each begins, the canvas, and the lines that none of the others has.

    Every text passes through `escape` here, without the characters that XML forbids.
    """
    drawn = [_canvas(canvas, own) for _, canvas, own in parts]
    used = {"p"} | {
        c for part in drawn for names in re.findall(r' class="([^"]*)"', part) for c in names.split()
    }
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{number(width)}" height="{number(height)}" viewBox="0 0 {number(width)} {number(height)}" '
        f'style="max-width:100%;height:auto" role="img" '
        f'aria-labelledby="title desc"><title id="title">{_text(title)}</title><desc id="desc">{_text(about)}</desc>'
        f'<style>{_style(used)}</style><rect class="p" width="{number(width)}" height="{number(height)}"/>'
    ]
    for (x, _, _), inside in zip(parts, drawn, strict=True):
        out.append(f'<g transform="translate({number(x)})">{inside}</g>' if x else inside)
    return "".join(out) + "</svg>\n"


def _canvas(c: Canvas, own: Collection[str]) -> str:
    paths: dict[str, str] = {}  # one for each style: a picture is mostly short lines
    for d, style in c.paths:
        paths[style] = paths.get(style, "") + d
    streams = paths.pop("u", "")
    out = [_rect(r) for r in c.rects if r.depth == 0]
    out += [f'<path class="u" d="{streams}"/>'] if streams else []  # below what they go through
    out += [_rect(r) for r in sorted(c.rects, key=lambda r: r.depth) if r.depth]
    out += [f'<path class="{style}" d="{d}"/>' for style, d in paths.items()]
    # What texts have in common stands once: their size, class and anchor.
    alike: dict[tuple[float, str, str], list[Text]] = {}
    for t in c.texts:
        marked = t.compared and t.text.strip() in own
        alike.setdefault((t.size, f"{t.style} o".strip() if marked else t.style, t.anchor), []).append(t)
    for (size, style, anchor), texts in sorted(alike.items(), key=lambda item: item[0]):
        classes = f" class={quoteattr(style)}" if style else ""
        anchored = "" if anchor == "start" else f' text-anchor="{anchor}"'
        out.append(f'<g font-size="{number(size)}"{classes}{anchored}>{"".join(map(_line, texts))}</g>')
    return "".join(out)


def _line(t: Text) -> str:
    x = " ".join(number(t.x + n * t.pitch) for n in range(len(t.text))) if t.pitch else number(t.x)
    return f'<text x="{x}" y="{number(t.y)}">{_text(t.text)}</text>'


def _rect(r: Rect) -> str:
    x, y, w, h = map(number, (r.x, r.y, r.w, r.h))
    return f'<rect class="{r.style}" x="{x}" y="{y}" width="{w}" height="{h}" rx="{4 if r.depth else 8}"/>'


def _text(text: str) -> str:
    return escape(printable(text).encode("utf-8", "replace").decode()).replace("￾", "?").replace("￿", "?")
