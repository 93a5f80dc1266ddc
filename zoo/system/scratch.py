"""Memory that a thread uses again: fresh memory costs a page fault per 4 KiB, as much as copying into it."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

_memory = threading.local()
LINE = 64  # bytes that a CPU reads at once: a vector that lies across two costs two


def scratch(name: str, shape: int | tuple[int, ...], dtype: Any = np.uint8) -> NDArray[Any]:
    """An array of whatever was there, this thread's until it asks by this name again."""
    dtype = np.dtype(dtype)
    n = dtype.itemsize * (shape if isinstance(shape, int) else math.prod(shape))
    held: dict[str, NDArray[np.uint8]] = _memory.__dict__
    if name not in held or held[name].nbytes < n:
        held.pop(name, None)
        room = np.empty(n + LINE, np.uint8)
        first = -room.ctypes.data % LINE
        held[name] = room[first : first + n]
    found: NDArray[Any] = held[name][:n].view(dtype)
    return found.reshape(shape)
