"""Native code of which each thread does a share. A share is a function of three numbers: where its arguments lie (int64, one after the
other), which thread it is, and of how many.

Unusual: numba's own loop over threads (`parallel=True`) is compiled once, here, and is handed the address of a share. In a kernel of many
kinds it would be compiled with each: 0.9 s of a processor for a product in ggml's blocks, of which 0.15 to 0.3 are for what is in the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from zoo.kernels.cpu import SETTINGS, caller, compiled, one_process, threads
from zoo.kernels.cpu.vectors import ADDRESS, addresses, at

_kept: list[Any] = []  # whose addresses are in use


def share(function: Callable[[Any, Any, Any], None], **options: Any) -> int:
    """The address of the native code of a share (arguments, thread, threads). What the function closes over is constant in it."""
    signature, settings = types.void(types.intp, types.intp, types.intp), SETTINGS | options
    with one_process():
        try:
            made = cfunc(signature, cache=True, **settings)(function)
        except RuntimeError:  # nowhere to keep it
            made = cfunc(signature, **settings)(function)
    _kept.append(made)
    address: int = made.address
    return address


@intrinsic(prefer_literal=True)
def given(context: Any, address: Any, n: Any) -> Any:
    """The n arguments of a share, each by itself."""
    found = types.UniTuple(types.intp, n.literal_value)

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        values = [b.load(at(b, args[0], 8 * i, ADDRESS)) for i in range(n.literal_value)]
        return context.make_tuple(b, found, values)

    return found(types.intp, n), code


def together(function: int, *arguments: int | NDArray[Any], first: int = 0) -> NDArray[np.int64]:
    """Each thread its share of a function; before it one of them all of `first`; zero: there is none. Both are told the same, of arrays
    where they lie. It is returned: while a `Tape` runs it is what is told at each replay."""
    told = np.array([a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments], np.int64)
    with threads(taped=True) as t:
        _together(first, function, told, t)
    if caller.tape is not None:
        caller.tape.calls.append((first, function, told))
        caller.tape.kept += [a for a in arguments if isinstance(a, np.ndarray)]
    return told


class Tape:
    """Calls of `together`, kept as they are made (`with tape.running()`), and made again by one native call. `whole`: whether no other
    kernel of ours computed meanwhile. Tensors that the calls read and write must be kept, too; arrays are.

    What a CUDA graph is to a GPU: a line of Python between two products takes five microseconds, and a token of a small model has
    thousands of them."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, NDArray[np.int64]]] = []
        self.kept: list[Any] = []
        self.moves: list[Any] = []  # what has to be told the position before a replay: `move(position)`
        self.whole = True

    @contextmanager
    def running(self) -> Iterator[None]:
        caller.tape = self
        try:
            yield
        finally:
            caller.tape = None
        table = [(first, function, told.ctypes.data) for first, function, told in self.calls]
        self._table = np.array(table, np.int64).reshape(-1, 3)

    def replay(self) -> None:
        with threads(taped=True) as t:
            _again(self._table, t)


@intrinsic
def run(context: Any, function: Any, arguments: Any, thread: Any, threads: Any) -> Any:
    """A share by its address."""
    kind = ir.FunctionType(ir.VoidType(), [ADDRESS] * 3)

    def code(b: Any, function: Any, *told: Any) -> None:
        b.call(b.inttoptr(function, kind.as_pointer()), told)

    return addresses(4, code)


@compiled(parallel=True)
def _together(first, function, arguments, threads):
    where = arguments.ctypes.data
    if first:
        run(first, where, 0, 1)
    if function:
        for t in prange(threads):
            run(function, where, t, threads)


@compiled(parallel=True)
def _again(calls, threads):
    for i in range(len(calls)):
        first, function, where = calls[i, 0], calls[i, 1], calls[i, 2]
        if first:
            run(first, where, 0, 1)
        if function:
            for t in prange(threads):
                run(function, where, t, threads)
