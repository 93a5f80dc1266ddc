"""RMSNorm, and the residual that it is added to, or that a branch's output is added to before it.

Unusual: `Norm.rounding` says where the weight meets the rounding. The kernel keeps that order, so in bf16 it
differs from its twin by nothing but the order of the sum of squares. A linear mixer's norm has a gate, before or after it.

Margin: one kernel (9 us for 2048 x 4096 bf16 on an H100) where the plain expression is seven; torch's fused
`rms_norm` rounds once where upstream rounds twice. On a CPU see `zoo.kernels.cpu.norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.cpu import kernels
from zoo.kernels.launch import Kernel, has_triton, is_recorded, overlap, power_of_2, triton
from zoo.spec import Norm

if triton is not None:
    import triton.language as tl

    from zoo.kernels.gated import sigmoid
    from zoo.kernels.launch import after_previous

GateAct = Literal["silu", "sigmoid"]
SOME, WIDE = 2048, 512
"""Numbers, or those of a row, from which a CPU's kernel is worth asking for (the first time that takes a second)."""


def rms_norm_reference(x: Tensor, weight: Tensor | None, norm: Norm) -> Tensor:
    """x / rms(x), times w or 1 + w. Same shape and dtype as x; statistics in fp32."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps)
    if weight is None:
        return y.to(x.dtype)
    if norm.rounding == "first":
        return y.to(x.dtype) * factor(weight, norm).to(x.dtype)
    return (y * factor(weight.float(), norm)).to(x.dtype)


def factor(weight: Tensor, norm: Norm) -> Tensor:
    """What the normalised x is multiplied by."""
    return 1 + weight if norm.weight == "plus_one" else weight


def rms_norm_add_reference(x: Tensor, h: Tensor, weight: Tensor | None, norm: Norm) -> Tensor:
    """x + rms_norm(h): the norm of a branch's output, and the residual."""
    return x + rms_norm_reference(h, weight, norm)


def rms_norm(x: Tensor, weight: Tensor | None, norm: Norm) -> Tensor:
    """`rms_norm_reference`, as one kernel where Triton or numba runs. x [.., D]."""
    if fits(x, weight, norm):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _launch(x, None, weight, norm, out)
        return out
    y = _compiled(x, None, weight, norm)
    return rms_norm_reference(x, weight, norm) if y is None else y


def rms_norm_add(x: Tensor, h: Tensor, weight: Tensor | None, norm: Norm) -> Tensor:
    """`rms_norm_add_reference`, as one kernel where Triton or numba runs. x, h [.., D], contiguous."""
    if fits(x, weight, norm) and x.is_contiguous() and h.is_contiguous():
        out = torch.empty_like(x)
        _launch(h, x, weight, norm, out)
        return out
    y = _compiled(h, x, weight, norm)
    return rms_norm_add_reference(x, h, weight, norm) if y is None else y


