"""What a terminal is shown: text of somebody else's, made fit for it; large numbers."""

from __future__ import annotations

_TURNS = {c: f"\\u{c:04x}" for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
"""Controls of Unicode that have the text around them written the other way round: a name would be read as another."""
_HIDDEN = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"} | _TURNS
_HIDDEN_JSON = {c: f"\\u{c:04x}" for c in range(127, 160)} | _TURNS


def printable(text: str) -> str:
    """Without control characters (C0, DEL, C1, those of direction), but for newline and tab: names in a file, and what a model
    says, may hold what a terminal obeys."""
    return text.translate(_HIDDEN)


def printable_json(text: str) -> str:
    """The same for JSON, whose own rules leave DEL, C1 and directions as they are."""
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
