"""Floats of 4 bits (E2M1), two to a byte, the low half first: NVFP4, and mxfp4 as compressed-tensors and DeepSeek pack it.

nvfp4 (ModelOpt):   weight[o, k] = value[o, k] * (scale[o, k / 16] * weight_scale_2)
nvfp4-packed (compressed-tensors):  value[o, k] * (scale[o, k / 16] / weight_global_scale)
mxfp4-packed (compressed-tensors), mxfp4-bytes (DeepSeek-V4):  value[o, k] * 2^(scale[o, k / 32] - 127)

Codes are [out, in / 2]; nvfp4's scales are e4m3, with one number in fp32 for each released tensor; mxfp4's are exponents. What
stands beside them for activations is kept, and rounds nothing here.

Source: OCP Microscaling Formats v1.0 (E2M1); ModelOpt, NVFP4QTensor.dequantize; compressed-tensors 0.20, compressors/nvfp4
and mxfp4; DeepSeek-V4-Flash, inference/convert.py (cast_e2m1fn_to_e4m3fn).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from zoo.formats.base import TensorRef
from zoo.quant import compressed
from zoo.quant.base import CODES, Component, Scheme, Unread
from zoo.quant.packed import Array, constants, indices, one, pairs, scaled

NAME = re.compile(r"nvfp4(-packed)?|mxfp4-(?:packed|bytes)", re.ASCII)
# By code, for all that read E2M1.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# And what e8m0 exponents do.
POWERS = (*(2.0 ** (k - 127) for k in range(255)), float("nan"))


def scheme(m: re.Match[str]) -> Scheme:
    """Of a name that matches NAME."""
    name, own = m[0], m[0] == "nvfp4"
    if name == "mxfp4-bytes":
        codes = Component("weight", ("I8",), (1, 2), CODES)
        return Scheme(
            name, (codes, Component("scale", ("F8_E8M0",), (1, 32), ((".weight", ".scale"),))), "fp4", 4, 32
        )
    group = 16 if name.startswith("nv") else 32
    act = ((".weight", ".input_scale"),) if own else ((".weight", ".input_global_scale"),)
    parts = [
        Component("weight", ("U8",), (1, 2), CODES if own else (("", "_packed"),)),
        Component("scale", ("F8_E4M3",) if group == 16 else ("U8", "F8_E8M0"), (1, group), (("", "_scale"),)),
    ]
    if group == 16:
        parts.append(
            Component("global_scale", ("F32",), None, (("", "_scale_2" if own else "_global_scale"),))
        )
    parts.append(Component("act_scale", ("F32", "BF16", "F16"), None, act, optional=True))
    return Scheme(name, tuple(parts), "fp4", 4, group)


def detect(leaf: str, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of the weight that a rule calls `leaf`, if it is quantised so. Raises Unread for a kind that is not read."""
    codes, scale = tensors.get(leaf), tensors.get(leaf.removesuffix(".weight") + ".scale")
    if codes is not None and codes.dtype == "I8" and scale is not None and scale.dtype == "F8_E8M0":
        return _named("mxfp4-bytes")
    for name, packed in (("nvfp4", leaf), ("packed", leaf + "_packed")):
        if (ref := tensors.get(packed)) is None or ref.dtype != "U8":
            continue
        scale = tensors.get(leaf + "_scale")
        if name == "nvfp4" and (
            scale is None or scale.dtype != "F8_E4M3" or leaf + "_scale_2" not in tensors
        ):
            return None
        if scale is None or scale.dtype not in ("F8_E4M3", "U8", "F8_E8M0"):
            return None
        if name == "packed":
            compressed.settings(config)
            if leaf + "_zero_point" in tensors:
                raise Unread(f"{leaf}_zero_point: floats of 4 bits with zero points; zoo reads those without")
            name = "nvfp4-packed" if scale.dtype == "F8_E4M3" else "mxfp4-packed"
        return _named(name)
    return None


def _named(name: str) -> Scheme:
    m = NAME.fullmatch(name)
    assert m is not None
    return scheme(m)


def values(c: Mapping[str, Array], s: Scheme, i: int = 1, at: int = 0) -> Array:
    """fp32 [out, in]."""
    codes, scale = c["weight"], c["scale"]
    if s.name.startswith("mxfp4"):
        scale = constants(POWERS, codes)[indices(scale)]
    elif s.name == "nvfp4":
        scale = scale * one(c["global_scale"], "its global scale")
    else:
        scale = scale / one(c["global_scale"], "its global scale")
    return scaled(pairs(VALUES, codes), scale, s.group)
