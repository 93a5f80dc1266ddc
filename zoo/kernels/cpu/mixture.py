"""A token's experts on a CPU, but for their products: which they are, with what weights, and the weighted sum of what they make.

Torch takes some forty calls for it, between products that leave nothing but weights in the caches: of a token of 8 experts of 64 in each of
6 layers, 24 ms in four bits, 14 were not the time in which its weights are read. And calls of ours can be kept (`zoo.model.tape`).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from zoo.kernels.cpu import compiled
from zoo.kernels.cpu.codes import CODE, address, bits, narrow, number, numbers, wide
from zoo.kernels.cpu.exp import exp
from zoo.kernels.cpu.shares import given, share, together
from zoo.spec import Router
from zoo.system.scratch import scratch


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, selection_bias: Tensor | None, r: Router) -> bool:
    """Whether `choose` serves them."""
    if (
        len(x) != 1
        or x.dtype not in CODE
        or any(t is not None and t.dtype != x.dtype for t in (weight, bias))
    ):
        return False
    if selection_bias is not None and selection_bias.dtype != torch.float32:
        return False
    if not all(t is None or t.is_contiguous() for t in (x, weight, bias, selection_bias)):
        return False
    if r.over == "chosen" and (selection_bias is not None or (r.normalize and r.score == "softmax")):
        return False  # there weights are rounded before they are divided
    plain = r.n_groups == 1 and r.softcap is None and r.score_rounding == "last" and not r.expert_scale
    return plain and r.over in ("all", "chosen") and r.score in ("softmax", "sigmoid")


def choose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    selection_bias: Tensor | None,
    r: Router,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x [1, d], as the router's weight [E, d] multiplies it -> the experts [1, top_k] (int64), by number, and their weights [1, top_k] in
    `dtype`."""
    n, d = weight.shape
    logits = scratch("router logits", n, np.float32)
    scores = scratch("router scores", 2 * n, np.float32)
    experts, weights = torch.empty(1, r.top_k, dtype=torch.int64), torch.empty(1, r.top_k, dtype=dtype)
    together(
        _logits(x.dtype, r.rounding == "first"), x.data_ptr(), weight.data_ptr(), address(bias), logits, n, d,
    )  # fmt: skip
    together(
        0, logits, scores, address(selection_bias), n, r.top_k, r.score == "sigmoid", r.over == "chosen", r.normalize,
        bits(r.normalize_eps), bits(r.normalize_floor), bits(r.scale), experts.data_ptr(), weights.data_ptr(), first=_choice(dtype),
    )  # fmt: skip
    return experts, weights


@compiled()
def _dot(x, y):
    total = np.float32(0)
    for i in range(len(x)):
        total += wide(x[i]) * wide(y[i])
    return total


@functools.cache
def _logits(dtype: torch.dtype, rounds: bool) -> int:
    code = CODE[dtype]

    def logits(told, thread, threads):
        x_at, weight, bias_at, out_at, n, d = given(told, 6)
        x, bias, out = (
            numbers(x_at, 0, d, code),
            numbers(bias_at, 0, n, code),
            numbers(out_at, 0, n, np.float32(0)),
        )
        for i in range(n * thread // threads, n * (thread + 1) // threads):
            y = _dot(x, numbers(weight, i * d, d, code))
            if bias_at:
                y += wide(bias[i])
            out[i] = wide(narrow(y, code)) if rounds else y

    return share(logits)


@compiled(fastmath=False)
def _sigmoid(x):
    e, one = exp(-abs(x)), np.float32(1)
    return (one if x >= 0 else e) / (one + e)


@compiled(fastmath=False)
def _softmax(x, out):
    most, total = np.float32(-np.inf), np.float32(0)
    for i in range(len(x)):
        most = max(most, x[i])
    for i in range(len(x)):
        out[i] = exp(x[i] - most)
        total += out[i]
    for i in range(len(x)):
        out[i] /= total


@functools.cache
def _choice(dtype: torch.dtype) -> int:
    to = CODE[dtype]

    def choice(told, thread, threads):
        (
            logits_at, scores_at, selection_at, n, k, sigmoid, chosen_alone, normalize, eps, floor, scale, experts_at, weights_at,
        ) = given(told, 13)  # fmt: skip
        logits, scores = numbers(logits_at, 0, n, np.float32(0)), numbers(scores_at, 0, n, np.float32(0))
        left = numbers(scores_at, n, n, np.float32(0))
        selection = numbers(selection_at, 0, n, np.float32(0))
        experts, weights = numbers(experts_at, 0, k, np.int64(0)), numbers(weights_at, 0, k, to)
        if chosen_alone:
            scores[:] = logits
        elif sigmoid:
            for i in range(n):
                scores[i] = _sigmoid(logits[i])
        else:
            _softmax(logits, scores)
        for i in range(n):
            left[i] = scores[i] + selection[i] if selection_at else scores[i]
        for j in range(k):
            best = 0
            for i in range(1, n):
                if left[i] > left[best]:
                    best = i
            left[best] = np.float32(-np.inf)
            at = j  # kept in order: what experts make is added in it
            while at > 0 and experts[at - 1] > best:
                experts[at] = experts[at - 1]
                at -= 1
            experts[at] = best
        for j in range(k):
            left[j] = scores[experts[j]]
        found = left[:k]
        if chosen_alone and sigmoid:
            for j in range(k):
                found[j] = _sigmoid(found[j])
        elif chosen_alone:
            _softmax(found, found)
        by = np.float32(1)
        if normalize:
            by = np.float32(0)
            for j in range(k):
                by += found[j]
            by = max(by + number(eps), number(floor))
        for j in range(k):
            weights[j] = narrow(found[j] / by * number(scale), to)

    return share(choice, fastmath=False)


def summed(y: Tensor, weights: Tensor, *onto: Tensor | None) -> Tensor:
    """The sum of the rows of y [k, d] times `weights` [k], in fp32, rounded: [1, d], added to each of `onto` [1, d] in turn. Rows times
    weights of their own dtype are rounded before."""
    k, d = y.shape
    out = torch.empty(1, d, dtype=y.dtype)
    first, second = (None if t is None else t.contiguous() for t in onto)
    together(
        _summed(y.dtype, weights.dtype), y.data_ptr(), weights.data_ptr(), k, d, address(first), address(second), out.data_ptr(),
    )  # fmt: skip
    return out


@functools.cache
def _summed(dtype: torch.dtype, weights_dtype: torch.dtype) -> int:
    code, of_weights, rounds = CODE[dtype], CODE[weights_dtype], dtype == weights_dtype

    def summed(told, thread, threads):
        y_at, weights_at, k, d, first_at, second_at, out_at = given(told, 7)
        weights, out = numbers(weights_at, 0, k, of_weights), numbers(out_at, 0, d, code)
        first, second = numbers(first_at, 0, d, code), numbers(second_at, 0, d, code)
        for i in range(d * thread // threads, d * (thread + 1) // threads):
            total = np.float32(0)
            for j in range(k):
                term = wide(numbers(y_at, j * d, d, code)[i]) * wide(weights[j])
                total += wide(narrow(term, code)) if rounds else term
            if first_at:
                total = wide(first[i]) + wide(narrow(total, code))
            if second_at:
                total = wide(second[i]) + wide(narrow(total, code))
            out[i] = narrow(total, code)

    return share(summed, fastmath=False)
