"""Mamba-2 (arXiv 2405.21060): a state space per head, with B and C shared by groups of heads.

    h = exp(dt A) h + B (dt x)^T;  y = C^T h + D x                            h [N, P]

which is the recurrence of the gated delta rule without its correction (`zoo.kernels.delta`).

Unusual: the output is gated before its norm, and the norm is over groups of channels. dt is clamped from
below by `dt_min` at every token. (transformers clamps in a prompt but not in single-token decoding, so
that its own two modes disagree where the clamp acts; here both are the prompt's.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.kernels.delta import gates, mix
from zoo.kernels.norm import gated_norm, gated_norm_reference
from zoo.model.across import Spread
from zoo.model.cache import Context, State
from zoo.model.delta import Conv
from zoo.model.linear import Linear
from zoo.spec import Mamba as MambaSpec
from zoo.spec import Norm as NormSpec


class Mamba(nn.Module):
    def __init__(self, spec: MambaSpec, d: int, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        inner, bc = spec.n_heads * spec.head_dim, spec.n_groups * spec.state
        self.in_proj = Linear(d, inner, inner, bc, bc, spec.n_heads)
        self.conv = Conv(inner + 2 * bc, spec.conv, bias=spec.conv_bias)
        self.A_log = nn.Parameter(torch.empty(spec.n_heads))
        self.D = nn.Parameter(torch.empty(spec.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(spec.n_heads))
        self.norm = GroupNorm(inner)
        self.out = Linear(inner, d)

    def forward(self, x: Tensor, ctx: Context, onto: Tensor | None = None) -> Tensor:
        s = self.spec
        inner, bc = s.n_heads * s.head_dim, s.n_groups * s.state
        z, xbc, dt = self.in_proj(x).split((inner, inner + 2 * bc, s.n_heads), -1)
        entry = ctx.entry(self.layer)
        carried = entry if isinstance(entry, State) else None
        u, b, c = self.conv(xbc, carried).split((inner, bc, bc), -1)
        log_decay, dt = gates(dt.unsqueeze(-1), None, self.A_log, self.dt_bias, s.dt_min)
        u = u.unflatten(-1, (s.n_heads, s.head_dim))  # [B, T, H, P]
        b, c = (g.unflatten(-1, (s.n_groups, s.state)) for g in (b, c))
        if carried is None:
            state = log_decay.new_zeros(len(x), s.n_heads, s.state, s.head_dim)
        else:
            state = carried.state
        y = mix(c, b, u, log_decay, dt, state, corrected=False)
        y = (y + self.D.float()[:, None] * u).flatten(2).unflatten(-1, (s.n_groups, -1))
        y = self.norm(y, z.view_as(y), s.out_norm)
        out: Tensor = self.out(y.flatten(2), onto)
        return out


class GroupNorm(nn.Module):
    """A norm over groups of channels, gated before it. `spread`: this rank has some of one group's channels."""

    spread: Spread | None = None

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner))

    def forward(self, y: Tensor, z: Tensor, norm: NormSpec) -> Tensor:
        """y and its gate z [..., groups, channels] -> the same."""
        weight = self.weight.view(y.shape[-2:])
        if self.spread is None:
            return gated_norm(y, z, weight, norm, "silu", first=True)
        return gated_norm_reference(y, z, weight, norm, "silu", first=True, rms=self.spread)
