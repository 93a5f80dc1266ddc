"""Weights as the tools of quantised releases write them: tensors by the end of their name, and the values they stand for.

Each `pack` takes (rows, columns, generator) and gives (tensors, values [rows, columns] in fp32). Codes, scales and zero points are
random, so that every code and every place occurs; the values are looked up element by element, as the formula of each is
published, and so share nothing with zoo's unpacking.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Pack = Callable[[int, int, torch.Generator], tuple[Tensors, torch.Tensor]]


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, k * bits / 32] of codes [n, k]: their bits one after the other, from the lowest up."""
    stream = (codes[:, :, None] >> torch.arange(bits)) & 1  # [n, k, bits]
    stream = stream.reshape(len(codes), -1, 32).long()
    value = (stream << torch.arange(32)).sum(-1)
    return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32)


def numbers(low: int, high: int, shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=g)


def scales(
    shape: tuple[int, ...], g: torch.Generator, bits: int, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """Such that values are like those of weights."""
    return ((torch.rand(shape, generator=g) + 0.5) * 0.2 / 2**bits).to(dtype)


def by_group(
    codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, group_of: torch.Tensor
) -> torch.Tensor:
    """(codes - zero) * scale, codes [out, in], of which input k has the zero and scale [out, groups] of group_of[k]."""
    return (codes - zero[:, group_of]).float() * scale.float()[:, group_of]


def gptq(bits: int, group: int, ordered: bool = False, version: int = 1, symmetric: bool = False) -> Pack:
    """AutoGPTQ's `pack`: zero points less one in version 1."""

    def pack(rows: int, columns: int, g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n = columns // group if group else 1
        of = torch.arange(columns) // (group or columns)
        if ordered:
            of = of[torch.randperm(columns, generator=g)]
        codes = numbers(0, 1 << bits, (rows, columns), g)
        # one in a hundred is zero, which in version 1 is borrowed from the next: too few tools agree on it
        zero = torch.full((rows, n), 1 << bits - 1) if symmetric else numbers(1, 1 << bits, (rows, n), g)
        scale = scales((rows, n), g, bits)
        made = {
            "qweight": words(codes, bits).T.contiguous(), "scales": scale.T.contiguous(),
            "qzeros": words(zero.T.contiguous() - int(version == 1), bits), "g_idx": of.to(torch.int32),
        }  # fmt: skip
        return made, by_group(codes, zero, scale, of)

    return pack


def awq(group: int) -> Pack:
    """AutoAWQ's WQLinear_GEMM.from_linear."""

    def packed(codes: torch.Tensor) -> torch.Tensor:
        return words(codes.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]], 4).reshape(len(codes), -1)

    def pack(rows: int, columns: int, g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        of = torch.arange(columns) // group
        codes, zero = numbers(0, 16, (rows, columns), g), numbers(0, 16, (rows, columns // group), g)
        scale = scales((rows, columns // group), g, 4)
        made = {
            "qweight": packed(codes.T.contiguous()),
            "qzeros": packed(zero.T.contiguous()),
            "scales": scale.T.contiguous(),
        }
        return made, by_group(codes, zero, scale, of)

    return pack


def quantise(
    tensors: Tensors, pack: Pack, which: Callable[[str], bool], seed: int = 0
) -> tuple[Tensors, Tensors]:
    """(the release, the same with the values that the codes stand for): all weights `which` says, packed."""
    g = torch.Generator().manual_seed(seed)
    release: Tensors = {}
    plain: dict[str, Any] = {}
    for name, t in tensors.items():
        if t.ndim == 2 and which(name):
            made, plain[name] = pack(*t.shape, g)
            release |= {name.removesuffix("weight") + end: x for end, x in made.items()}
        else:
            release[name] = plain[name] = t
    return release, plain
