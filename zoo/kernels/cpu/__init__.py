"""The kernels of a CPU, which numba compiles when they are first used: where they run, and what they have in common."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# numba's own pool of threads, which it has where there is no OpenMP, allows no two callers.
_one_at_a_time = threading.Lock()

MANY = 1 << 17  # numbers, from which threads are worth their start where little is done with each


class _Caller(threading.local):
    threads = 0  # numba counts them per caller
    tape: Any = None  # see `zoo.kernels.cpu.shares.Tape`


caller = _Caller()


@functools.cache
def kernels(name: str) -> Any:
    """The module `zoo.kernels.cpu.<name>`; None where numba does not run."""
    if _forked:
        return None
    try:  # numba takes a second to import
        if _interprets():
            return None
        if platform.machine() in ("x86_64", "AMD64") and not compiles_for("f16c"):
            return None  # nothing to widen fp16 with
        module = importlib.import_module(f"zoo.kernels.cpu.{name}")
    except (ImportError, OSError):  # no numba, or one that does not go with this numpy or this system
        return None
    _watch_forks()
    return module


def _interprets() -> bool:
    """Whether numba was told to compile nothing (NUMBA_DISABLE_JIT=1): these kernels have no other form."""
    import numba

    return bool(numba.config.DISABLE_JIT)


@functools.cache
def compiles_for(*features: str) -> bool:
    """Whether numba compiles for a CPU with these features, by LLVM's names: not, if this one lacks them or if numba is to
    compile for any CPU (NUMBA_CPU_NAME=generic). What it has no instruction for ends the process."""
    from numba.core.registry import cpu_target

    *_, known = cpu_target.target_context.codegen().magic_tuple()
    return {f"+{f}" for f in features} <= set(known.split(","))


_forked = False


def _after_fork() -> None:
    """OpenMP ends a child of a process that used it, when the child uses it too: there torch computes."""
    global _forked
    _forked = True
    kernels.cache_clear()


@functools.cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)


SETTINGS = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
"""Sums may change their order; numbers are not assumed to be finite."""


HERE = Path(__file__).resolve().parent


@functools.cache
def _sources() -> str:
    """What tells the sources of these kernels from others: of all files here, and of those whose constants are compiled into them."""
    files = sorted((*HERE.glob("*.py"), *(HERE.parents[1] / "quant").glob("*.py")))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


@functools.cache
def stamp_by_all_sources() -> None:
    """Have numba look for kernels that were compiled from today's sources. It goes by the file that a kernel is written in, and a kernel has
    in it what it calls, mostly of other files: after a change of one of those the code from before would run."""
    from numba.core.caching import CacheImpl

    def ours(kind: Any) -> Any:
        class Locator(kind):  # type: ignore[misc]
            @classmethod
            def from_function(cls, function: Any, file: str) -> Any:
                return super().from_function(function, file) if Path(file).resolve().parent == HERE else None

            def get_source_stamp(self) -> Any:
                return super().get_source_stamp(), _sources()

        return Locator

    kinds = CacheImpl._locator_classes
    CacheImpl._locator_classes = [*map(ours, kinds), *kinds]


def compiled(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """numba's njit."""
    import numba

    stamp_by_all_sources()

    def compile_later(function: Callable[..., None]) -> Any:
        settings = {"nogil": True} | SETTINGS | options
        try:
            made = numba.njit(function, cache=True, **settings)
        except RuntimeError:  # nowhere to keep it: neither beside this file nor under the user's home
            return numba.njit(function, **settings)
        found_or_made = made.compile

        def by_one_process(signature: Any) -> Any:
            with one_process():
                return found_or_made(signature)

        made.compile = by_one_process
        return made

    return compile_later


PATIENCE = 60.0
"""Seconds that a process waits for another to compile, which takes a second."""
_within = threading.RLock()
_depth = 0


@contextmanager
def one_process() -> Iterator[None]:
    """Alone of all processes that look for these kernels where numba keeps them, or compile them. Its index is read, added to, written, and
    names the next file: of two that do so at once one finds the other's code under its own key. And nothing is compiled twice."""
    global _depth
    with _within:
        _depth += 1
        try:
            with _locked() if _depth == 1 else nullcontext():
                yield
        finally:
            _depth -= 1


@contextmanager
def _locked() -> Iterator[None]:
    """A lock on this folder, which need not be ours to write to. None where there are none."""
    try:
        import fcntl

        folder = os.open(Path(__file__).parent, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        # Not for ever: a process may have been stopped while it compiles, or have left a child that holds the folder open.
        until = time.monotonic() + PATIENCE
        with suppress(OSError):  # a file system without flock
            while time.monotonic() < until:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.02)
        yield
    finally:
        with suppress(OSError):  # a child may have been forked, and have the folder open, too
            fcntl.flock(folder, fcntl.LOCK_UN)
        os.close(folder)


class threads:
    """As many threads as torch has, for this caller's loops alone: `with threads() as n`. `taped`: what is done with them is."""

    def __init__(self, taped: bool = False) -> None:
        self.taped = taped

    def __enter__(self) -> int:
        if caller.tape is not None and not self.taped:
            caller.tape.whole = False
        torchs = torch.get_num_threads()
        n = min(torchs, _most())
        _one_at_a_time.acquire()
        try:
            if caller.threads != n:
                import numba

                numba.set_num_threads(n)
                caller.threads = n
                # numba's start of OpenMP sets its own number for this thread, torch's too
                if torch.get_num_threads() != torchs:
                    torch.set_num_threads(torchs)
        except BaseException:
            _one_at_a_time.release()
            raise
        return n

    def __exit__(self, *_: object) -> None:
        _one_at_a_time.release()


@functools.cache
def _most() -> int:
    import numba

    most: int = numba.config.NUMBA_NUM_THREADS
    return most


Numbers = NDArray[np.int64]


def grouped(experts: Tensor | None, counts: Tensor | None, rows: int) -> tuple[Numbers, Numbers]:
    """Which matrix of a stack multiplies how many rows; without either, the first all `rows`."""
    if experts is None or counts is None:
        return _alone(rows)
    return experts.numpy(), counts.numpy()


# Kept, and so are others of its kind: it is asked for again and again while one token is computed, when all that a product
# leaves in the caches is its weight, and a line of Python takes microseconds.
@functools.lru_cache(64)
def _alone(rows: int) -> tuple[Numbers, Numbers]:
    return np.zeros(1, np.int64), np.array([rows])


def biased(out: Tensor, bias: Tensor | None, experts: Tensor | None, counts: Tensor | None) -> None:
    """Add to each row of `out` (fp32) the bias [N], or that of its expert [E, N] (see `grouped`)."""
    if bias is not None:
        of_rows = bias if experts is None or counts is None else bias[experts].repeat_interleave(counts, 0)
        out += of_rows.float()


def taken(tokens: Tensor | None, rows: int) -> Numbers:
    """Which row of x is multiplied when, of `rows` in all; without `tokens` as they come."""
    return _in_order(rows) if tokens is None else tokens.numpy()


@functools.lru_cache(64)
def _in_order(rows: int) -> Numbers:
    return np.arange(rows)


def offsets(bias: Tensor | None, n: int) -> NDArray[np.float32]:
    """A bias [N] or [E, N] as numbers of fp32 [.., N]; zeros where there is none."""
    return _zeros(n) if bias is None else bias.float().view(-1, n).contiguous().numpy()


@functools.lru_cache(64)
def _zeros(n: int) -> NDArray[np.float32]:
    return np.zeros((1, n), np.float32)
