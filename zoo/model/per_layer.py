"""Per-layer embeddings (Gemma 3n, Gemma 4): a second table, of a small vector for every token and layer.

Unusual: the table's factor is rounded to the model's dtype before it is used; so are, in Gemma 3n, the other constants
(`PerLayerEmbedding.rounding`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from zoo.kernels.gated import activation
from zoo.model.linear import Linear, Table
from zoo.model.norm import Norm
from zoo.spec import PerLayerEmbedding as PerLayerSpec


class PerLayerEnds(nn.Module):
    """The second embedding: a vector of `dim` channels for every token and layer."""

    def __init__(self, spec: PerLayerSpec, d: int, n_layers: int) -> None:
        super().__init__()
        self.spec, self.d = spec, d
        self.embed = Table(spec.vocab_size, n_layers * spec.dim)
        self.proj = Linear(d, n_layers * spec.dim)
        self.norm = Norm(spec.norm, spec.dim)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        """ids [B, T], x [B, T, D] -> [B, T, n_layers, dim]. Ids beyond the table count as 0."""
        s = self.spec

        def rounded(value: float) -> float:
            return float(torch.tensor(value, dtype=x.dtype))

        def number(value: float) -> float:
            return rounded(value) if s.rounding == "first" else value

        known = torch.where(ids < s.vocab_size, ids, 0)
        own = self.embed.rows(known).to(x.dtype) * rounded(s.dim**0.5)
        projected = (self.proj(x) * number(self.d**-0.5)).unflatten(-1, (-1, s.dim))
        out: Tensor = (self.norm(projected) + own.view_as(projected)) * number(math.sqrt(0.5))
        return out


class PerLayer(nn.Module):
    """What a layer makes of its hidden state and its per-layer vector, to be added."""

    def __init__(self, spec: PerLayerSpec, d: int) -> None:
        super().__init__()
        self.spec = spec
        self.gate = Linear(d, spec.dim)
        self.out = Linear(spec.dim, d)
        self.norm = Norm(spec.norm, d)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """x [B, T, D], vector [B, T, dim] -> [B, T, D]"""
        out: Tensor = self.norm(self.out(activation(self.gate(x), self.spec.act) * vector))
        return out
