"""Routing: from logits to the chosen experts and their weights, one program per token.

Unusual: what the plain version sorts, the kernel takes as `top_k` successive maxima, the lower expert first
among equals.

Margin: one kernel where the plain version is eight to twenty, none of them longer than its launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from zoo.kernels.launch import Kernel, has_triton, overlap, power_of_2, triton
from zoo.spec import Router

if triton is not None:
    import triton.language as tl

    from zoo.kernels.gated import sigmoid, tanh
    from zoo.kernels.launch import after_previous


def route_reference(
    logits: Tensor, selection_bias: Tensor | None, r: Router, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Router logits [N, E] -> chosen experts [N, top_k] (those `given`, where they are) and their weights [N, top_k]."""
    if r.softcap is not None:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = r.softcap * torch.tanh(wide / r.softcap)
    if r.over == "chosen":
        top = logits.topk(r.top_k, -1)
        weights = top.values.softmax(-1) if r.score == "softmax" else top.values.float().sigmoid()
        return top.indices, _normalized(weights, r) * r.scale
    if r.over == "near":
        chosen, weights = _near(logits, r)
        return chosen, _normalized(weights, r) * r.scale
    if r.score_rounding == "last":
        logits = logits.float()
    scores = SCORES[r.score](logits)
    if given is not None:
        return given, _normalized(scores.gather(-1, given), r) * r.scale
    choice = scores if selection_bias is None else scores + selection_bias
    if r.n_groups > 1:
        groups = choice.unflatten(-1, (r.n_groups, -1))  # [N, G, E/G]
        best = groups.topk(r.group_top, -1).values.sum(-1).topk(r.top_groups, -1).indices  # [N, top_groups]
        eligible = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        out = -torch.inf if r.masked_groups == "-inf" else 0.0
        choice = groups.masked_fill(~eligible.unsqueeze(-1), out).flatten(1)
    chosen = choice.topk(r.top_k, -1).indices
    return chosen, _normalized(scores.gather(-1, chosen), r) * r.scale


SCORES: dict[str, Callable[[Tensor], Tensor]] = {  # logits [N, E] -> scores
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda z: softplus(z).sqrt(),
}


def _near(logits: Tensor, r: Router) -> tuple[Tensor, Tensor]:
    """Experts one after the other, each with its softmax over what is left and near it, in the dtype of the logits."""
    left, chosen, weights = logits, [], []
    for _ in range(r.top_k):
        best, expert = left.max(-1, keepdim=True)
        far = (best - logits) / torch.maximum(logits.abs(), best) > r.near
        chosen.append(expert)
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, expert))
        left = left.scatter(-1, expert, -torch.inf)
    return torch.cat(chosen, -1), torch.cat(weights, -1)


def _normalized(weights: Tensor, r: Router) -> Tensor:
    if not r.normalize:
        return weights
    return weights / (weights.sum(-1, keepdim=True) + r.normalize_eps).clamp(min=r.normalize_floor)


