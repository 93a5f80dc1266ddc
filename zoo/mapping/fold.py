"""Names told in few words: those that differ in numbers only are one, with the span of these."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable


def fold_one(name: str) -> str:
    """A name with * for its layer."""
    return re.sub(r"^layers\.\d+\.", "layers.*.", name)


MOST_FOLDED = 100_000
"""Names that are looked at for a message; the largest release has 92,000 tensors."""


MOST_CHARACTERS = 8 << 20
"""Of them all."""
LONGEST = 256
"""Of a name that is folded; a longer one, which no release has, stands alone."""


def fold(names: Iterable[str]) -> list[tuple[str, str]]:
    """(text, first name) per group of names that differ in their numbers only; of the first `MOST_FOLDED` names, as far as
    `MOST_CHARACTERS` go."""
    groups: dict[str, list[str]] = {}
    left = MOST_CHARACTERS
    for name in itertools.islice(names, MOST_FOLDED):
        if (left := left - len(name)) < 0:
            break
        short = name if len(name) > LONGEST else re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        groups.setdefault(short, []).append(name)
    out = []
    for group in groups.values():
        if len(group) == 1:
            out.append((group[0], group[0]))
            continue
        words = zip(*(name.split(".") for name in group), strict=True)
        text = ".".join(w[0] if len(set(w)) == 1 else span(w) for w in words)
        out.append((f"{text} ({len(group)} tensors)", group[0]))
    return out


def span(numbers: Iterable[str]) -> str:
    numbers = list(numbers)
    if not all(n.isascii() and n.isdigit() and len(n) <= 9 for n in numbers):
        return "*"  # a name may have any number of digits, or a star of its own
    values = sorted(set(map(int, numbers)))
    if values[-1] - values[0] == len(values) - 1:
        return f"{{{values[0]}-{values[-1]}}}"
    return "{" + ",".join(map(str, values)) + "}"
