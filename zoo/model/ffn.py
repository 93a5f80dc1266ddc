"""Feed-forward: down(act(gate x) * up x), gate and up in one matrix; or down(act(up x)).

Unusual: `silu_clamped` (gpt-oss) adds one to the clamped up half; `sparsity` (Gemma 3n) lets only the gate
activations pass that stand out of their Gaussian.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels.gated import activation, gated
from zoo.kernels.launch import has_triton
from zoo.kernels.linear import gated_linear, one_row
from zoo.model.linear import Linear, scaled
from zoo.model.norm import Unnormed
from zoo.spec import MLP


def activate(h: Tensor, spec: MLP) -> Tensor:
    """What stands between the two matrices: [..., 2 F] (gate | up) -> [..., F], or [..., F] -> [..., F]."""
    if not spec.sparsity and spec.gate_scale == 1.0:
        return gated(h, spec)
    gate, up = h.chunk(2, -1)
    gate = stand_out(gate, spec.sparsity) if spec.sparsity else gate * spec.gate_scale
    return activation(gate, spec.act) * up


def stand_out(gate: Tensor, sparsity: float) -> Tensor:
    """relu(gate - (mean + std * icdf(sparsity))): under a Gaussian, a share of 1 - sparsity passes."""
    quantile = math.sqrt(2) * torch.erfinv(torch.tensor(2 * sparsity - 1, dtype=torch.float32))
    z = float(quantile.to(gate.dtype))
    cutoff = gate.mean(-1, keepdim=True) + gate.std(-1, keepdim=True, correction=0) * z
    return F.relu(gate - cutoff)


class XIELU(nn.Module):
    """xIELU (arXiv 2411.13010): a parabola to the right of 0, an exponential to its left, of learned strengths.

    Its constants are tensors, as files have them: the slope `beta` (1/2), and `near` (-1e-6), from which on the exponential
    is not taken any nearer to 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.Parameter(torch.empty(1))
        self.negative = nn.Parameter(torch.empty(1))
        self.beta = nn.Parameter(torch.empty(()))
        self.near = nn.Parameter(torch.empty(()))

    def forward(self, x: Tensor) -> Tensor:
        positive, negative, beta, near = (
            t.to(x.dtype) for t in (self.positive, self.negative, self.beta, self.near)
        )
        left = (torch.expm1(torch.minimum(x, near)) - x) * (beta + F.softplus(negative))
        return torch.where(x > 0, F.softplus(positive) * x * x, left) + beta * x


class FeedForward(nn.Module):
    def __init__(self, spec: MLP, d: int) -> None:
        super().__init__()
        self.spec = spec
        if spec.gated:
            self.gate_up = Linear(d, spec.d_ff, spec.d_ff, bias=spec.bias)
        else:
            self.up = Linear(d, spec.d_ff, bias=spec.bias)
        self.down = Linear(spec.d_ff, d, bias=spec.bias)
        if spec.act == "xielu":
            self.act = XIELU()

    @property
    def _plain(self) -> bool:
        s = self.spec
        return s.gated and not s.sparsity and s.gate_scale == 1.0

    def reads(self, x: Unnormed) -> bool:
        """Whether the first product makes the norm of x."""
        return self._plain and self.gate_up.makes_norm(x.x, x.norm, gated=True)

    def forward(self, x: Tensor | Unnormed, onto: Tensor | None = None) -> Tensor:
        """x [..., d] -> [..., d], added to `onto`."""
        s = self.spec
        if not isinstance(x, Tensor):
            w = self.gate_up.packed()
            assert w is not None
            h = gated_linear(x.x, w, s, x.norm)
        elif self._plain and has_triton(x) and (w := self.gate_up.packed()) and one_row(x, w):
            h = gated_linear(x, w, s)
        elif s.act == "xielu":
            h = self.act(self.up(x))
        else:
            h = activate(self.gate_up(x) if s.gated else self.up(x), s)
        return scaled(partial(self.down, h), s.out_scale, onto)
