"""Quantised weights: a file per scheme says what it is called, which tensors it has, and what they stand for.

`schemes` finds them. The formula of a scheme (its `values`) is written once, for numpy and torch alike (`packed`): a conversion
evaluates it in numpy, a piece of a tensor at a time (`host`), a model in torch (`dequantise`). fp8, mxfp4 and int4 without zero
points are written twice, for speed: in a module each for models, with

    dequantise(components: dict[str, torch.Tensor], parts: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor

and in `host` for conversions.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.quant.base import Component, Scheme, grid
from zoo.quant.schemes import block_size, scheme

if TYPE_CHECKING:
    import torch

_MODULES = {"fp8": "zoo.quant.fp8", "mxfp4": "zoo.quant.mxfp4", "int4": "zoo.quant.int4"}


def dequantise(
    name: str, components: dict[str, torch.Tensor], parts: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The logical weight [..., out, in] in `dtype` of a slot quantised by scheme `name`.

    components: "weight" (codes), "scale", ... as stored. parts: rows of each fused part, since scale rows
    are counted per part. The arithmetic is in fp32, rounded once to `dtype`.
    """
    s = scheme(name)  # an unknown one is refused here
    if s.module:
        return _by_formula(s, components, parts, dtype)
    module = importlib.import_module(_MODULES[name.split("-")[0]])
    out: torch.Tensor = module.dequantise(components, parts, dtype, block=block_size(name))
    return out


def looked_up(
    name: str, components: dict[str, torch.Tensor], rows: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The rows [...] (int64) of the logical weight [out, in] in `dtype`: [..., in]. The scheme has each row apart (`Scheme.by_rows`)."""
    flat = rows.reshape(-1)
    own = {
        n: c if scheme(name).component(n).unit is None else _picked(c, flat) for n, c in components.items()
    }
    return dequantise(name, own, (len(flat),), dtype).view(*rows.shape, -1)


def _picked(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows, of any dtype: torch looks up few but the old ones."""
    import torch

    plain = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.view(plain).index_select(0, rows).view(x.dtype)  # not by [rows]: no id is below 0


def formula(s: Scheme) -> Any:
    """`values` of the scheme's module."""
    return importlib.import_module(f"zoo.quant.{s.module}").values


def as_canonical(s: Scheme, components: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Components of one released tensor with their axes as the canonical ones have them."""
    out = {}
    for name, x in components.items():
        axes = s.component(name).axes
        out[name] = x.transpose(-1, -2) if axes == "io" else x[..., None] if axes == "o" else x
    return out


def _by_formula(
    s: Scheme, components: Mapping[str, torch.Tensor], parts: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Matrix by matrix and part by part. Raises ZooError if the components do not fit together."""
    import torch

    codes = components["weight"]
    if codes.ndim > 2:
        pick = [
            {n: c[e] if c.ndim and len(c) == len(codes) else c for n, c in components.items()}
            for e in range(len(codes))
        ]
        return torch.stack([_by_formula(s, c, parts, dtype) for c in pick])
    values = formula(s)
    if s.components[0].axes == "flat":
        cast = {n: _plain(c) for n, c in components.items()}
        return values(cast, s).reshape(sum(parts), -1).to(dtype)
    unit, per = s.components[0].unit, s.components[0].per
    assert unit is not None
    columns = codes.shape[-1] * unit[1] // per[1]
    pieces = {n: _pieces(s, s.component(n), c, parts, columns) for n, c in components.items()}
    return torch.cat([values({n: p[k] for n, p in pieces.items()}, s).to(dtype) for k in range(len(parts))])


def _plain(x: torch.Tensor) -> torch.Tensor:
    """Floats as fp32, exponents as bytes, words with a sign: as a formula takes them."""
    import torch

    if x.dtype == torch.float8_e8m0fnu:
        return x.view(torch.uint8)
    if x.dtype == torch.uint32:
        return x.view(torch.int32)
    return x.to(torch.float32) if x.is_floating_point() else x


def _pieces(
    s: Scheme, part: Component, x: torch.Tensor, parts: tuple[int, ...], columns: int
) -> tuple[torch.Tensor, ...]:
    """The component of each part."""
    x = _plain(x)
    if part.unit is None:
        each = x.ndim > part.ndim and len(x) == len(parts)
        return tuple(x[k] if each else x for k in range(len(parts)))
    rows, rest = grid(part, parts, columns)
    if x.shape != (sum(rows), *rest):
        raise ZooError(
            f"a weight of {'+'.join(map(str, parts))} rows and {columns} columns in {s.name} needs {part.name}s "
            f"{[sum(rows), *rest]}, found {list(x.shape)}"
        )
    return tuple(x.split(rows))
