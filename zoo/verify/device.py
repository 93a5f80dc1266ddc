"""Where a comparison is computed: both sides on one device, in arithmetic that is the dtype's own.

On a GPU torch may multiply fp32 in tf32, of which 10 bits of mantissa are left: bounds of fp32 would not hold, nor would
they mean anything. While a comparison runs that is off, whatever the program had set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zoo.errors import ZooError
from zoo.model.load import usable


def chosen(name: str | torch.device) -> torch.device:
    """The device called `name`; "auto": the first GPU, or the CPU where there is none.

    Raises ZooError if torch has no such device here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = usable(name)
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


def available(device: torch.device) -> int | None:
    """Bytes of memory that can be had there, page cache included; None where the system does not say."""
    if device.type == "cuda":
        allocated, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        may = int(
            torch.cuda.get_per_process_memory_fraction(device) * total
        )  # what the program limited itself to
        return min(free + held, may) - allocated
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            found = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    return min(found, _of_group(found))


def _of_group(otherwise: int) -> int:
    """What a container's limit leaves of it."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(stat["file"])  # files' pages are given back
    except (OSError, ValueError, KeyError):  # no group, or "max"
        return otherwise


def has_room(device: torch.device, need: int) -> bool:
    """Whether so many bytes are at most half of the memory that can be had there (where the system says)."""
    found = available(device)
    return found is not None and need <= found // 2
