"""A gated short convolution (LFM2): out(C * conv(B * x)).

Unusual: it sees `conv` tokens and no more, so all that a cache keeps of it are the last `conv - 1` of B * x.
"""

from __future__ import annotations

from torch import Tensor, nn

from zoo.model.cache import Context
from zoo.model.delta import Conv
from zoo.model.linear import Linear
from zoo.spec import ShortConv as ShortConvSpec


class ShortConv(nn.Module):
    def __init__(self, spec: ShortConvSpec, d: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.in_proj = Linear(d, d, d, d, bias=spec.bias)
        self.conv = Conv(d, spec.conv, bias=spec.bias, silu=False)
        self.out = Linear(d, d, bias=spec.bias)

    def forward(self, x: Tensor, ctx: Context, onto: Tensor | None = None) -> Tensor:
        """Normed x [B, T, d] -> [B, T, d], added to `onto`."""
        b, c, x = self.in_proj(x).chunk(3, -1)
        y = c * self.conv(b * x, ctx.carried(self.layer))
        out: Tensor = self.out(y, onto)
        return out
