"""Quantisation schemes, found: by the name in a canonical folder (`scheme`), or by the tensors and the config of a release
(`detect`). No tensor library.

Each of `MODULES` is a file that says all of its schemes: NAME, a pattern of their names, and `scheme(match)`; `detect(leaf,
tensors, config)`; and `values(components, scheme, i, at)`, what codes stand for. The older ones are described here; what their
codes stand for is in a module each for models, and in `zoo.quant.host` for conversions.

| scheme | codes | beside them | released as |
|---|---|---|---|
| fp8-block | F8_E4M3 | `scale` per block, F32 mostly | `X.weight`, `X.weight_scale_inv` (or `weight_scale`, `X.scale`) |
| fp8-channel | F8_E4M3 | `scale` [out, 1] | `X.weight`, `X.weight_scale` |
| fp8-tensor | F8_E4M3 | `scale`, `act_scale`: one number per released tensor | `qscale_weight` and `qscale_act`, ... |
| mxfp4 | U8, two codes each | `scale` per 32 inputs, U8 exponents | `X_blocks`, `X_scales`; `X.blocks`, `X.scales` |
| int4-group32 | I32, eight codes each | `scale` per 32 inputs; `shape` [out, in] | `X.weight_packed`, `weight_scale`, `weight_shape` |

`fp8-block` means 128 x 128; another block is part of the name (`fp8-block-64x32`; MXFP8 is `fp8-block-1x32`), as is another
group (`int4-group128`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import FLOATS, TensorRef
from zoo.quant import awq, bitsandbytes, blocks, compressed, fp4, gptq, integers, mlx
from zoo.quant.base import CODES, SCALES, Component, Scheme, grid

MODULES = (gptq, awq, integers, fp4, bitsandbytes, mlx, blocks)

_ACT_SCALE = Component(  # of what a weight multiplies, for engines that round that too
    "act_scale", SCALES, None,
    (
        (".weight", ".activation_scale"), (".weight", ".input_scale"), (".weight", ".qscale_act"), ("", "_qscale_act"),
        ("", "_activation_scale"),
    ),
    optional=True,
)  # fmt: skip
CACHE_SCALE = re.compile(r"\.(?:[kv]_proj\.)?[kv]_scale$")
"""Names of scales for keys and values that an engine keeps in fp8."""
_SCALE = Component("scale", SCALES, (1, 1), (("", "_scale_inv"), ("", "_scale"), (".weight", ".scale")))


def _fp8_block(rows: int, columns: int) -> Scheme:
    name = "fp8-block" if (rows, columns) == (128, 128) else f"fp8-block-{rows}x{columns}"
    scale = Component("scale", (*SCALES, "F8_E8M0", "U8"), (rows, columns), _SCALE.spellings)
    return Scheme(name, (Component("weight", ("F8_E4M3",), (1, 1), CODES), scale, _ACT_SCALE))


_FP8_CHANNEL = Scheme(
    "fp8-channel",
    (
        Component("weight", ("F8_E4M3",), (1, 1), CODES),
        Component("scale", SCALES, (1, 0), (("", "_scale"), ("", "_scale_inv"))),
        _ACT_SCALE,
    ),
)
_FP8_TENSOR = Scheme(
    "fp8-tensor",
    (
        Component("weight", ("F8_E4M3",), (1, 1), CODES),
        Component(
            "scale", SCALES, None,
            (("", "_scale_inv"), ("", "_scale"), (".weight", ".qscale_weight"), ("", "_qscale_weight")),
        ),
        _ACT_SCALE,
    ),
)  # fmt: skip
_MXFP4 = Scheme(
    "mxfp4",
    (
        Component(
            "weight", ("U8",), (1, 32), (("_blocks", "_blocks"), (".blocks", ".blocks")), trailing=(16,)
        ),
        Component("scale", ("U8", "F8_E8M0"), (1, 32), (("_blocks", "_scales"), (".blocks", ".scales"))),
    ),
)


@functools.cache
def scheme(name: str) -> Scheme:
    """The scheme called `name`. Raises ZooError for one this version does not know."""
    fixed = {s.name: s for s in (_FP8_CHANNEL, _FP8_TENSOR, _MXFP4)}
    if name in fixed:
        return fixed[name]
    if m := re.fullmatch(r"fp8-block(?:-([1-9]\d{0,5})x([1-9]\d{0,5}))?", name, re.ASCII):
        return _fp8_block(int(m[1] or 128), int(m[2] or 128))
    for module in MODULES:
        if m := module.NAME.fullmatch(name):
            return module.scheme(m)
    raise ZooError(
        f"unknown quantisation scheme {name!r:.100}; known: fp8-block, fp8-channel, fp8-tensor, mxfp4, int4-group32, and "
        f"those that {', '.join(m.NAME.pattern for m in MODULES)} match"
    )


def block_size(name: str) -> tuple[int, int]:
    """Logical rows and columns that one scale of the scheme stands for. 0: all of them."""
    unit = scheme(name).component("scale").unit
    return unit if unit is not None else (0, 0)


def named(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> list[str]:
    """The schemes of the weights among these tensors, by name, one for each weight that has one that is read."""
    return [how for how, _ in coded(tensors, config)]


def nbytes(tensors: Mapping[str, TensorRef], weights: Iterable[tuple[str, list[str]]]) -> dict[str, int]:
    """Bytes by scheme of these `coded` weights, with what stands beside the codes; "plain": those of all other tensors."""
    out: dict[str, int] = {}
    for how, names in weights:
        out[how] = out.get(how, 0) + sum(tensors[n].nbytes for n in names)
    plain = sum(t.nbytes for t in tensors.values()) - sum(out.values())
    return out | ({"plain": plain} if plain else {})


def coded(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The scheme of each quantised weight, and the names of its tensors."""
    for name, ref in tensors.items():
        leaf = leaf_of(name)
        if ref.dtype in FLOATS or (leaf == name and not name.endswith(("weight", "blocks", "_proj"))):
            continue
        try:
            how = detect(leaf, tensors, config)
        except ZooError:  # inspecting goes on; a plan says what is wrong
            continue
        if how is not None:
            yield (
                how.name,
                list(dict.fromkeys(n for c in how.components for n in c.names(leaf) if n in tensors)),
            )


