"""MLX's affine quantisation: integers of 2 to 8 bits, a scale and a bias per group of inputs.

weight[o, k] = code[o, k] * scale[o, k / group] + bias[o, k / group]

`weight` (U32) [out, in * bits / 32] is packed along the inputs; `scales` and `biases` [out, in / group]. The config's
`quantization` says bits and group size, and those of single modules by their names.

Source: mlx, mlx/ops.cpp (`dequantize`); mlx-lm, utils.py (`quantize_model`). MLX rounds the product and the sum each to the dtype of
the scales where it dequantises; its matrix products, which are what a model computes, do not. Here it is computed in fp32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from zoo.formats.base import TensorRef
from zoo.quant.base import CODES, SCALES, Component, Scheme, Unread, count, packing, quantization
from zoo.quant.packed import Array, fp32, unpack

NAME = re.compile(r"mlx([2-8])-group([1-9]\d{0,5})", re.ASCII)


def scheme(m: re.Match[str]) -> Scheme:
    """Of a name that matches NAME."""
    bits, group = int(m[1]), int(m[2])
    codes, words = packing(bits)
    return Scheme(
        m[0],
        (
            Component("weight", ("U32",), (1, codes), CODES, per=(1, words)),
            Component("scale", SCALES, (1, group), ((".weight", ".scales"),)),
            Component("shift", SCALES, (1, group), ((".weight", ".biases"),)),
        ),
        "mlx", bits, group,
    )  # fmt: skip


def detect(leaf: str, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of the weight that a rule calls `leaf`, if it is quantised so. Raises Unread for a kind that is not read."""
    codes, stem = tensors.get(leaf), leaf.removesuffix(".weight")
    if codes is None or codes.dtype != "U32" or f"{stem}.scales" not in tensors:
        return None
    q = quantization(config, "quantization", "quantization_config")
    if (mode := q.get("mode", "affine")) != "affine" or f"{stem}.biases" not in tensors:
        raise Unread(f"config.json: quantization has mode {mode!r:.40}; of MLX zoo reads affine")
    own = q.get(stem)
    q = {**q, **own} if isinstance(own, Mapping) else q
    if "bits" not in q or "group_size" not in q:
        raise Unread(
            "config.json: quantization does not say bits and group_size, of which MLX's weights need both"
        )
    if not 2 <= (bits := count(q, "bits", 4)) <= 8 or bits == 7:
        raise Unread(f"config.json: quantization has bits {bits}; of MLX zoo reads 2 to 6 and 8")
    m = NAME.fullmatch(f"mlx{bits}-group{count(q, 'group_size', 64)}")
    assert m is not None
    return scheme(m)


def values(c: Mapping[str, Array], s: Scheme, i: int = 1, at: int = 0) -> Array:
    """fp32 [out, in]."""
    words = c["weight"]
    codes = fp32(unpack(words, s.bits, 1))
    grouped = codes.reshape(codes.shape[0], -1, s.group)
    grouped *= c["scale"][:, :, None]
    grouped += c["shift"][:, :, None]
    return grouped.reshape(codes.shape)
