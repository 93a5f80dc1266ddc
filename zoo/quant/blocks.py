"""ggml's block types, carried as a GGUF has them: a row of bytes for each row of the weight, which are its blocks one after the other.

| type | a block | values |
|---|---|---|
| Q8_0 | d (fp16), 32 bytes with a sign | d q |
| Q4_0, Q5_0 | d; of Q5_0 32 fifth bits; 16 bytes, whose low halves are the first 16 codes | d (q - 8), d (q - 16) |
| Q4_1, Q5_1 | d, m; the same | d q + m |
| Q4_K, Q5_K | d, e; 8 scales s and 8 mins t of six bits; of Q5_K 256 fifth bits; 128 bytes | (d s) q - (e t), s and t of 32 columns |
| Q6_K | 256 lower halves, 256 times two bits, 16 scales s (bytes with a sign), d | (d s) (q - 32), s of 16 columns |

Unusual: nothing is taken apart. A row moves as a whole, so whatever puts rows elsewhere (llama.cpp's order of rotary channels, fused parts,
stacked experts) is undone by the rule that did it, and the file's bytes come back; and a kernel finds scales beside the codes that they
belong to. Parts of one weight may be of several types (`gguf-q4_k+q4_k+q6_k`, a type for each part): each type has a component of its own.

Source: ggml, ggml-common.h and dequantize_row_* of ggml-quants.c. The values are those of the package gguf, to the bit
(`zoo.quant.ggml`, which a conversion evaluates).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zoo.formats.base import ITEMSIZE, TensorRef
from zoo.quant.base import CODES, Component, Scheme
from zoo.quant.packed import Array

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """Columns and bytes of a block, bits of a code, and the bytes at which its numbers of fp16 lie."""

    columns: int
    nbytes: int
    bits: int
    halves: tuple[int, ...]


TYPES = {
    "q8_0": Block(32, 34, 8, (0,)),
    "q4_0": Block(32, 18, 4, (0,)),
    "q4_1": Block(32, 20, 4, (0, 2)),
    "q5_0": Block(32, 22, 5, (0,)),
    "q5_1": Block(32, 24, 5, (0, 2)),
    "q4_k": Block(256, 144, 4, (0, 2)),
    "q5_k": Block(256, 176, 5, (0, 2)),
    "q6_k": Block(256, 210, 6, (208,)),
}
"""Those that are carried. The others are dequantised."""
_ONE = "|".join(TYPES)
NAME = re.compile(rf"gguf-((?:{_ONE})(?:\+(?:{_ONE}))*)")
PIECE = 1 << 22  # values made at a time


def of_types(types: Sequence[str]) -> Scheme:
    """The scheme of a weight whose parts are of these types, in their order."""
    distinct = list(dict.fromkeys(types))
    name = types[0] if len(distinct) == 1 else "+".join(types)
    found = NAME.fullmatch(f"gguf-{name}")
    assert found is not None
    return scheme(found)


def scheme(m: re.Match[str]) -> Scheme:
    """Of a name that matches NAME."""
    types = m[1].split("+")
    parts: list[Component] = []
    for t in dict.fromkeys(types):
        block = TYPES[t]
        holds = None if len(types) == 1 else tuple(k for k, of in enumerate(types) if of == t)
        parts.append(
            Component(
                "weight" if not parts else t, ("U8",), (1, block.columns), CODES, per=(1, block.nbytes), holds=holds,
            )
        )  # fmt: skip
    return Scheme(m[0], tuple(parts), "blocks", max(TYPES[t].bits for t in types))


def is_one(s: Scheme | None) -> bool:
    """Whether it is a scheme of blocks."""
    return s is not None and s.module == "blocks"


def type_of(s: Scheme, component: str) -> str:
    """The type of a component's blocks."""
    return s.name.removeprefix("gguf-").partition("+")[0] if component == "weight" else component


