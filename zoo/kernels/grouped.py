"""The experts of many tokens on Hopper, codes of prompts: each expert's weights times the rows of x that chose it, by `wgmma`.

Tensor cores take weights from registers, where codes are widened (`cuda/grouped.cu`), and rows of x from shared memory: the product is
W x^T. Serves plain weights of bf16 and codes whose scales are of rows, of 128 columns and rows (fp8), of 64 or more columns (int4), or of
the blocks of mxfp4 and nvfp4.

Unusual: a tile has as many rows of x as an expert has left, in steps of 16 or 32, and an expert's tiles are of one height, so little is
multiplied for nothing and no program waits for another. Scales of fp8 are of blocks: sums are kept over the scale of a block, and
multiplied by the quotient of two scales from one to the next, so no second set of sums is needed.

Margin on an H200 for 2048 tokens, sorting and summing included, against `experts._many_codes`: 32 experts of 2880 x 2880, top 4, in mxfp4
903 and 1194 us; 128 of 768 x 2048, top 8, in fp8 with blocks 463 and 585, in int4 379 and 492 (in bf16, by the copy engine, 442).

Tried and not faster: bf16 (479 us; 442); tiles of x of 160 rows and what is left (with programs in turn, every other had the high ones:
mxfp4 1166 us). What is left: without widening mxfp4's down product takes 218 us of 277, with a quarter of the products 169.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import codes, cuda
from zoo.kernels.gated import code
from zoo.kernels.launch import ceil_div, only_hopper
from zoo.kernels.weights import FOUR_BITS, FP8, FP8_ROWS, INT4, INT8, MXFP4, NVFP4, PLAIN, Weight
from zoo.spec import MLP

ROWS = 256
"""Rows of a weight that a program multiplies at once."""
MOST = 160
"""Rows of x."""
GROUP = 8
"""Tiles of an expert's rows that are multiplied by the same columns of its weight one after the other."""
ENOUGH = 96
"""Rows of x to an expert on average, from which it is used."""
THREADS = 384
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_SOURCE = cuda.Source("grouped", (*[_POINTER] * 8, *[_INT] * 3, *[_FLOAT] * 2), ("codes",))
_SCALES = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}


def serves(x: Tensor, up: Weight, down: Weight, spec: MLP) -> bool:
    """Whether `up_rows` and `down_rows` serve x [N, D] and these experts."""
    if not cuda.serves(x) or not only_hopper(x) or x.dtype != torch.bfloat16 or not x.is_contiguous():
        return False
    return x.data_ptr() % 16 == 0 and _fits(up, down.k if spec.gated else 0) and _fits(down, 0)


def pays(chosen: Tensor, up: Weight, down: Weight) -> bool:
    """Whether that is the fastest way, as far as it was measured: plain weights are read faster by the copy engine."""
    measured = (FP8, INT4, MXFP4)
    return up.kind in measured and down.kind in measured and chosen.numel() >= ENOUGH * up.codes.shape[0]


def _fits(w: Weight, half: int) -> bool:
    """`half`: from which row on the rows of up follow those of gate."""
    if (
        not w.lead
        or w.order is not None
        or w.k % 64
        or w.n % 64
        or not w.codes.is_contiguous()
        or w.codes.data_ptr() % 16
    ):
        return False
    if w.bias is not None and (w.bias.dtype != torch.bfloat16 or not w.bias.is_contiguous()):
        return False
    if w.kind == PLAIN:
        return w.codes.dtype == torch.bfloat16
    if not w.words or w.scale is None or not w.scale.is_contiguous() or w.scale.data_ptr() % 16:
        return False
    columns, dtype = w.n_scales[1], w.scale.dtype
    if w.kind in (FP8_ROWS, INT8):
        return dtype == torch.float32 and columns == 1
    if w.kind == FP8:
        blocks = w.columns == 128 and columns == ceil_div(w.k, 128) and w.rows is None and half % 128 == 0
        return blocks and dtype == torch.float32 and w.steady
    if w.kind == INT4:
        return (
            dtype in _SCALES and w.columns % 64 == 0 and w.k % w.columns == 0 and columns == w.k // w.columns
        )
    return w.kind in (MXFP4, NVFP4)


def order_of(w: Weight) -> int:
    """The order of channels that w is multiplied in, as `cuda/grouped.cu` numbers them (see `codes.in_order`)."""
    return 0 if w.kind == PLAIN else 2 if w.kind in FOUR_BITS else 1


def in_order(x: Tensor, w: Weight) -> Tensor:
    """x [N, K] in the order of channels that w is multiplied in."""
    return x if w.kind == PLAIN else codes.in_order(x, w)


def up_rows(
    x: Tensor, order: Tensor, tiles: Tensor, up: Weight, down: Weight, spec: MLP, top_k: int
) -> Tensor:
    """What down is multiplied by: of the pairs (token, expert) in `order`, in tiles of MOST rows (see `experts.sort_by_expert`), what gate
    and up of their experts make of x [N, D]; [pairs, F], in the order of channels of `down`."""
    h = x.new_empty(len(order), down.k)
    _launch(in_order(x, up), order, tiles, up, h, 1, order_of(down), spec, top_k)
    return h


def down_rows(h: Tensor, order: Tensor, tiles: Tensor, down: Weight) -> Tensor:
    """What each pair's expert makes of its row of h: [pairs, D], pairs by tokens."""
    y = h.new_empty(len(order), down.n)
    _launch(h, order, tiles, down, y, 0, 0, None, 1)
    return y


def stages(room: int, kind: int, most: int) -> int:
    """Steps of 64 channels that fit in so many bytes of shared memory, and their barriers."""
    pieces = 8 if kind == PLAIN else 2 if kind in FOUR_BITS else 4
    return min(8, (room - 1024) // (ROWS * pieces * 16 + most * 128 + 16))


def _launch(
    x: Tensor,
    order: Tensor,
    tiles: Tensor,
    w: Weight,
    out: Tensor,
    up: int,
    given: int,
    spec: MLP | None,
    top_k: int,
) -> None:
    device = x.device.index or 0
    gated = spec is not None and spec.gated
    steps = stages(cuda.shared(device), w.kind, MOST)
    pieces = 8 if w.kind == PLAIN else 2 if w.kind in FOUR_BITS else 4
    constants: dict[str, Any] = {
        "KIND": w.kind, "K": w.k, "COLUMNS": w.columns if w.kind == INT4 else w.k, "UP": up, "TOP_K": top_k, "GATED": gated,
        "ACT": 0 if spec is None else code(spec), "SCALE": _SCALES[w.scale.dtype] if w.scale is not None and w.kind == INT4 else 0, "ORDER": given,
        "MOST": MOST, "STAGES": steps, "GROUP": GROUP,
    }  # fmt: skip
    limit, alpha = (0.0, 0.0) if spec is None else (spec.limit or 0.0, spec.alpha)
    programs = min(cuda.multiprocessors(device), tiles.shape[1] * ceil_div(w.n, ROWS))
    _SOURCE.launch(
        x, programs, THREADS, 1024 + steps * (ROWS * pieces * 16 + MOST * 128 + 16),
        (*w.pointers, x, order, tiles, out, w.n, w.n_scales[0], tiles.shape[1], limit, alpha),
        **constants,
    )  # fmt: skip
