"""What all kernels share: whether Triton runs here, and how a kernel is launched.

Unusual here: programmatic dependent launch (Hopper). Each kernel starts while its predecessor is still
running, fetches what does not depend on it (weights), and only then waits (`after_previous`). At batch 1
a decode step is a chain of kernels of 2-20 us, so the overlap is worth more than any tile size.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter: kernels run on CPU tensors, slowly. What the tests use."""

triton: Any = None
if INTERPRET or torch.cuda.is_available():
    try:
        import triton
        import triton.language as tl
    except ImportError:  # the plain twins run
        pass


def has_triton(x: torch.Tensor) -> bool:
    """Whether the kernels, rather than their plain twins, run for `x`."""
    return triton is not None and (x.is_cuda or (INTERPRET and x.device.type == "cpu"))


@functools.cache
def _overlaps(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


def overlap(x: torch.Tensor) -> dict[str, Any]:
    """Launch arguments of a kernel that calls `after_previous`: overlapped where the GPU can."""
    if x.is_cuda and _overlaps(x.device.index or 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


def power_of_2(n: int, least: int = 1) -> int:
    """The least power of two >= n (and >= `least`): the tile that covers n."""
    return max(least, 1 << max(0, n - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


if triton is not None:

    @triton.jit
    def after_previous(OVERLAP: tl.constexpr) -> None:
        """Wait until everything the previous kernels wrote is visible; let the next one start."""
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
