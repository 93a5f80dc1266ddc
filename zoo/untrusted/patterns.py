"""Regular expressions that strangers wrote, in configs of adapters and of quantisations: a few letters are matched for ever.

What is left over after the refusals here takes at most a second for a name: its repetitions and alternatives are counted, and with them
the ways in which `re` may try to match it.
"""

from __future__ import annotations

import math
import re

LONGEST = 500
"""Characters of one."""
LONGEST_NAME = 128
"""Characters of a name that they are matched against; released models' modules have up to some 80."""
WAYS = 12 * LONGEST_NAME**3 // 6
"""Of three repetitions and twelve alternatives; each is tried behind every dot of a name, where any prefix is allowed."""
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_ENDLESS = re.compile(r"\)[*+{?]|\(\?(?![:=!]|<[=!])|\\", re.DOTALL)
"""Repeated groups, and groups that are looked back at or set flags."""
_REPEATED = re.compile(r"(?:[*+]|\{[\d,]*\}|\{|(?<!\()\?)[?+]?")
_MOST = 3
"""Repetitions, and groups."""


def endless(pattern: str) -> bool:
    """Whether matching it may take for ever, or it is longer than any that is meant."""
    if len(pattern) > LONGEST:
        return True
    # what is escaped is a letter, repeated like any other; what is looked back at stays a backslash, and so does a lone one
    letters = _ESCAPED.sub(lambda m: "\\" if m[1] in "123456789" else "a", pattern)
    repeated, groups = len(_REPEATED.findall(letters)), letters.count("(")
    if _ENDLESS.search(letters) or repeated > _MOST or groups > _MOST:
        return True
    # the most that so many bars can multiply to, spread over the groups
    alternatives = (letters.count("|") / max(groups, 1) + 1) ** max(groups, 1)
    return bool(alternatives * LONGEST_NAME**repeated / math.factorial(repeated) > WAYS)
