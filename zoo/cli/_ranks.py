"""Commands that several ranks run together: `torchrun --nproc-per-node N -m zoo generate CANON PROMPT`.

Only the first rank speaks. Where one fails, its message is the one that is printed, whichever rank it is, and the others
end with it: they may be waiting for it, in a place where nothing reaches them but the end of their process.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import click

from zoo.errors import ZooError
from zoo.untrusted.bounded import whole

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
GRACE = 5.0
"""Seconds that a rank has to end by itself after one has failed."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a command. `mesh`: None for a process alone; `device`: where this one computes, as torch spells it."""

    mesh: DeviceMesh | None
    device: str
    first: bool = True

    def of_first(self, value: Callable[[], T]) -> T:
        """What the first rank finds `value` to be, on all."""
        if self.mesh is None:
            return value()
        from zoo.together import of_first

        return of_first(value() if self.first else None)  # type: ignore[return-value]


@contextmanager
def together(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone.

    Raises ZooError for variables that make no sense, and for a device that is not each rank's own."""
    from zoo.mapping.parts import of_process

    if not {"MASTER_ADDR", "RANK"} <= os.environ.keys() or of_process(os.environ) is None:
        yield Ranks(None, device)
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port, local = (
        os.environ.get(k, d) for k, d in (("MASTER_ADDR", ""), ("MASTER_PORT", ""), ("LOCAL_RANK", "0"))
    )
    at, on = whole(port), whole(local)
    if not (at and at < 1 << 16) or on is None or on >= n or not _is_host(address):
        raise ZooError(
            f"MASTER_ADDR={address:.200}, MASTER_PORT={port:.200}, LOCAL_RANK={local:.200}: expected a host, a port, and a rank below {n}: start "
            "the ranks by torchrun"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    outputs = sys.stdout, sys.stderr
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    done = threading.Event()
    threading.Thread(target=_end_with_others, args=(store, done), daemon=True).start()
    try:
        here = _own(device)
        yield Ranks(init_device_mesh(device, (n,)), here, rank == 0)
        dist.barrier()  # whoever leaves takes the store along
    except click.exceptions.Exit:  # all know
        done.set()
        raise
    except BaseException as e:
        if _said_by_another(store, rank):
            raise click.exceptions.Exit(1) from None
        if rank and isinstance(e, (ZooError, OSError)):
            raise ZooError(f"rank {rank}: {e}") from e
        raise
    else:
        done.set()
        dist.destroy_process_group()
    finally:
        sys.stdout, sys.stderr = outputs


def _is_host(name: str) -> bool:
    """Whether there is a host of this name: torch asks for one that there is not again and again, for half an hour."""
    try:
        return bool(name) and bool(socket.getaddrinfo(name, None))
    except (OSError, UnicodeError, ValueError):
        return False


def _own(device: str) -> str:
    """This rank's device. Raises ZooError where it has none of its own."""
    import torch

    if device == "cpu":
        return device
    if device != "cuda":
        raise ZooError(
            f"of several ranks each computes on the CPU or a GPU of its own; found --device {device}: say cpu or cuda"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= (there := torch.cuda.device_count()):
        raise ZooError(
            f"rank {local} of this machine has no GPU: there are {there}; start as many ranks as GPUs"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _failed() -> str:
    """Where it stands that a rank has failed. The store outlives ranks that torchrun starts again."""
    return f"zoo/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _said_by_another(store: dist.TCPStore, rank: int) -> bool:
    """Whether another rank was the first to fail; else this one is, and says so to all."""
    try:
        return store.compare_set(_failed(), "", str(rank)) != str(rank).encode()
    except RuntimeError:  # the store has gone, with the rank that kept it
        return True


def _end_with_others(store: dist.TCPStore, done: threading.Event) -> None:
    """Ends this process soon after a rank has failed, if it does not end by itself."""
    try:
        while not done.wait(0.2):
            if store.check([_failed()]):
                break
    except RuntimeError:
        pass
    if not done.wait(GRACE):
        os._exit(1)
