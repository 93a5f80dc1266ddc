"""AWQ ("gemm"): integers of 4 bits, a scale and a zero point per group of inputs.

weight[o, k] = (code[o, k] - zero[o, k / group]) * scale[o, k / group]

`qweight` [in, out / 8] and `qzeros` [in / group, out / 8] are packed along the outputs, eight to a word in the order 0, 2, 4,
6, 1, 3, 5, 7 from the low bits up; `scales` [in / group, out].

Source: AutoAWQ, awq/utils/packing_utils.py and awq/modules/linear/gemm.py; the same in GPTQModel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from zoo.formats.base import TensorRef
from zoo.quant.base import SCALES, Component, Scheme, Unread, count, of_group, of_words
from zoo.quant.packed import Array, affine, empty, octets

NAME = re.compile(r"awq4-(?:group([1-9]\d{0,5})|channel)", re.ASCII)
SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where the code of row k of eight begins."""


def scheme(m: re.Match[str]) -> Scheme:
    """Of a name that matches NAME."""
    group = int(m[1] or 0)
    return Scheme(
        m[0],
        (
            Component("weight", ("I32",), (8, 1), ((".weight", ".qweight"),), axes="io"),
            Component("scale", SCALES, (1, group), ((".weight", ".scales"),), axes="io"),
            Component("zero", ("I32",), (8, group), ((".weight", ".qzeros"),), axes="io"),
        ),
        "awq", 4, group,
    )  # fmt: skip


def detect(leaf: str, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of the weight that a rule calls `leaf`, if it is quantised so. Raises Unread for a kind that is not read."""
    if (q := of_words(leaf, tensors, config, "awq")) is None:
        return None
    version = str(q.get("version") or q.get("format") or "gemm").lower()
    if q.get("backend") == "llm-awq":
        raise Unread(
            "config.json: quantization_config has backend 'llm-awq'; of AWQ zoo reads what AutoAWQ writes"
        )
    if version != "gemm":
        raise Unread(f"config.json: quantization_config has version {version!r:.40}; of AWQ zoo reads gemm")
    if (bits := count(q, "bits", 4)) != 4:
        raise Unread(f"config.json: quantization_config has bits {bits}; of AWQ zoo reads 4")
    group = count(q, "group_size", 128, -1)
    group = (
        0
        if group in (-1, 0) or group > tensors[leaf.removesuffix(".weight") + ".qweight"].shape[0]
        else group
    )
    m = NAME.fullmatch(f"awq4-{of_group(group)}")
    assert m is not None
    return scheme(m)


def values(c: Mapping[str, Array], s: Scheme, i: int = 1, at: int = 0) -> Array:
    """fp32 [out, in], or [in, out] where `i`, the axis of inputs, is 0. `at` as in `affine`."""
    return affine(_unpack(c["weight"], i), zeros(c["zero"], s, i), c["scale"], s.group, i, at)


def zeros(words: Array, s: Scheme, i: int = 1) -> Array:
    """Zero points of the words that are stored, [out, groups] where `i` is 1."""
    return _unpack(words, i)


def _unpack(words: Array, i: int) -> Array:
    """Codes (bytes) of words of eight rows each; the rows are the axis that `i` is not."""
    parts = octets(words)
    rows, columns = words.shape
    out = empty((rows, 8, columns) if i else (rows, columns, 8), words)
    for k, shift in enumerate(SHIFTS):
        code = (parts[..., shift // 8] >> shift % 8) & 15
        if i:
            out[:, k] = code
        else:
            out[:, :, k] = code
    return out.reshape((-1, columns) if i else (rows, -1))
