"""Mixture of experts: a router that chooses experts per token, and the experts as one stacked matrix.

Unusual: tokens are sorted by expert and each expert is one matrix product over its tokens; experts that no
token chose are never touched (their pages are never read from a mapped checkpoint). The weighted sum over
a token's experts is taken at once, in fp32 where the routing weights are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels import experts as fused
from zoo.kernels.launch import has_triton
from zoo.kernels.route import route
from zoo.model.ffn import FeedForward, activate
from zoo.model.linear import Linear, Stacked, Weights
from zoo.spec import MoE as MoESpec
from zoo.spec import Router as RouterSpec


class Router(Weights):
    """`weight` [E, d], `bias` [E] and `selection_bias` [E]."""

    selection_bias: Tensor | None

    def __init__(self, spec: RouterSpec, n_experts: int, d: int) -> None:
        super().__init__(n_experts, d, parts=(n_experts,), bias=spec.bias)
        self.spec = spec
        has_bias = spec.selection_bias
        self.register_parameter("selection_bias", nn.Parameter(torch.empty(n_experts)) if has_bias else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, d] -> the chosen experts [N, top_k] (int64) and their weights [N, top_k]."""
        dtype = torch.float32 if self.spec.fp32 else x.dtype
        logits = self.times(x.to(dtype))  # [N, E]
        return route(logits, self.selection_bias, self.spec, dtype)


def experts(x: Tensor, chosen: Tensor, weights: Tensor, up: Stacked, down: Stacked, spec: MoESpec) -> Tensor:
    """Sum over a token's experts of weight * expert(x). x [N, d], chosen and weights [N, k] -> [N, d]."""
    N, k = chosen.shape
    if has_triton(x) and fused.fits(x, a := up.packed(), b := down.packed()) and not spec.expert.sparsity:
        return fused.experts(x, chosen, weights, a, b, spec.expert, spec.weight_input)
    order = chosen.flatten().argsort(stable=True)  # rows of [N * k], sorted by expert
    ids, counts = torch.unique_consecutive(chosen.flatten()[order], return_counts=True)
    rows = x[order // k]  # [N k, d]
    if spec.weight_input:
        rows = rows * weights.flatten()[order, None].to(x.dtype)
    groups = list(zip(ids.tolist(), counts.tolist(), strict=True))
    h = activate(grouped(rows, up, groups), spec.expert)
    y = torch.empty_like(rows)
    y[order] = grouped(h, down, groups)
    y = y.view(N, k, -1)
    if spec.weight_input:
        return y.sum(1)
    return (y * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def grouped(x: Tensor, stack: Stacked, groups: list[tuple[int, int]]) -> Tensor:
    """Rows of x [R, in], sorted by expert, each times its expert's matrix -> [R, out].
    `groups`: (expert, how many rows)."""
    pieces = x.split([n for _, n in groups])
    out = [
        F.linear(p, stack.dense(x.dtype, e), stack.offset(x.dtype, e))
        for p, (e, _) in zip(pieces, groups, strict=True)
    ]
    return out[0] if len(out) == 1 else torch.cat(out)


class MoE(nn.Module):
    def __init__(self, spec: MoESpec, d: int) -> None:
        super().__init__()
        self.spec = spec
        width, e = spec.latent or d, spec.expert
        self.router = Router(spec.router, spec.n_experts, d)
        if spec.latent is not None:
            self.latent_down = Linear(d, spec.latent)
            self.latent_up = Linear(spec.latent, d)
        if e.gated:
            self.gate_up = Stacked(spec.n_experts, width, e.d_ff, e.d_ff, bias=e.bias)
        else:
            self.up = Stacked(spec.n_experts, width, e.d_ff, bias=e.bias)
        self.down = Stacked(spec.n_experts, e.d_ff, width, bias=e.bias)
        if spec.shared is not None:
            self.shared = FeedForward(spec.shared, d)
            if spec.shared_gate:
                self.shared_gate = Linear(d, 1)

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x [..., d] -> [..., d], added to `onto`."""
        s = self.spec
        flat = x.flatten(0, -2)  # [N, d]
        chosen, weights = self.router(flat)
        inner = flat if s.latent is None else self.latent_down(flat)
        y = experts(inner, chosen, weights, self.gate_up if s.expert.gated else self.up, self.down, s)
        if s.latent is not None:
            y = self.latent_up(y)
        if s.shared is not None:
            shared = self.shared(flat)
            y = y + (torch.sigmoid(self.shared_gate(flat)) * shared if s.shared_gate else shared)
        if s.scale != 1.0:
            y = y * s.scale
        y = y.view_as(x)
        return y if onto is None else onto + y
