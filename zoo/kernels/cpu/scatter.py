"""Weighted rows added where they belong, on a CPU: what experts computed, to the tokens that asked.

Unusual: a thread takes its share of the columns of every row, so a token's rows are added in their order.

Margin: 508 x 2048 in bf16 onto 256 rows in fp32, 2 cores of a Xeon, 290 us against 620 of torch's product, conversion
and `index_add_`; in a model, where torch's two copies come from fresh memory, some milliseconds.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from zoo.kernels.cpu import compiled, threads
from zoo.kernels.cpu.codes import CODE, numbers, wide


def add_rows(out: Tensor, rows: Tensor, at: Tensor, shares: Tensor | None) -> None:
    """out[at[i]] += rows[i] * shares[i]: out [N, d] in fp32, rows [M, d] of a dtype of `CODE`, at int64 [M], shares
    [M, 1] (None: 1)."""
    weights = None if shares is None else shares.float().view(-1).numpy()
    rows = rows.contiguous()
    with threads() as t:
        _add(out.numpy(), rows.data_ptr(), CODE[rows.dtype], at.numpy(), weights, t)


@compiled(parallel=True)
def _add(out, rows, code, at, weights, threads):
    d = out.shape[1]
    for t in prange(threads):
        first, last = d * t // threads, d * (t + 1) // threads
        for i in range(len(at)):
            onto, of = out[at[i], first:last], numbers(rows, i * d + first, last - first, code)
            share = np.float32(1) if weights is None else weights[i]
            for j in range(last - first):
                onto[j] += wide(of[j]) * share
