"""A call of a library that has no limits of its own, ended at those of time and memory.

What is waited for goes on in another thread, or in an event loop of its library's. It is told to end; where it doesn't listen it keeps
its thread, which is no reason for anybody to wait.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
LOOK = 0.05  # seconds between two looks at the memory


class Late(Exception):
    """It took longer than it may."""


class Grown(Exception):
    """It took more memory than it may."""


def started(call: Callable[[], T]) -> tuple[Future[T], Callable[[], object]]:
    """The call, made by a thread of its own; and what tells it to end."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            made = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(made)

    thread = threading.Thread(target=work, daemon=True, name="zoo-within")
    thread.start()
    return future, lambda: end(thread)


def end(thread: threading.Thread) -> None:
    """Raise TimeoutError in the thread, at its next step of Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeoutError)
    )


def wait(future: Future[T], cancel: Callable[[], object], seconds: float, growth: int | None = None) -> T:
    """The result. Raises what the call raises; `Late` after so many `seconds`, `Grown` where the process has so many bytes
    more than before (None: that is not looked at). Then the call is told to end."""
    until, before = time.monotonic() + seconds, private() if growth is not None else None
    try:
        while True:
            left = until - time.monotonic()
            if left <= 0:
                raise Late
            with suppress(NotYet):
                return future.result(min(left, LOOK if before is not None else 1.0))
            if future.done():  # its own TimeoutError
                return future.result()
            if before is not None and growth is not None and (private() or 0) - before > growth:
                raise Grown
    except BaseException:
        if not future.done():
            cancel()
        raise


def private() -> int | None:
    """Bytes of memory that are this process' alone, mapped files not among them; None where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            _, resident, shared, *_ = f.read().split()
    except OSError:
        return None
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGESIZE")
