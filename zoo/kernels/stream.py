"""Codes of a weight times one row of x, streamed through shared memory: the products of a decode step on Hopper.

A program to a multiprocessor, which has as many rows as all others and keeps 64 to 96 KB of them on their way, whatever it multiplies
meanwhile (`cuda/stream.cu`). Serves codes whose scales are of rows, of 128 columns or of mxfp4's and nvfp4's blocks; the experts of a token,
too; and an RMS norm of x is made on the way.

Unusual: a thread copies to shared memory just what it will multiply, so no barrier stands between a byte's arrival and its product.
The next kernel starts once the last byte has been asked for.

Margin on an H200, four products of an 8B layer one after the other, against `zoo.kernels.codes` and `weights.rows_times`: fp8 with a scale
to all 56 and 69 us (at a copy's rate 52), fp8 with blocks 58 and 77, int4 36 and 48 (27), AWQ 39 and 56 (29). A token's experts:
gpt-oss-20b's in mxfp4 24 and 34 us (12), Qwen3-30B-A3B's in fp8 14 and 18 (9), in int4 11 and 12 (5).

Tried and slower: more on its way before x is there, or asked of L2 by the kernel before (a step of 8B in fp8 by 1 to 4 %): what is waited
for then waits behind it. Two programs to a multiprocessor (by a third): those of one kernel come to lie beside each other.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.kernels import cuda
from zoo.kernels.gated import code
from zoo.kernels.launch import ceil_div
from zoo.kernels.weights import AFFINE4, FOUR_BITS, FP8, FP8_ROWS, INT4, INT8, MXFP4, NVFP4, Weight
from zoo.spec import MLP, Norm

WARPS = 16
ROWS = 16
"""Rows of a weight that tensor cores multiply at once: a unit of work."""
FEWEST = 64
"""Units, from which a weight keeps the GPU busy."""
MOST = 24
"""Units that a program multiplies at most: their sums are kept till the end."""
GROUP = 128
"""Columns that share a scale, of integers and of fp8 with blocks."""
MATRIX, UP, DOWN = range(3)  # what is multiplied: a lone matrix, or these of a token's experts
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_SOURCE = cuda.Source("stream", (*[_POINTER] * 11, *[_INT] * 3, *[_FLOAT] * 3), ("codes",))
_SCALES = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}

Before = tuple[Tensor | None, Norm]
"""An RMS norm of x that is made on the way: its weight and what it is."""


def serves(x: Tensor, w: Weight, gated: bool = False, norm: Before | None = None) -> bool:
    """Whether `times` and `gated_times` (`gated`) serve x and a lone matrix of codes."""
    if (
        w.lead
        or not _fits(x, w, gated)
        or w.n // ROWS < FEWEST
        or _plan(x, w, MATRIX, 1).shared > cuda.shared(x.device.index or 0)
    ):
        return False
    if norm is None:
        return True
    weight, spec = norm
    plain = weight is None or (
        weight.dim() == 1 and weight.dtype in (torch.bfloat16, torch.float32) and weight.is_contiguous()
    )
    return spec.kind == "rms" and plain and w.order is None


def serves_experts(x: Tensor, chosen: Tensor, weights: Tensor, up: Weight, down: Weight, spec: MLP) -> bool:
    """Whether `experts` serves one token x [1, D] and its experts."""
    top_k = chosen.numel()
    if len(x) != 1 or top_k not in (1, 2, 4, 8, 16) or not (up.lead and down.lead):
        return False
    if weights.dtype not in (torch.bfloat16, torch.float32) or not (
        _fits(x, up, spec.gated) and _fits(x, down, False)
    ):
        return False
    if up.n // ROWS < WARPS or min(up.n * top_k, down.n) // ROWS < FEWEST:
        return False
    plan = _plan(x, down, DOWN, top_k)
    room = max(plan.shared, _plan(x, up, UP, top_k).shared)
    return room <= cuda.shared(x.device.index or 0) and plan.units * ROWS * top_k <= WARPS * 32


def times(x: Tensor, w: Weight, residual: Tensor | None, out: Tensor, norm: Before | None = None) -> None:
    """x [.., K], one row, or its norm, times w, plus its bias and `residual`, into out [.., N]."""
    _launch(x, w, out, MATRIX, residual=residual, norm=norm)


def gated_times(x: Tensor, w: Weight, spec: MLP, out: Tensor, norm: Before | None = None) -> None:
    """act(gate x) * up x of one row x [.., K], or its norm, and w (gate rows | up rows), into out [.., N / 2]."""
    _launch(x, w, out, MATRIX, spec, norm=norm)


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Weight,
    down: Weight,
    spec: MLP,
    shared: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """`zoo.kernels.experts.experts` of one token, whose weights multiply what experts give."""
    h, out = x.new_empty(chosen.numel(), down.k), torch.empty_like(x)
    _launch(x, up, h, UP, spec, chosen=chosen)
    _launch(h, down, out, DOWN, chosen=chosen, weights=weights, shared=shared, residual=residual)
    return out


def _fits(x: Tensor, w: Weight, gated: bool) -> bool:
    if not cuda.serves(x) or x.dtype != torch.bfloat16 or not x.is_contiguous() or x.data_ptr() % 16:
        return False
    if not w.words or w.n % ROWS or w.k % 32 or not _scaled(w):
        return False
    return w.bias is None or (w.bias.dtype == x.dtype and w.bias.is_contiguous())


def _scaled(w: Weight) -> bool:
    """Whether the scales of w lie as the kernel reads them."""
    if w.scale is None or w.scale.data_ptr() % 16:
        return False
    columns, dtype = w.n_scales[1], w.scale.dtype
    if w.kind in (FP8_ROWS, INT8):
        return dtype == torch.float32 and columns == 1
    if w.kind == FP8:
        blocks = w.columns == GROUP and columns == ceil_div(w.k, GROUP) and w.rows is None
        return blocks and dtype == torch.float32
    if w.kind in (INT4, AFFINE4):  # a step's two scales are read at once
        whole = w.columns == GROUP and w.k % (2 * GROUP) == 0
        if w.kind == AFFINE4:
            return whole and dtype == torch.float32 and columns == w.k // GROUP * 2
        return whole and dtype in _SCALES and columns == w.k // GROUP
    return w.kind in (MXFP4, NVFP4)


class Plan(NamedTuple):
    """How programs share a weight's rows, and what they have on its way."""

    programs: int
    units: int  # of a program
    team: int  # warps that share a row of x
    depth: (
        int  # steps of a warp that there is room for, those on their way, and those of them before x is there
    )
    at_once: int
    first: int
    shared: int  # bytes of shared memory


