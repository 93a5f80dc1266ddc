"""Whether two results differ by rounding alone, on whatever CPU this is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.model import Decoder, attention, moe
from zoo.model.ffn import activate
from zoo.model.linear import Stacked
from zoo.spec import MoE
from zoo.verify.float64 import logits_of
from zoo.verify.tolerance import FACTOR, FLOOR_FP32


def agree(made: Tensor, other: Tensor, model: Decoder, ids: Tensor) -> bool:
    """Whether logits [B, T, V] are another's but for rounding. Which sums a CPU's instructions take first moves both: what
    is apart by more than the floor is right if it is as near to float64 as the other, whose own distance is measured here.

    Distances are root mean squares, and the largest has a cap: of the same sums in another order (Jamba, 3 instruction
    sets, 1 and 2 threads, a prompt cut at each of its tokens) the first move by 0.87 to 1.23, the largest by 0.96 to 2.25.
    """
    if far(made, other) <= FLOOR_FP32:
        return True
    exact = logits_of(model, ids)
    assert exact is not None
    near = _rms(made, exact) <= FACTOR * _rms(other, exact)
    return near and max(far(made, exact), far(other, exact)) <= FACTOR * FACTOR * FLOOR_FP32


def far(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _rms(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


@contextlib.contextmanager
def sums_as_upstream(eager: bool, experts: bool) -> Iterator[None]:
    """Meanwhile ours adds up in upstream's order, so that all other roundings can be compared to the bit.

    eager: attention is written out, for a class that has no other; else v keeps its width (ours pads it, which takes
      another path of torch's). experts: a token's experts are summed as upstream's loop sums them, one after the other,
      each sum rounded to the model's dtype. Ours keeps that sum in fp32, as upstream's other kernels do in orders of their
      own: nearer to what the weights stand for.
    """
    was = attention._sdpa, moe.experts
    attention._sdpa = _written_out if eager else _unpadded
    if experts:
        moe.experts = _one_after_the_other
    try:
        yield
    finally:
        attention._sdpa, moe.experts = was


def _unpadded(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool, scale: float) -> Tensor:
    """As `zoo.model.attention._sdpa`."""
    gqa = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, allowed, is_causal=causal, scale=scale, enable_gqa=gqa)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """As `zoo.model.attention._sdpa`."""
    if causal:
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return attention._written_out(q, k, v, allowed, scale, None, None, None, None)


def _one_after_the_other(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Stacked,
    down: Stacked,
    spec: MoE,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `zoo.model.moe.experts`."""
    out = torch.zeros_like(x)
    for e in range(spec.n_experts):
        tokens, k = (chosen == e).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        share, of = weights[tokens, k, None], (torch.tensor([e]), torch.tensor([len(tokens)]))
        h = up(x[tokens] * share.to(x.dtype) if spec.weight_input else x[tokens], *of)
        y = down(activate(h, spec.expert), *of)
        out.index_add_(0, tokens, (y if spec.weight_input else y * share).to(x.dtype))
    out = out if shared is None else shared + out
    return out if residual is None else residual + out
