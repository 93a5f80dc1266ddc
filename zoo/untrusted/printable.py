"""What a terminal is shown: text of somebody else's, made fit for it; large numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logging import Logger

_TURNS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""What turns the direction of the text after it, so that a name is shown as another one. (The marks that a right-to-left
language needs turn nothing else.)"""
_LINES = (0x2028, 0x2029)
_NO_TEXT = range(0xD800, 0xE000)
"""Surrogates: what Python makes of a file's name that is in no encoding of ours, and nothing can write."""
_HIDDEN = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
_HIDDEN |= {c: f"\\u{c:04x}" for c in (*_TURNS, *_LINES, *_NO_TEXT)}
_HIDDEN_JSON = {c: f"\\u{c:04x}" for c in (*range(127, 160), *_TURNS, *_LINES, *_NO_TEXT)}


def printable(text: str) -> str:
    """Without control characters (C0, DEL, C1; those that turn or end a line), but for newline and tab: names in a file, and
    what a model says, may hold what a terminal obeys."""
    return text.translate(_HIDDEN)


def warn(log: Logger, text: str, *about: object) -> None:
    """A warning about what is in files of somebody else's, for whoever looks at the log: a terminal, if nobody else."""
    log.warning("%s", printable(text % about))


def printable_json(text: str) -> str:
    """The same for JSON, whose own rules leave all but C0 as they are."""
    return text.translate(_HIDDEN_JSON)


def decimal(n: float) -> str:
    """1234567 -> '1.23 MB', as the Hub shows sizes."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.3g} {unit}" if n < 999.5 else f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def count(n: int) -> str:
    """8030261248 -> '8.03B'; three significant digits, as publishers write."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size * 0.9995:
            x = n / size
            return f"{x:.2f}{unit}" if x < 9.995 else f"{x:.1f}{unit}" if x < 99.95 else f"{x:.0f}{unit}"
    return str(n)