def _plan(x: Tensor, w: Weight, mode: int, top_k: int) -> Plan:
    return _planned(cuda.multiprocessors(x.device.index or 0), w.n, w.k, w.kind, mode, top_k)


@functools.cache
def _planned(multiprocessors: int, n: int, k: int, kind: int, mode: int, top_k: int) -> Plan:
    units = n // ROWS * (top_k if mode == UP else 1)
    per, slots = min(MOST, ceil_div(units, multiprocessors)), top_k if mode == DOWN else 1
    chunks = ceil_div(k // 2 if kind in FOUR_BITS else k, 128)
    # All warps have as much to do, and of those ways the one in which they turn to the next row the least.
    ways = [team for team in (1, 2, 4, 8, 16) if team * slots <= WARPS]
    team = min(ways, key=lambda team: (ceil_div(per, WARPS // (team * slots)) * ceil_div(chunks, team), team))
    # Measured on an H200.
    depth, at_once, first = (4, 3, 2) if mode == MATRIX and kind not in FOUR_BITS else (3, 2, 1)
    of_x = chunks * 8 * (64 if kind in FOUR_BITS else 32) + (chunks * 8 if kind in (INT4, AFFINE4) else 0)
    shared = WARPS * depth * 2048 + slots * (of_x + per * team * 64)
    return Plan(ceil_div(units, per), per, team, depth, at_once, first, shared)


def _launch(
    x: Tensor,
    w: Weight,
    out: Tensor,
    mode: int,
    spec: MLP | None = None,
    residual: Tensor | None = None,
    chosen: Tensor | None = None,
    weights: Tensor | None = None,
    shared: Tensor | None = None,
    norm: Before | None = None,
) -> None:
    top_k = 1 if chosen is None else chosen.numel()
    plan, slots = _plan(x, w, mode, top_k), top_k if mode == DOWN else 1
    assert w.scale is not None
    constants: dict[str, Any] = {
        "KIND": w.kind, "K": w.k, "MODE": mode, "TOP_K": top_k, "TEAM": plan.team, "TEAMS": WARPS // (plan.team * slots),
        "DEPTH": plan.depth, "AT_ONCE": plan.at_once, "FIRST": plan.first,
        "GATED": spec is not None and spec.gated, "ACT": 0 if spec is None else code(spec),
        "SCALE": _SCALES.get(w.scale.dtype, 0), "WEIGHT": weights is not None and weights.dtype == torch.float32,
        "NORM": 0, "PLUS_ONE": 0, "WIDE": 0,
    }  # fmt: skip
    factor, eps = None, 0.0
    if norm is not None:
        factor, of = norm
        eps = of.eps
        constants |= {
            "NORM": 1 if factor is None else 2 if of.rounding == "first" else 3,
            "PLUS_ONE": of.weight == "plus_one", "WIDE": factor is not None and factor.dtype == torch.float32,
        }  # fmt: skip
    limit, alpha = (0.0, 0.0) if spec is None else (spec.limit or 0.0, spec.alpha)
    _SOURCE.launch(
        x, plan.programs, WARPS * 32, plan.shared,
        (*w.pointers, x, shared, residual, out, chosen, weights, factor, w.n, w.n_scales[0], plan.units, limit, alpha, eps),
        **constants,
    )  # fmt: skip
