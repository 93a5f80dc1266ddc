"""MLX's quantisation: integers of 1 to 8 bits with a scale and a bias per group of inputs (`affine`), and floats of 4 and 8 bits
with a scale (`mxfp4`, `mxfp8`, `nvfp4`).

affine:  weight[o, k] = code[o, k] * scale[o, k / group] + bias[o, k / group]
mxfp4, mxfp8:  value(code[o, k]) * 2^(scale[o, k / 32] - 127), of e2m1 or e4m3
nvfp4:  value(code[o, k]) * e4m3(scale[o, k / 16])

`weight` (U32) [out, in * bits / 32] is packed along the inputs; `scales` (of floats U8) and `biases` [out, in / group]. The config's
`quantization` says bits, group size and mode, and those of single modules by their names, which then stand alone: what they leave
out is MLX's default, not what the config says of the rest.

Source: mlx, mlx/ops.cpp (`dequantize`) and python/mlx/nn/layers/quantized.py (`quantize`); mlx-lm, utils.py (`quantize_model`). MLX
rounds affine's product and sum each to the dtype of the scales where it dequantises; its matrix products, which are what a model
computes, do not. Here it is computed in fp32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from zoo.formats.base import TensorRef
from zoo.quant.base import CODES, SCALES, Component, Scheme, Unread, count, packing, quantization
from zoo.quant.fp4 import POWERS, VALUES
from zoo.quant.packed import Array, constants, fp32, indices, octets, pairs, scaled, unpack

NAME = re.compile(r"mlx(?:([1-8])-group([1-9]\d{0,5})|-(mxfp4|mxfp8|nvfp4))", re.ASCII)
FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Bits and group, which a mode of floats has but one of."""
_E4M3 = tuple(
    (-1.0 if b >> 7 else 1.0) * ((8 + (b & 7)) * 2.0 ** ((b >> 3 & 15) - 10) if b >> 3 & 15 else (b & 7) * 2.0**-9)
    if b & 127 != 127
    else float("nan")
    for b in range(256)
)  # fmt: skip


def scheme(m: re.Match[str]) -> Scheme:
    """Of a name that matches NAME."""
    mode = m[3]
    bits, group = FLOATS[mode] if mode else (int(m[1]), int(m[2]))
    codes, words = packing(bits)
    parts = (
        Component("weight", ("U32",), (1, codes), CODES, per=(1, words)),
        Component("scale", ("U8",) if mode else SCALES, (1, group), ((".weight", ".scales"),)),
    )
    shift = Component("shift", SCALES, (1, group), ((".weight", ".biases"),))
    return Scheme(m[0], parts if mode else (*parts, shift), "mlx", bits, group)


def detect(leaf: str, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of the weight that a rule calls `leaf`, if it is quantised so. Raises Unread for a kind that is not read."""
    codes, stem = tensors.get(leaf), leaf.removesuffix(".weight")
    if codes is None or codes.dtype != "U32" or f"{stem}.scales" not in tensors:
        return None
    q = quantization(config, "quantization", "quantization_config")
    own = q.get(stem)
    if isinstance(own, Mapping):
        q = own
    elif "bits" not in q or "group_size" not in q:
        raise Unread(
            "config.json: quantization does not say bits and group_size, of which MLX's weights need both"
        )
    mode, biases = q.get("mode", "affine"), f"{stem}.biases" in tensors
    if mode == "affine" and biases:
        bits, group = count(q, "bits", 4), count(q, "group_size", 64)
        if bits > 8 or bits == 7:
            raise Unread(f"config.json: quantization has bits {bits}; of MLX zoo reads 1 to 6 and 8")
        return _named(f"mlx{bits}-group{group}")
    if not isinstance(mode, str) or mode not in FLOATS or biases:
        raise Unread(
            f"config.json: quantization has mode {mode!r:.40}, and {stem} {'has' if biases else 'has no'} biases; of MLX zoo reads "
            f"affine with biases, and {', '.join(FLOATS)} without"
        )
    if f"{stem}.global_scale" in tensors:
        raise Unread(f"{stem}.global_scale: of MLX's nvfp4 zoo reads weights without a global scale")
    known = FLOATS[mode]
    if (found := (count(q, "bits", known[0]), count(q, "group_size", known[1]))) != known:
        raise Unread(
            f"config.json: quantization has mode {mode!r} with bits {found[0]} and group_size {found[1]}; MLX's has {known[0]} "
            f"and {known[1]}"
        )
    return _named(f"mlx-{mode}")


def _named(name: str) -> Scheme:
    m = NAME.fullmatch(name)
    assert m is not None
    return scheme(m)


def values(c: Mapping[str, Array], s: Scheme, i: int = 1, at: int = 0) -> Array:
    """fp32 [out, in]."""
    words, scale = c["weight"], c["scale"]
    if "shift" not in c:
        each = octets(words).reshape(words.shape[0], -1)
        codes = pairs(VALUES, each) if s.bits == 4 else constants(_E4M3, words)[indices(each)]
        return scaled(
            codes, constants(_E4M3 if s.name == "mlx-nvfp4" else POWERS, words)[indices(scale)], s.group
        )
    codes = fp32(unpack(words, s.bits, 1))
    grouped = codes.reshape(codes.shape[0], -1, s.group)
    grouped *= scale[:, :, None]
    grouped += c["shift"][:, :, None]
    return grouped.reshape(codes.shape)
