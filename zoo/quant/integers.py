"""compressed-tensors' integers: packed (pack-quantized, 2 to 8 bits) or a byte each (int-quantized, W8A8).

weight[o, k] = (code[o, k] - zero[o, g]) * scale[o, g], g the group of input k: k / group, or `weight_g_idx[k]`

Packed are code + 2^(bits - 1), in `weight_packed` [out, in * bits / 32] along the inputs, zero points in `weight_zero_point`
[out * bits / 32, groups] along the outputs; `weight_shape` holds [out, in] of each released tensor. A byte each has `weight` (I8)
[out, in], `weight_scale` [out, 1], [out, groups] or one number, and a `weight_zero_point` like it where it is not symmetric.
Activations, which an engine for W8A8 rounds too, are not rounded here.

`int4-groupN` (symmetric) has a formula of its own: see `zoo.quant.int4`. Packed codes of four bits and GPTQ's lie as it does: where they are
symmetric, kernels take them for it (`zoo.kernels.weights.symmetric`).

Source: compressed-tensors 0.20, compressors/pack_quantized and naive_quantized, `_dequantize`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import TensorRef
from zoo.quant import compressed
from zoo.quant.base import CODES, SCALES, Component, Scheme, Unread, check_shape, count, of_group, packing
from zoo.quant.packed import Array, affine, fp32, unpack

NAME = re.compile(
    r"(int4-group|packed[2-8]-group|packed[2-8]-(?=channel)|int8-group|int8-(?=channel|tensor))([1-9]\d{0,5}|channel|tensor)(-zeros)?",
    re.ASCII,
)
_SHAPE = Component("shape", ("I32", "I64"), None, (("", "_shape"),), ndim=1)
_ORDER = Component("order", ("I32",), None, (("", "_g_idx"),), optional=True, axes="i", ndim=1)


def scheme(m: re.Match[str]) -> Scheme:
    """Of a name that matches NAME."""
    kind, group = m[1].partition("-")[0], 0 if m[2] in ("channel", "tensor") else int(m[2])
    bits = int(kind[-1])
    codes, words = packing(bits)
    if kind == "int8":
        unit = None if m[2] == "tensor" else (1, group)
        own = (
            Component("weight", ("I8",), (1, 1), CODES),
            Component("scale", SCALES, unit, (("", "_scale"),)),
            *((Component("zero", ("I8",), unit, (("", "_zero_point"),)),) if m[3] else ()),
        )
        return Scheme(m[0], own, "integers", 8, group)
    packed = Component("weight", ("I32",), (1, codes), (("", "_packed"),), per=(1, words))
    scale = Component("scale", ("BF16", "F16", "F32"), (1, group), (("", "_scale"),))
    if kind == "int4":
        return Scheme(m[0], (packed, scale, _SHAPE), "", 4, group)
    zero = Component("zero", ("I32",), (codes, group), (("", "_zero_point"),), per=(words, 1))
    return Scheme(m[0], (packed, scale, *((zero,) if m[3] else ()), _SHAPE, _ORDER), "integers", bits, group)


def detect(leaf: str, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of the weight that a rule calls `leaf`, if it is quantised so. Raises Unread for a kind that is not read."""
    if (packed := tensors.get(leaf + "_packed")) is not None and packed.dtype == "I32" and packed.shape:
        return _packed(leaf, packed, tensors, config)
    codes, scale = tensors.get(leaf), tensors.get(leaf + "_scale")
    if codes is None or scale is None or codes.dtype != "I8":
        return None
    if compressed.settings(config).get("quant_method") != "compressed-tensors":
        return None
    zeros = "-zeros" if leaf + "_zero_point" in tensors else ""
    if math.prod(scale.shape) == 1:
        return _named(f"int8-tensor{zeros}")
    if len(scale.shape) < 2 or not codes.shape or not scale.shape[-1] or codes.shape[-1] % scale.shape[-1]:
        raise ZooError(
            f"{leaf}_scale in {scale.file}: {list(scale.shape)} scales for codes {list(codes.shape)}"
        )
    group = codes.shape[-1] // scale.shape[-1] if scale.shape[-1] > 1 else 0
    return _named(f"int8-{of_group(group)}{zeros}")


def _named(name: str) -> Scheme:
    if (m := NAME.fullmatch(name)) is None:
        raise Unread(f"the tensors are {name}; zoo reads {NAME.pattern}")
    return scheme(m)


def _packed(
    leaf: str, packed: TensorRef, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]
) -> Scheme:
    made = [_of(leaf, packed, tensors, w) for w in compressed.weights(config, "int") or [{}]]
    scale = tensors.get(leaf + "_scale")
    fits = (s for s, columns in made if scale is not None and scale.shape[-1:] == (_groups(s, columns),))
    found, columns = next(((s, _columns(packed, s.bits)) for s in fits), made[0])
    if found.group and columns % found.group:
        raise ZooError(f"{leaf}_packed: rows of {columns} inputs do not divide into groups of {found.group}")
    return found


def _columns(packed: TensorRef, bits: int) -> int:
    codes, words = packing(bits)
    return packed.shape[-1] * codes // words


def _groups(s: Scheme, columns: int) -> int:
    return columns // s.group if s.group else 1


def _of(
    leaf: str, packed: TensorRef, tensors: Mapping[str, TensorRef], w: Mapping[str, Any]
) -> tuple[Scheme, int]:
    """(the scheme, the columns) by what one group of the config says."""
    bits = count(w, "num_bits", 4)
    if not 2 <= bits <= 8:
        raise Unread(
            f"config.json: quantization_config has num_bits {bits}; of packed integers zoo reads 2 to 8"
        )
    strategy = w.get("strategy") or ("channel" if w.get("group_size") == -1 else "group")
    if strategy not in ("group", "channel"):
        raise Unread(
            f"config.json: quantization_config has strategy {strategy!r:.40}; of packed integers zoo reads group and channel"
        )
    group = count(w, "group_size", 32) if strategy == "group" else 0
    zeros = w.get("symmetric", True) is not True
    if not zeros and leaf + "_zero_point" in tensors:
        raise ZooError(f"{leaf}_zero_point: zero points, though the config calls the weights symmetric")
    plain = bits == 4 and group and not zeros and leaf + "_g_idx" not in tensors
    name = f"int4-group{group}" if plain else f"packed{bits}-{of_group(group)}{'-zeros' * zeros}"
    return _named(name), _columns(packed, bits)


def values(c: Mapping[str, Array], s: Scheme, i: int = 1, at: int = 0) -> Array:
    """fp32 [out, in]. Raises ZooError where `shape` says another one."""
    codes, zero = c["weight"], c.get("zero")
    if s.name.startswith("int8"):
        scale = c["scale"].reshape(1, 1) if s.name.startswith("int8-tensor") else c["scale"]
        # The difference of two bytes is none.
        return affine(fp32(codes), 0 if zero is None else fp32(zero.reshape(scale.shape)), scale, s.group, i)
    codes = unpack(codes, s.bits, 1)
    if (shape := c.get("shape")) is not None:
        check_shape(shape, (codes.shape[0],), codes.shape[1])
    low = 1 << s.bits - 1
    zero = low if zero is None else zeros(zero, s)[: codes.shape[0]]
    return affine(codes, zero, c["scale"], s.group, 1, 0, c.get("order"))


def zeros(words: Array, s: Scheme, i: int = 1) -> Array:
    """Zero points of the words that are stored, [out, groups] where `i` is 1; of rows that make up a word there may be more."""
    return unpack(words, s.bits, 1 - i)
