"""What all kernels share: whether Triton runs here, and how a kernel is launched.

Unusual here: programmatic dependent launch (Hopper). Each kernel starts while its predecessor is still
running, fetches what does not depend on it (weights), and only then waits (`after_previous`). At batch 1
a decode step is a chain of kernels of 2-20 us, so the overlap is worth more than any tile size.

And a kernel remembers what it was compiled to (`Kernel`). Triton itself looks at each argument at each launch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter: kernels run on CPU tensors, slowly. What the tests use."""

MOST = 4096  # kinds of arguments that a kernel remembers
OVERLAPPED, APART = {"OVERLAP": True, "launch_pdl": True}, {"OVERLAP": False}

NVIDIA = not INTERPRET and torch.version.hip is None
"""Whether kernels may have instructions of its GPUs in them."""

triton: Any = None
if INTERPRET or torch.cuda.is_available():
    try:
        import triton
        import triton.language as tl
    except ImportError:  # the plain twins run
        pass


class Kernel:
    """A Triton kernel, `kernel[grid](*arguments, **constants)`, whose first launch with arguments of a kind is Triton's,
    and which launches what that was compiled to from then on. Tensors are of a kind if dtype and alignment are the same,
    integers if they are equal (which is more than Triton asks). Parameters that are constants come last.

    Margin: some 25 us of the 30-75 that a launch costs the host, nearly 10 of them Triton's looking for hooks and the stream:
    a quarter of its time for a prompt, 21.7 and 19.0 ms for 24 layers of Qwen3-30B-A3B with and without the latter alone."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.jit = triton.jit(function)
        self.constants = [] if INTERPRET else [p.name for p in self.jit.params if p.is_constexpr]
        self.compiled: dict[tuple[object, ...], Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if INTERPRET or torch.version.hip:  # on AMD's a tensor's size counts too
            self.jit[grid](*arguments, **constants)
            return
        device = torch.cuda.current_device()
        kinds = [a if a.__class__ is int else _kind(a) for a in arguments]
        key = (device, *kinds, *constants.items())
        known = self.compiled.get(key)
        if known is None:
            if len(self.compiled) >= MOST:
                self.compiled.clear()
            compiled = self.jit[grid](*arguments, **constants)
            self.compiled[key] = compiled, [constants[name] for name in self.constants]
            return
        compiled, last = known
        # What Triton's `compiled[grid](*arguments, *last)` does, without its hooks.
        compiled.run(
            *(*grid, 1, 1)[:3], _stream(device), compiled.function, compiled.packed_metadata, None, None, None,
            *arguments, *last,
        )  # fmt: skip


def _kind(a: Any) -> object:
    if isinstance(a, torch.Tensor):
        return a.dtype, a.data_ptr() % 16
    if a is None or a.__class__ is float:
        return a.__class__
    return a.base.dtype, *a.block_shape  # a tensor descriptor


def _stream(device: int) -> Any:
    return triton.runtime.driver.active.get_current_stream(device)


def has_triton(x: torch.Tensor) -> bool:
    """Whether the kernels, rather than their plain twins, run for `x`."""
    return triton is not None and (x.is_cuda or (INTERPRET and x.device.type == "cpu")) and not is_recorded(x)


def is_recorded(x: torch.Tensor) -> bool:
    """Whether autograd records what is made of x. Kernels have no backward pass: their plain twins run then."""
    return x.requires_grad and torch.is_grad_enabled()


def hopper(x: torch.Tensor) -> bool:
    """Whether x is on a GPU of Hopper's kind or later: programmatic launch, the copy engine, cuDNN's attention."""
    return x.is_cuda and _capability(x.device.index or 0) >= 9


def only_hopper(x: torch.Tensor) -> bool:
    """Whether x is on a GPU of Hopper's kind: what later ones do not have, `wgmma`."""
    return x.is_cuda and _capability(x.device.index or 0) == 9


@functools.cache
def _capability(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


def overlap(x: torch.Tensor) -> dict[str, Any]:
    """Launch arguments of a kernel that calls `after_previous`: overlapped where the GPU can."""
    return OVERLAPPED if hopper(x) else APART


def power_of_2(n: int, least: int = 1) -> int:
    """The least power of two >= n (and >= `least`): the tile that covers n."""
    return max(least, 1 << max(0, n - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


if triton is not None:
    ASM = tl.constexpr(NVIDIA)

    @triton.jit
    def after_previous(OVERLAP: tl.constexpr) -> None:
        """Wait until everything the previous kernels wrote is visible; let the next one start."""
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def in_turn(OVERLAP: tl.constexpr) -> None:
        """`after_previous`, but the next kernel starts only now. What the kernels before this one wrote is there when it
        starts: it may read that before it waits, around the cache of its multiprocessor (".cg")."""
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
