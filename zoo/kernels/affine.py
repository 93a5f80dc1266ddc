"""Integers of four or eight bits with a scale and an offset to a group, as kernels read them: value = code * scale + offset.

What GPTQ, AWQ and packed integers have a zero point for (offset = -zero * scale), and MLX a bias. Scales and offsets lie beside
each other in fp32, in which a product of a scale and a zero point is exact. Codes stay where they are; laid out anew, once, beside the
released ones, are AWQ's, of which a word holds eight rows, those of which groups have an order of their own (`by_groups`), and bytes
with a sign, which are made 128 more.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from zoo.quant.base import Scheme, check_shape, grid


def paired(s: Scheme, components: dict[str, Tensor], parts: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """Codes [.., N, K / 2], two to a byte, the low one first, and fp32 [.., N, 2 G], scale and offset of each group in turn; None
    for other schemes, groups of columns in an order of their own, and tensors of shapes that do not fit."""
    if s.bits not in (4, 8) or s.module not in ("gptq", "awq", "integers", "mlx"):
        return None
    codes, scale = components["weight"], components["scale"]
    signed = codes.dtype == torch.int8
    if s.name.startswith("int8-tensor"):
        scale = each_row(scale, codes, parts)[..., None]
    if s.module == "mlx":
        offset = components.get("shift")
        if offset is None:
            return None
        offset = offset.float()
    else:
        zero = zeros(s, components, parts)
        zero = torch.full_like(scale, 0 if signed else 1 << s.bits - 1) if zero is None else zero
        if zero.shape != scale.shape:
            return None
        offset = -(zero.float() + 128 * signed) * scale.float()
    if s.module == "awq":
        codes = _by_rows(codes, s)
    codes = codes.view(torch.uint8)
    if signed:
        codes = codes ^ 128
    n, k, g = codes.shape[-2], codes.shape[-1] * (8 // s.bits), scale.shape[-1]
    group = s.group or k
    if k % group or k // group != g or offset.shape != scale.shape or scale.shape[-2] != n or n != sum(parts):
        return None
    if (shape := components.get("shape")) is not None:
        check_shape(shape, parts, k)
    return codes, torch.stack((scale.float(), offset), -1).flatten(-2).contiguous()


def by_groups(s: Scheme, components: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None] | None:
    """Components of a weight whose columns are in groups one after the other, and of which column of the weight each column of codes is
    [K] (None: of the same). None where parts have orders of their own, groups are not of one size, and of experts, which all have their own."""
    order = components["order"]
    rest = {name: c for name, c in components.items() if name != "order"}
    codes = components["weight"]
    k = codes.shape[-1] * (32 // s.bits)
    if in_order(order, k, s.group or k):
        return rest, None
    order = order.reshape(-1, k)
    if codes.ndim > 2 or bool((order != order[0]).any()):
        return None
    columns = order[0].argsort(stable=True)
    if not in_order(order[0][columns], k, s.group or k):
        return None
    each = codes.view(torch.uint8)
    if s.bits == 4:
        each = torch.stack((each & 15, each >> 4), -1).flatten(-2)
    each = each.index_select(-1, columns)
    if s.bits == 4:
        each = each[..., 0::2] | each[..., 1::2] << 4
    return rest | {"weight": each.contiguous().view(torch.int32)}, columns


def each_row(x: Tensor, codes: Tensor, parts: tuple[int, ...]) -> Tensor:
    """A constant of each released tensor, or of all of them, for each row of the weight: [N] or [E, N]."""
    if codes.ndim > 2:
        each = x if x.ndim and len(x) == len(codes) else [x] * len(codes)
        return torch.stack([each_row(y, codes[0], parts) for y in each])
    of_parts = x.reshape(-1).expand(len(parts)) if x.numel() == 1 else x.reshape(len(parts))
    return of_parts.repeat_interleave(torch.tensor(parts, device=x.device)).contiguous()


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
    if components["weight"].dtype == torch.int8:
        whole = s.name.startswith("int8-tensor")
        return each_row(words, components["weight"], parts)[..., None] if whole else words
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
