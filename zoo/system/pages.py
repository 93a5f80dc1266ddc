"""Large pages for large tensors, where Linux gives them to who asks (its usual setting): new memory is there in a third of the time,
and is used faster, most of all in a virtual machine."""

from __future__ import annotations

import os


def large() -> None:
    """Have torch ask for pages of 2 MiB, unless it has made a tensor already, or the user decided."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
