"""Charts of a report as SVG: lines, points and bars over two axes.

Text is text. Colours and dashes are those of the classes in report.css (`ours`, `spread`, `bound`, `grid`), so that a chart
follows light, dark and print like the page around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BELOW, LINE = 58, 14, 18, 44, 18
"""Pixels around the axes, for their labels; a line of the legend."""
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`; of a logarithmic one these are the exponents of ten."""

    label: str
    low: float
    high: float
    log: bool = False

    def share(self, x: float) -> float:
        """Where `x` stands: 0 at the low end, 1 at the high one. What is beyond an end stands there."""
        at = (math.log10(x) if x > 0 else self.low) if self.log else x
        return min(1.0, max(0.0, (at - self.low) / (self.high - self.low)))

    def ticks(self) -> list[tuple[float, str]]:
        """At most eight round numbers, as shares and texts."""
        step = _step((self.high - self.low) / 7)
        step = max(1.0, step) if self.log else step
        first = math.ceil(self.low / step - 1e-9)
        values = [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [((v - self.low) / (self.high - self.low), self._text(v)) for v in values]

    def _text(self, value: float) -> str:
        if self.log:
            return "10" + str(round(value)).translate(_RAISED)
        unit, size = next(((u, n) for u, n in (("M", 1e6), ("K", 1e3)) if abs(value) >= 10 * n), ("", 1))
        return f"{value / size:,.10g}{unit}"


def _step(least: float) -> float:
    """The next of 1, 2, 5, 10, 20, ..."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= least * (1 - 1e-9))


def over(label: str, values: Iterable[float], log: bool = False) -> Axis:
    """An axis that holds the values; a logarithmic one begins and ends at a power of ten. Of no two values it has a length all
    the same. Values that a logarithm has none of are left to stand at the low end."""
    found = [math.log10(v) for v in values if v > 0] if log else list(values)
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if log:
        low, high = math.floor(low), math.ceil(high)
    return Axis(label, low, high if high > low else low + 1, log)


@dataclass(frozen=True)
class Series:
    """Points joined by a line of the class `kind`; `dots` marks each."""

    label: str
    kind: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True)
class Frame:
    """Two axes in so many pixels."""

    x: Axis
    y: Axis
    width: int
    height: int

    def at(self, x: float, y: float) -> str:
        return f"{self.across(self.x.share(x)):.1f} {self.up(self.y.share(y)):.1f}"

    def across(self, share: float) -> float:
        return LEFT + share * (self.width - LEFT - RIGHT)

    def up(self, share: float) -> float:
        return TOP + (1 - share) * (self.height - TOP - BELOW)

    def axes(self) -> str:
        left, right, bottom, top = self.across(0), self.across(1), self.up(0), self.up(1)
        out = ""
        for share, text in self.y.ticks():
            y = self.up(share)
            out += f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/><text class="end" x="{left - 6:.1f}" y="{y + 4:.1f}">{text}</text>'
        for share, text in self.x.ticks():
            x = self.across(share)
            out += f'<path class="grid" d="M{x:.1f} {bottom:.1f}V{top:.1f}"/><text class="mid" x="{x:.1f}" y="{bottom + 16:.1f}">{text}</text>'
        middle = (top + bottom) / 2
        return out + (
            f'<path class="axis" d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>'
            f'<text class="mid" x="{(left + right) / 2:.1f}" y="{bottom + 36:.1f}">{escape(self.x.label)}</text>'
            f'<text class="mid" transform="translate(13 {middle:.1f})rotate(-90)">{escape(self.y.label)}</text>'
        )


def _svg(title: str, width: int, height: int, body: str) -> Markup:
    return Markup(
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {height}" width="{width}" height="{height}">{body}</svg>'
    )


def lines(
    title: str, x: Axis, y: Axis, series: Sequence[Series], mark: tuple[float, str] | None = None
) -> Markup:
    """Lines with a legend below them. `mark`: a place on `x` that is pointed at, and what is said of it."""
    frame = Frame(x, y, 470, 360)
    body = frame.axes()
    for s in series:
        body += f'<path class="line {s.kind}" d="M{"L".join(frame.at(*p) for p in s.points)}"/>'
        if s.dots:
            body += f'<path class="dots {s.kind}" d="{"".join(f"M{frame.at(*p)}h0" for p in s.points)}"/>'
    if mark is not None:
        at, said = frame.across(x.share(mark[0])), escape(mark[1])
        body += f'<path class="line mark" d="M{at:.1f} {frame.up(0):.1f}V{TOP}"/><text class="mid mark" x="{at:.1f}" y="{TOP - 6}">{said}</text>'
    for n, s in enumerate(series):
        left, top = LEFT + 200 * (n % 2), frame.height + 8 + LINE * (n // 2)
        body += f'<path class="line {s.kind}" d="M{left} {top}h22"/><text x="{left + 28}" y="{top + 4}">{escape(s.label)}</text>'
    return _svg(title, frame.width, frame.height + 8 + LINE * ((len(series) + 1) // 2), body)


def scatter(title: str, points: Sequence[tuple[float, float]], across: str, up: str) -> Markup:
    """Points over two axes of one range, and the line on which both are equal."""
    of = over("", [v for p in points for v in p])
    frame = Frame(Axis(across, of.low, of.high), Axis(up, of.low, of.high), 350, 330)
    body = (
        frame.axes()
        + f'<path class="line spread" d="M{frame.at(of.low, of.low)}L{frame.at(of.high, of.high)}"/>'
    )
    return _svg(
        title,
        350,
        330,
        body + f'<path class="dots ours" d="{"".join(f"M{frame.at(*p)}h0" for p in points)}"/>',
    )


def histogram(title: str, edges: Sequence[float], counts: Sequence[int], across: str) -> Markup:
    """Bars from edge to edge; `edges` are exponents of ten."""
    frame = Frame(Axis(across, edges[0], edges[-1], log=True), over("count", [0, *counts]), 350, 330)
    bars = "".join(
        f"M{frame.at(10**a, 0)}V{frame.up(frame.y.share(n)):.1f}H{frame.across(frame.x.share(10**b)):.1f}V{frame.up(0):.1f}Z"
        for a, b, n in zip(edges, edges[1:], counts, strict=False)
        if n
    )
    return _svg(title, 350, 330, frame.axes() + f'<path class="bar ours" d="{bars}"/>')
