"""Attention of one token on a CPU, from the projection to what the heads found: norm and RoPE of queries and keys, the write to the cache, and
softmax over its slots, in one call.

Torch takes some thirty calls for it, each of which costs more than what it computes: between two products, which leave nothing but their
weights in the caches, five to ten microseconds. Norm and RoPE round where their plain twins do; scores, softmax and the sum of values
are in fp32, and only the result is rounded.

Margin: see `zoo.model.tape`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.kernels.cpu import caller, compiled
from zoo.kernels.cpu.codes import CODE, address, bits, narrow, number, numbers, wide
from zoo.kernels.cpu.exp import exp
from zoo.kernels.cpu.norm import _divided, _early, _late, _scale
from zoo.kernels.cpu.shares import given, share, together
from zoo.spec import Norm
from zoo.system.scratch import scratch

NO_NORM, DIVIDED, EARLY, LATE = range(4)
SLOT, SEEN = 14, 15  # which arguments these are
Table = tuple[Tensor, Tensor]


def fits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Table | None,
    *weights: Tensor | None,
) -> bool:
    """Whether `attend` serves them."""
    same = all(x.dtype == q.dtype and x.stride(-1) == 1 for x in (q, k, v, keys, values))
    if q.dtype not in CODE or not same or not keys.is_contiguous() or not values.is_contiguous():
        return False
    if table is not None and not all(t.dtype in CODE and t.is_contiguous() for t in table):
        return False
    if len({w.dtype for w in weights if w is not None}) > 1:
        return False
    return all(w is None or (w.dtype in CODE and w.dim() == 1 and w.is_contiguous()) for w in weights)


def attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot: int, seen: int, table: Table | None, interleaved: bool,
    norm: Norm | None, q_norm: Tensor | None, k_norm: Tensor | None, scale: float, sinks: Tensor | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """One token of each of B sequences, q [B, H D], k [B, K D], v [B, K V] as projected, by the tables [D' / 2] of its position: k and v go
    to the `slot` of keys [B, K, S, D] and values [B, K, S, V], of which each query sees the first `seen`. -> [B, H V]."""
    b, kv, slots, d = keys.shape
    dv, h = values.shape[-1], q.shape[-1] // d
    kind = (
        NO_NORM
        if norm is None
        else DIVIDED
        if norm.weight == "none"
        else EARLY
        if norm.rounding == "first"
        else LATE
    )
    plus_one, eps = norm is not None and norm.weight == "plus_one", 0.0 if norm is None else norm.eps
    cos, sin = (None, None) if table is None else table
    sink = None if sinks is None else sinks.float().contiguous()
    out = torch.empty(b, h * dv, dtype=q.dtype)
    found = scratch("scores", (b * h, slots), np.float32)
    queries = scratch("queries", (b * h, d * q.element_size()))
    wide_queries = scratch("wide queries", (b * h, max(d, dv)), np.float32)
    place, search = _made(q.dtype, *(q.dtype if x is None else x.dtype for x in (cos, q_norm)))
    told = together(
        search, q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k.stride(0), v.stride(0), keys.data_ptr(), values.data_ptr(), b, h, kv,
        slots, d, dv, slot, seen, address(cos), address(sin), 0 if cos is None else cos.shape[-1], interleaved, kind, plus_one, bits(eps),
        address(q_norm), address(k_norm), bits(scale), address(sink), bits(softcap or 0.0), queries, wide_queries,
        found, out.data_ptr(), first=place,
    )  # fmt: skip
    if caller.tape is not None:
        caller.tape.moves.append(At(told, slots))
    return out


@dataclass(frozen=True)
class At:
    """A call of `attend` on a tape, which each replay has to tell its position."""

    told: NDArray[np.int64]
    slots: int

    def move(self, position: int) -> None:
        self.told[SLOT], self.told[SEEN] = position % self.slots, min(position + 1, self.slots)


@compiled(fastmath=False)  # as it is written
def _turned(x, cos, sin, interleaved):
    """RoPE of a head, in place."""
    half = len(cos)
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, half + i)
        a, b, c, s, to = wide(x[first]), wide(x[second]), wide(cos[i]), wide(sin[i]), cos[i]
        left = wide(narrow(a * c, to)) - wide(narrow(b * s, to))
        right = wide(narrow(b * c, to)) + wide(narrow(a * s, to))
        x[first] = narrow(wide(narrow(left, to)), x[first])
        x[second] = narrow(wide(narrow(right, to)), x[second])


@compiled()
def _normed(x, kind, weight, plus, eps, out):
    if kind == NO_NORM:
        out[:] = x
    elif kind == DIVIDED:
        _divided(x, _scale(x, eps), out)
    elif kind == EARLY:
        _early(x, _scale(x, eps), weight, plus, out)
    else:
        _late(x, _scale(x, eps), weight, plus, out)


@compiled()
def _times(x, y):
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * wide(y[i])
    return total


@compiled()
def _plus(total, share, y):
    for i in range(len(y)):
        total[i] += share * wide(y[i])


@compiled(fastmath=False)  # what is added to be subtracted again would not be
def _exp(scores, most):
    for s in range(len(scores)):
        scores[s] = exp(scores[s] - most)


@compiled()
def _softmax(scores, sinks, head):
    """e to the scores over the largest, in place; their sum, a sink's included."""
    most = np.float32(-np.inf)
    for s in range(len(scores)):
        most = max(most, scores[s])
    if len(sinks):
        most = max(most, sinks[head])
    _exp(scores, most)
    total = np.exp(sinks[head] - most) if len(sinks) else np.float32(0)
    for s in range(len(scores)):
        total += scores[s]
    return total


@functools.cache
def _made(dtype: torch.dtype, table: torch.dtype, weight: torch.dtype) -> tuple[int, int]:
    """Two shares: what puts k and v where they belong, and the heads of queries."""
    code, of_table, of_weight = (CODE[d] for d in (dtype, table, weight))

    def place(told, thread, threads):
        (
            _, k, v, _, k_row, v_row, keys, values, b, _, kv, slots, d, dv, slot, _, cos_at, sin_at, half, interleaved, kind, plus_one, eps, _,
            k_norm, _, _, _, _, _, _, _,
        ) = given(told, 32)  # fmt: skip
        cos, sin = numbers(cos_at, 0, half, of_table), numbers(sin_at, 0, half, of_table)
        weight, plus = numbers(k_norm, 0, d, of_weight), np.float32(plus_one)
        for i in range(b * kv):
            row, h = i // kv, i % kv
            key = numbers(keys, (i * slots + slot) * d, d, code)
            _normed(numbers(k, row * k_row + h * d, d, code), kind, weight, plus, number(eps), key)
            _turned(key, cos, sin, interleaved)
            value = numbers(values, (i * slots + slot) * dv, dv, code)
            value[:] = numbers(v, row * v_row + h * dv, dv, code)

    def search(told, thread, threads):
        (
            q, _, _, q_row, _, _, keys, values, b, heads, kv, slots, d, dv, _, seen, cos_at, sin_at, half, interleaved, kind, plus_one, eps,
            q_norm, _, scale, sinks_at, softcap, queries, wide_queries, scores_at, out,
        ) = given(told, 32)  # fmt: skip
        cos, sin = numbers(cos_at, 0, half, of_table), numbers(sin_at, 0, half, of_table)
        weight, plus, cap = numbers(q_norm, 0, d, of_weight), np.float32(plus_one), number(softcap)
        sinks = numbers(sinks_at, 0, heads if sinks_at else 0, np.float32(0))
        wide_one = max(d, dv)
        for i in range(b * heads * thread // threads, b * heads * (thread + 1) // threads):
            row, h = i // heads, i % heads
            query, x = numbers(queries, i * d, d, code), numbers(wide_queries, i * wide_one, d, np.float32(0))
            _normed(numbers(q, row * q_row + h * d, d, code), kind, weight, plus, number(eps), query)
            _turned(query, cos, sin, interleaved)
            for j in range(d):
                x[j] = wide(query[j])
            first = (row * kv + h // (heads // kv)) * slots
            scores = numbers(scores_at, i * seen, seen, np.float32(0))
            for s in range(seen):
                scores[s] = _times(x, numbers(keys, (first + s) * d, d, code)) * number(scale)
            if cap != 0:
                for s in range(seen):
                    scores[s] = cap * np.float32(np.tanh(scores[s] / cap))
            total = _softmax(scores, sinks, h)
            found = numbers(wide_queries, i * wide_one, dv, np.float32(0))
            found[:] = 0
            for s in range(seen):
                _plus(found, scores[s], numbers(values, (first + s) * dv, dv, code))
            result = numbers(out, i * dv, dv, code)
            for j in range(dv):
                result[j] = narrow(found[j] / total, result[j])

    return share(place), share(search)
