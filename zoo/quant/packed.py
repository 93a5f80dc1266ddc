"""Codes of a few bits in words of 32, and what groups of them stand for; for numpy and torch alike.

Code k of a row lies at bits [bits * k, bits * (k + 1)) of its words, from the low bits up, across words where it must.

Unusual: only operators that both libraries have are used, so a formula is written once: a conversion evaluates it in numpy,
a model in torch, and both give the same bits. `i` is the axis of inputs (1, or 0 where a release has it first).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo.quant.base import packing

Array = Any
"""An array of numpy or a tensor of torch."""


def is_torch(x: Array) -> bool:
    return type(x).__module__.partition(".")[0] == "torch"


def fp32(x: Array) -> Array:
    """The numbers in fp32."""
    if is_torch(x):
        import torch

        return x.to(torch.float32)
    return x.astype("float32")


def constants(values: Sequence[float], like: Array, dtype: str = "float32") -> Array:
    """These numbers in an array of the same library and device."""
    if is_torch(like):
        import torch

        return torch.tensor(values, dtype=getattr(torch, dtype), device=like.device)
    import numpy as np

    return np.array(values, dtype)


def unpack(words: Array, bits: int, i: int) -> Array:
    """int32 codes of int32 words of a matrix, unpacked along axis `i`."""
    codes, width = packing(bits)
    mask = (1 << bits) - 1
    if width == 1:
        shifts = constants(range(0, 32, bits), words, "int32")
        if i:
            found = (words[:, :, None] >> shifts) & mask
            return found.reshape(words.shape[0], -1)
        found = (words[:, None, :] >> shifts[:, None]) & mask
        return found.reshape(-1, words.shape[1])
    n = words.shape[i] // width
    shape = (words.shape[0], n, width) if i else (n, width, words.shape[1])
    groups = words.reshape(shape)
    out = None
    for k in range(codes):
        word, shift = divmod(bits * k, 32)
        at = groups[:, :, word] if i else groups[:, word]
        code = at >> shift
        if (rest := shift + bits - 32) > 0:  # its last bits are the first of the next word
            after = groups[:, :, word + 1] if i else groups[:, word + 1]
            code = (code & ((1 << (bits - rest)) - 1)) | (after << (bits - rest))
        if out is None:
            out = _empty(code, (words.shape[0], n, codes) if i else (n, codes, words.shape[1]))
        if i:
            out[:, :, k] = code & mask
        else:
            out[:, k] = code & mask
    assert out is not None
    return out.reshape((words.shape[0], -1) if i else (-1, words.shape[1]))


def _empty(like: Array, shape: tuple[int, ...]) -> Array:
    if is_torch(like):
        return like.new_empty(shape)
    import numpy as np

    return np.empty(shape, like.dtype)


def affine(
    codes: Array, zero: Array | int, scale: Array, group: int, i: int, at: int = 0, order: Array | None = None
) -> Array:
    """(codes - zero) * scale in fp32, of which `zero` and `scale` have one for each `group` columns (0: for all), or
    for column k that number `order[k]`. `at`: columns of the first group that come before the first of `codes`."""
    n = codes.shape[i]
    if order is None and group and (at or n % group):
        order = (constants(range(at, at + n), codes, "int64")) // group
    if order is not None:
        order = order.reshape(-1)
        if _blocks(order, group, n):
            order = None
    if order is not None:
        zero = zero if isinstance(zero, int) else (zero[:, order] if i else zero[order])
        return fp32(codes - zero) * (scale[:, order] if i else scale[order])
    groups = n // group if group else 1
    rows = codes.shape[1 - i]
    one: tuple[Any, ...] = (slice(None), None) if i == 0 else (slice(None), slice(None), None)
    grouped = codes.reshape((rows, groups, -1) if i else (groups, -1, rows))
    values = fp32(grouped - (zero if isinstance(zero, int) else zero[one]))
    values *= scale[one]
    return values.reshape(codes.shape)


def _blocks(order: Array, group: int, n: int) -> bool:
    """Whether columns are in groups one after the other, as most are."""
    if not group or n % group:
        return False
    return bool((order == constants(range(n), order, "int64") // group).all())
