"""int4, packed eight to an int32 (`compressed-tensors`, pack-quantized, symmetric), a scale per group of inputs.

weight = (code - 8) * scale. Codes lie in a word from its low bits up; with little-endian words that is two to
a byte, the low half first. `shape` holds the logical [out, in] of each released tensor.
"""

from __future__ import annotations

import math

import torch

from zoo.errors import ZooError
from zoo.quant import nibbles
from zoo.quant.base import check_shape
from zoo.quant.fp8 import CHUNK, multiply

_PAIRS = nibbles.table([float(n - 8) for n in range(16)])


def dequantise(
    components: dict[str, torch.Tensor],
    parts: tuple[int, ...],
    dtype: torch.dtype,
    block: tuple[int, int] = (1, 32),
) -> torch.Tensor:
    """The logical weight [..., out, in]. Raises ZooError if its components do not fit together."""
    codes, scale = components["weight"], components["scale"]
    *lead, rows, words = codes.shape
    columns = 8 * words
    if rows != sum(parts):
        raise ZooError(f"int4 codes have {rows} rows, expected {sum(parts)}")
    if (shape := components.get("shape")) is not None:
        check_shape(shape, parts, columns)
    width = math.ceil(columns / block[1])
    if scale.shape != (*lead, rows, width):
        raise ZooError(
            f"int4 codes of {rows} rows and {columns} columns in groups of {block[1]} need scales "
            f"{[*lead, rows, width]}, found {list(scale.shape)}"
        )
    codes, scale = codes.reshape(-1, words), scale.reshape(-1, width).to(torch.float32)
    out = torch.empty(codes.shape[0], columns, dtype=dtype, device=codes.device)
    step = min(max(1, CHUNK // max(columns, 1)), max(codes.shape[0], 1))
    decode = nibbles.Decoder(_PAIRS, step * 4 * words, codes.device)
    values = torch.empty(step, columns, dtype=torch.float32, device=codes.device)
    for at in range(0, codes.shape[0], step):
        packed = codes[at : at + step].contiguous().view(torch.uint8)
        n = packed.shape[0]
        values[:n] = decode(packed)
        multiply(values[:n], scale[at : at + n], block[1])
        out[at : at + n] = values[:n]
    return out.reshape(*lead, rows, columns)
