"""Source tensors read as elements of another dtype: casts, dequantisation, block types.

A loader gives any range of a tensor's elements, so that a tensor of any size passes through in pieces. Arrays
here hold bit patterns: numpy has no bf16, so every element of 2 bytes is a uint16, of 4 a uint32.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from zoo.errors import ZooError
from zoo.formats.base import FLOATS, ITEMSIZE, TensorRef
from zoo.layout import Slot
from zoo.mapping import changes
from zoo.mapping.rules import Change
from zoo.quant import blocks, host
from zoo.quant.base import Component, Scheme, grid
from zoo.quant.floats import bits, exponents, from_float, to_fp32
from zoo.quant.schemes import block_size, scheme
from zoo.system import libc

if TYPE_CHECKING:
    from zoo.mapping.moves import Array

MAPPED = 64 << 20  # bytes of a source in memory per thread, where they are rearranged as they are
MADE = 12 << 20  # elements, where something is made of them first


class Files:
    """Reads of open files, which raise ZooError where a file ends early or cannot be read.

    Unusual: what is not small is mapped, which saves a copy; and its pages are asked for at once, since the
    kernel then reports what would otherwise kill the process when the page is touched."""

    def __init__(self, fd_of: Callable[[str], int]) -> None:
        self.fd_of = fd_of

    def __call__(self, file: str, at: int, n: int) -> Array:
        """Bytes [at, at + n). Writing to them changes no file."""
        if n >= _MAPPED and (mapped := self._map(file, at, n)) is not None:
            return mapped
        out = np.empty(n, np.uint8)
        self._fill(file, at, memoryview(out))  # type: ignore[arg-type]
        return out

    def _map(self, file: str, at: int, n: int) -> Array | None:
        """None where that does not work, for whatever reason: reading then says what is wrong."""
        fd, skip = self.fd_of(file), at % mmap.ALLOCATIONGRANULARITY
        if not _LINUX or os.fstat(fd).st_size < at + n:
            return None
        os.posix_fadvise(fd, at, n, os.POSIX_FADV_WILLNEED)
        try:
            pages = mmap.mmap(
                fd, skip + n, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=at - skip
            )
        except (OSError, ValueError):  # the second: cut short since its size was asked for
            return None
        whole = np.frombuffer(pages, np.uint8)
        return whole[skip:] if libc.populate(whole.ctypes.data, whole.size) else None

    def _fill(self, file: str, at: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            n = os.preadv(self.fd_of(file), [out[done:]], at + done)
            if n == 0:
                raise _short(file, at + done, at + len(out))
            done += n


_MAPPED = 256 << 10  # bytes; mapping fewer costs more than copying them
_LINUX = sys.platform == "linux"


def _short(file: str, end: int, wanted: int) -> ZooError:
    return ZooError(f"{file}: ends at byte {end}, {wanted} were expected: it changed or is truncated")


@dataclass
class Raw:
    """Elements as they are."""

    ref: TensorRef
    files: Files
    chunk = 4 << 20
    grain = 1

    @property
    def most(self) -> int:
        return MAPPED // ITEMSIZE[self.ref.dtype]

    def read(self, at: int, n: int) -> Array:
        size = ITEMSIZE[self.ref.dtype]
        return self.files(self.ref.file, self.ref.offset + at * size, n * size).view(bits(self.ref.dtype))


@dataclass
class Cast:
    """Elements of a float tensor in another float dtype."""

    ref: TensorRef
    files: Files
    dtype: str
    chunk = 1 << 18  # what is made of it on the way stays in a core's cache
    most = MADE
    grain = 1

    def read(self, at: int, n: int) -> Array:
        x = to_fp32(Raw(self.ref, self.files).read(at, n), self.ref.dtype)
        return from_float(x, self.dtype, self.ref.name)


NOT_FINITE = "{} in {}: some of its blocks have scales that are NaN or infinite"


@dataclass
class Blocks:
    """Elements of one of ggml's block types, whose rows are sequences of blocks with scales inside. `warn` is told of a
    tensor some of whose values are none."""

    ref: TensorRef
    files: Files
    dtype: str
    warn: Callable[[str], None]
    chunk = 1 << 18
    most = MADE

    @property
    def grain(self) -> int:
        return self.ref.shape[-1]

    def read(self, at: int, n: int) -> Array:
        from zoo.quant import ggml

        columns = self.ref.shape[-1]
        row_bytes = self.ref.nbytes // (self.ref.size // columns)
        first, last = at // columns, -(-(at + n) // columns)
        raw = self.files(self.ref.file, self.ref.offset + first * row_bytes, (last - first) * row_bytes)
        x = ggml.dequantise(raw, self.ref.dtype, (last - first, columns))
        if not np.isfinite(x).all():
            self.warn(NOT_FINITE.format(self.ref.name, self.ref.file))
        start = at - first * columns
        return from_float(x.reshape(-1)[start : start + n], self.dtype, self.ref.name)


@dataclass
class Runs:
    """Elements of a tensor whose rows are in several loaders by turns: `runs` are (loader, its first row, rows), in order."""

    runs: list[tuple[Blocks, int, int]]
    columns: int
    chunk = 1 << 18
    most = MADE

    @property
    def grain(self) -> int:
        return self.columns

    def read(self, at: int, n: int) -> Array:
        found, row, end = [], 0, at + n
        for loader, first, rows in self.runs:
            begin, last = max(at, row * self.columns), min(end, (row + rows) * self.columns)
            if begin < last:
                found.append(loader.read(begin + (first - row) * self.columns, last - begin))
            row += rows
        return np.concatenate(found)


def expanded(
    refs: Mapping[str, TensorRef],
    how: Scheme,
    slot: Slot,
    files: Files,
    dtype: str,
    warn: Callable[[str], None],
) -> Blocks | Runs:
    """The logical elements of a canonical weight that is carried in ggml's blocks; `refs`: its components, by their names."""
    columns = slot.shape[-1]
    loaders: list[tuple[Blocks, tuple[int, ...]]] = []
    for part in how.components:
        ref = refs[part.name]
        typed = replace(ref, dtype=blocks.type_of(how, part.name).upper(), shape=(*ref.shape[:-1], columns))
        loaders.append((Blocks(typed, files, dtype, warn), grid(part, slot.parts, columns)[0]))
    if len(loaders) == 1:
        return loaders[0][0]
    matrices, runs = math.prod(slot.shape[:-2]), []
    for e in range(matrices):
        for k in range(len(slot.parts)):
            for loader, rows in loaders:
                if rows[k]:
                    runs.append((loader, e * sum(rows) + sum(rows[:k]), rows[k]))
    return Runs(runs, columns)


