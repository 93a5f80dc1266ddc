"""How long what strangers wrote may take, a tokenizer, a template or an answer: more where people say so."""

from __future__ import annotations

import os

PATIENCE = "ZOO_PATIENCE"
"""Environment variable: so many times as long."""


def patience() -> float:
    """By how much people multiplied the limits of time; 1 where they said nothing that counts."""
    try:
        times = float(os.environ.get(PATIENCE, "1"))
    except ValueError:
        return 1.0
    return min(times, 1000.0) if times > 1 else 1.0
