"""Mamba-2 (arXiv 2405.21060): a state space per head, with B and C shared by groups of heads.

    h = exp(dt A) h + dt B x^T;  y = C^T h + D x                              h [N, P]

Unusual: the output is gated before its norm, and the norm is over groups of channels. dt is clamped from
below by `dt_min` at every token. (transformers clamps in a prompt but not in single-token decoding, so
that its own two modes disagree where the clamp acts; here both are the prompt's.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels.norm import rms_norm
from zoo.model.cache import Context, State
from zoo.model.delta import Conv
from zoo.model.linear import Linear
from zoo.spec import Mamba as MambaSpec

CHUNK = 64


def step(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """One token. x [B, H, P] (dt x), log_decay [B, H] (dt A), b, c [B, H, N]; `state` [B, H, N, P] is updated
    in place. Returns [B, H, P]. All fp32."""
    state.mul_(log_decay.exp()[..., None, None]).add_(b.unsqueeze(-1) * x.unsqueeze(-2))
    return torch.einsum("bhnp,bhn->bhp", state, c)


def scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """Many tokens, in chunks. x [B, H, T, P], log_decay [B, H, T], b, c [B, H, T, N]; `state` [B, H, N, P] is
    updated in place. Returns [B, H, T, P]. All fp32."""
    T = x.shape[2]
    pad = -T % CHUNK
    x, b, c = (F.pad(t, (0, 0, 0, pad)).unflatten(2, (-1, CHUNK)) for t in (x, b, c))  # [B, H, n, C, ...]
    # Sums of logs in fp64: where decay is strong, fp32 would lose their small differences.
    G = (
        F.pad(log_decay, (0, pad)).unflatten(2, (-1, CHUNK)).double().cumsum(-1).unsqueeze(-1)
    )  # [B, H, n, C, 1]
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    decay = (G - G.transpose(-1, -2)).float().masked_fill(~lower, -torch.inf).exp()
    within = ((c @ b.transpose(-1, -2)) * decay) @ x
    last = G[..., -1:, :]
    added = (b * (last - G).float().exp()).transpose(
        -1, -2
    ) @ x  # [B, H, n, N, P]: what a chunk leaves in the state
    c, kept = c * G.float().exp(), last.float().exp()
    out = []
    for n in range(x.shape[2]):
        out.append(within[:, :, n] + c[:, :, n] @ state)
        state.mul_(kept[:, :, n]).add_(added[:, :, n])
    return torch.cat(out, 2)[:, :, :T]


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
        self.norm = GroupNorm(spec, inner)
        self.out = Linear(inner, d)

    def forward(self, x: Tensor, ctx: Context, onto: Tensor | None = None) -> Tensor:
        s = self.spec
        inner, bc = s.n_heads * s.head_dim, s.n_groups * s.state
        z, xbc, dt = self.in_proj(x).split((inner, inner + 2 * bc, s.n_heads), -1)
        entry = ctx.entry(self.layer)
        carried = entry if isinstance(entry, State) else None
        u, b, c = self.conv(xbc, carried).split((inner, bc, bc), -1)
        dt = F.softplus(dt + self.dt_bias.to(dt.dtype)).clamp(min=s.dt_min).float()  # [B, T, H]
        log_decay = -self.A_log.float().exp() * dt
        u = u.unflatten(-1, (s.n_heads, s.head_dim)).float()  # [B, T, H, P]
        b, c = (
            g.unflatten(-1, (s.n_groups, s.state)).float().repeat_interleave(s.n_heads // s.n_groups, 2)
            for g in (b, c)
        )  # [B, T, H, N]
        state = u.new_zeros(len(x), s.n_heads, s.state, s.head_dim) if carried is None else carried.state
        scaled = u * dt.unsqueeze(-1)
        if ctx.T == 1:
            scaled, log_decay, b, c = (t.squeeze(1) for t in (scaled, log_decay, b, c))
            y = step(scaled, log_decay, b, c, state).unsqueeze(1)
        else:
            scaled, log_decay, b, c = (t.transpose(1, 2) for t in (scaled, log_decay, b, c))
            y = scan(scaled, log_decay, b, c, state).transpose(1, 2)
        y = y + self.D.float()[:, None] * u
        out: Tensor = self.out(self.norm(y.flatten(2), z).to(x.dtype), onto)
        return out


class GroupNorm(nn.Module):
    """y * silu(z), then RMS norm over each group of channels. fp32 throughout."""

    def __init__(self, spec: MambaSpec, inner: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(inner))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gated = (y * F.silu(z.float())).unflatten(-1, (self.spec.n_groups, -1))
        weight = self.weight.view(self.spec.n_groups, -1)
        return rms_norm(gated, weight, self.spec.out_norm).flatten(-2)
