"""Integers of four bits with a scale and an offset to a group, as kernels read them: value = code * scale + offset.

What GPTQ, AWQ and packed integers have a zero point for (offset = -zero * scale), and MLX a bias. Scales and offsets lie beside
each other in fp32, in which a product of a scale and a zero point is exact. Codes stay where they are; AWQ's, of which a word
holds eight rows, are laid out anew by rows, once, beside the released ones.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from zoo.quant.base import Scheme, check_shape, grid


def paired(s: Scheme, components: dict[str, Tensor], parts: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """Codes [.., N, K / 2], two to a byte, the low one first, and fp32 [.., N, 2 G], scale and offset of each group in turn; None
    for other schemes, groups of columns in an order of their own, and tensors of shapes that do not fit."""
    if s.bits != 4 or s.module not in ("gptq", "awq", "integers", "mlx"):
        return None
    codes, scale = components["weight"], components["scale"]
    if s.module == "mlx":
        offset = components.get("shift")
        if offset is None:
            return None
        offset = offset.float()
    else:
        if (zero := zeros(s, components, parts)) is None or zero.shape != scale.shape:
            return None
        offset = -zero.float() * scale.float()
    if s.module == "awq":
        codes = _by_rows(codes, s)
    codes = codes.view(torch.uint8)
    n, k, g = codes.shape[-2], codes.shape[-1] * 2, scale.shape[-1]
    group = s.group or k
    if k % group or k // group != g or offset.shape != scale.shape or scale.shape[-2] != n or n != sum(parts):
        return None
    if not in_order(components.get("order"), k, group):
        return None
    if (shape := components.get("shape")) is not None:
        check_shape(shape, parts, k)
    return codes, torch.stack((scale.float(), offset), -1).flatten(-2).contiguous()


def in_order(order: Tensor | None, k: int, group: int) -> bool:
    """Whether columns are in groups one after the other."""
    if order is None:
        return True
    return bool((order.reshape(-1, k) == torch.arange(k, device=order.device) // group).all())


def zeros(s: Scheme, components: dict[str, Tensor], parts: tuple[int, ...]) -> Tensor | None:
    """Zero points [.., N, G]; None: there are none. Each released tensor has words of its own, of which the last may hold more rows than
    there are."""
    words = components.get("zero")
    if words is None:
        return None
    unit = s.component("zero")
    rows, _ = grid(unit, parts, 1)
    unpack = importlib.import_module(f"zoo.quant.{s.module}").zeros
    made = [
        torch.cat([unpack(w, s)[:part] for w, part in zip(of_one.split(rows), parts, strict=True)])
        for of_one in words.reshape(-1, *words.shape[-2:])
    ]
    out: Tensor = torch.stack(made).view(*words.shape[:-2], sum(parts), words.shape[-1])
    return out


def _by_rows(words: Tensor, s: Scheme) -> Tensor:
    """AWQ's words [.., N / 8, K] of eight rows -> bytes [.., N, K / 2]."""
    unpack = importlib.import_module("zoo.quant.awq").zeros  # codes and zero points lie alike
    made = []
    for of_one in words.reshape(-1, *words.shape[-2:]):
        code = unpack(of_one, s)
        made.append(code[:, 0::2] | code[:, 1::2] << 4)
    return torch.stack(made).view(*words.shape[:-2], *made[0].shape)
