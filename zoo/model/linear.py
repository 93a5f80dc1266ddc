"""Linear maps and stacks of them (one per expert), plain or quantised.

Unusual: a quantised weight stays as codes and scales; it is expanded when used, one layer or one expert
at a time, to the dtype of its input. The logits are those of a model expanded beforehand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels.cpu import kernels
from zoo.kernels.launch import has_triton, is_recorded
from zoo.kernels.linear import MOST, few_rows, linear, one_row, takes_norm
from zoo.kernels.near import some_rows
from zoo.kernels.product import kernel, product, unrounded
from zoo.kernels.stream import Before
from zoo.kernels.weights import Weight, expanded, laid_out, ordered, plain, quantised
from zoo.kernels.weights import looked_up as rows_of
from zoo.model.across import Across
from zoo.model.rows import Normer


class Weights(nn.Module):
    """`weight` [..., out, in], and its quantisation components if `scheme` is set (see `zoo.quant`)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, *shape: int, parts: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.parts = parts
        self.scheme: str | None = None
        self._packed: tuple[int, int, Weight | None] | None = None
        self._carried: tuple[tuple[int, int], Any] | None = None
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[:-1])) if bias else None)

    def quantise(self, scheme: str, components: dict[str, Tensor]) -> None:
        """Replace the weight by the codes (component "weight"), scales, ... of `scheme`."""
        self.scheme = scheme
        self._packed = self._carried = None
        del self.weight
        for name, value in components.items():
            self.register_buffer(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As torch's; what is packed would keep the memory of a model that is moved."""
        self._packed = self._carried = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def packed(self) -> Weight | None:
        """The weight as the kernels read it; None for a scheme that they do not know."""
        if self._packed is None or self._packed[:2] != (id(self.weight), id(self.bias)):
            if self.scheme is None:
                w: Weight | None = plain(self.weight, self.bias)
            else:
                w = quantised(self.scheme, dict(self.named_buffers(recurse=False)), self.parts, self.bias)
            self._packed = id(self.weight), id(self.bias), w
        return self._packed[2]

    def times(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x [..., in] times the weight of a lone matrix, plus bias: [..., out], added to `onto`."""
        few = x.numel() <= MOST * x.shape[-1] and has_triton(x)
        if few and (w := self.packed()) is not None and few_rows(x, w):
            return linear(x, w, onto)
        if (w := self._reordered(x)) is not None:
            y = product(ordered(x, w), laid_out(w, x.dtype), self.offset(x.dtype))
        elif times := self.coded(x, x.shape[:-1].numel()):
            more = None if onto is None else onto.reshape(-1, onto.shape[-1])
            y = times(x.reshape(-1, x.shape[-1]), bias=self.offset(x.dtype), onto=more)
            return y.view(*x.shape[:-1], -1)
        else:
            y = product(x, self.dense(x.dtype), self.offset(x.dtype))
        return y if onto is None else onto + y

    def makes_norm(self, x: Tensor, norm: Before, gated: bool = False) -> bool:
        """Whether `of_unnormed` (`gated`: `zoo.kernels.linear.gated_linear`) serves a row x."""
        return has_triton(x) and takes_norm(x, self.packed(), norm, gated)

    def of_unnormed(self, x: Tensor, norm: Before) -> Tensor:
        """`times` of the norm of one row x, made on its way (see `makes_norm`)."""
        w = self.packed()
        assert w is not None
        return linear(x, w, norm=norm)

    def _reordered(self, x: Tensor) -> Weight | None:
        """The weight as the kernels read it, where its codes have columns in another order: then x is put into that."""
        if self.scheme is None or not has_triton(x) or (w := self.packed()) is None or w.order is None:
            return None
        return w

    def unrounded(self, x: Tensor) -> Tensor:
        """`times` on a CPU, in fp32: for sums that go on."""
        if times := self.coded(x, x.shape[:-1].numel()):
            y = times(x.reshape(-1, x.shape[-1]), bias=self.offset(x.dtype), dtype=torch.float32)
            return y.view(*x.shape[:-1], -1)
        return unrounded(x, self.dense(x.dtype), self.offset(x.dtype))

    def coded(self, x: Tensor, rows: int) -> Callable[..., Tensor] | None:
        """Our kernel of a CPU for codes and `rows` rows of x (to an expert, where stacked), where it serves them: as
        `zoo.kernels.cpu.quantised.times`."""
        if self.scheme is None or x.device.type != "cpu" or x.dtype == torch.float64 or is_recorded(x):
            return None
        made = kernels("blocks" if self.in_blocks else "quantised")
        if made is None or (w := self._codes(made)) is None or not made.fits(w, rows):
            return None
        times = partial(made.times, w=w)
        order = None if self.in_blocks else w.order
        return times if order is None else lambda x, **how: times(x.index_select(-1, order), **how)

    @property
    def in_blocks(self) -> bool:
        """Whether it is carried in ggml's blocks."""
        return self.scheme is not None and self.scheme.startswith("gguf-")

    def _codes(self, made: Any) -> Any:
        """Codes as the kernels of a CPU read them; None for those that they do not know."""
        # A weight that is shared with other processes keeps its name, and lies elsewhere.
        where = id(self.weight), self.weight.data_ptr()
        if self._carried is None or self._carried[0] != where:
            w = made.carried(self.scheme, dict(self.named_buffers(recurse=False)), self.parts)
            self._carried = where, w
        return self._carried[1]

    def dense(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """The logical weight in `dtype` (of one expert, where stacked). A view when nothing is to be done."""
        if self.scheme is None:
            w = self.weight if expert is None else self.weight[expert]
            return w if w.dtype == dtype else w.to(dtype)
        if expert is None and has_triton(self.weight) and (packed := self.packed()) is not None:
            return expanded(packed, dtype)
        if (
            self.weight.device.type == "cpu"
            and (made := kernels("blocks" if self.in_blocks else "expand")) is not None
            and not is_recorded(self.weight)
        ):
            w = self._codes(made if self.in_blocks else kernels("quantised"))
            if w is not None and (self.in_blocks or w.order is None) and made.widens(w, dtype):
                return made.expanded(w, dtype, expert)
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


def scaled(last: Callable[..., Tensor], scale: float, onto: Tensor | None) -> Tensor:
    """`onto` + scale * last(). Without a scale the last step adds by itself, where it can."""
    if scale == 1.0:
        return last(onto=onto)
    y = last(onto=None) * scale
    return y if onto is None else onto + y


class Linear(Weights):
    """x [..., in] -> [..., out]. `parts`: the pieces fused along `out`. `across`: each rank has some of `in`, and what they
    make of it is added up. `reads`: each has some of `out`, and in a pass by rows is given its rows of x alone. `norm`: what a
    sum over ranks is given to next."""

    across: Across | None = None
    reads: Across | None = None
    norm: Normer | None = None

    def __init__(self, d_in: int, *parts: int, bias: bool = False) -> None:
        super().__init__(sum(parts), d_in, parts=parts, bias=bias)

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        ranks = self.across or self.reads
        if ranks is not None and ranks.rows is not None:
            if self.across is not None:
                return ranks.rows.sum(x, self, onto, self.norm)
            y = ranks.rows.spread(x, self)
            return y if onto is None else onto + y
        if self.across is None:
            return self.times(x, onto)
        if x.device.type == "cpu" and x.dtype in (
            torch.bfloat16,
            torch.float16,
        ):  # a GPU would send twice as much
            total = self.across.sum(self.unrounded(x)).to(x.dtype)
            return total if onto is None else onto + total
        return self.across.sum(self.times(x), onto)


class Stacked(Weights):
    """One linear map per expert: `weight` [E, out, in]. Used by `moe.experts`."""

    def __init__(self, n_experts: int, d_in: int, *parts: int, bias: bool = False) -> None:
        super().__init__(n_experts, sum(parts), d_in, parts=parts, bias=bias)

    def fits(self, x: Tensor, most: int) -> bool:
        """Whether several experts can be asked at once about rows like those of x, at most `most` to an expert."""
        return self._kernel(x, most) is not None

    def _kernel(self, x: Tensor, most: int) -> Callable[..., Tensor] | None:
        if self.scheme is not None:
            return self.coded(x, most)
        times = kernel(x, self.weight, most)
        return times and partial(times, weight=self.weight)

    def of_token(self, x: Tensor, experts: Tensor) -> Tensor | None:
        """x [1, in], or [G, in], a row to each of `experts` [G] (int64): [G, out]. None where no kernel of a CPU for codes serves them."""
        if self.scheme is None or self.in_blocks or (times := self.coded(x, 1)) is None:
            return None
        return times(x, bias=self.offset(x.dtype), experts=experts, counts=_ones(len(experts)))

    def forward(self, x: Tensor, experts: Tensor, counts: Tensor, tokens: Tensor | None = None) -> Tensor:
        """x [M, in], `counts[0]` rows by the map of `experts[0]`, and so on (int64 [G]): [M, out]. The rows x[tokens]
        (int64) in place of x, where given. One expert, if not `fits`."""
        times = self._kernel(x, int(counts.max()))
        if times is not None:
            return times(x, bias=self.offset(x.dtype), experts=experts, counts=counts, tokens=tokens)
        (expert,) = experts.tolist()
        x = x if tokens is None else x.index_select(0, tokens)
        return product(x, self.dense(x.dtype, expert), self.offset(x.dtype, expert))


@functools.lru_cache(64)
def _ones(n: int) -> Tensor:
    ones = torch.empty(n, dtype=torch.int64)
    ones.numpy().fill(1)  # nothing that torch computes, which a `Tape` would not keep
    return ones


class Table(Weights):
    """An embedding: `weight` [rows, d], and, where tied, the head. `across`: each rank has as many rows. Of codes only the rows that are
    asked for are expanded, to `asked` (None: the dtype of their scales, of those that are bytes bf16; of GGUF's blocks fp32)."""

    across: Across | None = None
    asked: torch.dtype | None = None

    def __init__(self, rows: int, d: int) -> None:
        super().__init__(rows, d, parts=(rows,), bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """That of its rows."""
        if self.scheme is None:
            return self.weight.dtype
        scale = dict(self.named_buffers(recurse=False)).get("scale")
        if scale is None:  # within the codes, as in a GGUF: its numbers are of fp32
            return self.asked or torch.float32
        stored = scale.dtype if scale.dtype.is_floating_point and scale.element_size() > 1 else torch.bfloat16
        return self.asked or stored

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., d]."""
        if self.across is None:
            return F.embedding(ids, self.weight) if self.scheme is None else self._looked_up(ids)
        first, n = self.across.rank * len(self.weight), len(self.weight)
        if self.scheme is None:
            return self.across.sum(some_rows(self.weight, ids, first))  # the others add zeros
        own = ids - first
        here = (own >= 0) & (own < n)
        return self.across.sum(torch.where(here[..., None], self._looked_up(own.clamp(0, n - 1)), 0))

    def _looked_up(self, ids: Tensor) -> Tensor:
        if (
            has_triton(self.weight)
            and ids.is_cuda == self.weight.is_cuda
            and (w := self.packed()) is not None
        ):
            return rows_of(w, ids, self.dtype)
        from zoo.quant import looked_up

        assert self.scheme is not None
        return looked_up(self.scheme, dict(self.named_buffers(recurse=False)), ids, self.dtype)

    def times(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x [..., d] -> [..., rows]."""
        if self.scheme is not None:
            return super().times(x, onto)
        if one_row(x, w := plain(self.weight)):
            return linear(x, w)
        return product(x, self.weight)