def detect(leaf: str, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of the weight that a rule calls `leaf`, if it is of such blocks."""
    ref = tensors.get(leaf)
    return of_types([ref.dtype.lower()]) if ref is not None and ref.dtype.lower() in TYPES else None


def as_bytes(ref: TensorRef) -> TensorRef:
    """A tensor of blocks [.., columns] as the bytes that it lies in, [.., bytes of a row]."""
    rows = ref.size // ref.shape[-1] if ref.shape else 1
    return replace(ref, dtype="U8", shape=(*ref.shape[:-1], ref.nbytes // max(1, rows)))


def as_planned(tensors: Mapping[str, TensorRef], planned: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """These tensors of a file, those of blocks as bytes that are bytes in what was `planned` of it."""
    return {
        n: as_bytes(r) if r.dtype not in ITEMSIZE and n in planned and planned[n].dtype == "U8" else r
        for n, r in tensors.items()
    }


def finite(raw: NDArray[Any], kind: str) -> bool:
    """Whether the scales (and mins) of blocks are all numbers. `raw`: their bytes."""
    import numpy as np

    block = TYPES[kind]
    of_each = raw.reshape(-1, block.nbytes)
    fields = (np.ascontiguousarray(of_each[:, at : at + 2]).view(np.uint16) for at in block.halves)
    return all(bool(((f & 0x7C00) != 0x7C00).all()) for f in fields)


def values(c: Mapping[str, Array], s: Scheme, i: int = 1, at: int = 0) -> Array:
    """fp32 [out, in], of torch's tensors. Where parts are of several types, of the one that has rows."""
    import torch

    name, raw = next(((n, x) for n, x in c.items() if len(x)), ("weight", c["weight"]))
    kind = type_of(s, name)
    block = TYPES[kind]
    rows, width = raw.shape[0], raw.shape[1] // block.nbytes
    out = torch.empty(rows, width * block.columns, device=raw.device)
    step = max(1, PIECE // max(1, out.shape[1]))
    for first in range(0, rows, step):
        piece = raw[first : first + step].reshape(-1, block.nbytes)
        out[first : first + step] = _VALUES[kind](piece).reshape(-1, out.shape[1])
    return out


# Each: bytes [n, bytes of a block] -> fp32 [n, columns, or groups by columns of a group].


def _half(b: Tensor, at: int) -> Tensor:
    """[n, 1] in fp32 of the fp16 at a byte."""
    import torch

    return b[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(b: Tensor) -> Tensor:
    """Bytes [.., k]: the low halves, then the high ones, [.., 2 k]."""
    import torch

    return torch.cat([b & 15, b >> 4], dim=-1)


def _fifth(b: Tensor) -> Tensor:
    """Four bytes [n, 4] as 32 bits, each as 16 or 0."""
    import torch

    place = torch.arange(8, device=b.device, dtype=torch.uint8)
    bits: Tensor = (b[:, :, None] >> place) & 1
    return bits.reshape(-1, 32) << 4


def _q8_0(b: Tensor) -> Tensor:
    import torch

    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b, 0)


def _q4_0(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 2:]).float() - 8) * _half(b, 0)


def _q4_1(b: Tensor) -> Tensor:
    return _nibbles(b[:, 4:]).float() * _half(b, 0) + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return ((_nibbles(b[:, 6:]) | _fifth(b[:, 2:6])).float() - 16) * _half(b, 0)


def _q5_1(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 8:]) | _fifth(b[:, 4:8])).float() * _half(b, 0) + _half(b, 2)


def _six_bits(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and mins [n, 8] of 12 bytes: of the first four the low six bits of bytes; of the last four the halves of the last bytes,
    with the upper two bits of the first ones."""
    import torch

    d, m, both = b[:, :4], b[:, 4:8], b[:, 8:]
    scales = torch.cat([d & 63, (both & 15) | ((d >> 2) & 48)], dim=-1)
    mins = torch.cat([m & 63, (both >> 4) | ((m >> 2) & 48)], dim=-1)
    return scales.float(), mins.float()


def _q4_k(b: Tensor) -> Tensor:
    return _scaled_k(b, _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(b: Tensor) -> Tensor:
    import torch

    place = torch.arange(8, device=b.device, dtype=torch.uint8)
    fifth = ((b[:, None, 16:48] >> place[:, None]) & 1) << 4
    return _scaled_k(b, _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth)


def _scaled_k(b: Tensor, codes: Tensor) -> Tensor:
    scales, mins = _six_bits(b[:, 4:16])
    d, e = _half(b, 0) * scales, _half(b, 2) * mins
    return d[:, :, None] * codes.float() - e[:, :, None]


def _q6_k(b: Tensor) -> Tensor:
    import torch

    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    shift = torch.tensor([0, 2, 4, 6], device=b.device, dtype=torch.uint8)
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shift[:, None]) & 3
    codes = (low | (high.reshape(-1, 8, 32) << 4)).float() - 32
    scales = _half(b, 208) * b[:, 192:208].contiguous().view(torch.int8).float()
    return codes.reshape(-1, 16, 16) * scales[:, :, None]


_VALUES = {
    "q8_0": _q8_0, "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k,
}  # fmt: skip
