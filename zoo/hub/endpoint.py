"""`HF_ENDPOINT`, looked at before the library is: that ends in an error of Python's where it is no address."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from zoo.errors import ZooError


def check() -> None:
    """Raises ZooError for what is no address."""
    try:
        _ = urlsplit(told := os.environ.get("HF_ENDPOINT", "")).port
    except ValueError as e:
        raise ZooError(
            f"HF_ENDPOINT is {told!r:.200}, which is no address ({e!s:.200}): unset it, or name one"
        ) from None
