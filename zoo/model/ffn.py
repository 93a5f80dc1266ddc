"""Feed-forward: down(act(gate x) * up x), gate and up in one matrix; or down(act(up x)).

Unusual: `silu_clamped` (gpt-oss) adds one to the clamped up half; `sparsity` (Gemma 3n) lets only the gate
activations pass that stand out of their Gaussian.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.model.linear import Linear
from zoo.spec import MLP, Activation


def activation(x: Tensor, act: Activation) -> Tensor:
    match act:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu2":
            return F.relu(x).square()
    raise AssertionError(act)


def activate(h: Tensor, spec: MLP) -> Tensor:
    """What stands between the two matrices: [..., 2 F] (gate | up) -> [..., F], or [..., F] -> [..., F]."""
    if not spec.gated:
        return activation(h, spec.act)
    gate, up = h.chunk(2, -1)
    if spec.act == "silu_clamped":
        assert spec.limit is not None
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * spec.alpha))
    if spec.sparsity:
        gate = stand_out(gate, spec.sparsity)
    return activation(gate, spec.act) * up


def stand_out(gate: Tensor, sparsity: float) -> Tensor:
    """relu(gate - (mean + std * icdf(sparsity))): under a Gaussian, a share of 1 - sparsity passes."""
    quantile = math.sqrt(2) * torch.erfinv(torch.tensor(2 * sparsity - 1, dtype=torch.float32))
    z = float(quantile.to(gate.dtype))
    cutoff = gate.mean(-1, keepdim=True) + gate.std(-1, keepdim=True, correction=0) * z
    return F.relu(gate - cutoff)


class FeedForward(nn.Module):
    def __init__(self, spec: MLP, d: int) -> None:
        super().__init__()
        self.spec = spec
        if spec.gated:
            self.gate_up = Linear(d, spec.d_ff, spec.d_ff, bias=spec.bias)
        else:
            self.up = Linear(d, spec.d_ff, bias=spec.bias)
        self.down = Linear(spec.d_ff, d, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.gate_up(x) if self.spec.gated else self.up(x)
        out: Tensor = self.down(activate(h, self.spec))
        return out
