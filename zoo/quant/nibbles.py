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


class Decoder:
    """Decodes up to `size` bytes at a time, in memory of its own that the next call uses again."""

    def __init__(self, pairs: torch.Tensor, size: int, device: torch.device) -> None:
        self.pairs = pairs.to(device)
        self.index = torch.empty(size, dtype=torch.int32, device=device)
        self.words = torch.empty(size, dtype=torch.int32, device=device)

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        """[N, B] bytes -> [N, 2 B] bf16 values, valid until the next call."""
        n, b = codes.shape
        index, words = self.index[: n * b], self.words[: n * b]
        index.copy_(codes.reshape(-1))
        torch.index_select(self.pairs, 0, index, out=words)
        return words.view(torch.bfloat16).view(n, 2 * b)
