"""Where a comparison is computed: both sides on one device, in arithmetic that is the dtype's own.

On a GPU torch may multiply fp32 in tf32, of which 10 bits of mantissa are left: bounds of fp32 would not hold, nor would
they mean anything. While a comparison runs that is off, whatever the program had set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from zoo.errors import ZooError


def chosen(name: str | torch.device) -> torch.device:
    """The device called `name`; "auto": the first GPU, or the CPU where there is none.

    Raises ZooError if torch has no such device here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # the second from a torch built without CUDA
        raise ZooError(f"torch can't use the device {str(name)!r} here: {str(e).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ZooError(f"device is {str(name)!r}; expected cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Meanwhile fp32 is fp32 on `device`, which is also the current one."""
    if device.type != "cuda":
        yield
        return
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.cuda.device(device), torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(was)


def described(device: torch.device) -> dict[str, Any]:
    """For the certificate: the device, and the libraries that compute on it."""
    if device.type != "cuda":
        return {
            "type": "cpu",
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    at = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda", "name": at.name, "capability": f"{at.major}.{at.minor}", "memory": at.total_memory,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "triton": _triton(),
    }  # fmt: skip


def _triton() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def has_room(device: torch.device, need: int) -> bool:
    """Whether so many bytes are at most half of the memory that is free there (where the system says)."""
    import os

    try:
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
            free -= torch.cuda.memory_allocated(device)
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return False
    return need <= free // 2
