"""Linear maps and stacks of them (one per expert), plain or quantised.

Unusual: a quantised weight stays as codes and scales; it is expanded when used, one layer or one expert
at a time, to the dtype of its input. The logits are those of a model expanded beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Weights(nn.Module):
    """`weight` [..., out, in], and its quantisation components if `scheme` is set (see `zoo.quant`)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, *shape: int, parts: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.parts = parts
        self.scheme: str | None = None
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[:-1])) if bias else None)

    def quantise(self, scheme: str, components: dict[str, Tensor]) -> None:
        """Replace the weight by the codes (component "weight"), scales, ... of `scheme`."""
        self.scheme = scheme
        del self.weight
        for name, value in components.items():
            self.register_buffer(name, value)

    def dense(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """The logical weight in `dtype` (of one expert, where stacked). A view when nothing is to be done."""
        if self.scheme is None:
            w = self.weight if expert is None else self.weight[expert]
            return w if w.dtype == dtype else w.to(dtype)
        from zoo.quant import dequantise

        components = dict(self.named_buffers(recurse=False))
        if expert is not None:  # a scale may be one for all experts
            E = len(self.weight)
            components = {n: c[expert] if c.ndim and len(c) == E else c for n, c in components.items()}
        return dequantise(self.scheme, components, self.parts, dtype)

    def offset(self, dtype: torch.dtype, expert: int | None = None) -> Tensor | None:
        """The bias in `dtype` (of one expert, where stacked)."""
        if self.bias is None:
            return None
        b = self.bias if expert is None else self.bias[expert]
        return b if b.dtype == dtype else b.to(dtype)


class Linear(Weights):
    """x [..., in] -> [..., out]. `parts`: the pieces fused along `out`."""

    def __init__(self, d_in: int, *parts: int, bias: bool = False) -> None:
        super().__init__(sum(parts), d_in, parts=parts, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(x.dtype), self.offset(x.dtype))


class Stacked(Weights):
    """One linear map per expert: `weight` [E, out, in]. Used by `moe.experts`."""

    def __init__(self, n_experts: int, d_in: int, *parts: int, bias: bool = False) -> None:
        super().__init__(n_experts, sum(parts), d_in, parts=parts, bias=bias)


class Table(nn.Module):
    """An embedding: `weight` [rows, d]."""

    weight: Tensor

    def __init__(self, rows: int, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, d))
