"""The likeliest token: argmax over a vocabulary, which is too long for one program and too short for a pass over memory.

Margin: of one row of 128256 in bf16 torch's (max over pieces, argmax over those) take 22 us on an H200, and these two kernels 3 after
the head's: a step of an 8B model in four bits takes 2 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.launch import Kernel, ceil_div, has_triton, overlap, power_of_2, triton

if triton is not None:
    import triton.language as tl

    from zoo.kernels.launch import after_previous

PIECE = 2048  # numbers of a program


def likeliest_reference(logits: Tensor) -> Tensor:
    """argmax of [B, V] over V, in two stages: one block per row is slow for a large vocabulary."""
    parts = next((n for n in (64, 32, 16, 8) if logits.shape[-1] % n == 0), 1)
    best, where = logits.unflatten(-1, (parts, -1)).max(-1)  # [B, parts]
    part = best.argmax(-1, keepdim=True)
    inside = logits.shape[-1] // parts
    best_of_all: Tensor = (where.gather(-1, part) + part * inside).squeeze(-1)
    return best_of_all


def likeliest(logits: Tensor) -> Tensor:
    """argmax of [B, V] over V: int64 [B], the first among equals where Triton runs. (Of logits that are no numbers: some.)"""
    if not has_triton(logits) or logits.dtype == torch.float64 or logits.stride(-1) != 1:
        return likeliest_reference(logits)
    b, v = logits.shape
    pieces = ceil_div(v, PIECE)
    best = torch.empty(b, pieces, dtype=torch.float32, device=logits.device)
    where = torch.empty(b, pieces, dtype=torch.int32, device=logits.device)
    out = torch.empty(b, dtype=torch.int64, device=logits.device)
    _best_of_pieces[(pieces, b)](
        logits, best, where, v, logits.stride(0), BLOCK=PIECE, num_warps=4, **overlap(logits)
    )
    _best_piece[(b,)](best, where, out, pieces, BLOCK=power_of_2(pieces), num_warps=4, **overlap(logits))
    return out


if triton is not None:

    @Kernel
    def _best_of_pieces(x_ptr, best_ptr, where_ptr, V, stride, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
        piece, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        v = piece * BLOCK + tl.arange(0, BLOCK)
        after_previous(OVERLAP)
        x = tl.load(x_ptr + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
        best, i = tl.max(x, 0, return_indices=True)
        at = row * tl.num_programs(0) + piece
        tl.store(best_ptr + at, best)
        tl.store(where_ptr + at, tl.minimum(piece * BLOCK + i, V - 1))  # of NaN a lane beyond may be the best

    @Kernel
    def _best_piece(best_ptr, where_ptr, out_ptr, n_pieces, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
        row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        after_previous(OVERLAP)
        best = tl.load(best_ptr + row * n_pieces + i, mask=i < n_pieces, other=float("-inf"))
        piece = tl.minimum(tl.argmax(best, 0), n_pieces - 1)
        tl.store(out_ptr + row, tl.load(where_ptr + row * n_pieces + piece).to(tl.int64))
