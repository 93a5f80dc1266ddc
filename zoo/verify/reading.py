"""Weights from their files, a layer at a time, each byte range once.

While a window is open on a layer, whoever asks for a range gets the same map of it: upstream's two ways, ours and the bytes
level. Then all of it goes. Meanwhile the system is told to read the next layer, and no more than that; or, on a GPU, the next
layer is copied there, where who computes finds it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.formats.base import TensorRef
from zoo.model.load import DTYPES
from zoo.verify.sharing import Sharing

Range = tuple[Path, int, int]
"""Of a file: the first byte, and how many."""


def mapped_range(path: Path, offset: int, nbytes: int) -> Tensor:
    """Bytes of a file (uint8 [nbytes]), read-only, under a map of their own that is gone with the tensor: neither
    memory nor address space grows with the file."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as f:
        m = mmap.mmap(f.fileno(), offset - start + nbytes, access=mmap.ACCESS_READ, offset=start)
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")  # that it cannot be written to is meant
        return torch.frombuffer(m, dtype=torch.uint8, count=nbytes, offset=offset - start)


class Rider(Protocol):
    """What takes part in a pass over the layers."""

    def ranges(self, layer: int) -> Iterable[Range]:
        """What it will read of a layer, if any."""
        ...

    def computes_with(self, layer: int | None) -> Iterable[Range]:
        """What it will use of a layer (None: what lies beside the layers) on the device that computes."""
        ...

    def leave(self, layer: int | None) -> None:
        """The layer is about to go: the last chance to look at it."""
        ...


class Ahead(Protocol):
    """How bytes get ahead of the pass to the device that computes."""

    def ask(self, ranges: Iterable[Range]) -> Collection[Range]:
        """Begin with those that there is room for, the first first: these."""
        ...

    def take(self) -> Mapping[Range, Tensor]:
        """Wait for what was asked for last: the bytes of each range that is there, uint8 [nbytes]."""
        ...

    def close(self) -> None: ...


class Window:
    """What is held of the files now: of a layer, or, before and after all of them, what lies beside them (embeddings, norms,
    the head)."""

    def __init__(self, sharing: Sharing | None = None) -> None:
        """`sharing`: the ranks that go through one pass together; None: this process alone."""
        self.sharing = sharing
        self.riders: list[Rider] = []
        self._held: dict[Range, Tensor] = {}
        self._carried: Mapping[Range, Tensor] = {}
        self._lock = threading.Lock()

    def range(self, path: Path, offset: int, nbytes: int) -> Tensor:
        """As `mapped_range`, the same map for all who ask while it is held."""
        key = (path, offset, nbytes)
        with self._lock:
            if key not in self._held:
                self._held[key] = mapped_range(path, offset, nbytes)
            return self._held[key]

    def carried(self, path: Path, offset: int, nbytes: int) -> Tensor | None:
        """The same bytes on the device that computes, if they are there."""
        return self._carried.get((path, offset, nbytes))

    def hold(self, carried: Mapping[Range, Tensor]) -> None:
        """Have these bytes on the device, until they are let go."""
        self._carried = carried

    def let_go(self) -> None:
        """Hold nothing any more."""
        with self._lock:
            self._held.clear()
        self._carried = {}


class Passing:
    """One pass over layers 0 to `n_layers` - 1: they are entered in order, and each is let go before the next; then what lies
    beside them."""

    def __init__(
        self,
        window: Window,
        n_layers: int,
        ahead: Ahead | None = None,
        waiting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """`ahead`: what copies bytes to the device, if that is not where they are read to. `waiting`: a context in which a
        layer is waited for."""
        self.window, self.n_layers, self.ahead, self.waiting = window, n_layers, ahead, waiting
        self._thread = ThreadPoolExecutor(1)
        self._asked: Future[None] | None = None

    def __enter__(self) -> Passing:
        self._ask(0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self.ahead is not None:
            self.ahead.close()
        try:
            if kind is None:
                self._leave(None)
        finally:
            self.window.let_go()

    @contextlib.contextmanager
    def layer(self, i: int) -> Iterator[None]:
        """Meanwhile layer `i` is held, and the next is read."""
        self._take()
        self._ask(i + 1 if i + 1 < self.n_layers else None)
        try:
            yield
            self._leave(i)
        finally:
            self.window.let_go()

    def beside(self) -> None:
        """Hold what lies beside the layers, to the end."""
        self._take()

    def _take(self) -> None:
        with self.waiting():
            if self._asked is not None:
                self._asked.result()  # never more than one layer ahead
            if self.ahead is not None:
                self.window.hold(self.ahead.take())

    def _leave(self, i: int | None) -> None:
        for rider in self.window.riders:
            rider.leave(i)

    def _ask(self, i: int | None) -> None:
        riders, carried = self.window.riders, frozenset[Range]()
        read = [] if i is None else [r for rider in riders for r in rider.ranges(i)]
        if self.ahead is not None:
            there = dict.fromkeys(r for rider in riders for r in rider.computes_with(i))
            carried = frozenset(self.ahead.ask(there))
            read += there
        wanted = [r for r in read if r not in carried]
        self._asked = self._thread.submit(read_ahead, wanted) if wanted else None


def read_ahead(ranges: Iterable[Range]) -> None:
    """Have the system read these into its cache, each once, in the order of the files. It takes none of our memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path, offset, nbytes in sorted({r for r in ranges if r[2]}):  # 0 would be "to the end"
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), offset, nbytes, os.POSIX_FADV_WILLNEED)


def mapped(path: Path, ref: TensorRef, window: Window | None = None) -> Tensor:
    """The tensor's bytes, read-only: those that the window holds, on the device if they are there; or those in the file, under a
    map of their own."""
    dtype = DTYPES[ref.dtype]
    if ref.size == 0:
        return torch.empty(ref.shape, dtype=dtype)
    at = path, ref.offset, ref.nbytes
    raw = None if window is None else window.carried(*at)
    if raw is None:
        raw = (mapped_range if window is None else window.range)(*at)
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(ref.shape)
