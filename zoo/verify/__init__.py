"""Proof: is a canonical checkpoint what upstream would compute? Levels, oracles, bounds, seeded faults.

Start at `run.verify`. `against` opens what a folder is compared with, `compare` runs both sides, `judge` holds the measurements
against the bounds of `tolerance`, `certificate` is the outcome. docs/verification.md explains it to a reader of certificates.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.system import pages
from zoo.verify.certificate import LEVELS, NO_TRANSFORMERS, NUMERIC

if TYPE_CHECKING:
    from zoo.verify.certificate import Certificate


def check_upstream(level: str) -> None:
    """Raises ZooError if there is no such level, or it needs transformers and that is not installed."""
    if level not in LEVELS:
        raise ZooError(f"unknown level {level!r}; expected one of {', '.join(LEVELS)}")
    if level in NUMERIC and importlib.util.find_spec("transformers") is None:
        raise ZooError(f"{level}: {NO_TRANSFORMERS}; up to `bytes`, nothing but the source's files is needed")


def verify(canon: Any, against: Any = None, **how: Any) -> Certificate:
    """See `zoo.verify.run.verify`."""
    pages.large()
    from zoo.verify.run import verify

    return verify(canon, against, **how)
