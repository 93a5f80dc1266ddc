"""A canvas that a picture is laid out on, in user units of about a pixel, and how wide text is.

Unusual here: nothing is measured by a browser. A text's width is estimated with the advance widths of DejaVu Sans, the
widest of the fonts that the pictures ask for, so that what fits here fits everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Hundredths of an em, of the characters from 32 to 126 (DejaVu Sans 2.37).
_WIDTHS = (
    32, 40, 46, 84, 64, 95, 78, 27, 39, 39, 50, 84, 32, 36, 32, 34, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 34, 34, 84, 84, 84,
    53, 100, 68, 69, 70, 77, 63, 58, 77, 75, 29, 29, 66, 56, 86, 75, 79, 60, 79, 69, 63, 61, 73, 68, 99, 69, 61, 69, 39, 34, 39,
    84, 50, 50, 61, 63, 55, 63, 62, 35, 63, 63, 28, 28, 58, 28, 97, 63, 61, 63, 63, 41, 52, 39, 63, 59, 82, 59, 59, 52, 64, 34,
    64, 84,
)  # fmt: skip
_OTHER = {"·": 32, "–": 50, "√": 67, "θ": 69, "ε": 56, "β": 64, "σ": 78, "⌊": 40, "⌋": 40}
_BOLD = 1.13  # no letter of DejaVu Sans Bold is more than that beyond its own plain width, but for a few narrow ones


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width of `text` at `size` units per em; a character that is not in the tables counts as a whole em."""
    ems = sum(_WIDTHS[ord(c) - 32] if " " <= c <= "~" else _OTHER.get(c, 100) for c in text)
    return ems * size / 100 * (_BOLD if bold else 1)


def wrap(text: str, width: float, size: float, bold: bool = False) -> list[str]:
    """`text` in lines of at most `width` units, broken at spaces; a word that is too long, at any character.

    An indent (spaces at the start) is kept on every line.
    """
    indent = text[: len(text) - len(text.lstrip(" "))]
    lines, line = [], ""
    for word in text.split():
        while text_width(indent + word, size, bold) > width and len(word) > 1:
            if line:
                lines.append(line)
                line = ""
            keep = next(
                (
                    n
                    for n in range(len(word) - 1, 1, -1)
                    if text_width(indent + word[:n], size, bold) <= width
                ),
                1,
            )
            lines.append(indent + word[:keep])
            word = word[keep:]
        longer = f"{line} {word}" if line else indent + word
        if text_width(longer, size, bold) <= width or not line:
            line = longer
        else:
            lines.append(line)
            line = indent + word
    return [*lines, line] if line else lines


@dataclass(frozen=True)
class Rect:
    """A box. `style`: a class of the style sheet; `depth`: how many boxes it lies in."""

    x: float
    y: float
    w: float
    h: float
    style: str
    depth: int


@dataclass(frozen=True)
class Text:
    """One line of text: `x` is where it starts, or ends (`end`), or its middle (`middle`); `y` is its baseline."""

    x: float
    y: float
    text: str
    size: float
    style: str = ""
    anchor: str = "start"
    room: float = 0.0  # the width it must stay within
    pitch: float = 0.0  # of the strip: a letter every so many units

    @property
    def bold(self) -> bool:
        return "b" in self.style.split()

    @property
    def compared(self) -> bool:
        """Whether it is part of the architecture: not a name, a remark or a strip."""
        return not self.pitch and "m" not in self.style.split() and self.size < 17

    @property
    def width(self) -> float:
        return len(self.text) * self.pitch if self.pitch else text_width(self.text, self.size, self.bold)

    @property
    def left(self) -> float:
        """Where it begins."""
        return self.x - {"start": 0.0, "middle": self.width / 2, "end": self.width}[self.anchor]


@dataclass
class Canvas:
    """What was put where; the writer draws boxes, then lines, then text."""

    rects: list[Rect] = field(default_factory=list)
    paths: list[tuple[str, str]] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)

    def rect(self, x: float, y: float, w: float, h: float, style: str, depth: int) -> None:
        self.rects.append(Rect(x, y, w, h, style, depth))

    def path(self, d: str, style: str) -> None:
        self.paths.append((d, style))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        style: str = "",
        anchor: str = "start",
        room: float = 0.0,
    ) -> None:
        self.texts.append(Text(x, y, text, size, style, anchor, room))

    def cells(self, x: float, y: float, letters: str, size: float, pitch: float) -> None:
        """A letter in the middle of each cell, the first of which is at `x`."""
        self.texts.append(
            # the middle, in whole units: a strip is mostly these numbers
            Text(x + pitch // 2 - 1, y, letters, size, "", "middle", len(letters) * pitch, pitch)
        )

    def lines(
        self, x: float, y: float, text: str, size: float, room: float, style: str = "", leading: float = 1.3
    ) -> float:
        """Wrapped text whose top is `y`; its height. In whole units: a picture is mostly coordinates."""
        rows, step = wrap(text, room, size, "b" in style.split()), round(size * leading)
        for n, row in enumerate(rows):
            self.text(x, y + math.ceil(size) + n * step, row, size, style, room=room)
        return len(rows) * step
