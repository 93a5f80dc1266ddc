"""Byte moves: what a fit comes down to, in loops over runs of bytes.

A fit pairs elements of a source tensor with elements of a canonical one. Written as nested loops with a
stride on either side it is a `Move`, and a move is done in one of two ways:

- where both sides are contiguous for long, each run is copied from file to file, neighbouring runs merged, by the
  fastest of several ways (`ways.py`);
- where they are not (transposes, interleaved rows, the columns of several ranks), or where elements change on the way
  (casts, dequantisation), in chunks of bounded size: read, rearrange in numpy, write.

A move knows nothing of directions: export is the same loops with the sides exchanged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from zoo.mapping.rules import Box
from zoo.mapping.ways import PAGE, write

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Loop = tuple[int, int, int]
"""(count, source stride, destination stride), in elements."""

RUN = 32 << 10  # bytes; shorter runs go through memory: a system call each would cost more than the copy
COPY = 16 << 20  # bytes per copy: often enough to stop, to report, and to share out
STRIPE = 1600 << 10  # bytes rearranged and written at a time: still in a cache when the kernel reads them
# Rows and columns of the source transposed at a time, of elements of two bytes; more rows where there are fewer columns.
# Memory is read in runs of as many columns: with 512 it takes half as long as with 128.
TILE = 128, 512


def loops(source: Box, destination: Box) -> tuple[Loop, ...]:
    """Nested loops, by falling destination stride, with those that are one run on both sides merged."""
    (sizes, s), (sizes2, d) = source.flat(), destination.flat()
    assert sizes == sizes2, (sizes, sizes2)
    found = sorted(((n, a, b) for n, a, b in zip(sizes, s, d) if n != 1), key=lambda x: -x[2])
    out: list[Loop] = []
    for n, a, b in reversed(found):
        if out and a == out[-1][0] * out[-1][1] and b == out[-1][0] * out[-1][2]:
            out[-1] = (n * out[-1][0], out[-1][1], out[-1][2])
        else:
            out.append((n, a, b))
    return tuple(reversed(out)) or ((1, 1, 1),)


def restride(box: Box, shape: tuple[int, ...], strides: tuple[int, ...]) -> Box:
    """`box`, which speaks of a contiguous tensor of `shape`, for one stored with other `strides`."""
    dense = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))

    def moved(n: int) -> int:
        out = 0
        for size, here, there in zip(shape, dense, strides):
            out += n // here % size * there
        return out

    axes = tuple(tuple((n, moved(s) if n > 1 else s) for n, s in axis) for axis in box.axes)
    return Box(moved(box.offset), axes)


def run_length(loop: tuple[Loop, ...]) -> int:
    """Elements that are contiguous on both sides."""
    n, s, d = loop[-1]
    return n if s == d == 1 else 1


def in_kernel(loop: tuple[Loop, ...], itemsize: int) -> bool:
    """Whether a move is better done by copying its runs than through memory."""
    n = run_length(loop)
    return n * itemsize >= RUN or math.prod(k for k, _, _ in loop) // n <= 4


def offsets(loop: Iterable[Loop]) -> Iterator[tuple[int, int]]:
    """(source, destination) offset of every iteration."""
    sides = [[(i * s, i * d) for i in range(n)] for n, s, d in loop]
    for steps in itertools.product(*sides):
        yield sum(a for a, _ in steps), sum(b for _, b in steps)


# ---------------------------------------------------------------------------------------------------
# Copies


@dataclass(slots=True)
class Copy:
    """`nbytes` from `src` at `src_at` to `dst` at `dst_at`; the files by the caller's keys."""

    src: str
    src_at: int
    dst: str
    dst_at: int
    nbytes: int

    @property
    def alike(self) -> bool:
        """Whether both sides lie alike within their pages."""
        return (self.src_at - self.dst_at) % PAGE == 0


