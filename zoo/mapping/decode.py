"""Source tensors read as elements of another dtype: casts, dequantisation, block types.

A loader gives any range of a tensor's elements, so that a tensor of any size passes through in pieces. Arrays
here hold bit patterns: numpy has no bf16, so every element of 2 bytes is a uint16, of 4 a uint32.

Casts round to nearest, ties to even; what overflows fp16 is refused rather than made infinite.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo import quant
from zoo.errors import ZooError
from zoo.formats.base import ITEMSIZE, TensorRef
from zoo.quant.schemes import block_size, scheme

if TYPE_CHECKING:
    import torch

    from zoo.mapping.moves import Array

MAPPED = 64 << 20  # bytes of a source in memory per thread, where they are rearranged as they are
MADE = 12 << 20  # elements, where something is made of them first
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


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
        except OSError:
            return None
        whole = np.frombuffer(pages, np.uint8)
        # By ctypes, which lets the other threads run meanwhile: mmap's own madvise does not.
        failed = _libc().madvise(
            ctypes.c_void_p(whole.ctypes.data), ctypes.c_size_t(whole.size), _POPULATE_READ
        )
        return None if failed else whole[skip:]

    def _fill(self, file: str, at: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            n = os.preadv(self.fd_of(file), [out[done:]], at + done)
            if n == 0:
                raise _short(file, at + done, at + len(out))
            done += n


_MAPPED = 256 << 10  # bytes; mapping fewer costs more than copying them
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14; Python has no name for it yet
_LINUX = sys.platform == "linux"


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _short(file: str, end: int, wanted: int) -> ZooError:
    return ZooError(f"{file}: ends at byte {end}, {wanted} were expected: it changed or is truncated")


def bits(dtype: str) -> Any:
    """numpy dtype for the bit patterns of a safetensors dtype."""
    return _BITS[ITEMSIZE[dtype]]


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


def to_fp32(x: Array, dtype: str) -> Array:
    """Bit patterns of a float dtype -> fp32 values (fp64 stays fp64)."""
    if dtype == "BF16":
        wide = x.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype == "F16":
        return x.view(np.float16).astype(np.float32)
    if dtype in ("F32", "F64"):
        return x.view(np.float32 if dtype == "F32" else np.float64)
    raise ZooError(f"{dtype} cannot be converted to a float dtype")


def from_float(x: Array, dtype: str, name: str) -> Array:
    """fp32 (or fp64) values -> bit patterns of `dtype`, rounded to nearest even."""
    if dtype == "F64":
        return x.astype(np.float64).view(np.uint64)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            half = x.astype(np.float16)
        if np.isinf(half).any() and not np.isinf(x).any():
            worst = float(np.abs(x[np.isfinite(x)]).max())
            raise ZooError(f"{name}: {worst:g} is beyond fp16 (65504); convert with --dtype bf16 or fp32")
        return half.view(np.uint16)
    if x.dtype == np.float64:
        x = x.astype(np.float32)
    u = x.view(np.uint32)
    if dtype == "F32":
        return u
    assert dtype == "BF16"
    nan = np.isnan(x)
    rounded = ((u + (((u >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    if nan.any():  # rounding up could carry a NaN into infinity: cut it, and keep it a NaN
        rounded[nan] = (u[nan] >> 16).astype(np.uint16) | np.where(u[nan] & 0x7F0000, 0, 0x40).astype(
            np.uint16
        )
    return rounded


@dataclass
class Blocks:
    """Elements of one of ggml's block types, whose rows are sequences of blocks."""

    ref: TensorRef
    files: Files
    dtype: str
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
        start = at - first * columns
        return from_float(x.reshape(-1)[start : start + n], self.dtype, self.ref.name)


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
        pieces = []
        r = first
        while r < last:  # matrix by matrix: scale rows are counted from the top of each
            top = r // rows * rows
            end = min(last, top + rows)
            pieces.append(self._rows(top // rows, r - top, end - top))
            r = end
        x = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
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
                components[name] = self._whole(ref)
            else:
                components[name] = self._part(ref, matrix, n_matrices, low, end, unit)
        import torch

        to = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[self.dtype]
        out = quant.dequantise(self.scheme, components, (end - low,), to)
        skip = (begin - low) * self.shape[-1]
        flat: Array = out.reshape(-1).view(torch.int32 if self.dtype == "F32" else torch.int16).numpy()
        return flat[skip:].view(bits(self.dtype))

    def _part(
        self, ref: TensorRef, matrix: int, n_matrices: int, low: int, end: int, unit: int
    ) -> torch.Tensor:
        """The rows of a component that belong to logical rows [low, end) of a matrix."""
        per_matrix = ref.nbytes // n_matrices
        n_rows = -(-self.shape[-2] // unit)
        row = per_matrix // n_rows
        a, b = low // unit, -(-end // unit)
        raw = self.files(ref.file, ref.offset + matrix * per_matrix + a * row, (b - a) * row)
        axis = len(self.shape) - 2  # of the rows, in the component as in the weight
        return _tensor(raw, ref.dtype, (b - a, *ref.shape[axis + 1 :]))

    def _whole(self, ref: TensorRef) -> torch.Tensor:
        return _tensor(self.files(ref.file, ref.offset, ref.nbytes), ref.dtype, ref.shape)


def _tensor(raw: Array, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    types = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.uint8,
    }  # fmt: skip
    return torch.frombuffer(raw, dtype=types[dtype]).reshape(shape)


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
