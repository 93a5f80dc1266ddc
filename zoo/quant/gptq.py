"""GPTQ: integers of 2, 3, 4 or 8 bits, a scale and a zero point per group of inputs, which `g_idx` may put in any order.

weight[o, k] = (code[o, k] - zero[o, g_idx[k]]) * scale[o, g_idx[k]]

`qweight` [in * bits / 32, out] is packed along the inputs, `qzeros` [groups, out * bits / 32] along the outputs; `scales`
[groups, out], `g_idx` [in]. Files of format "gptq" (v1, the default) hold zero points less one, "gptq_v2" the zero points.

Source: AutoGPTQ and GPTQModel (nn_modules/qlinear, `dequantize_weight`; utils/model.py, `convert_gptq_v1_to_v2_format`: one is
added to each field of a whole word, so a carry goes on, but for 3 bits).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from zoo.formats.base import TensorRef
from zoo.quant.base import SCALES, Component, Scheme, Unread, count, of_group, of_words, packing
from zoo.quant.packed import Array, affine, unpack

NAME = re.compile(r"gptq(2|3|4|8)(-v2)?-(?:group([1-9]\d{0,5})|channel)", re.ASCII)
FORMATS = {"gptq": "", "gptq_v2": "-v2"}


def scheme(m: re.Match[str]) -> Scheme:
    """Of a name that matches NAME."""
    bits, group = int(m[1]), int(m[3] or 0)
    codes, words = packing(bits)
    return Scheme(
        m[0],
        (
            Component("weight", ("I32",), (1, codes), ((".weight", ".qweight"),), per=(1, words), axes="io"),
            Component("scale", SCALES, (1, group), ((".weight", ".scales"),), axes="io"),
            Component("zero", ("I32",), (codes, group), ((".weight", ".qzeros"),), per=(words, 1), axes="io"),
            Component("order", ("I32",), None, ((".weight", ".g_idx"),), optional=True, axes="i", ndim=1),
        ),
        "gptq", bits, group,
    )  # fmt: skip


def detect(leaf: str, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of the weight that a rule calls `leaf`, if it is quantised so. Raises Unread for a kind that is not read."""
    if (q := of_words(leaf, tensors, config, "gptq")) is None:
        return None
    kind = q.get("checkpoint_format", q.get("format", "gptq"))
    if not isinstance(kind, str) or kind not in FORMATS:
        raise Unread(
            f"config.json: quantization_config has format {kind!r:.40}; of GPTQ zoo reads {', '.join(FORMATS)}"
        )
    if q.get("pack_dtype", "int32") != "int32":
        raise Unread(
            f"config.json: quantization_config has pack_dtype {q['pack_dtype']!r:.40}; zoo reads int32"
        )
    bits = count(q, "bits", 4)
    if bits not in (2, 3, 4, 8):
        raise Unread(f"config.json: quantization_config has bits {bits}; of GPTQ zoo reads 2, 3, 4 and 8")
    group = count(q, "group_size", 128, -1)
    codes, words = packing(bits)
    columns = tensors[leaf.removesuffix(".weight") + ".qweight"].shape[0] * codes // words
    group = 0 if group in (-1, 0) or group > columns else group
    name = f"gptq{bits}{FORMATS[kind]}-{of_group(group)}"
    m = NAME.fullmatch(name)
    assert m is not None
    return scheme(m)


def values(c: Mapping[str, Array], s: Scheme, i: int = 1, at: int = 0) -> Array:
    """fp32 [out, in], or [in, out] where `i`, the axis of inputs, is 0. `at` as in `affine`."""
    zero = zeros(c["zero"], s, i)
    scale = c["scale"]
    zero = zero[: scale.shape[0]] if i else zero[:, : scale.shape[1]]
    return affine(unpack(c["weight"], s.bits, i), zero, scale, s.group, i, at, c.get("order"))


def zeros(words: Array, s: Scheme, i: int = 1) -> Array:
    """Zero points of the words that are stored, [out, groups] where `i` is 1; of rows that make up a word there may be more."""
    if s.name[5:8] == "-v2":
        return unpack(words, s.bits, 1 - i)
    if s.bits == 3:
        return (unpack(words, 3, 1 - i) + 1) & 7
    return unpack(_plus_one(words, s.bits), s.bits, 1 - i)


def _plus_one(words: Array, bits: int) -> Array:
    """Words of int32 with one added to each of their fields, as whole words."""
    one = sum(1 << k for k in range(0, 32, bits))
    return words + (one - (1 << 32) if one >> 31 else one)
