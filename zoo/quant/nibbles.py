"""4-bit codes, two to a byte, the low half first: looked up as pairs.

A table of 256 entries gives both values of a byte at once, as two bf16 numbers in one 32-bit word. Every
4-bit code of the schemes here is exact in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def table(values: Sequence[float]) -> torch.Tensor:
    """[256] int32: the two bf16 values of each byte. `values`: those of the 16 codes."""
    one = torch.tensor(values, dtype=torch.bfloat16)  # [16]
    byte = torch.arange(256)
    return torch.stack([one[byte & 15], one[byte >> 4]], dim=-1).view(torch.int32).reshape(256)


def decode(codes: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """[N, B] bytes -> [N, 2 B] bf16 values."""
    n, b = codes.shape
    index = codes.reshape(-1).to(torch.int32)
    words = torch.index_select(pairs.to(codes.device), 0, index)
    return words.view(torch.bfloat16).view(n, 2 * b)