def add_rms_norm_reference(x: Tensor, h: Tensor, weight: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """The norm of x + h, and that sum: what the next branch reads, and is added to."""
    total = x + h
    return rms_norm_reference(total, weight, norm), total


def add_rms_norm(x: Tensor, h: Tensor, weight: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_reference`, as one kernel where Triton runs. x, h [.., D], contiguous."""
    if fits(x, weight, norm) and x.is_contiguous() and h.is_contiguous():
        out, total = torch.empty_like(x), torch.empty_like(x)
        _launch(h, x, weight, norm, out, total)
        return out, total
    total = x + h
    return rms_norm(total, weight, norm), total


def gated_norm_reference(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    norm: Norm,
    act: GateAct,
    first: bool = False,
    rms: Callable[[Tensor, Tensor, Norm], Tensor] = rms_norm_reference,
) -> Tensor:
    """Norm over the last axis of y [.., H, D] and a gate z, as large: norm(y) act(z), or norm(y act(z)) where the gate comes
    first; the products in fp32. weight [D] or [H, D]. In the dtype of z."""
    gate = F.silu(z.float()) if act == "silu" else torch.sigmoid(z.float())
    if first:
        return rms(y * gate, weight, norm).to(z.dtype)
    return (rms(y if norm.rounding == "first" else y.float(), weight, norm) * gate).to(z.dtype)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, norm: Norm, act: GateAct, first: bool = False) -> Tensor:
    """`gated_norm_reference`, as one kernel where Triton runs. `first` wants y in fp32."""
    h, d = y.shape[-2:]
    fits = has_triton(y) and y.is_contiguous() and weight.is_contiguous() and z.stride(-1) == 1 and y.numel()
    if not fits or norm.kind != "rms" or d > 16384 or torch.float64 in (y.dtype, z.dtype):
        return gated_norm_reference(y, z, weight, norm, act, first, rms_norm)
    out, z = z.new_empty(z.shape), z.reshape(-1, h, d)
    block = power_of_2(d)
    _gated_norm[(len(z), h)](
        y, z, weight, out, d, *z.stride()[:2], 0 if weight.dim() == 1 else d, norm.eps,
        SILU=act == "silu", FIRST=first, KIND=1 if norm.rounding == "first" else 2, PLUS_ONE=norm.weight == "plus_one",
        BLOCK=block, num_warps=min(8, max(1, block // 512)), **overlap(y),
    )  # fmt: skip
    return out


def _compiled(x: Tensor, onto: Tensor | None, weight: Tensor | None, norm: Norm) -> Tensor | None:
    """By `zoo.kernels.cpu.norm`; None where that does not serve."""
    small = x.numel() < SOME and x.shape[-1] < WIDE
    if small or x.device.type != "cpu" or norm.kind != "rms":
        return None
    if is_recorded(x) or (cpu := kernels("norm")) is None or not cpu.fits(x, onto, weight):
        return None
    y: Tensor = cpu.rms_norm(x, onto, weight, norm.weight == "plus_one", norm.rounding == "first", norm.eps)
    return y


def fits(x: Tensor, weight: Tensor | None, norm: Norm) -> bool:
    """Whether the kernels here serve them."""
    same = weight is None or (weight.dim() == 1 and weight.dtype in (x.dtype, torch.float32))
    return has_triton(x) and norm.kind == "rms" and x.shape[-1] <= 16384 and same and x.dtype != torch.float64


def constants(weight: Tensor | None, norm: Norm) -> dict[str, int | bool]:
    """What a kernel is told of the norm, for `normalise`."""
    kind = 0 if weight is None else 1 if norm.rounding == "first" else 2
    return {"KIND": kind, "PLUS_ONE": norm.weight == "plus_one"}


def _launch(
    x: Tensor,
    onto: Tensor | None,
    weight: Tensor | None,
    norm: Norm,
    out: Tensor,
    total: Tensor | None = None,
) -> None:
    """`onto` is added to the norm or, where there is a place for the sum, to x."""
    d = stride = x.shape[-1]
    if not x.is_contiguous():
        x = x.reshape(-1, d)  # a view if they are one stride apart, as in a slice along the last axis
        if x.stride(1) != 1:
            x = x.contiguous()
        stride = x.stride(0)
    block = power_of_2(d)
    _rms_norm[(x.numel() // d,)](
        x, onto, weight, out, total, stride, d, norm.eps, **constants(weight, norm),
        ONTO=onto is not None and total is None, TOTAL=total is not None, BLOCK=block, num_warps=min(8, max(1, block // 512)), **overlap(x),
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def normalise(y, w, KIND: tl.constexpr, PLUS_ONE: tl.constexpr, DTYPE: tl.constexpr):
        """Weight and rounding of fp32 y (already divided by its rms): fp32 that holds a `DTYPE` number.
        KIND 0: no weight; 1: rounded, then multiplied; 2: multiplied, then rounded."""
        if KIND == 1:
            if PLUS_ONE:
                w = (1.0 + w).to(DTYPE).to(tl.float32)
            y = y.to(DTYPE).to(tl.float32) * w
        elif KIND == 2:
            if PLUS_ONE:
                w = 1.0 + w
            y = y * w
        return y.to(DTYPE).to(tl.float32)

    @Kernel
    def _rms_norm(
        x_ptr, onto_ptr, w_ptr, out_ptr, total_ptr, stride, D, eps,
        KIND: tl.constexpr, PLUS_ONE: tl.constexpr, ONTO: tl.constexpr, TOTAL: tl.constexpr,
        BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK)
        mask = d < D
        dtype = out_ptr.dtype.element_ty
        w = d.to(tl.float32)
        if KIND != 0:
            w = tl.load(w_ptr + d, mask=mask, other=0.0).to(tl.float32)
        after_previous(OVERLAP)
        x = tl.load(x_ptr + row * stride + d, mask=mask, other=0.0).to(tl.float32)
        if TOTAL:
            x += tl.load(onto_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
            tl.store(total_ptr + row * D + d, x.to(dtype), mask=mask)
            x = x.to(dtype).to(tl.float32)
        y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        y = normalise(y, w, KIND, PLUS_ONE, dtype)
        if ONTO:
            y += tl.load(onto_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * D + d, y.to(dtype), mask=mask)

    @Kernel
    def _gated_norm(
        y_ptr, z_ptr, w_ptr, out_ptr, D, z_row, z_h, w_h, eps,
        SILU: tl.constexpr, FIRST: tl.constexpr, KIND: tl.constexpr, PLUS_ONE: tl.constexpr,
        BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        row, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
        d = tl.arange(0, BLOCK)
        mask, at = d < D, (row * tl.num_programs(1) + h) * D + d
        w = tl.load(w_ptr + h * w_h + d, mask=mask, other=0.0).to(tl.float32)
        after_previous(OVERLAP)
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + row * z_row + h * z_h + d, mask=mask, other=0.0).to(tl.float32)
        gate = sigmoid(z)
        if SILU:
            gate *= z
        if FIRST:
            y *= gate
        y *= tl.rsqrt(tl.sum(y * y, 0) / D + eps)
        dtype = y_ptr.dtype.element_ty
        if KIND == 1:
            y = normalise(y, w, KIND, PLUS_ONE, dtype)
        else:
            y = normalise(y, w, KIND, PLUS_ONE, tl.float32)
        if not FIRST:
            y *= gate
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
