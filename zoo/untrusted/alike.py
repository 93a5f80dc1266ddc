"""Which names are most like one that is not there, of names that strangers made."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable

LONGEST, MOST = 256, 1000
"""Characters of a name, and names: how alike two texts are costs more than the product of their lengths."""


def alike(name: str, among: Iterable[str], n: int = 3, cutoff: float = 0.6) -> list[str]:
    """At most `n` names, the nearest first; none for a name that is too long to be meant."""
    if len(name) > LONGEST:
        return []
    short = (other for other in itertools.islice(among, MOST) if len(other) <= LONGEST)
    return difflib.get_close_matches(name, list(short), n, cutoff)
