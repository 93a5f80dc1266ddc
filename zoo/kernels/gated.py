"""Gated activations: [.., 2 F] (gate | up) -> [.., F], and [.., F] -> [.., F] where nothing gates.

Unusual: in bf16 the kernel rounds after each step, as the plain expression does, so the two agree bit for
bit up to the last bit of exp and tanh.

Margin: 2048 x 28672 bf16 in 59 us on an H100, at the copy's bandwidth (176 MB); torch's silu and product, two
kernels with a tensor of 59 MB between them, move 1.7 times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.cpu import kernels
from zoo.kernels.launch import Kernel, ceil_div, has_triton, is_recorded, overlap, triton
from zoo.spec import MLP, Activation

if triton is not None:
    import triton.language as tl

    from zoo.kernels.launch import after_previous

FEW = 16  # rows, up to which a CPU's kernel is asked: a token's experts
SOME = 1024  # numbers, from which a CPU's kernel is worth asking for (the first time that takes a second)
CODES: dict[Activation, int] = {
    "silu": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3, "silu_clamped": 4, "relu": 5, "quick_gelu": 6,
}  # fmt: skip
CLAMPED_BEFORE, CLAMPED_AFTER = 7, 8  # silu, with a limit before it or after


def code(spec: MLP) -> int:
    """How the kernels call an MLP's activation."""
    if spec.act == "silu" and spec.limit is not None:
        return CLAMPED_AFTER if spec.limit_after else CLAMPED_BEFORE
    return CODES[spec.act]


def activation(x: Tensor, act: Activation) -> Tensor:
    """The ungated functions, in the dtype of `x`."""
    match act:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
    raise AssertionError(act)


def gated_reference(h: Tensor, spec: MLP) -> Tensor:
    """act(gate) * up of h [.., 2 F]; act(h) of h [.., F] when not `spec.gated`. No sparsity here."""
    if not spec.gated:
        return activation(h, spec.act)
    gate, up = h.chunk(2, -1)
    if spec.act == "silu_clamped":
        assert spec.limit is not None
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * spec.alpha))
    if spec.limit is not None:
        up = up.clamp(-spec.limit, spec.limit)
        if spec.limit_after:
            return activation(gate, spec.act).clamp(max=spec.limit) * up
        gate = gate.clamp(max=spec.limit)
    return activation(gate, spec.act) * up


def gated(h: Tensor, spec: MLP) -> Tensor:
    """`gated_reference`, as one kernel where Triton runs, and for a token where numba does."""
    if not has_triton(h) or h.dtype == torch.float64:
        return _compiled(h, spec) if _alone(h, spec) else gated_reference(h, spec)
    f = h.shape[-1] // 2 if spec.gated else h.shape[-1]
    h = h.contiguous()
    out = h.new_empty(*h.shape[:-1], f)
    rows, block = out.numel() // f, 1024
    _gated[(rows, ceil_div(f, block))](
        h, out, f, spec.limit or 0.0, spec.alpha,
        ACT=code(spec), GATED=spec.gated, BLOCK=block, num_warps=4, **overlap(h),
    )  # fmt: skip
    return out


def _alone(h: Tensor, spec: MLP) -> bool:
    """Whether h is a token on a CPU, or what its experts make of it, large enough to ask for a kernel."""
    few = h.device.type == "cpu" and SOME <= h.numel() <= FEW * h.shape[-1] and not is_recorded(h)
    return few and spec.gated and spec.limit is None


def _compiled(h: Tensor, spec: MLP) -> Tensor:
    cpu = kernels("gated")
    return cpu.gated(h, spec.act) if cpu is not None and cpu.fits(h, spec.act) else gated_reference(h, spec)


if triton is not None:

    @triton.jit
    def sigmoid(x):
        return 1.0 / (1.0 + tl.exp(-x))

    @triton.jit
    def tanh(x):
        e = tl.exp(-2.0 * tl.abs(x))
        t = (1.0 - e) / (1.0 + e)
        return tl.where(x < 0, -t, t)

    @triton.jit
    def activate(gate, up, limit, alpha, ACT: tl.constexpr, GATED: tl.constexpr, DTYPE: tl.constexpr):
        """The activation of fp32 values that hold `DTYPE` numbers; the result, in fp32, holds one too."""
        if ACT == 4:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
            s = sigmoid((gate * alpha).to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
            s = (gate * s).to(DTYPE).to(tl.float32)
            y = (up + 1.0).to(DTYPE).to(tl.float32) * s
        else:
            if ACT == 7:
                gate = tl.minimum(gate, limit)
            if ACT == 7 or ACT == 8:
                up = tl.minimum(tl.maximum(up, -limit), limit)
            if ACT == 0 or ACT == 7:
                y = gate * sigmoid(gate)
            elif ACT == 8:
                y = tl.minimum((gate * sigmoid(gate)).to(DTYPE).to(tl.float32), limit)
            elif ACT == 1:
                y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
            elif ACT == 2:
                y = 0.5 * gate * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
            elif ACT == 6:
                y = gate * sigmoid((1.702 * gate).to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
            else:
                y = tl.maximum(gate, 0.0)
                if ACT == 3:
                    y = y * y
            if GATED:
                y = y.to(DTYPE).to(tl.float32) * up
        return y.to(DTYPE).to(tl.float32)

    @Kernel
    def _gated(
        h_ptr, out_ptr, F, limit, alpha,
        ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        after_previous(OVERLAP)
        base = h_ptr + row * (2 * F if GATED else F)
        gate = tl.load(base + f, mask=f < F, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(base + F + f, mask=f < F, other=0.0).to(tl.float32)
        dtype = out_ptr.dtype.element_ty
        y = activate(gate, up, limit, alpha, ACT, GATED, dtype)
        tl.store(out_ptr + row * F + f, y.to(dtype), mask=f < F)