@dataclass
class Undone:
    """Elements w of a tensor that holds what `change` makes of them; `whole` gives that in fp32. Raises ZooError, naming the
    tensor, where no w in fp32 gives back what is there."""

    ref: TensorRef
    whole: Cast | Blocks
    dtype: str
    change: Change
    chunk = 1 << 18
    most = MADE

    @property
    def grain(self) -> int:
        return self.whole.grain

    def read(self, at: int, n: int) -> Array:
        x = self.whole.read(at, n).view(np.float32)
        w = changes.weights(x, self.change)
        if (wrong := changes.unsound(x, w, self.change)).size:
            k = int(wrong[0])
            form, what = _FORMS[self.change]
            raise ZooError(
                f"{self.ref.name} in {self.ref.file}: expected {what} stored as {form}; of its {self.ref.size} elements "
                f"number {at + k}, {x[k]!r}, is not {form} for any w in fp32 that gives it back (nearest: w = {w[k]!r}): was it "
                "edited? Take a GGUF that llama.cpp's converter wrote"
            )
        return from_float(w, self.dtype, self.ref.name)


@dataclass
class Redone:
    """What a source held of a canonical tensor's elements: `Undone` backwards."""

    ref: TensorRef
    files: Files
    dtype: str
    change: Change
    chunk = 1 << 18
    most = MADE
    grain = 1

    def read(self, at: int, n: int) -> Array:
        x = to_fp32(Raw(self.ref, self.files).read(at, n), self.ref.dtype).astype(np.float32, copy=False)
        return from_float(changes.stored(x, self.change), self.dtype, self.ref.name)


_FORMS = {"1 +": ("1 + w", "norm weights"), "-exp": ("-exp(w)", "decays of a state")}


