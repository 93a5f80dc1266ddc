"""Regular expressions that strangers wrote, in configs of adapters and of quantisations: a few letters are matched for ever."""

from __future__ import annotations

import re

LONGEST = 500
"""Characters of one."""
_ENDLESS = re.compile(r"\)[*+{?]|\(\?(?![:=!]|<[=!])|\\[1-9]|(?:[^\\(][*+{?].*){4}|(?:\(.*){4}", re.DOTALL)
"""Repeated groups, groups that are looked back at or set flags, more than three repetitions or groups."""


def endless(pattern: str) -> bool:
    """Whether matching it may take for ever, or it is longer than any that is meant."""
    return len(pattern) > LONGEST or _ENDLESS.search(pattern) is not None
