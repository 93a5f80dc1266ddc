"""Gated delta rule: linear attention with a state per head that forgets and is corrected.

    S = decay * S;  S += k (beta (v - S^T k))^T;  o = S^T q                  S [K, V]

Gated DeltaNet (arXiv 2412.06464) decays a head by one number, KDA (arXiv 2510.26692) each key channel by
its own. Unusual: queries and keys are L2-normalised; everything from there to the output norm is fp32; a
prompt is computed in chunks, inside which the corrections solve a triangular system, and the result is the
recurrence's to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.model.cache import Context, State
from zoo.model.linear import Linear
from zoo.model.norm import Norm
from zoo.spec import DeltaNet as DeltaSpec


class Conv(nn.Module):
    """Causal depthwise convolution over time, then SiLU. `weight` [channels, width]: the last column is now."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, channels: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.register_parameter("bias", nn.Parameter(torch.empty(channels)) if bias else None)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        """x [B, T, channels] -> the same, reading from and updating the tail of `state`."""
        width = self.weight.shape[1]
        if state is None:
            padded = F.pad(x, (0, 0, width - 1, 0))
        else:
            padded = torch.cat((state.tail, x), 1)
            state.tail.copy_(padded[:, x.shape[1] :])
        weight = self.weight.to(x.dtype).unsqueeze(1)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.conv1d(padded.transpose(1, 2), weight, bias, groups=weight.shape[0])
        return F.silu(y.transpose(1, 2))


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """One token. q, k [B, H, K], v [B, H, V], log_decay [B, H, K or 1], beta [B, H, 1]; `state`
    [B, H, K, V] is updated in place. Returns [B, H, V]. All fp32."""
    state.mul_(log_decay.exp().unsqueeze(-1))
    correction = beta * (v - torch.einsum("bhkv,bhk->bhv", state, k))
    state.add_(k.unsqueeze(-1) * correction.unsqueeze(-2))
    return torch.einsum("bhkv,bhk->bhv", state, q)


def scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """Many tokens, in chunks. q, k [B, H, T, K], v [B, H, T, V], log_decay [B, H, T, K or 1], beta
    [B, H, T, 1]; `state` [B, H, K, V] is updated in place. Returns [B, H, T, V]. All fp32.

    With G the decay accumulated within a chunk (in logs) and S the state before it, the corrections
    u_t = beta_t (v_t - S_t^T k_t) solve (1 + beta A) U = beta (V - (e^G k) S) with the strictly lower
    A_tj = sum_c k_tc k_jc e^(G_tc - G_jc): exponents are of differences only, so nothing overflows. G is
    kept in fp64: where decay is strong, fp32 sums would lose the small differences.
    """
    per_channel = log_decay.shape[-1] > 1
    size = 16 if per_channel else 64  # per channel, the pairs of a chunk are [size, size, K]
    T = q.shape[2]
    q, k, v, log_decay, beta = (
        F.pad(x, (0, 0, 0, -T % size)).unflatten(2, (-1, size)) for x in (q, k, v, log_decay, beta)
    )  # [B, H, N, C, ...]
    G = log_decay.double().cumsum(-2)
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    A, M = _pairs(k, k, G, lower), _pairs(q, k, G, lower)  # [B, H, N, C, C]
    system = beta * A.tril(-1)  # the unit diagonal is implied
    grown = G.float().exp()
    rhs = torch.cat((beta * v, beta * grown * k), -1)
    solved = torch.linalg.solve_triangular(system, rhs, upper=False, unitriangular=True)
    U, W = solved.split((v.shape[-1], k.shape[-1]), -1)  # corrections from the chunk, from the state before
    q = q * grown
    last = G[..., -1:, :]
    k = k * (last - G).float().exp()
    kept = last.float().exp().transpose(-1, -2)  # [B, H, N, K or 1, 1]
    out = []
    for n in range(q.shape[2]):
        u = U[:, :, n] - W[:, :, n] @ state  # [B, H, C, V]
        out.append(q[:, :, n] @ state + M[:, :, n] @ u)
        state.mul_(kept[:, :, n]).add_(k[:, :, n].transpose(-1, -2) @ u)
    return torch.cat(out, 2)[:, :, :T]


def _pairs(a: Tensor, b: Tensor, G: Tensor, lower: Tensor) -> Tensor:
    """sum_c a_tc b_jc e^(G_tc - G_jc) for j <= t, else 0. [..., C, K] -> [..., C, C]"""
    if G.shape[-1] == 1:
        decay = (G - G.transpose(-1, -2)).float().masked_fill(~lower, -torch.inf).exp()
        return (a @ b.transpose(-1, -2)) * decay
    diff = (G.unsqueeze(-2) - G.unsqueeze(-3)).float()  # [..., C, C, K]
    diff = diff.masked_fill_(~lower.unsqueeze(-1), -torch.inf)
    return torch.einsum("...tk,...tjk,...jk->...tj", a, diff.exp_(), b)


class DeltaNet(nn.Module):
    def __init__(self, spec: DeltaSpec, d: int, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
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
        dt_bias = self.dt_bias.float().view(dt.shape[-2:])
        log_decay = -self.A_log.float().exp()[:, None] * F.softplus(dt.float() + dt_bias)  # [B, T, H, K or 1]
        beta = beta.sigmoid().float().unsqueeze(-1)  # [B, T, Hv, 1]

        entry = ctx.entry(self.layer)
        carried = entry if isinstance(entry, State) else None
        q, k, v = self.conv(qkv, carried).split((k_width, k_width, v_width), -1)
        q, k = (self._unit(h.unflatten(-1, (s.n_k_heads, s.k_head_dim)).float()) for h in (q, k))
        q = q * s.k_head_dim**-0.5
        v = v.unflatten(-1, (s.n_v_heads, s.v_head_dim)).float()
        if (repeat := s.n_v_heads // s.n_k_heads) > 1:
            q, k = q.repeat_interleave(repeat, 2), k.repeat_interleave(repeat, 2)

        if carried is None:
            state = q.new_zeros(len(x), s.n_v_heads, s.k_head_dim, s.v_head_dim)
        else:
            state = carried.state
        if ctx.T == 1:
            q, k, v, log_decay, beta = (h.squeeze(1) for h in (q, k, v, log_decay, beta))
            y = step(q, k, v, log_decay, beta, state).unsqueeze(1)
        else:
            q, k, v, log_decay, beta = (h.transpose(1, 2) for h in (q, k, v, log_decay, beta))
            y = scan(q, k, v, log_decay, beta, state).transpose(1, 2)
        y = self._gated_norm(y.to(x.dtype), z.view_as(y))  # [B, T, Hv, V]
        out: Tensor = self.out(y.flatten(2), onto)
        return out

    @staticmethod
    def _unit(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """norm(y) * gate(z), the product in fp32."""
        s = self.spec
        gate = F.silu(z.float()) if s.out_gate == "silu" else torch.sigmoid(z.float())
        normed = self.norm(y) if s.out_norm.scale_in == "model" else self.norm(y.float())
        out: Tensor = (normed * gate).to(y.dtype)
        return out