def leaf_of(codes: str) -> str:
    """What rules call the weight whose codes are stored under this name."""
    plain = codes.removesuffix("_packed")
    return f"{plain.removesuffix('.qweight')}.weight" if plain.endswith(".qweight") else plain


def codes_of(leaf: str) -> tuple[str, ...]:
    """What the weight that rules call `leaf`, or its codes, may be stored under: `leaf_of` backwards."""
    return leaf, f"{leaf}_packed", f"{leaf.removesuffix('.weight')}.qweight"


def detect(leaf: str, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of the weight that a rule calls `leaf`, by what is beside it; the block size and the
    strategy by the config's `quantization_config`. None: it is a plain tensor, or not there.

    Raises ZooError for codes without scales, and for a scheme of the config that zoo does not know.
    """
    for module in MODULES:
        if (found := module.detect(leaf, tensors, config)) is not None:
            return found
    codes = tensors.get(leaf)
    if codes is None:
        return None
    if leaf.endswith(("_blocks", ".blocks")) and codes.dtype == "U8":
        if leaf[: -len("blocks")] + "scales" not in tensors:
            raise ZooError(f"{leaf} in {codes.file}: mxfp4 codes without their scales ({leaf[:-6]}scales)")
        return _MXFP4
    if not codes.dtype.startswith("F8_E4M3"):
        return None
    spelled = (_SCALE, *(s.component("scale") for s in (_FP8_TENSOR, _FP8_CHANNEL)))
    names = dict.fromkeys(n for part in spelled for n in part.names(leaf))
    scale = next((tensors[n] for n in names if n in tensors), None)
    if scale is None:
        raise ZooError(
            f"{leaf} in {codes.file}: {codes.dtype} codes without a scale; looked for {', '.join(names)}"
        )
    # A config may have several groups, of layers by names that are not those of the files: the scale says which.
    schemes = [_fp8(codes, scale, *said) for said in _fp8_strategies(config)]
    if scale.dtype in ("U8", "F8_E8M0"):  # MXFP8, where the config does not say a group
        schemes.append(_fp8_block(1, 32))
    return next((s for s in schemes if _fits(s, codes, scale)), schemes[0])


def _fp8(codes: TensorRef, scale: TensorRef, strategy: str | None, block: tuple[int, int]) -> Scheme:
    if scale.shape in ((), (1,)) or (strategy == "tensor" and math.prod(scale.shape) == 1):
        return _FP8_TENSOR
    if strategy in (None, "tensor") and _is_one_each(codes, scale):
        return _FP8_TENSOR
    if strategy == "channel" or (strategy is None and _is_channel(codes, scale)):
        return _FP8_CHANNEL
    return _fp8_block(*block)


def _fits(made: Scheme, codes: TensorRef, scale: TensorRef) -> bool:
    """Whether the scale has the shape that it has for such codes."""
    if made is _FP8_TENSOR or len(codes.shape) < 2:
        return True
    *lead, rows, columns = codes.shape
    (n,), rest = grid(made.component("scale"), (rows,), columns)
    return scale.shape == (*lead, n, *rest)


def _is_channel(codes: TensorRef, scale: TensorRef) -> bool:
    return scale.shape == (*codes.shape[:-1], 1) and codes.shape[-2] > 1


def _is_one_each(codes: TensorRef, scale: TensorRef) -> bool:
    """Whether there is one scale for each matrix of a stack (the experts of Mistral Small 4, transformers' layout)."""
    return len(codes.shape) > 2 and scale.shape == (*codes.shape[:-2], 1, 1)


def _fp8_strategies(config: Mapping[str, Any]) -> list[tuple[str | None, tuple[int, int]]]:
    """("block", "channel", "tensor" or None where the config does not say; block size) of each group."""
    q = compressed.settings(config)
    block = q.get("weight_block_size")
    strategy = "channel" if q.get("quant_method") == "fbgemm_fp8" else "block" if block else None
    groups = [
        (w.get("strategy") or strategy, w.get("block_structure") or _row_blocks(w) or block)
        for w in compressed.weights(config, "float")
    ]
    return [(s, _two_numbers(b)) for s, b in groups or [(strategy, block)]]


def _row_blocks(weights: Mapping[str, Any]) -> list[Any] | None:
    """The block of a group of inputs."""
    return [1, weights.get("group_size")] if weights.get("strategy") == "group" else None


def _two_numbers(block: Any) -> tuple[int, int]:
    if block is None:
        return 128, 128
    if isinstance(block, str) and (m := re.fullmatch(r"(\d{1,6})x(\d{1,6})", block, re.ASCII)):
        block = [int(n) for n in m.groups()]
    two = isinstance(block, list | tuple) and len(block) == 2
    if not two or not all(type(n) is int and 0 < n < 10**6 for n in block):  # a scheme's name has six digits
        raise ZooError(
            f"config.json: quantization_config has block size {block!r:.80}; expected two positive numbers"
        )
    return block[0], block[1]