@dataclass
class Quantised:
    """Logical elements of a quantised source tensor: `codes`, and what stands beside them by component."""

    codes: TensorRef
    others: dict[str, TensorRef]
    scheme: str
    shape: tuple[int, ...]  # logical: [.., out, in]
    files: Files
    dtype: str
    chunk = 1 << 20
    most = MADE

    @property
    def grain(self) -> int:
        return max(1, block_size(self.scheme)[0]) * self.shape[-1]

    def read(self, at: int, n: int) -> Array:
        columns, rows = self.shape[-1], self.shape[-2]
        first, last = at // columns, -(-(at + n) // columns)
        matrix = first // rows
        if last <= (matrix + 1) * rows:
            x = self._rows(matrix, first - matrix * rows, last - matrix * rows)
        else:  # matrix by matrix: scale rows are counted from the top of each
            x = np.empty((last - first) * columns, bits(self.dtype))
            for top in range(matrix * rows, last, rows):
                begin, end = max(first, top), min(last, top + rows)
                part = x[(begin - first) * columns : (end - first) * columns]
                part[:] = self._rows(top // rows, begin - top, end - top)
        start = at - first * columns
        return x[start : start + n]

    def _rows(self, matrix: int, begin: int, end: int) -> Array:
        """Rows [begin, end) of one matrix, flat."""
        unit = block_size(self.scheme)[0]  # logical rows per row of scales; 0: one scale for all
        low = begin // unit * unit if unit else begin  # a chunk starts where a block does
        n_matrices = math.prod(self.shape[:-2])
        components = {"weight": self._part(self.codes, matrix, n_matrices, low, end, 1)}
        for name, ref in self.others.items():
            if scheme(self.scheme).component(name).unit is None:
                whole = self._whole(ref)
                one_each = n_matrices > 1 and whole.size == n_matrices
                components[name] = whole.reshape(-1)[matrix : matrix + 1] if one_each else whole
            else:
                components[name] = self._part(ref, matrix, n_matrices, low, end, unit)
        out = host.dequantise(self.scheme, components, self.dtype, self.codes.name)
        skip = (begin - low) * self.shape[-1]
        return out.reshape(-1)[skip:]

    def _part(self, ref: TensorRef, matrix: int, n_matrices: int, low: int, end: int, unit: int) -> Array:
        """The rows of a component that belong to logical rows [low, end) of a matrix."""
        per_matrix = ref.nbytes // n_matrices
        n_rows = -(-self.shape[-2] // unit)
        row = per_matrix // n_rows
        a, b = low // unit, -(-end // unit)
        raw = self.files(ref.file, ref.offset + matrix * per_matrix + a * row, (b - a) * row)
        axis = len(self.shape) - 2  # of the rows, in the component as in the weight
        return self._values(raw, ref, (b - a, *ref.shape[axis + 1 :]))

    def _whole(self, ref: TensorRef) -> Array:
        return self._values(self.files(ref.file, ref.offset, ref.nbytes), ref, ref.shape)

    def _values(self, raw: Array, ref: TensorRef, shape: tuple[int, ...]) -> Array:
        """As `host` takes them: scales as fp32, but for mxfp4's exponents."""
        if ref.dtype in ("I32", "I64"):
            return raw.view(np.int32 if ref.dtype == "I32" else np.int64).reshape(shape)
        if ref is self.codes or self.scheme == "mxfp4":
            return raw.reshape(shape)
        if ref.dtype in ("U8", "F8_E8M0"):
            return exponents(raw).reshape(shape)
        return np.asarray(to_fp32(raw.view(bits(ref.dtype)), ref.dtype), np.float32).reshape(shape)


@dataclass
class Formula:
    """As `Quantised`, of a scheme that is a formula (see `zoo.quant`). Elements are in the order of the released tensor's axes;
    a line is what lies along the last of them: a row of the weight or, where the inputs come first, a column."""

    codes: TensorRef
    others: dict[str, TensorRef]
    how: Scheme
    shape: tuple[int, ...]  # logical: [.., out, in], or [.., in, out]
    files: Files
    dtype: str
    chunk = 1 << 20
    most = MADE

    @functools.cached_property
    def step(self) -> int:
        """Lines that belong together: those of a word of codes and, where they are rows, of a block of anything else."""
        if self.flat:
            return 1 + self.shape[-1] % 2
        units = [c.unit for c in self.how.components if c.unit is not None]
        return units[0][1] if self.how.turned else math.lcm(*(u[0] or 1 for u in units))

    @property
    def flat(self) -> bool:
        """Whether codes are counted through the ends of rows."""
        return self.how.components[0].axes == "flat"

    @property
    def grain(self) -> int:
        return self.step * self.shape[-1]

    def read(self, at: int, n: int) -> Array:
        *_, lines, width = self.shape
        first, last = at // width, -(-(at + n) // width)
        pieces = []
        for matrix in range(first // lines, -(-last // lines)):
            top = matrix * lines
            pieces.append(self._lines(matrix, max(first - top, 0), min(last - top, lines)))
        x = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        start = at - first * width
        return x.reshape(-1)[start : start + n]

    def _lines(self, matrix: int, begin: int, end: int) -> Array:
        """Lines [begin, end) of one matrix, by pieces that stay in a core's cache, but of no fewer lines than there are groups,
        since columns in any order may need the scales of all."""
        least = self.others["scale"].shape[-2] if self.how.turned else 1
        step = max(-(-least // self.step), host.CHUNK // self.grain, 1) * self.step
        if end - begin <= step:
            return self._piece(matrix, begin, end)
        out = np.empty((end - begin, self.shape[-1]), bits(self.dtype))
        for at in range(begin, end, step):
            last = min(at + step, end)
            out[at - begin : last - begin] = self._piece(matrix, at, last)
        return out

    def _piece(self, matrix: int, begin: int, end: int) -> Array:
        """Lines [begin, end) of one matrix at once."""
        low, high = begin // self.step * self.step, min(-(-end // self.step) * self.step, self.shape[-2])
        group, at = self.how.group, 0
        found: dict[str, Array] = {}
        groups = (low // group, -(-high // group)) if group else (0, 1)
        if (order := self.others.get("order")) is not None:
            which = self._read(order, (0, order.size), (order.size,))
            if self.how.turned:  # of the columns that are read, and of the groups only those that they are of
                which = which[low:high]
                groups = int(which.min()), int(which.max()) + 1
                which = which - groups[0]
            found["order"] = which
        elif self.how.turned and group:
            at = low % group
        if self.flat:
            at = low * self.shape[-1]
            found["weight"] = self._read(self.codes, (at // 2, high * self.shape[-1] // 2), (-1,))
        for name, ref in {"weight": self.codes, **self.others}.items():
            part = self.how.component(name)
            if name in found:
                continue
            if part.unit is None:
                found[name] = self._constant(ref, matrix)
            elif not self.how.turned:
                found[name] = self._part(ref, part, matrix, _stored(part, 0, low, high))
            elif name == "weight":
                found[name] = self._part(ref, part, matrix, _stored(part, 1, low, high))
            else:
                found[name] = self._part(ref, part, matrix, groups)
        out = host.by_formula(self.how, found, self.dtype, self.codes.name, int(not self.how.turned), at)
        return out.reshape(-1, self.shape[-1])[begin - low : end - low]

    def _part(self, ref: TensorRef, part: Component, matrix: int, lines: tuple[int, int]) -> Array:
        """Those lines of a matrix' component."""
        axis = len(self.shape) - 2
        if not 0 <= lines[0] <= lines[1] <= ref.shape[axis]:
            raise ZooError(
                f"{self.codes.name}: its {part.name} {ref.name} has {ref.shape[axis]} lines; some up to {lines[1]} are asked for"
            )
        rest = ref.shape[axis + 1 :]
        first, n = matrix * ref.shape[axis] + lines[0], lines[1] - lines[0]
        each = math.prod(rest)
        x = self._read(ref, (first * each, (first + n) * each), (n, *rest))
        return x[:, None] if part.axes == "o" else x

    def _constant(self, ref: TensorRef, matrix: int) -> Array:
        """Of a stack, the matrix' own where each has one."""
        x = self._read(ref, (0, ref.size), ref.shape)
        n = math.prod(self.shape[:-2])
        return x.reshape(n)[matrix : matrix + 1] if n > 1 and x.size == n else x

    def _read(self, ref: TensorRef, span: tuple[int, int], shape: tuple[int, ...]) -> Array:
        """Elements of a tensor: floats as fp32, codes as they are."""
        size = ITEMSIZE[ref.dtype]
        raw = self.files(ref.file, ref.offset + span[0] * size, (span[1] - span[0]) * size)
        if ref.dtype in FLOATS:
            return np.asarray(to_fp32(raw.view(bits(ref.dtype)), ref.dtype), np.float32).reshape(shape)
        if ref.dtype == "F8_E4M3":
            return host.e4m3()[raw].reshape(shape)
        kinds = {"I8": np.int8, "I32": np.int32, "U32": np.int32, "I64": np.int64}
        return raw.view(kinds.get(ref.dtype, np.uint8)).reshape(shape)


def _stored(part: Component, axis: int, low: int, high: int) -> tuple[int, int]:
    """The lines of a component that belong to logical lines [low, high)."""
    assert part.unit is not None
    unit, per = part.unit[axis], part.per[axis]
    return (low // unit * per, -(-high // unit) * per) if unit else (0, per)


def bad_scales(ref: TensorRef, files: Files) -> str | None:
    """What is wrong with a tensor of scales: "NaN or infinite", "zero", or None."""
    if ref.dtype not in ("F32", "F16", "BF16", "F64"):
        if ref.dtype in ("U8", "F8_E8M0") and (
            255 in np.frombuffer(files(ref.file, ref.offset, ref.nbytes), np.uint8)
        ):
            return "NaN (exponent 255)"
        return None
    x = to_fp32(Raw(ref, files).read(0, ref.size), ref.dtype)
    if not np.isfinite(x).all():
        return f"NaN or infinite ({int((~np.isfinite(x)).sum())} of {x.size})"
    if (x == 0).any():
        return f"zero ({int((x == 0).sum())} of {x.size})"
    return None
