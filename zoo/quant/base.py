"""What a quantisation scheme is described by; the schemes themselves are a file each (`zoo.quant.schemes` finds them).

A quantised canonical slot `X.weight` is stored as components: the codes under its own name, the rest as `X.<component>`. Each
is rearranged by the same rule as the weight, at its own grain. No arithmetic here and no tensor library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import TensorRef


class Unread(ZooError):
    """Weights are quantised in a way that zoo does not read: what the config says of it, and what is read."""


MAX_SHAPES = 1 << 16
"""Numbers of a `weight_shape`: two for each expert of a stack."""
SCALES = ("F32", "BF16", "F16")
SAID = ("quantization_config", "quantization", "compression_config")
"""Fields in which a config says it."""
CODES = (("", ""),)
"""Spelling of codes that are where the weight would be."""


@dataclass(frozen=True, slots=True)
class Component:
    """One stored tensor of a quantised weight.

    `unit`: the logical rows and columns that `per` stored elements stand for (0: all of them). None: the component is a
    constant of each released tensor, whatever its shape. `trailing`: axes behind those of the grid. `axes`: those of the
    released tensor, of rows (o) and columns (i); the canonical one always has "oi"; "flat" has one, over all elements row
    after row. `ndim`: axes of a constant, beyond one of size 1. `varies`: each released tensor has a shape of its own.
    `spellings`: (suffix of the rule's name, suffix of the component's) in the order in which they are tried; the first is
    Hugging Face's. `holds`: the fused parts whose rows it has, where other components have those of others; None: all.
    """

    name: str
    dtypes: tuple[str, ...]
    unit: tuple[int, int] | None
    spellings: tuple[tuple[str, str], ...]
    trailing: tuple[int, ...] = ()
    optional: bool = False
    per: tuple[int, int] = (1, 1)
    axes: str = "oi"
    ndim: int = 0
    varies: bool = False
    holds: tuple[int, ...] | None = None

    def names(self, leaf: str) -> list[str]:
        """What the component of the weight that a rule calls `leaf` may be called."""
        return [leaf.removesuffix(a) + b for a, b in self.spellings if leaf.endswith(a)]

    def refuse_constant(self, shape: tuple[int, ...], weight: tuple[int, ...], n_parts: int) -> None:
        """Raises ZooError where a constant of this shape belongs to no weight [..., rows, columns] of so many fused parts."""
        n, matrices, wrong = math.prod(shape), math.prod(weight[:-2]), ""
        if not n:
            wrong = "which holds nothing"
        elif self.axes == "i" and shape[-1:] != weight[-1:]:
            wrong = f"expected a number for each of {weight[-1]} inputs"
        elif self.name == "shape" and (n % 2 or n > MAX_SHAPES):
            wrong = "expected rows and columns"
        elif not self.ndim and n not in (1, matrices, n_parts, matrices * n_parts):
            wrong = "expected one number, or one for each matrix"
        if wrong:
            raise ZooError(f"its {self.name} has the shape {list(shape)}, {wrong}")

    def released(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the released tensor, of that [..., rows, columns] of the grid."""
        if self.axes == "io":
            return (*shape[:-2], shape[-1], shape[-2])
        if self.axes == "flat":
            return (math.prod(shape), 1)
        return shape[:-1] if self.axes == "o" else shape


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to quantise; `components[0]` is the codes.

    `module`: the file of `zoo.quant` whose `values` says what codes stand for; "" for those of `zoo.quant.host`. `bits` of a
    code, `group`: columns that share a scale (0: all). `kept`: why such a weight cannot be carried as codes; "": it can.
    """

    name: str
    components: tuple[Component, ...]
    module: str = ""
    bits: int = 0
    group: int = 0
    kept: str = ""

    def component(self, name: str) -> Component:
        return next(c for c in self.components if c.name == name)

    @property
    def by_rows(self) -> bool:
        """Whether each row has codes and scales of its own, so that one can be looked up alone."""
        return all(c.unit is None or (c.unit[0] == c.per[0] == 1 and c.axes == "oi") for c in self.components)

    @property
    def turned(self) -> bool:
        """Whether a released tensor of codes has the input axis first."""
        return self.components[0].axes == "io"


def grid(component: Component, parts: Iterable[int], columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(rows per part, shape after the rows) of a component of a weight with these parts and columns."""
    assert component.unit is not None
    (u, v), (m, n) = component.unit, component.per
    held = component.holds
    rows = tuple(
        m * (math.ceil(p / u) if u else 1) if held is None or k in held else 0 for k, p in enumerate(parts)
    )
    return rows, (n * (math.ceil(columns / v) if v else 1), *component.trailing)


def packing(bits: int) -> tuple[int, int]:
    """(codes, words of 32 bits): the least whole number of either."""
    common = math.gcd(bits, 32)
    return 32 // common, bits // common


def of_group(size: int) -> str:
    """What a group of so many columns is called in a scheme's name."""
    return f"group{size}" if size else "channel"


def quantization(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The config's `quantization_config` (or the first of `keys` that it has), its own or its text model's; {}: none."""
    for c in (config, config.get("text_config") or {}):
        for key in keys or ("quantization_config",):
            if isinstance(c, Mapping) and (q := c.get(key)) is not None:
                if not isinstance(q, Mapping):
                    raise ZooError(f"config.json: {key} is {q!r}; expected an object"[:200])
                return q
    return {}


def of_words(
    leaf: str, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], method: str
) -> Mapping[str, Any] | None:
    """The `quantization_config` by which the weight that a rule calls `leaf` is words of codes and of zero points, as `method`
    (GPTQ, AWQ) stores them; None if it is not."""
    stem = leaf.removesuffix(".weight")
    if (
        f"{stem}.qweight" not in tensors
        or f"{stem}.qzeros" not in tensors
        or not tensors[f"{stem}.qweight"].shape
    ):
        return None
    q = quantization(config)
    return q if q.get("quant_method") == method else None


def count(q: Mapping[str, Any], key: str, default: int, least: int = 1) -> int:
    """A whole number of the config. Raises ZooError for anything else."""
    value = q.get(key, default)
    if type(value) is not int or not least <= value < 10**6:  # the name of a scheme has six digits
        raise Unread(f"config.json: quantization_config has {key} {value!r:.40}; expected a whole number")
    return value


def check_shape(shape: Any, parts: tuple[int, ...], columns: int, who: str = "") -> None:
    """`shape` (an array) holds [rows, columns] of every part of every expert; the codes may be some rows of
    them. `who` begins the error."""
    if len(shape.reshape(-1)) > MAX_SHAPES:
        raise ZooError(f"{who}weight_shape has {len(shape.reshape(-1))} numbers (limit {MAX_SHAPES})")
    numbers = list(_flat(shape.tolist()))
    for n, found in enumerate(zip(numbers[::2], numbers[1::2])):
        want = [parts[n % len(parts)], columns]
        if found[0] < want[0] or found[1] != want[1]:
            raise ZooError(f"{who}weight_shape says {list(found)}, the packed codes hold {want}")


def _flat(x: Any) -> Iterable[int]:
    if isinstance(x, list):
        for y in x:
            yield from _flat(y)
    else:
        yield x
