"""Attention of one token as one kernel, on Hopper: QK norm, RoPE, the write to the cache and the softmax over its keys (`cuda/attend.cu`).

`zoo.kernels.rope.place` and `zoo.kernels.attention.decode` in one, of heads of whole 32 channels in bf16. A cluster of programs shares the
keys of a key head and joins its results in shared memory.

Margin on an H200, alone in a graph, against those three kernels: 32 heads over 8 of 128 channels after 2048 tokens 5.6 and 7.4 us, after
200 3.9 and 6.7; 64 over 8 of 64 with sinks 4.8 and 6.2, with a window of 128 3.1 and 4.4. A step of 8B in fp8 takes 2.31 ms, 2.39 before, in bf16
4.10 and 4.21, of Qwen3-30B-A3B's 24 layers in fp8 0.97 and 1.00. Long caches are read faster by more programs (32000 keys 51 and 41 us), see `SHORT`
and `SMALL`.

Tried and not faster in all three: clusters of 16, 4 warps to a program, one tile or three on their way.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.kernels import cuda
from zoo.kernels.launch import ceil_div
from zoo.spec import Norm

WARPS = 8
MOST = 8
"""Programs of a cluster, at most."""
SHORT, SMALL = 1 << 20, 1 << 23
"""Channels of all keys that there is room for, up to which a head's, and all heads', are attended to here."""
TILE = 16
"""Keys that a warp multiplies at once."""
LOG2E = 1.4426950408889634
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_SOURCE = cuda.Source("attend", (*[_POINTER] * 12, *[_INT] * 16, *[_FLOAT] * 3))
_WIDE = {torch.bfloat16: False, torch.float32: True}


class Turn(NamedTuple):
    """What is done to queries and keys: a norm over each head (`after` RoPE), and RoPE by cos and sin [1, dim / 2]."""

    norm: Norm | None
    weights: tuple[Tensor | None, Tensor | None]  # [D], of queries and keys
    after: bool
    table: tuple[Tensor, Tensor] | None
    interleaved: bool


def serves(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    turn: Turn,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
) -> bool:
    """Whether `attend` serves q [B, 1, H, D], k and v [B, 1, K, D], and keys and values [B, C, K, D]."""
    d, group = q.shape[3], q.shape[2] // k.shape[2]
    if q.shape[1] != 1 or v.shape[3] != d or d % 32 or d > 256 or group > 16 or d * ceil_div(group, 8) > 256:
        return False
    if (read := _reach(keys, window, chunk) * d) > SHORT or read * len(k) * k.shape[2] > SMALL:
        return False
    if not cuda.serves(q) or any(
        x.dtype != torch.bfloat16 or x.stride(-1) != 1 for x in (q, k, v, keys, values)
    ):
        return False
    if any(x.data_ptr() % 16 or any(n % 8 or n >= 1 << 31 for n in x.stride()[:3]) for x in (keys, values)):
        return False
    if turn.norm is not None and turn.norm.kind != "rms":
        return False
    beside = [*turn.weights, *(turn.table or ()), sinks]
    if any(x is not None and (x.dtype not in _WIDE or not x.is_contiguous()) for x in beside):
        return False
    if (
        any(w is not None and w.shape != (d,) for w in turn.weights)
        or len({None if w is None else w.dtype for w in turn.weights}) > 1
    ):
        return False
    return _room(d, group, MOST, _depth(d)) <= cuda.shared(q.device.index or 0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    turn: Turn,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`place_reference`, then `decode_reference`: q [B, 1, H, D], k and v [B, 1, K, D] as projected, keys and values [B, C, K, D] of
    the cache, `position` a tensor of one int -> [B, H, D]. Since the pass began nobody wrote to the cache of this layer
    (see `zoo.kernels.attention.decode`, `placed`)."""
    (b, _, h, d), kv, slots = q.shape, k.shape[2], keys.shape[1]
    group, out = h // kv, q.new_empty(b, h, d)
    most = _reach(keys, window, chunk)
    splits = _splits(b * kv, most, cuda.multiprocessors(q.device.index or 0))
    depth = min(_depth(d), ceil_div(most, TILE * WARPS * splits))
    norm, (q_norm, k_norm) = turn.norm, turn.weights
    cos, sin = turn.table or (None, None)
    _SOURCE.launch(
        q, b * kv * splits, WARPS * 32, _room(d, group, splits, depth),
        (q, k, v, keys, values, out, position, cos, sin, q_norm, k_norm, sinks, slots, window, chunk, kv,
         q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2), *keys.stride()[:3], *values.stride()[:3],
         scale * LOG2E, (softcap or 0.0) * LOG2E, 0.0 if norm is None else norm.eps),
        D=d, GROUP=group, SPLITS=splits, WARPS=WARPS, DEPTH=depth,
        NORM=0 if norm is None else 1 if norm.weight == "none" else 2 if norm.rounding == "first" else 3,
        AFTER=turn.after, PLUS_ONE=norm is not None and norm.weight == "plus_one", WIDE=q_norm is not None and _WIDE[q_norm.dtype],
        HALF=0 if cos is None else cos.shape[-1], INTERLEAVED=turn.interleaved, TABLE=cos is not None and _WIDE[cos.dtype],
        CAPPED=softcap is not None, SINK=0 if sinks is None else 1 + _WIDE[sinks.dtype],
    )  # fmt: skip
    return out


def _reach(keys: Tensor, window: int | None, chunk: int | None) -> int:
    """How many of the keys [B, C, K, D] a query sees at most."""
    slots = keys.shape[1]
    return min(slots, window or slots, chunk or slots)


@functools.cache
def _splits(key_heads: int, keys: int, multiprocessors: int) -> int:
    """Programs that share the keys of a head: as many as the GPU has room for at once, with work for two warps each."""
    most = min(MOST, multiprocessors // key_heads, ceil_div(keys, 2 * TILE))
    return 1 << (max(1, most).bit_length() - 1)


def _depth(d: int) -> int:
    """Times 16 keys and values of a warp that are on their way."""
    return 2 if d <= 192 else 1


@functools.cache
def _room(d: int, group: int, splits: int, depth: int) -> int:
    """Bytes of shared memory of a program: keys and values on their way, queries, the newest key and value, and what is joined."""
    ring = WARPS * depth * TILE * (2 * d + ceil_div(d, 64) * 128)
    queries = ceil_div(group, 8) * 8 * (2 * d + 64)
    joined = 4 * splits * ceil_div(group * d, splits) + 8 * group * (WARPS + splits)
    return ring + queries + 4 * d + 4 * WARPS * d + joined
