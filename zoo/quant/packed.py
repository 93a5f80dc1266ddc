"""Codes of a few bits in words of 32, and what groups of them stand for; for numpy and torch alike.

Code k of a row lies at bits [bits * k, bits * (k + 1)) of its words, from the low bits up, across words where it must.

Unusual: only operators that both libraries have are used, so a formula is written once: a conversion evaluates it in numpy,
a model in torch, and both give the same bits. `i` is the axis of inputs (1, or 0 where a release has it first).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo.errors import ZooError
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
    return x.astype("float32", copy=False)


def constants(values: Sequence[float], like: Array) -> Array:
    """These numbers in fp32, in an array of the same library and device."""
    if is_torch(like):
        import torch

        return torch.tensor(values, dtype=torch.float32, device=like.device)
    import numpy as np

    return np.array(values, np.float32)


def counted(first: int, last: int, like: Array) -> Array:
    """The whole numbers from `first` up to `last` in an array of the same library and device."""
    if is_torch(like):
        import torch

        return torch.arange(first, last, device=like.device)
    import numpy as np

    return np.arange(first, last)


def one(x: Array, what: str) -> Array:
    """The only number of a tensor, without axes."""
    if (n := len(x.reshape(-1))) != 1:
        raise ZooError(f"{what} has {n} numbers, expected one")
    return x.reshape(())


def indices(codes: Array) -> Array:
    """Codes of a byte as places in a table."""
    if not is_torch(codes):
        return codes
    import torch

    return codes.view(torch.uint8).long()


def pairs(values: Sequence[float], codes: Array) -> Array:
    """fp32 [rows, 2 B] of bytes [rows, B], each of two codes of four bits, the low half first. `values`: of the 16 codes.

    Both are looked up at once, as one number of 64 bits."""
    both = constants([values[b >> h & 15] for b in range(256) for h in (0, 4)], codes)
    if is_torch(codes):
        return both.reshape(256, 2)[indices(codes)].reshape(codes.shape[0], -1)
    import numpy as np

    return np.take(both.view(np.complex64), codes.view(np.uint8), mode="clip").view(np.float32)


def scaled(values: Array, scale: Array, group: int) -> Array:
    """values [rows, columns] times the scale [rows, groups] of its group, in place where it can be."""
    grouped = values.reshape(values.shape[0], -1, group)
    grouped *= scale[:, :, None]
    return grouped.reshape(values.shape)


def octets(words: Array) -> Array:
    """int32 words as four bytes each, on an axis behind the others."""
    if is_torch(words):
        import torch

        flat = words.reshape(-1).contiguous()
        flat = flat.as_strided(flat.shape, (1,))  # of one element a contiguous axis may have any stride
        return flat.view(torch.uint8).view(*words.shape, 4)
    import numpy as np

    return np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)


def empty(shape: tuple[int, ...], like: Array) -> Array:
    """Bytes to be filled, in an array of the same library and device."""
    if is_torch(like):
        import torch

        return torch.empty(shape, dtype=torch.uint8, device=like.device)
    import numpy as np

    return np.empty(shape, np.uint8)


def unpack(words: Array, bits: int, i: int) -> Array:
    """Codes (bytes) of int32 words of a matrix, unpacked along axis `i`."""
    codes, width = packing(bits)
    mask = (1 << bits) - 1
    n = words.shape[i] // width
    out = empty((words.shape[0], n, codes) if i else (n, codes, words.shape[1]), words)
    parts = octets(words)
    parts = (
        parts.reshape((words.shape[0], n, 4 * width)) if i else parts.reshape((n, width, words.shape[1], 4))
    )
    for k in range(codes):
        at, shift = divmod(bits * k, 8)
        code = _octet(parts, at, i) >> shift
        if (rest := shift + bits - 8) > 0:  # its last bits are the first of the next byte
            code = (code & ((1 << (bits - rest)) - 1)) | (_octet(parts, at + 1, i) << (bits - rest))
        if i:
            out[:, :, k] = code & mask
        else:
            out[:, k] = code & mask
    return out.reshape((words.shape[0], -1) if i else (-1, words.shape[1]))


def _octet(parts: Array, at: int, i: int) -> Array:
    """Byte `at` of each run of words."""
    return parts[:, :, at] if i else parts[:, at // 4, :, at % 4]


def affine(
    codes: Array, zero: Array | int, scale: Array, group: int, i: int, at: int = 0, order: Array | None = None
) -> Array:
    """(codes - zero) * scale in fp32, of which `zero` and `scale` have one for each `group` columns (0: for all), or
    for column k that number `order[k]`. `at`: columns of the first group that come before the first of `codes`."""
    n, rows = codes.shape[i], codes.shape[1 - i]
    zero = zero if isinstance(zero, int) else fp32(zero)
    if order is None and group and (at or n % group):
        order = counted(at, at + n, codes) // group
    if order is not None and (found := len(order := order.reshape(-1))) != n:
        raise ZooError(f"{n} inputs are put into groups by {found} numbers; expected one each")
    if order is not None and not _blocks(order, group, n):
        if n and not 0 <= int(order.min()) <= int(order.max()) < scale.shape[i]:
            raise ZooError(
                f"inputs are of groups {int(order.min())} to {int(order.max())}; there are scales of {scale.shape[i]} groups"
            )
        values = fp32(codes) - (zero if isinstance(zero, int) else zero[:, order] if i else zero[order])
        values *= scale[:, order] if i else scale[order]
        return values
    groups = n // group if group else 1
    if scale.shape[i] != groups:
        raise ZooError(
            f"{n} inputs in groups of {group or n} need scales of {groups} groups, found {scale.shape[i]}"
        )
    one: tuple[Any, ...] = (slice(None), None) if i == 0 else (slice(None), slice(None), None)
    values = fp32(codes).reshape((rows, groups, -1) if i else (groups, -1, rows))
    values = values - (zero if isinstance(zero, int) else zero[one])
    values *= scale[one]
    return values.reshape(codes.shape)


def _blocks(order: Array, group: int, n: int) -> bool:
    """Whether columns are in groups one after the other, as most are."""
    if not group or n % group:
        return False
    return bool((order == counted(0, n, order) // group).all())
