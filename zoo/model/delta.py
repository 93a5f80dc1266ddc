"""Gated delta rule: linear attention with a state per head that forgets and is corrected (`zoo.kernels.delta`).

Gated DeltaNet (arXiv 2412.06464) decays a head by one number, KDA (arXiv 2510.26692) each key channel by
its own. Unusual: everything from the convolution to the output norm is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.kernels.conv import conv
from zoo.kernels.delta import gates, mix
from zoo.kernels.norm import gated_norm
from zoo.model.cache import Context, State
from zoo.model.linear import Linear
from zoo.model.norm import Norm
from zoo.spec import DeltaNet as DeltaSpec


class Conv(nn.Module):
    """Causal depthwise convolution over time, then SiLU (if `silu`). `weight` [channels, width]: the last column is now."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, channels: int, width: int, bias: bool = False, silu: bool = True) -> None:
        super().__init__()
        self.silu = silu
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.register_parameter("bias", nn.Parameter(torch.empty(channels)) if bias else None)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        """x [B, T, channels] -> the same, reading from and updating the tail of `state`."""
        return conv(x, self.weight, self.bias, None if state is None else state.tail, self.silu)


class DeltaNet(nn.Module):
    def __init__(self, spec: DeltaSpec, d: int, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        self.KEPT = ("A_log",) if spec.fp32_decay else ()
        k, v = spec.n_k_heads * spec.k_head_dim, spec.n_v_heads * spec.v_head_dim
        if spec.decay == "head":
            self.qkvz = Linear(d, k, k, v, v)
            self.ba = Linear(d, spec.n_v_heads, spec.n_v_heads)
            self.dt_bias = nn.Parameter(torch.empty(spec.n_v_heads))
        else:
            self.qkv = Linear(d, k, k, v)
            self.beta = Linear(d, spec.n_v_heads)
            self.decay_down, self.decay_up = Linear(d, spec.k_head_dim), Linear(spec.k_head_dim, k)
            self.gate_down, self.gate_up = Linear(d, spec.v_head_dim), Linear(spec.v_head_dim, v)
            self.dt_bias = nn.Parameter(torch.empty(k))
        self.conv = Conv(2 * k + v, spec.conv)
        self.A_log = nn.Parameter(torch.empty(spec.n_v_heads))
        self.norm = Norm(spec.out_norm, spec.v_head_dim)
        self.out = Linear(v, d)

    def forward(self, x: Tensor, ctx: Context, onto: Tensor | None = None) -> Tensor:
        s = self.spec
        k_width, v_width = s.n_k_heads * s.k_head_dim, s.n_v_heads * s.v_head_dim
        if s.decay == "head":
            qkv, z = self.qkvz(x).split((2 * k_width + v_width, v_width), -1)
            beta, dt = self.ba(x).chunk(2, -1)  # [B, T, Hv] each
            dt = dt.unsqueeze(-1)
        else:
            qkv, z = self.qkv(x), self.gate_up(self.gate_down(x))
            beta, dt = (
                self.beta(x),
                self.decay_up(self.decay_down(x)).unflatten(-1, (s.n_k_heads, s.k_head_dim)),
            )
        log_decay, beta = gates(dt, beta, self.A_log, self.dt_bias)  # [B, T, H, K or 1], [B, T, H]
        if s.beta_scale != 1.0:
            beta = beta * s.beta_scale
        carried = ctx.carried(self.layer)
        q, k, v = self.conv(qkv, carried).split((k_width, k_width, v_width), -1)
        q, k = (h.unflatten(-1, (s.n_k_heads, s.k_head_dim)) for h in (q, k))
        v = v.unflatten(-1, (s.n_v_heads, s.v_head_dim))
        if carried is None:
            state = log_decay.new_zeros(len(x), s.n_v_heads, s.k_head_dim, s.v_head_dim)
        else:
            state = carried.state
        y = mix(q, k, v, log_decay, beta, state)
        assert self.norm.weight is not None
        y = gated_norm(y, z.view_as(y), self.norm.weight, s.out_norm, s.out_gate)
        out: Tensor = self.out(y.flatten(2), onto)
        return out
