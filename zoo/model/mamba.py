"""Mamba-2 (arXiv 2405.21060): a state space per head, with B and C shared by groups of heads.

    h = exp(dt A) h + B (dt x)^T;  y = C^T h + D x                            h [N, P]

which is the recurrence of the gated delta rule without its correction (`zoo.kernels.delta`).

Unusual: the output is gated before its norm (or after it, or there is no norm), and the norm is over groups of channels. dt is clamped from
below by `dt_min` at every token. (transformers clamps in a prompt but not in single-token decoding, so
that its own two modes disagree where the clamp acts; here both are the prompt's.)
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels.delta import gates, mix
from zoo.kernels.norm import gated_norm, gated_norm_reference
from zoo.model.across import Spread
from zoo.model.cache import Context
from zoo.model.delta import Conv
from zoo.model.linear import Linear, scaled
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
        if spec.out_norm is not None:
            self.norm = GroupNorm(inner)
        self.out = Linear(inner, d)

    def forward(self, x: Tensor, ctx: Context, onto: Tensor | None = None) -> Tensor:
        s = self.spec
        inner, bc = s.n_heads * s.head_dim, s.n_groups * s.state
        made = self.in_proj(x if s.in_scale == 1.0 else x * s.in_scale)
        if s.parts_scales:
            parts = made.split((inner, inner, bc, bc, s.n_heads), -1)
            scales = _rounded(s.parts_scales, x.dtype)
            made = torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)], -1)
        z, xbc, dt = made.split((inner, inner + 2 * bc, s.n_heads), -1)
        carried = ctx.carried(self.layer)
        u, b, c = self.conv(xbc, carried).split((inner, bc, bc), -1)
        log_decay, dt = gates(dt.unsqueeze(-1), None, self.A_log, self.dt_bias, s.dt_min)
        u = u.unflatten(-1, (s.n_heads, s.head_dim))  # [B, T, H, P]
        b, c = (g.unflatten(-1, (s.n_groups, s.state)) for g in (b, c))
        if carried is None:
            state = log_decay.new_zeros(len(x), s.n_heads, s.state, s.head_dim)
        else:
            state = carried.state
        y = mix(c, b, u, log_decay, dt, state, corrected=False)
        y = self._gated((y + self.D.float()[:, None] * u).flatten(2), z)
        return scaled(partial(self.out, y), s.out_scale, onto)

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """Norm and gate: fp32 y and z [B, T, inner] -> the same in the dtype of z."""
        s = self.spec
        if s.out_norm is None:
            return (y * F.silu(z)).to(z.dtype)
        normed: Tensor = self.norm(y.unflatten(-1, (s.n_groups, -1)), z, s.out_norm, first=not s.norm_first)
        return normed.flatten(2)


@cache
def _rounded(scales: tuple[float, ...], dtype: torch.dtype) -> list[float]:
    return torch.tensor(scales, dtype=dtype, device="cpu").tolist()


class GroupNorm(nn.Module):
    """A norm over groups of channels, and its gate. `spread`: this rank has some of one group's channels."""

    spread: Spread | None = None

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner))

    def forward(self, y: Tensor, z: Tensor, norm: NormSpec, first: bool) -> Tensor:
        """y [..., groups, channels] and its gate z, which comes `first` or last -> y in the dtype of z."""
        z, weight = z.view_as(y), self.weight.view(y.shape[-2:])
        if self.spread is None:
            return gated_norm(y, z, weight, norm, "silu", first)
        return gated_norm_reference(y, z, weight, norm, "silu", first, rms=self.spread)
