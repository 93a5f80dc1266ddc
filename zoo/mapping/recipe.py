"""A rule compiled for a kind of layer: for a canonical tensor, where the elements of each source tensor lie in it.

What the layers of a kind share is a `Recipe`; an `Output` adds the names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace

from zoo.errors import ZooError
from zoo.formats.base import ITEMSIZE
from zoo.layout import Slot
from zoo.mapping.moves import restride
from zoo.mapping.rules import Box, Cat, Expr, Fit, Rule, Stack, Target, Transpose
from zoo.quant.base import Component, grid
from zoo.spec import Spec


@dataclass(frozen=True, slots=True)
class Recipe:
    """A compiled rule: where the elements of each source tensor lie in the canonical one. Names still
    hold `{i}`; one recipe serves every layer of a kind."""

    names: tuple[str, ...]  # each: one name per line; alternatives where a component has several spellings
    shape: tuple[int, ...]
    fits: tuple[Fit, ...]

    def sources(self, layer: int | None, tensors: Container[str]) -> list[str]:
        """The source names, in the first spelling that exists (by its first name), else in the first."""
        found = [names.replace("{i}", str(layer)).split("\n") for names in self.names]
        return next((names for names in found if names[0] in tensors), found[0])


@dataclass(frozen=True, slots=True)
class Output:
    """A canonical tensor and its making: source tensor `sources[k]` gives the elements `fits[k]`.

    `scheme`: the source is quantised, and dequantised on the way; `components` are then the names of what
    stands beside each source (`components["scale"][k]`), and the fits are of logical elements. `mixed`: of each source its own
    scheme (None: it is plain) and what stands beside it, where they differ; ask `way` and `beside`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layer: int | None
    sources: tuple[str, ...]
    fits: tuple[Fit, ...]
    scheme: str | None = None
    components: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mixed: tuple[tuple[str | None, Mapping[str, str]], ...] = ()

    def way(self, k: int) -> str | None:
        """The scheme of the k-th source."""
        return self.mixed[k][0] if self.mixed else self.scheme

    def beside(self, k: int) -> Mapping[str, str]:
        """What stands beside the k-th source, by component."""
        return self.mixed[k][1] if self.mixed else {c: names[k] for c, names in self.components.items()}

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def compile_rule(
    rule: Rule,
    slot: Slot,
    spec: Spec,
    spell: Callable[[str], str],
    n_ranks: int,
    part: Component | None = None,
    own: tuple[int, ...] = (),
) -> Recipe:
    """The rule's recipe for `slot` (of any layer of its kind), or for a component of it when quantised.
    `own`: the shape of a component that is a constant of each source tensor.

    Raises ZooError if it does not apply.
    """
    layer = None if slot.layer is None else spec.layers[slot.layer]
    axis = int(slot.stacked)
    shape, parts, unit = slot.shape, slot.parts, (1, 1)
    if part is not None:
        if part.unit is None:
            parts = (1,) * len(slot.parts)
            # one released stack has one constant, of its own shape
            lead = slot.shape[:axis] if _stacks(rule.expr) else ()
            shape = (*lead, *((len(parts),) if fuses(rule.expr) else ()), *own)
        else:
            columns = slot.shape[-1]
            unit = (part.unit[0] or sum(slot.parts), part.unit[1] or columns)
            parts, rest = grid(part, slot.parts, columns)
            shape = (*slot.shape[:axis], sum(parts), *rest)
            if part.name == "weight" and (slot.shape[-1] % unit[1] or any(p % unit[0] for p in slot.parts)):
                raise ZooError(f"rows of {columns} elements do not divide into blocks of {unit[1]}")
            if not fuses(rule.expr) and any(p % unit[0] for p in slot.parts[:-1]):
                raise ZooError(
                    f"parts of {'/'.join(map(str, slot.parts))} rows in one tensor are no whole blocks of {unit[0]}: one "
                    "scale would stand for rows of two; convert with --dtype"
                )
            if (part.trailing or part.axes != "oi") and transposes(rule.expr):
                raise ZooError("its blocks run along the input axis and cannot be transposed as they are")
    target = Target(
        Box.whole(shape), parts, slot.parts, axis, layer, spec,
        unit, part is not None and part.unit is None, {"i": "{i}"}, n_ranks,
    )  # fmt: skip
    fits = tuple(rule.expr.compile(target))
    if part is not None and part.holds is not None:  # of the others nothing
        fits = tuple(fit for fit in fits if math.prod(fit.canonical.shape))
    if sum(math.prod(f.canonical.shape) for f in fits if not f.copy) != math.prod(shape):
        raise ZooError(
            "its rule does not fill all of it"
            + (f"; its {part.name}s cannot be fused: use --dtype" if part else "")
        )
    leaves = [spell(f.name) for f in fits]
    if part is None:
        return Recipe(("\n".join(leaves),), shape, fits)
    if part.unit is not None and part.axes != "oi":
        fits = tuple(stored(fit, part.axes) for fit in fits)
    return Recipe(_spelled(leaves, part), shape, fits)


def stored(fit: Fit, axes: str) -> Fit:
    """The fit of a tensor [..., out, in] for one that is released with other axes (see `Component`)."""
    if axes == "o":
        return replace(fit, shape=fit.shape[:-1])
    *lead, rows, columns = fit.shape
    strides = [math.prod(fit.shape[k + 1 :]) for k in range(len(lead))]
    box = restride(fit.source, fit.shape, (*strides, 1, rows))
    return replace(fit, shape=(*lead, columns, rows), source=box)


def _spelled(leaves: list[str], part: Component) -> tuple[str, ...]:
    """The names of a component of these weights, as `Recipe` has them."""
    return tuple(
        "\n".join(leaf.removesuffix(a) + b for leaf in leaves)
        for a, b in part.spellings
        if leaves[0].endswith(a)
    )


def beside(plain: Recipe, part: Component, own: tuple[int, ...]) -> Recipe:
    """Of the recipe of plain weights, that of a component of quantised ones, of which each belongs to a whole released
    tensor, along the axes of that. The fits say shapes only. `own` as in `compile_rule`.

    Raises ZooError for rows that are not whole blocks of codes.
    """
    shapes = [fit.shape if part.unit else own for fit in plain.fits]
    if part.unit is not None:
        for k, (*lead, rows, columns) in enumerate(shapes):
            (n,), rest = grid(part, (rows,), columns)
            shapes[k] = part.released((*lead, n, *rest))
            if part.name == "weight" and (columns % part.unit[1] or rows % part.unit[0]):
                raise ZooError(
                    f"{rows} rows of {columns} elements do not divide into blocks of {part.unit[0]} x {part.unit[1]}"
                )
    fits = tuple(replace(fit, shape=shape) for fit, shape in zip(plain.fits, shapes))
    return Recipe(_spelled(plain.names[0].split("\n"), part), plain.shape, fits)


def _within(expr: Expr) -> Iterator[Expr]:
    """An expression and all those it is made of."""
    yield expr
    for inner in (getattr(expr, "expr", None), *getattr(expr, "parts", ())):
        if isinstance(inner, Expr):
            yield from _within(inner)


def transposes(expr: Expr) -> bool:
    return any(isinstance(e, Transpose) for e in _within(expr))


def fuses(expr: Expr) -> bool:
    return any(isinstance(e, Cat) for e in _within(expr))


def _stacks(expr: Expr) -> bool:
    return any(isinstance(e, Stack) for e in _within(expr))
