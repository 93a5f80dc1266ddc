"""Gemma 3n's additions to a block: alternating updates (arXiv 2301.13310) and LAuReL (arXiv 2411.07501).

The residual is `n_streams` wide: x [S, B, T, D]. A layer predicts all streams, computes on the active one,
and corrects all by what came out. Unusual: the rescaling of streams and many roundings on the way are in
the model's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.model.linear import Linear, Stacked
from zoo.model.norm import Norm
from zoo.spec import AltUp as AltUpSpec


class AltUp(nn.Module):
    """Prediction and correction of the streams, steered by what a small router makes of the active one."""

    correct_scale: Tensor | None

    def __init__(self, spec: AltUpSpec, d: int) -> None:
        super().__init__()
        self.spec, self.d, n = spec, d, spec.n_streams
        self.router_norm = Norm(spec.norm, d)
        self.router = Linear(d, n)
        self.predict = Linear(n, n * n)
        self.correct = Linear(n, n)
        self.register_parameter("correct_scale", nn.Parameter(torch.empty(d)) if spec.correct_scale else None)

    def _modalities(self, x: Tensor) -> Tensor:
        scale = torch.tensor(1 / self.d, dtype=x.dtype).item()
        steer: Tensor = self.router(self.router_norm(x) * scale)  # [B, T, S]
        return torch.tanh(steer.float()).to(x.dtype)

    def predicted(self, x: Tensor) -> Tensor:
        """[S, B, T, D] -> what each stream will be if nothing is computed."""
        n = self.spec.n_streams
        coefs = self.predict(self._modalities(x[self.spec.active])).unflatten(-1, (n, n)).transpose(-1, -2)
        mixed = x.permute(1, 2, 3, 0) @ coefs  # [B, T, D, S]
        out: Tensor = mixed.permute(3, 0, 1, 2) + x
        return out

    def corrected(self, predicted: Tensor, computed: Tensor) -> Tensor:
        """Add to each stream its share of what the active one was mispredicted by."""
        coefs = self.correct(self._modalities(computed)) + 1.0  # [B, T, S]
        surprise = computed - predicted[self.spec.active]  # [B, T, D]
        out: Tensor = surprise * coefs.permute(2, 0, 1).unsqueeze(-1) + predicted
        return out


class Laurel(nn.Module):
    """x + norm(up(down(x))): a learned low-rank residual."""

    def __init__(self, spec: AltUpSpec, d: int) -> None:
        super().__init__()
        self.down = Linear(d, spec.laurel_rank)
        self.up = Linear(spec.laurel_rank, d)
        self.norm = Norm(spec.norm, d)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.norm(self.up(self.down(x)))
        return out


class Streams(nn.Module):
    """One residual to many and back, at the ends of the model."""

    def __init__(self, spec: AltUpSpec, d: int) -> None:
        super().__init__()
        self.expand = Stacked(spec.n_streams - 1, d, d)
        self.merge = Stacked(spec.n_streams - 1, d, d)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [S, B, T, D]"""
        others = [self._like(F.linear(x, w), x) for w in self.expand.dense(x.dtype)]
        return torch.stack((x, *others))

    def join(self, x: Tensor) -> Tensor:
        """[S, B, T, D] -> [B, T, D]"""
        weights = self.merge.dense(x.dtype)
        others = [self._like(F.linear(s, w), x[0]) for s, w in zip(x[1:], weights, strict=True)]
        return torch.stack((x[0], *others)).mean(0)

    @staticmethod
    def _like(x: Tensor, model: Tensor) -> Tensor:
        """x with the RMS of `model`."""
        wanted = (model**2).mean(-1, keepdim=True) ** 0.5
        has = torch.sqrt((x**2).mean(-1, keepdim=True).clamp(min=1e-5))
        return x * wanted / has
