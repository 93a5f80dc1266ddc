"""Gated activations of a few rows on a CPU: [M, 2 F] (gate | up) -> [M, F] in one call, which rounds after each step as the plain expression
does."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from zoo.kernels.cpu import compiled
from zoo.kernels.cpu.codes import CODE, narrow, numbers, wide
from zoo.kernels.cpu.exp import exp
from zoo.kernels.cpu.shares import given, share, together

ACTS = ("silu", "gelu_tanh")


def fits(h: Tensor, act: str) -> bool:
    """Whether `gated` serves them."""
    return act in ACTS and h.dtype in CODE and h.is_contiguous()


def gated(h: Tensor, act: str) -> Tensor:
    """act(gate) times up."""
    f = h.shape[-1] // 2
    out = torch.empty(*h.shape[:-1], f, dtype=h.dtype)
    together(_made(h.dtype, act), h.data_ptr(), out.data_ptr(), out.numel() // f, f)
    return out


@compiled(fastmath=False)
def _silu(gate, up, out):
    one = np.float32(1)
    for i in range(len(gate)):
        x = wide(gate[i])
        e = exp(-abs(x))
        y = (x if x >= 0 else x * e) / (one + e)
        out[i] = narrow(wide(narrow(y, gate[i])) * wide(up[i]), gate[i])


@compiled(fastmath=False)
def _gelu_tanh(gate, up, out):
    one = np.float32(1)
    for i in range(len(gate)):
        x = wide(gate[i])
        z = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)
        e = exp(np.float32(-2) * abs(z))
        tanh = (one - e) / (one + e)
        y = np.float32(0.5) * x * (one + (tanh if z >= 0 else -tanh))
        out[i] = narrow(wide(narrow(y, gate[i])) * wide(up[i]), gate[i])


@functools.cache
def _made(dtype: torch.dtype, act: str) -> int:
    code, gelu = CODE[dtype], act == "gelu_tanh"

    def made(told, thread, threads):
        h, out, rows, f = given(told, 4)
        first, n = f * thread // threads, f * (thread + 1) // threads - f * thread // threads
        for i in range(rows):
            gate, up = numbers(h, 2 * i * f + first, n, code), numbers(h, (2 * i + 1) * f + first, n, code)
            if gelu:
                _gelu_tanh(gate, up, numbers(out, i * f + first, n, code))
            else:
                _silu(gate, up, numbers(out, i * f + first, n, code))

    return share(made)
