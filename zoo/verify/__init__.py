"""Proof: is a canonical checkpoint what upstream would compute? Levels, oracles, bounds, seeded faults.

Start at `run.verify`. `compare` runs both sides, `judge` holds the measurements against the bounds of
`tolerance`, `certificate` is the outcome. docs/verification.md explains it to a reader of certificates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.verify.certificate import Certificate


def verify(canon: Any, against: Any = None, **how: Any) -> Certificate:
    """See `zoo.verify.run.verify`."""
    from zoo.verify.run import verify

    return verify(canon, against, **how)
