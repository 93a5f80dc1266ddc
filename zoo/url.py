"""URLs of stores: what is one, and what of it may be shown."""

from __future__ import annotations

import os
import re
from typing import TypeGuard

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL", re.IGNORECASE)


def is_url(text: object) -> TypeGuard[str]:
    """Whether this names something in a store: `protocol://...`."""
    return isinstance(text, str) and _URL.match(text) is not None


def without_secrets(text: str) -> str:
    """`text` without a URL's user and query, and without the values of the environment's keys and tokens."""
    text = re.sub(r"(?<=://)[^/@\s]*@", "", text)
    text = re.sub(r"(://[^\s?]*)\?\S*", r"\1", text)
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return text


def not_here(url: str, what: str) -> str:
    """Why `what` does not work on a store, and what to do."""
    shown = without_secrets(url)
    return f"{shown} is in a store, and {what} on this disk: `zoo pull {shown} --to FOLDER` brings it here, hashes checked"
