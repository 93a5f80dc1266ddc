"""Manifold-constrained hyper-connections (arXiv 2512.24880): several residual streams in place of one.

A branch reads a weighted sum of the streams; what it gives is added to each with a weight of its own, while a matrix, made
nearly doubly stochastic by Sinkhorn's iterations, mixes the streams. All weights are made anew for each token.

Unusual: streams are the first axis, [n, B, T, D], as those of AltUp; all is computed in fp32, whatever the model's dtype, and
the new streams are rounded once, as the vendor's code does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.kernels.product import product
from zoo.model.linear import Weights
from zoo.spec import HyperConnections


class _Mixer(Weights):
    """`weight` [out, n D], `bias` [out], and `factors`, one for each of the `parts` of `out`."""

    KEPT = ("weight", "bias", "factors")

    def __init__(self, spec: HyperConnections, d: int, *parts: int) -> None:
        super().__init__(sum(parts), spec.n_streams * d, parts=(sum(parts),), bias=True)
        self.spec, self.of = spec, parts
        self.factors = nn.Parameter(torch.empty(len(parts)))

    def made(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Streams [n, B, T, D] -> the same in fp32 [B, T, n, D], and what the weights are made of, [B, T, part] each."""
        wide = torch.promote_types(x.dtype, torch.float32)
        streams = x.permute(1, 2, 0, 3).to(wide)
        flat = streams.flatten(2)
        size = torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.spec.norm.eps)
        z = product(flat, self.dense(wide)) * size
        bias = self.offset(wide)
        assert bias is not None
        parts = zip(z.split(self.of, -1), self.factors.to(wide), bias.split(self.of), strict=True)
        return streams, [part * factor + b for part, factor, b in parts]


class HyperConnection(_Mixer):
    """One branch's."""

    def __init__(self, spec: HyperConnections, d: int) -> None:
        n = spec.n_streams
        super().__init__(spec, d, n, n, n * n)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Streams [n, B, T, D] -> what the branch reads [B, T, D]; and for `put` the streams [B, T, n, D], the branch's weights
        [B, T, n] and the mixing matrix [B, T, from n, to n], in fp32."""
        s = self.spec
        streams, (a, b, m) = self.made(x)
        m = m.unflatten(-1, (s.n_streams, s.n_streams)).softmax(-1) + s.eps
        for k in range(2 * s.rounds - 1):
            m = m / (m.sum(-1 if k % 2 else -2, keepdim=True) + s.eps)
        return _read(streams, a, s.eps).to(x.dtype), streams, 2 * b.sigmoid(), m

    @staticmethod
    def put(y: Tensor, streams: Tensor, b: Tensor, m: Tensor) -> Tensor:
        """What the branch gave, y [B, T, D], and its streams -> the new streams [n, B, T, D]."""
        new = m.transpose(-1, -2) @ streams + b.unsqueeze(-1) * y.unsqueeze(2)
        return new.to(y.dtype).permute(2, 0, 1, 3)


class HyperHead(_Mixer):
    """Many streams to one, at the end of the model."""

    def __init__(self, spec: HyperConnections, d: int) -> None:
        super().__init__(spec, d, spec.n_streams)

    def forward(self, x: Tensor) -> Tensor:
        """[n, B, T, D] -> [B, T, D]"""
        streams, (a,) = self.made(x)
        return _read(streams, a, self.spec.eps).to(x.dtype)


def _read(streams: Tensor, a: Tensor, eps: float) -> Tensor:
    return ((a.sigmoid() + eps).unsqueeze(-1) * streams).sum(2)