def route(
    logits: Tensor,
    bias: Tensor | None,
    spec: Router,
    dtype: torch.dtype = torch.float32,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`route_reference`, as one kernel where Triton runs (experts are then int32). Weights in `dtype`."""
    # Scores in less than fp32, those over the near, and roots of a softplus are one family's each; the kernel has none.
    special = spec.score_rounding == "first" or spec.over == "near" or spec.score == "sqrt_softplus"
    special = special or given is not None
    if not has_triton(logits) or logits.dtype == torch.float64 or special:
        chosen, weights = route_reference(logits, bias, spec, given)
        return chosen, weights.to(dtype)
    n, e = logits.shape
    logits = logits.contiguous()
    experts = torch.empty(n, spec.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(n, spec.top_k, dtype=dtype, device=logits.device)
    _route[(n,)](
        logits, bias, experts, weights, e, e // spec.n_groups, spec.scale, spec.normalize_eps, spec.normalize_floor,
        spec.softcap or 0.0,
        TOP_K=spec.top_k, SOFTMAX=spec.score == "softmax", CHOSEN=spec.over == "chosen", BIAS=bias is not None,
        GROUPS=spec.n_groups, TOP_GROUPS=spec.top_groups, GROUP_TOP=spec.group_top,
        MASK_ZERO=spec.masked_groups == "zero", NORMALIZE=spec.normalize, SOFTCAP=spec.softcap is not None,
        E=power_of_2(e), K=power_of_2(spec.top_k), G=power_of_2(spec.n_groups),
        num_warps=1 if e <= 128 else 4, **overlap(logits),
    )  # fmt: skip
    return experts, weights


if triton is not None:

    @Kernel
    def _route(
        logits_ptr, bias_ptr, experts_ptr, weights_ptr, n_experts, per_group, scale, eps, floor, cap,
        TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, CHOSEN: tl.constexpr, BIAS: tl.constexpr,
        GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_TOP: tl.constexpr,
        MASK_ZERO: tl.constexpr, NORMALIZE: tl.constexpr, SOFTCAP: tl.constexpr,
        E: tl.constexpr, K: tl.constexpr, G: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        e = tl.arange(0, E)
        real = e < n_experts
        bias = e.to(tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + e, mask=real, other=0.0).to(tl.float32)
        after_previous(OVERLAP)
        raw = tl.load(logits_ptr + row * n_experts + e, mask=real, other=0.0)
        logits = raw.to(tl.float32)
        if SOFTCAP:
            logits = cap * tanh(logits / cap)
        masked = tl.where(real, logits, float("-inf"))
        if CHOSEN:
            score = masked
        elif SOFTMAX:
            p = tl.exp(masked - tl.max(masked, 0))
            score = p / tl.sum(p, 0)
        else:
            score = sigmoid(logits)
        choice = score
        if BIAS:
            choice += bias
        choice = tl.where(real, choice, float("-inf"))
        if GROUPS > 1:
            g = tl.arange(0, G)
            best = tl.full([G], float("-inf"), dtype=tl.float32)
            for i in tl.static_range(GROUPS):
                inside = tl.where(e // per_group == i, choice, float("-inf"))
                sum_of_best = 0.0
                for _ in tl.static_range(GROUP_TOP):
                    m = tl.argmax(inside, 0)
                    sum_of_best += tl.max(inside, 0)
                    inside = tl.where(e == m, float("-inf"), inside)
                best = tl.where(g == i, sum_of_best, best)
            kept = tl.zeros([E], dtype=tl.int32)
            for _ in tl.static_range(TOP_GROUPS):
                m = tl.argmax(best, 0)
                kept = tl.where(e // per_group == m, 1, kept)
                best = tl.where(g == m, float("-inf"), best)
            out = 0.0 if MASK_ZERO else float("-inf")
            choice = tl.where(real, tl.where(kept == 1, choice, out), float("-inf"))
        k = tl.arange(0, K)
        same: tl.constexpr = not BIAS and GROUPS == 1  # an expert is chosen by its score
        chosen = tl.zeros([K], dtype=tl.int32)
        weight = tl.full([K], float("-inf") if CHOSEN else 0.0, dtype=tl.float32)
        for i in tl.static_range(TOP_K):
            best_score, m = tl.max(choice, 0, return_indices=True)
            if not same:
                best_score = tl.sum(tl.where(e == m, score, 0.0), 0)
            chosen = tl.where(k == i, m, chosen)
            weight = tl.where(k == i, best_score, weight)
            choice = tl.where(e == m, float("-inf"), choice)
        if CHOSEN:
            if SOFTMAX:
                p = tl.exp(weight - tl.max(weight, 0))
                weight = (p / tl.sum(p, 0)).to(raw.dtype).to(tl.float32)
            else:
                weight = tl.where(k < TOP_K, sigmoid(weight), 0.0)
        if NORMALIZE:
            weight = weight / tl.maximum(tl.sum(weight, 0) + eps, floor)
        weight = weight * scale
        tl.store(experts_ptr + row * TOP_K + k, chosen, mask=k < TOP_K)
        tl.store(weights_ptr + row * TOP_K + k, weight.to(weights_ptr.dtype.element_ty), mask=k < TOP_K)
