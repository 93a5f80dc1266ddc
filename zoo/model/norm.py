"""Normalisation over the last axis. Statistics are always fp32; where the weight is applied differs (`Norm.rounding`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.kernels.norm import add_rms_norm, factor, rms_norm, rms_norm_add
from zoo.kernels.stream import Before
from zoo.model.across import Across, Spread
from zoo.spec import Norm as NormSpec


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: NormSpec) -> Tensor:
    """(x - mean) / std, times w, plus bias. Same shape and dtype as x."""
    w = None if weight is None else factor(weight, norm).to(x.dtype)
    b = None if bias is None else bias.to(x.dtype)
    if w is not None and w.dim() > 1:  # one for each head
        y = nn.functional.layer_norm(x.float(), x.shape[-1:], eps=norm.eps) * w
        return (y if b is None else y + b).to(x.dtype)
    return nn.functional.layer_norm(x, x.shape[-1:], w, b, norm.eps)


@dataclass(frozen=True)
class Unnormed:
    """A token x [.., D] and the norm of it that the product which reads it makes on its way."""

    x: Tensor
    norm: Before


class Norm(nn.Module):
    """A norm over the last axis, its weight of `shape`. Without a weight it has no parameters. `spread`: the axis is longer
    than what this rank has of it. `across`: ranks that, in a pass by rows, make it along with the sum that it is of."""

    spread: Spread | None = None
    across: Across | None = None
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, spec: NormSpec, *shape: int) -> None:
        super().__init__()
        self.spec = spec
        self.register_parameter("weight", None if spec.weight == "none" else nn.Parameter(torch.empty(shape)))
        has_bias = spec.kind == "layer" and spec.bias
        self.register_parameter("bias", nn.Parameter(torch.empty(shape)) if has_bias else None)

    def forward(
        self, x: Tensor, onto: Tensor | None = None, before: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x, added to `onto`. With `before`: the norm of before + x, and that sum."""
        if self.spread is not None:
            assert onto is None and before is None
            return self.spread(x, self.weight, self.spec, self.bias)
        if self.across is not None and onto is None and before is None:
            made = self.across.normed(x, self)
            if made is not None:
                return made
        if before is not None:
            if self.spec.kind == "rms":
                return add_rms_norm(before, x, self.weight, self.spec)
            total = before + x
            return layer_norm(total, self.weight, self.bias, self.spec), total
        if self.spec.kind == "layer":
            y = layer_norm(x, self.weight, self.bias, self.spec)
            return y if onto is None else onto + y
        if onto is None:
            return rms_norm(x, self.weight, self.spec)
        return rms_norm_add(onto, x, self.weight, self.spec)
