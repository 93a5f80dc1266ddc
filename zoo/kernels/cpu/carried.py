"""Codes as the kernel of a CPU reads them (`zoo.kernels.cpu.quantised`), of every scheme that it knows.

With X[g] the sum of x over the columns of group g, and t what a `Form` makes of a code,

    y[n] = factor[n] * sum_g (scale[n, g] * sum_k t(code[n, k]) x[k]  +  moved[n, g] * X[g])

Zero points and biases are in `moved`, so codes are widened the same way with and without them: moved = scale * zero, or
scale * move + shift. Codes stay where a release has them; zero points, a few hundredths of them, are unpacked once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.kernels.affine import by_groups, each_row, zeros
from zoo.kernels.weights import FP8, FP8_ROWS, SCALE_ROWS, Weight, has_nan, quantised
from zoo.quant.base import Scheme, check_shape
from zoo.quant.bitsandbytes import ONE_OF_127
from zoo.quant.schemes import scheme as named


class Form(IntEnum):
    """How codes lie, and what t is of a code c."""

    E4M3 = 0  # a byte each: its value
    INT8 = 1  # a byte each, signed: c + 1/2, which but for its sign is the same for c and -1 - c
    UINT8 = 2  # a byte each: c - 128 + 1/2
    INT4 = 3  # two neighbours to a byte, the low half first: c - 8
    E2M1 = 4  # the same: its value
    ROWS4 = 5  # a word for each column, of eight rows (AWQ): c - 8


FOUR_BITS = (Form.INT4, Form.E2M1)
MIDDLE = {Form.INT8: 0.5, Form.UINT8: 0.5 - 128, Form.INT4: -8.0, Form.ROWS4: -8.0}
"""t less the code."""


@dataclass(frozen=True)
class Codes:
    """Weights [N, K] or [E, N, K]. `codes` as `Form` says; `scale` [.., R, G] as stored, of which row n uses that which `begins[n]`
    bytes behind the first begins, each for `group` columns. `zero` [.., N, G] fp16 or `shift` [.., N, G] in the dtype of scales;
    `move`: see above. `factor` fp32 [N] or [E, N]. `exact`: whether factor times scale is what the scheme's formula has, to the bit.
    `order` [K] int64: the column of the weight that each column of codes is (None: the same), in which x is to be."""

    form: Form
    codes: Tensor
    n: int
    k: int
    group: int
    scale: Tensor
    begins: NDArray[np.int64]
    factor: Tensor
    zero: Tensor | None = None
    shift: Tensor | None = None
    move: float = 0.0
    exact: bool = True
    order: Tensor | None = None
    ready: dict[bool, Any] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )  # what is made of it once


def carried(scheme: str, components: dict[str, Tensor], parts: tuple[int, ...]) -> Codes | None:
    """The weight of these components; None where the kernel does not know them. Raises ZooError as `zoo.quant.dequantise`."""
    s, codes = named(scheme), components["weight"]
    if any(not c.is_contiguous() for c in components.values()):
        return None  # codes may begin at any byte: those of a file that is mapped do
    if s.module in ("gptq", "integers", "awq") or scheme.startswith("int4"):
        order = None
        if "order" in components and s.bits in (4, 8):
            if (sorted_ := by_groups(s, components)) is None:
                return None
            components, order = sorted_
        of_integers = _integers(s, components, parts)
        return of_integers if of_integers is None or order is None else replace(of_integers, order=order)
    if scheme in ("fp8-block-1x32", "mlx-mxfp8"):
        codes, scale = codes.view(torch.float8_e4m3fn), components["scale"]
        if scale.dtype not in (torch.uint8, torch.float8_e8m0fnu) or has_nan(codes):
            return None
        return _by_rows(Form.E4M3, codes, parts, codes.shape[-1], 32, scale)
    if s.module == "mlx":
        return _mlx(s, components, parts)
    if scheme == "bnb8":
        return _bnb8(components, parts)
    if s.module == "fp4":
        return _e2m1(s, components, parts)
    if scheme == "mxfp4":
        k = codes.shape[-2] * 32
        return _by_rows(Form.E2M1, codes, parts, k, 32, components["scale"])
    w = quantised(scheme, components, parts)
    if w is None or w.kind not in (FP8, FP8_ROWS):
        return None
    return _fp8(w) if w.words or (w.k % 32 == 0 and not has_nan(codes)) else None


def _fp8(w: Weight) -> Codes | None:
    assert w.scale is not None
    scale = w.scale if w.scale.dtype in (torch.float32, torch.bfloat16) else w.scale.float()
    rows = np.arange(w.n) // SCALE_ROWS if w.rows is None else w.rows.numpy().astype(np.int64)
    begins = rows * (scale.shape[-1] * scale.element_size())
    return Codes(Form.E4M3, w.codes, w.n, w.k, min(w.columns, w.k), scale, begins, torch.ones(w.n))


def _by_rows(
    form: Form, codes: Tensor, parts: tuple[int, ...], k: int, group: int, scale: Tensor, zero: Tensor | None = None,
    shift: Tensor | None = None, move: float = 0.0, factor: Tensor | None = None, exact: bool = True,
) -> Codes | None:  # fmt: skip
    """Where each row of the weight has a row of scales."""
    n, group = sum(parts), group or k
    groups = -(-k // group)
    if k % group:
        return None
    if scale.shape[-2:] != (n, groups) or scale.shape[:-2] != codes.shape[: scale.ndim - 2]:
        return None
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn):
        byte = scale.view(torch.uint8)
        no_number = byte == 255 if scale.dtype != torch.float8_e4m3fn else byte & 127 == 127
        if bool(no_number.any()):  # which only damaged weights have
            return None
        exact = exact and (
            scale.dtype == torch.float8_e4m3fn or not bool((byte == 0).any())
        )  # 2^-127 is taken for 0
    begins = np.arange(n) * (groups * scale.element_size())
    scale = scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
    ones = torch.ones(n) if factor is None else factor
    return Codes(form, codes, n, k, group, scale, begins, ones, zero, shift, move, exact)


def _integers(s: Scheme, c: dict[str, Tensor], parts: tuple[int, ...]) -> Codes | None:
    codes, scale = c["weight"], c["scale"]
    if codes.dtype == torch.int8:
        form, k = Form.INT8, codes.shape[-1]
        if s.name.startswith("int8-tensor"):
            scale = each_row(scale, codes, parts)[..., None]
    elif s.bits in (4, 8):
        form = Form.ROWS4 if s.module == "awq" else Form.UINT8 if s.bits == 8 else Form.INT4
        k = codes.shape[-1] * (1 if s.module == "awq" else 32 // s.bits)
    else:
        return None
    group = s.group or k
    if (shape := c.get("shape")) is not None:
        check_shape(shape, parts, k)
    zero = zeros(s, c, parts)
    if zero is None:
        own = 0 if codes.dtype == torch.int8 else 1 << s.bits - 1
        move = -own - MIDDLE[form]
        return _by_rows(form, codes, parts, k, group, scale, move=move)
    if zero.shape != scale.shape:
        return None
    zero = -zero.to(torch.float16) - MIDDLE[form]
    return _by_rows(form, codes, parts, k, group, scale, zero if bool(zero.any()) else None)


def _mlx(s: Scheme, c: dict[str, Tensor], parts: tuple[int, ...]) -> Codes | None:
    codes, scale, shift = c["weight"], c["scale"], c.get("shift")
    if s.bits not in (4, 8):
        return None
    k = codes.shape[-1] * (32 // s.bits)
    if shift is not None:
        form = Form.INT4 if s.bits == 4 else Form.UINT8
        if shift.shape != scale.shape or shift.dtype != scale.dtype:
            return None
        return _by_rows(form, codes, parts, k, s.group, scale, shift=shift, move=-MIDDLE[form])
    if s.name == "mlx-nvfp4":
        scale = scale.view(torch.float8_e4m3fn)
    return _by_rows(Form.E2M1, codes, parts, k, s.group, scale)


def _bnb8(c: dict[str, Tensor], parts: tuple[int, ...]) -> Codes | None:
    if (form := c.get("form")) is not None and bool((form != 0).any()):
        return None  # a layout that is not read
    codes, scale = c["weight"], c["scale"].float() * ONE_OF_127
    return _by_rows(Form.INT8, codes, parts, codes.shape[-1], 0, scale, move=-MIDDLE[Form.INT8], exact=False)


def _e2m1(s: Scheme, c: dict[str, Tensor], parts: tuple[int, ...]) -> Codes | None:
    codes, factor, exact = c["weight"], None, True
    if s.group == 16:
        of_all = each_row(c["global_scale"].float(), codes, parts)
        exact = s.name == "nvfp4"
        factor = of_all if exact else 1 / of_all
    return _by_rows(
        Form.E2M1, codes, parts, codes.shape[-1] * 2, s.group, c["scale"], factor=factor, exact=exact
    )