def merged(copies: list[Copy]) -> list[Copy]:
    """Neighbours on both sides made one, and everything cut into pieces of at most `COPY` bytes."""
    copies.sort(key=lambda c: (c.src, c.src_at))
    out: list[Copy] = []
    for c in copies:
        last = out[-1] if out else None
        if (
            last is not None
            and (last.src, last.dst) == (c.src, c.dst)
            and last.src_at + last.nbytes == c.src_at
            and last.dst_at + last.nbytes == c.dst_at
        ):
            last.nbytes += c.nbytes
        else:
            out.append(Copy(c.src, c.src_at, c.dst, c.dst_at, c.nbytes))
    return [
        Copy(c.src, c.src_at + at, c.dst, c.dst_at + at, min(COPY, c.nbytes - at))
        for c in out
        for at in range(0, c.nbytes, COPY)
    ]


# ---------------------------------------------------------------------------------------------------
# Rearrangements, through memory


class Loader(Protocol):
    """A source tensor as a flat array of elements in the destination's dtype. `chunk`: how many to ask for at a
    time, of which `grain` are best not torn apart; `most`: where it has to be more, since they are rearranged."""

    @property
    def chunk(self) -> int: ...

    @property
    def most(self) -> int: ...

    @property
    def grain(self) -> int: ...

    def read(self, at: int, n: int) -> Array:
        """Elements [at, at + n)."""
        ...


