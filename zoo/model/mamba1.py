"""Mamba (arXiv 2312.00752): a state space per channel, with B and C shared by all channels.

    h = exp(dt A) h + dt B x;  y = C^T h + D x                            h [N] of each channel

Unusual: decay differs by channel AND by place in the state, which the chunks of Mamba-2 (`zoo.kernels.delta`) have no room for
at this many channels, so that tokens go one after the other. The state is fp32; what is read of it is rounded to the model's
dtype before it is multiplied by C, as in the implementation that releases run on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.model.cache import Context
from zoo.model.delta import Conv
from zoo.model.linear import Linear
from zoo.model.norm import Norm
from zoo.spec import Mamba1 as Mamba1Spec


class Mamba1(nn.Module):
    def __init__(self, spec: Mamba1Spec, d: int, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        self.in_proj = Linear(d, spec.inner, spec.inner)
        self.conv = Conv(spec.inner, spec.conv, bias=spec.conv_bias)
        self.x_proj = Linear(spec.inner, spec.dt_rank, spec.state, spec.state)
        if spec.norm is not None:
            self.dt_norm = Norm(spec.norm, spec.dt_rank)
            self.b_norm, self.c_norm = Norm(spec.norm, spec.state), Norm(spec.norm, spec.state)
        self.dt_proj = Linear(spec.dt_rank, spec.inner)
        self.dt_bias = nn.Parameter(torch.empty(spec.inner))
        self.A_log = nn.Parameter(torch.empty(spec.inner, spec.state))
        self.D = nn.Parameter(torch.empty(spec.inner))
        self.out = Linear(spec.inner, d)

    def forward(self, x: Tensor, ctx: Context, onto: Tensor | None = None) -> Tensor:
        """Normed x [B, T, d] -> [B, T, d], added to `onto`."""
        s, carried = self.spec, ctx.carried(self.layer)
        u, z = self.in_proj(x).chunk(2, -1)  # [B, T, inner] each
        u = self.conv(u, carried)
        dt, b, c = self.x_proj(u).split((s.dt_rank, s.state, s.state), -1)
        if s.norm is not None:
            dt, b, c = self.dt_norm(dt), self.b_norm(b), self.c_norm(c)
        dt = F.softplus(self.dt_proj(dt) + self.dt_bias.to(x.dtype))
        before = (
            u.new_zeros(len(x), s.inner, s.state, dtype=torch.float32) if carried is None else carried.state
        )
        y, state = scan(u, dt, -self.A_log.float().exp(), b, c, before)
        if carried is not None:
            carried.state.copy_(state)
        y = y + u * self.D.float()
        out: Tensor = self.out((y * F.silu(z)).to(x.dtype), onto)
        return out


def scan(u: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """u, dt [B, T, I], A [I, N] in fp32, b, c [B, T, N], `state` [B, I, N] in fp32 -> C^T h [B, T, I] in the dtype of u, and the
    state after them."""
    out = []
    for t in range(u.shape[1]):
        step = dt[:, t, :, None].float()
        state = state * (step * A).exp() + step * b[:, t, None].float() * u[:, t, :, None].float()
        out.append(state.to(c.dtype) @ c[:, t, :, None])  # [B, I, 1]
    return torch.cat(out, -1).transpose(1, 2), state
