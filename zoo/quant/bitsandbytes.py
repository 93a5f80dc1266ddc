"""bitsandbytes: 4 bits (nf4, fp4; LLM.int4 of QLoRA) and LLM.int8.

4 bits: weight[n] = quant_map[code[n]] * absmax[n / blocksize], n counting the elements row after row; two codes to a byte, the
first in its high half. Doubly quantised, absmax is itself a code:
absmax[b] = nested_quant_map[code[b]] * nested_absmax[b / 256] + nested_offset. The tables are in the checkpoint; the offset, the
sizes of blocks and the shape in a tensor `quant_state.bitsandbytes__nf4` of JSON.

int8: weight[o, k] = code[o, k] * SCB[o] / 127.

Source: bitsandbytes 0.50, functional.py (QuantState, dequantize_4bit, int8_vectorwise_dequant), backends/default/ops.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import TensorRef
from zoo.quant.base import CODES, Component, Scheme
from zoo.quant.packed import Array, constants, counted, fp32, indices, is_torch
from zoo.untrusted.bounded import parse_json

NAME = re.compile(r"bnb4-block(32|64|128|256|512|1024|2048|4096)(-nested)?|bnb8", re.ASCII)
ONE_OF_127 = 7.874015718698502e-3  # as bitsandbytes has it
NESTED = 256  # blocks that share what their absmax is scaled by
KINDS = ("nf4", "fp4")
MAX_STATE = 1 << 16  # bytes of its JSON, which has some 100
WHY = (
    "whose blocks run over the whole of a matrix, through the ends of rows, so that codes of parts that are stored as one could not "
    "be told apart"
)


def scheme(m: re.Match[str]) -> Scheme:
    """Of a name that matches NAME."""
    if m[1] is None:
        codes = Component("weight", ("I8",), (1, 1), CODES)
        scale = Component("scale", ("F32", "F16", "BF16"), (1, 0), ((".weight", ".SCB"),), axes="o")
        form = Component("form", ("U8",), None, ((".weight", ".weight_format"),), optional=True)
        return Scheme(m[0], (codes, scale, form), "bitsandbytes", 8)

    def beside(name: str, dtype: str, end: str) -> Component:
        return Component(name, (dtype,), None, (("", f".{end}"),), ndim=1, varies=True)

    state = Component(
        "state",
        ("U8",),
        None,
        tuple(("", f".quant_state.bitsandbytes__{k}") for k in KINDS),
        ndim=1,
        varies=True,
    )
    parts = [
        Component("weight", ("U8",), (1, 2), CODES, axes="flat"),
        beside("absmax", "U8" if m[2] else "F32", "absmax"),
        beside("table", "F32", "quant_map"),
        state,
    ]
    if m[2]:
        parts += [beside("nested", "F32", "nested_absmax"), beside("nested_table", "F32", "nested_quant_map")]
    return Scheme(m[0], tuple(parts), "bitsandbytes", 4, kept=WHY)


def detect(leaf: str, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of the weight that a rule calls `leaf`, if it is quantised so."""
    codes = tensors.get(leaf)
    if codes is None:
        return None
    if codes.dtype == "I8" and leaf.removesuffix(".weight") + ".SCB" in tensors:
        return _named("bnb8")
    absmax = tensors.get(leaf + ".absmax")
    if codes.dtype != "U8" or absmax is None:
        return None
    n, blocks = 2 * codes.size, absmax.size
    size = next((2**k for k in range(5, 13) if -(-n // 2**k) == blocks), None)
    if size is None:
        raise ZooError(
            f"{leaf} in {codes.file}: {n} codes of 4 bits, but {blocks} absmax: no size of blocks has so many"
        )
    return _named(f"bnb4-block{size}{'-nested' * (leaf + '.nested_absmax' in tensors)}")


def _named(name: str) -> Scheme:
    m = NAME.fullmatch(name)
    assert m is not None
    return scheme(m)


def values(c: Mapping[str, Array], s: Scheme, i: int = 1, at: int = 0) -> Array:
    """fp32 [out, in] of 8 bits; of 4 bits the elements from `at` on, flat, of codes that begin there, and of all else that the
    tensor has. Raises ZooError where the sizes are not those that the scheme has."""
    if s.bits == 8:
        if (form := c.get("form")) is not None and bool((form != 0).any()):
            raise ZooError("weight_format: expected 0 (rows), the layout that zoo reads")
        return fp32(c["weight"]) * c["scale"] * ONE_OF_127
    size = int(s.name.removesuffix("-nested").removeprefix("bnb4-block"))
    state = _state(c["state"], size, s.name.endswith("-nested"))
    blocks = len(c["absmax"])
    sizes = {"table": 16, "nested_table": 256, "nested": -(-blocks // NESTED)}
    if wrong := next((k for k, n in sizes.items() if k in c and len(c[k]) != n), None):
        raise ZooError(f"its {wrong} has {len(c[wrong])} numbers; {blocks} blocks need {sizes[wrong]}")
    codes = c["weight"].reshape(-1)
    n = 2 * codes.shape[0]
    first, last = at // size, -(-(at + n) // size)
    absmax = c["absmax"][first:last]
    if "nested" in c:
        outer = counted(first, last, codes) // NESTED
        absmax = c["nested_table"][indices(absmax)] * c["nested"][outer] + constants(
            [state["nested_offset"]], codes
        )
    out = c["table"][indices(_halves(codes))]
    if at % size or n % size:
        return out * absmax[counted(at, at + n, codes) // size - first]
    return (out.reshape(-1, size) * absmax[:, None]).reshape(-1)


def _state(raw: Array, size: int, nested: bool) -> dict[str, Any]:
    """What the JSON says, which must be what the headers said."""
    if len(raw) > MAX_STATE:
        raise ZooError(f"quant_state has {len(raw)} bytes (limit {MAX_STATE})")
    try:
        told = parse_json(bytes(raw.tolist()))
    except ValueError as e:
        raise ZooError(f"quant_state: expected JSON: {e}") from None
    if not isinstance(told, dict) or told.get("blocksize") != size:
        raise ZooError(
            f"quant_state says {str(told)[:100]}; by the sizes of the tensors expected blocksize {size}"
        )
    if nested and (
        told.get("nested_blocksize") != NESTED or not isinstance(told.get("nested_offset"), float)
    ):
        raise ZooError(
            f"quant_state says {str(told)[:200]}; expected nested_blocksize {NESTED} and a nested_offset"
        )
    return told


def _halves(codes: Array) -> Array:
    """Two codes to a byte, the high half first; flat."""
    if is_torch(codes):
        import torch

        return torch.stack([codes >> 4, codes & 15], dim=-1).reshape(-1)
    import numpy as np

    return np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)