@dataclass(slots=True)
class Rearrange:
    """Elements of `loader` into `dst`, whose tensor begins at byte `base`, by loops from the two offsets."""

    loader: Loader
    dst: str
    base: int
    itemsize: int
    loop: tuple[Loop, ...]
    src_at: int
    dst_at: int

    @property
    def nbytes(self) -> int:
        return math.prod(n for n, _, _ in self.loop) * self.itemsize

    def chunks(self) -> Iterator[Rearrange]:
        """The same work in pieces of bounded size, cut where that costs the fewest reads and writes."""
        limit = self.loader.chunk if len(self.loop) == 1 else self.loader.most
        total = math.prod(n for n, _, _ in self.loop)
        if total <= max(limit, self.loader.grain):
            yield self
            return
        best: tuple[float, int, int] | None = None
        for j, (n, _, _) in enumerate(self.loop):
            size = max(1, limit * n // total)
            size = -(-n // -(-n // size))  # alike, not a small one left over
            if len(self.loop) == 1:
                size = max(size // self.loader.grain, 1) * self.loader.grain
            piece = _cut(self.loop, j, size)
            n_chunks = -(-n // size)
            cost = n_chunks * (_n_runs(piece, 1) + _n_runs(piece, 2)) + 1e6 * (total // n > limit)
            if best is None or cost < best[0]:
                best = cost, j, size
        assert best is not None
        _, j, size = best
        n, s, d = self.loop[j]
        for at in range(0, n, size):
            piece = _cut(self.loop, j, min(size, n - at))
            part = Rearrange(
                self.loader,
                self.dst,
                self.base,
                self.itemsize,
                piece,
                self.src_at + at * s,
                self.dst_at + at * d,
            )
            yield from part.chunks()

    def run(self, fd: int) -> None:
        """Do it (a chunk of it: what is read is held in memory at once)."""
        import numpy as np

        elements, strides = self._gather()
        outer, inner = _runs(self.loop, 2)
        size = elements.itemsize
        view = np.lib.stride_tricks.as_strided(
            elements,
            [n for n, _, _ in (*outer, *inner)],
            [strides[loop] * size for loop in (*outer, *inner)],
            writeable=False,
        )
        base = self.base + self.dst_at * size
        length = math.prod(n for n, _, _ in inner)
        if outer and length * size < STRIPE // 16:  # many short runs: rearranged together
            for row, (_, at) in zip(rearranged(view).reshape(-1, length), offsets(outer)):
                write(fd, row, base + at * size)
            return
        for index, (_, at) in zip(np.ndindex(view.shape[: len(outer)]), offsets(outer)):
            _stripes(fd, view[index], base + at * size)

    def _gather(self) -> tuple[Array, dict[Loop, int]]:
        """The source elements in memory, and the stride of each loop there."""
        import numpy as np

        span = sum((n - 1) * s for n, s, _ in self.loop) + 1
        total = math.prod(n for n, _, _ in self.loop)
        outer, inner = _runs(self.loop, 1)
        if span <= 2 * total or not outer:
            return self.loader.read(self.src_at, span), {loop: loop[1] for loop in self.loop}
        length = math.prod(n for n, _, _ in inner)
        found = np.empty((total // length, length), self.loader.read(self.src_at, 1).dtype)
        for row, (at, _) in zip(found, offsets(outer)):
            row[:] = self.loader.read(self.src_at + at, length)
        strides, stride = {}, 1
        for loop in reversed((*outer, *inner)):
            strides[loop] = stride
            stride *= loop[0]
        return found.reshape(-1), strides


@dataclass(slots=True)
class Woven:
    """Matrices that lie side by side in the destination, as the ranks' columns do: `rows` of `length` elements of each
    loader, from the offset beside it, in turn; `at`: the byte where they begin. Written row by row each would take
    several times as long."""

    sources: list[tuple[Loader, int]]
    dst: str
    at: int
    itemsize: int
    rows: int
    length: int

    @property
    def nbytes(self) -> int:
        return self.rows * self._row

    @property
    def _row(self) -> int:
        return len(self.sources) * self.length * self.itemsize

    def chunks(self) -> Iterator[Woven]:
        step = max(1, STRIPE // self._row)
        for i in range(0, self.rows, step):
            sources = [(loader, at + i * self.length) for loader, at in self.sources]
            n, at = min(step, self.rows - i), self.at + i * self._row
            yield Woven(sources, self.dst, at, self.itemsize, n, self.length)

    def run(self, fd: int) -> None:
        import numpy as np

        from zoo.system.scratch import scratch

        shape = self.rows, self.length
        parts = [loader.read(at, math.prod(shape)).reshape(shape) for loader, at in self.sources]
        rows = scratch("woven", (self.rows, len(parts), self.length), parts[0].dtype)
        write(fd, np.stack(parts, 1, out=rows), self.at)


class Through(Protocol):
    """Bytes of `dst` that are made in memory, at once or in chunks."""

    @property
    def dst(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def chunks(self) -> Iterable[Through]: ...

    def run(self, fd: int) -> None: ...


Move = Copy | Through


def woven(moves: Iterable[Rearrange]) -> list[Rearrange | Woven]:
    """`moves`, with those that are the columns of the same rows made one."""
    out: list[Rearrange | Woven] = []
    sets: dict[tuple[str, int, tuple[Loop, ...], int], list[Rearrange]] = {}
    for m in moves:
        if len(m.loop) == 2 and m.loader.grain == 1:
            sets.setdefault((m.dst, m.base, m.loop, m.dst_at // m.loop[0][2]), []).append(m)
        else:
            out.append(m)
    for (dst, base, loop, row), parts in sets.items():
        parts.sort(key=lambda m: m.dst_at)
        (rows, _, width), (length, _, _) = loop
        columns = [row * width + k * length for k in range(width // length)]
        plain = loop == ((rows, length, len(columns) * length), (length, 1, 1))
        if plain and len(columns) > 1 and [m.dst_at for m in parts] == columns:
            size = parts[0].itemsize
            sources = [(m.loader, m.src_at) for m in parts]
            out.append(Woven(sources, dst, base + columns[0] * size, size, rows, length))
        else:
            out += parts
    return out


def _cut(loop: tuple[Loop, ...], j: int, size: int) -> tuple[Loop, ...]:
    """Loops of which the j-th goes over `size` only; gone if that is one."""
    cut = ((size, *loop[j][1:]),) if size > 1 else ()
    return (*loop[:j], *cut, *loop[j + 1 :]) or ((1, 1, 1),)


def _stripes(fd: int, view: Array, at: int) -> None:
    """Write what `view` shows, one run of the file, in pieces that are still in the cache when they are written."""
    n = view.nbytes
    if n <= STRIPE or view.ndim == 0:
        write(fd, rearranged(view), at)
        return
    row = n // view.shape[0]
    if row <= STRIPE or view.ndim == 1:
        step = _step(row)
        for i in range(0, view.shape[0], step):
            write(fd, rearranged(view[i : i + step]), at + i * row)
    elif view.ndim > 2 and _interleaved(view, 0, 1):  # the same lines of the source hold all of them
        short = row // view.shape[1]
        step = _step(short * view.shape[0])
        for i in range(0, view.shape[1], step):
            for k, part in enumerate(rearranged(view[:, i : i + step])):
                write(fd, part, at + k * row + i * short)
    else:
        for i in range(view.shape[0]):
            _stripes(fd, view[i], at + i * row)


def _step(row: int) -> int:
    """Rows of `row` bytes to rearrange and write at a time: at least as many as make runs of two cache lines in the
    source, of elements of two bytes."""
    return max(STRIPE // row, 64) // 64 * 64


def _interleaved(view: Array, a: int, b: int) -> bool:
    """Whether the source holds all of axis `a`, a short one, for each of axis `b`, as gate, up, gate, up."""
    return bool(1 < view.shape[a] <= 8 and view.strides[b] == view.shape[a] * view.strides[a])


def rearranged(view: Array) -> Array:
    """A contiguous copy, valid until this thread's next. numpy's own order of a transpose touches a cache line
    per element, so planes go tile by tile."""
    import numpy as np

    from zoo.system.scratch import scratch

    wide = [a for a in range(view.ndim - 1) if view.shape[a] >= 16]
    if view.strides[-1:] == (view.itemsize,) or view.size < 1 << 12 or not wide:
        return np.ascontiguousarray(view)
    out = scratch("rearranged", view.shape, view.dtype)
    # A plane: the last axis of what is made, and the source's innermost of some length; each perhaps of two axes.
    last = [view.ndim - 1]
    if view.shape[-1] <= 8 and view.ndim > 2 and wide != [view.ndim - 2]:
        last = [view.ndim - 2, view.ndim - 1]
    fast = [min((a for a in wide if a not in last), key=lambda a: view.strides[a])]
    fast += [a for a in range(view.ndim) if a not in last + fast and _interleaved(view, a, fast[0])]
    rest = [a for a in range(view.ndim) if a not in last + fast]

    def planes(x: Array, *axes: list[int]) -> Array:
        """[..., A, B, C, D] for two pairs of axes, of which each may lack the second."""
        x = x.transpose(rest + [a for pair in axes for a in pair])
        at = len(rest)
        for pair in axes:
            if len(pair) == 1:
                x = np.expand_dims(x, at + 1)
            at += 2
        return x

    there, here = planes(view, last, fast), planes(out, fast, last)
    for at in np.ndindex(there.shape[:-4]):
        _transpose(there[at], here[at])
    return out


def _transpose(source: Array, out: Array) -> None:
    """out [N, n, M, m] = source [M, m, N, n], by tiles that are first made compact: their rows then lie a cache line
    further apart than they are long, or they would share few lines of the cache."""
    from zoo.system.scratch import scratch

    m, m2, n, n2 = source.shape
    b = min(n, max(TILE[1] * 2 // (source.itemsize * n2), 8))
    a = min(m, max(math.prod(TILE) * 2 // (source.itemsize * m2 * b * n2), 8))
    memory = scratch("tile", (a * m2, b * n2 + 64 // source.itemsize), source.dtype)
    for i in range(0, m, a):
        for j in range(0, n, b):
            part = source[i : i + a, :, j : j + b]
            rows, _, columns, _ = part.shape
            tile = memory[: rows * m2, : columns * n2].reshape(rows, m2, columns, n2)
            tile[...] = part
            out[j : j + b, :, i : i + a] = tile.transpose(2, 3, 0, 1)


def _runs(loop: Iterable[Loop], side: int) -> tuple[list[Loop], list[Loop]]:
    """Loops by falling stride on a side (1 source, 2 destination): those outside a run, and the run's own."""
    order = sorted(loop, key=lambda x: -x[side])
    length, k = 1, len(order)
    while k and order[k - 1][side] == length:
        k -= 1
        length *= order[k][0]
    return order[:k], order[k:]


def _n_runs(loop: Iterable[Loop], side: int) -> int:
    return math.prod(n for n, _, _ in _runs(loop, side)[0])
