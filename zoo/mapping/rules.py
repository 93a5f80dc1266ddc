"""Rules: how released tensor names and shapes map to canonical ones. The whole algebra.

A rule says of which source tensors a canonical tensor is made:

    ("layers.{i}.attn.qkv.weight", cat("model.layers.{i}.self_attn.q_proj.weight", "...k...", "...v..."))

The right side is an expression of very few operations, each a rearrangement of elements and so its
own inverse when read from right to left: an import plan and an export plan are made from the same
line. (`plus_one` and `minus_exp`, for GGUFs, change values too: see `changes.py`.) A name may hold `{i}` (layer), `{e}` (expert, inside `stack`) and `{r}` (rank, inside `ranks`).

Compiling an expression needs only shapes. It yields for each source tensor where its elements lie in
the canonical one, as strided boxes; nothing is read.
"""

from __future__ import annotations

import fnmatch
import functools
import math
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from zoo.errors import ZooError
from zoo.quant.schemes import codes_of
from zoo.spec import Layer, Spec

Change = Literal["", "1 +", "-exp"]
"""What a source holds of a weight w: w itself, 1 + w, -exp(w)."""


# ---------------------------------------------------------------------------------------------------
# Boxes: rectangular sets of elements of a tensor


Axis = tuple[tuple[int, int], ...]
"""(size, stride) pairs; more than one where an axis is a merge of strided sub-axes."""


@dataclass(frozen=True, slots=True)
class Box:
    """Elements `offset + sum(index * stride)` of a flat tensor. Units: elements."""

    offset: int
    axes: tuple[Axis, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        stride, axes = 1, []
        for n in reversed(shape):
            axes.append(((n, stride),))
            stride *= n
        return cls(0, tuple(reversed(axes)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(n for n, _ in axis) for axis in self.axes)

    def split(self, axis: int, sizes: tuple[int, ...]) -> list[Box]:
        """Consecutive pieces along `axis`."""
        (_, stride), *inner = self.axes[axis]
        unit = math.prod(n for n, _ in inner)
        out, start = [], 0
        for size in sizes:
            if size % unit:
                raise ZooError(f"a piece of {size} rows cuts through a group of {unit} permuted rows")
            piece = ((size // unit, stride), *inner)
            axes = self.axes[:axis] + (piece,) + self.axes[axis + 1 :]
            out.append(Box(self.offset + start // unit * stride, axes))
            start += size
        return out

    def index(self, axis: int, at: int) -> Box:
        ((_, stride),) = self.axes[axis]
        return Box(self.offset + at * stride, self.axes[:axis] + self.axes[axis + 1 :])

    def swap(self, a: int, b: int) -> Box:
        axes = list(self.axes)
        axes[a], axes[b] = axes[b], axes[a]
        return Box(self.offset, tuple(axes))

    def regroup(self, axis: int, sizes: tuple[int, ...], order: tuple[int, ...]) -> Box:
        """View `axis` as `sizes` and put its sub-axes in `order`, merged to one axis again."""
        ((_, stride),) = self.axes[axis]
        subs = []
        for n in reversed(sizes):
            subs.append((n, stride))
            stride *= n
        subs.reverse()
        merged = tuple(subs[o] for o in order)
        return Box(self.offset, self.axes[:axis] + (merged,) + self.axes[axis + 1 :])

    def is_contiguous(self) -> bool:
        stride = 1
        for axis in reversed(self.axes):
            for n, s in reversed(axis):
                if n != 1 and s != stride:
                    return False
                stride *= n
        return True

    def flat(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes and strides with every sub-axis an axis of its own."""
        pairs = [p for axis in self.axes for p in axis]
        return tuple(n for n, _ in pairs), tuple(s for _, s in pairs)


@dataclass(frozen=True, slots=True)
class Fit:
    """Source tensor `name`, of `shape`: its elements `source` are the canonical elements `canonical`.

    `copy`: another fit has already given these elements; the bytes must be equal to those.
    `change`: what of w the source holds where the canonical tensor holds w; "" is w itself.
    """

    name: str
    shape: tuple[int, ...]
    source: Box
    canonical: Box
    copy: bool = False
    change: Change = ""


@dataclass(frozen=True, slots=True)
class Target:
    """What an expression is compiled for: a canonical tensor, or one component of a quantised one.

    `out_axis`: the axis of output rows (1 while stacked over experts, else 0). `parts`: its fused
    parts in elements, `rows` in logical rows. `unit`: logical rows and columns that one element
    stands for (a scale per 128 x 128 block: (128, 128)).
    `per_leaf`: the component is a constant of each source tensor (its own shape), not a grid.
    """

    box: Box
    parts: tuple[int, ...]
    rows: tuple[int, ...]
    out_axis: int
    layer: Layer | None
    spec: Spec
    unit: tuple[int, int] = (1, 1)
    per_leaf: bool = False
    names: dict[str, Any] = field(default_factory=dict)
    n_ranks: int = 1

    def with_(self, **kw: Any) -> Target:
        values = {s: getattr(self, s) for s in self.__slots__}
        return Target(**{**values, **kw})


# ---------------------------------------------------------------------------------------------------
# Expressions


class Expr:
    """A source expression. `compile` pushes a canonical box down to the source tensors."""

    def compile(self, t: Target) -> Iterator[Fit]:
        raise NotImplementedError

    def leaves(self) -> Iterator[Leaf]:
        raise NotImplementedError

    @property
    def n_parts(self) -> int:
        """How many of the canonical tensor's fused parts this expression fills inside a `cat`."""
        return 1


@dataclass(frozen=True)
class Leaf(Expr):
    """A source tensor by its name pattern."""

    pattern: str

    def name(self, names: Mapping[str, Any]) -> str:
        return self.pattern.format_map(names) if names else self.pattern

    def compile(self, t: Target) -> Iterator[Fit]:
        shape = t.box.shape
        yield Fit(self.name(t.names), shape, _merged(t.box), t.box)

    def leaves(self) -> Iterator[Leaf]:
        yield self


@functools.lru_cache(maxsize=4096)
def _contiguous(sizes: tuple[tuple[int, ...], ...]) -> Box:
    """A contiguous tensor whose axes are split into `sizes`."""
    stride, axes = 1, []
    for subs in reversed(sizes):
        axis = []
        for n in reversed(subs):
            axis.append((n, stride))
            stride *= n
        axes.append(tuple(reversed(axis)))
    return Box(0, tuple(reversed(axes)))


def _merged(box: Box) -> Box:
    return _contiguous(tuple(tuple(n for n, _ in axis) for axis in box.axes))


@dataclass(frozen=True)
class Cat(Expr):
    parts: tuple[Expr, ...]

    @property
    def n_parts(self) -> int:
        return sum(p.n_parts for p in self.parts)

    def compile(self, t: Target) -> Iterator[Fit]:
        if len(t.parts) != self.n_parts:
            raise ZooError(f"a rule fuses {self.n_parts} tensors where the layout has {len(t.parts)} parts")
        start, spans = 0, []
        for p in self.parts:
            spans.append(slice(start, start + p.n_parts))
            start += p.n_parts
        boxes = t.box.split(t.out_axis, tuple(sum(t.parts[s]) for s in spans))
        for p, s, box in zip(self.parts, spans, boxes, strict=True):
            inner = t.with_(parts=t.parts[s], rows=t.rows[s])
            # Each part has the constant of the tensor that its rows are from.
            each = [box.index(t.out_axis, k) for k in range(p.n_parts)] if t.per_leaf else [box]
            for whole in each:
                yield from p.compile(inner.with_(box=whole))

    def leaves(self) -> Iterator[Leaf]:
        for p in self.parts:
            yield from p.leaves()


@dataclass(frozen=True)
class Pieces(Expr):
    """The tensor was cut into equal pieces (the last may be shorter), wherever its fused parts end."""

    pieces: tuple[Expr, ...]

    def compile(self, t: Target) -> Iterator[Fit]:
        n, k = sum(t.parts), len(self.pieces)
        size = -(-n // k)
        if (last := n - size * (k - 1)) < 1:
            raise ZooError(f"a rule cuts {n} rows into {k} pieces")
        sizes = (*(size,) * (k - 1), last)
        for piece, rows, box in zip(self.pieces, sizes, t.box.split(t.out_axis, sizes), strict=True):
            yield from piece.compile(t.with_(box=box, parts=(rows,), rows=(rows,)))

    def leaves(self) -> Iterator[Leaf]:
        for piece in self.pieces:
            yield from piece.leaves()


@dataclass(frozen=True)
class Stack(Expr):
    expr: Expr

    def compile(self, t: Target) -> Iterator[Fit]:
        n = t.box.shape[0]
        for e in range(n):
            yield from self.expr.compile(
                t.with_(box=t.box.index(0, e), out_axis=0, names={**t.names, "e": e})
            )

    def leaves(self) -> Iterator[Leaf]:
        return self.expr.leaves()


@dataclass(frozen=True)
class Transpose(Expr):
    expr: Expr

    def compile(self, t: Target) -> Iterator[Fit]:
        if t.per_leaf:
            yield from self.expr.compile(t)
            return
        n = len(t.box.axes)
        other = n - 1 if t.out_axis == n - 2 else t.out_axis
        yield from self.expr.compile(t.with_(box=t.box.swap(n - 2, n - 1), out_axis=other, unit=t.unit[::-1]))

    def leaves(self) -> Iterator[Leaf]:
        return self.expr.leaves()


Groups = str | int | Callable[[Layer | None, Spec], int]
"""A count: a number, the name of a field of the layer's mixer, or a function of (layer, spec)."""


def _count(groups: Groups, t: Target) -> int:
    if isinstance(groups, int):
        return groups
    if callable(groups):
        return groups(t.layer, t.spec)
    mixer = t.layer.mixer if t.layer is not None else None
    return int(getattr(mixer, groups))


@dataclass(frozen=True)
class Regroup(Expr):
    """The output rows, seen as canonical [groups, a, b], lie in the source as [groups, b, a]."""

    expr: Expr
    groups: Groups
    a: int | None  # size of the canonical-major sub-axis; b is what remains

    def compile(self, t: Target) -> Iterator[Fit]:
        if t.per_leaf:
            yield from self.expr.compile(t)
            return
        rows, groups = t.box.shape[t.out_axis], _count(self.groups, t)
        if t.unit[0] != 1 or rows % (groups * (self.a or 1)):
            raise ZooError(
                f"{rows} rows in blocks of {t.unit[0]} cannot be reordered in {groups} groups of pairs: "
                "one scale would stand for rows of two blocks; dequantise with --dtype"
            )
        a = self.a or 1
        sizes = (groups, a, rows // groups // a)
        yield from self.expr.compile(t.with_(box=t.box.regroup(t.out_axis, sizes, (0, 2, 1))))

    def leaves(self) -> Iterator[Leaf]:
        return self.expr.leaves()


@dataclass(frozen=True)
class Ungroup(Expr):
    """One source tensor holds, for each of `groups` heads, a slice of each of `n` canonical parts."""

    leaf: Leaf
    groups: Groups
    n: int

    @property
    def n_parts(self) -> int:
        return self.n

    def compile(self, t: Target) -> Iterator[Fit]:
        if t.per_leaf:
            yield from self.leaf.compile(t)
            return
        groups, axis = _count(self.groups, t), t.out_axis
        if len(t.parts) != self.n:
            raise ZooError(f"a rule ungroups {self.n} parts where the layout has {len(t.parts)}")
        if any(p % groups for p in t.parts) or any(n % (groups * t.unit[0]) for n in t.rows):
            raise ZooError(
                f"parts of {'/'.join(map(str, t.parts))} rows do not split into {groups} heads; if they are "
                "quantised in blocks, dequantise with --dtype"
            )
        shape = t.box.shape
        name, whole = self.leaf.name(t.names), Box.whole(shape)
        ((rows, stride),) = whole.axes[axis]
        start = 0
        for part, box in zip(t.parts, t.box.split(axis, t.parts), strict=True):
            ((_, dst),) = box.axes[axis]
            n = part // groups
            src_axis = ((groups, rows // groups * stride), (n, stride))
            dst_axis = ((groups, n * dst), (n, dst))
            yield Fit(
                name,
                shape,
                Box(start * stride, whole.axes[:axis] + (src_axis,) + whole.axes[axis + 1 :]),
                Box(box.offset, box.axes[:axis] + (dst_axis,) + box.axes[axis + 1 :]),
            )
            start += n

    def leaves(self) -> Iterator[Leaf]:
        yield self.leaf


@dataclass(frozen=True)
class Unsqueeze(Expr):
    """The source tensor has extra axes of size 1 at `axes` (positions in the source's shape)."""

    leaf: Leaf
    axes: tuple[int, ...]

    def compile(self, t: Target) -> Iterator[Fit]:
        for fit in self.leaf.compile(t):
            shape = list(fit.shape)
            for a in sorted(self.axes):
                shape.insert(a, 1)
            yield replace(fit, shape=tuple(shape))

    def leaves(self) -> Iterator[Leaf]:
        yield self.leaf


@dataclass(frozen=True)
class Ranks(Expr):
    """The tensor was cut into equal slices along `axis` for tensor-parallel ranks `{r}`.
    `axis` None: every rank holds the whole tensor and the copies must be equal. Of a tensor of several
    fused parts, a rank has its slice of each, one after the other."""

    expr: Expr
    axis: int | None

    def compile(self, t: Target) -> Iterator[Fit]:
        n = t.n_ranks
        if self.axis is None or n == 1:
            for r in range(n):
                for fit in self.expr.compile(t.with_(names={**t.names, "r": r})):
                    yield replace(fit, copy=fit.copy or r > 0)
            return
        size, rest = divmod(t.box.shape[self.axis], n)
        if rest:
            raise ZooError(f"axis {self.axis} of {t.box.shape} does not split over {n} ranks")
        if len(t.parts) > 1 and self.axis == t.out_axis:
            yield from self._slices_of_parts(t, n, size)
            return
        for r, box in enumerate(t.box.split(self.axis, (size,) * n)):
            yield from self.expr.compile(
                t.with_(box=box, parts=(size,), rows=(t.rows[0] // n,), names={**t.names, "r": r})
            )

    def _slices_of_parts(self, t: Target, n: int, size: int) -> Iterator[Fit]:
        assert isinstance(self.expr, Leaf), "ranks of fused parts are slices of one plain tensor"
        if any(p % n for p in t.parts):
            raise ZooError(f"parts of {'/'.join(map(str, t.parts))} rows do not split over {n} ranks")
        shape = (*t.box.shape[: t.out_axis], size, *t.box.shape[t.out_axis + 1 :])
        slices = tuple(p // n for p in t.parts for _ in range(n))
        pieces = t.box.split(t.out_axis, slices)
        for r in range(n):
            source = Box.whole(shape).split(t.out_axis, tuple(p // n for p in t.parts))
            for k, box in enumerate(source):
                yield Fit(self.expr.name({**t.names, "r": r}), shape, box, pieces[k * n + r])

    def leaves(self) -> Iterator[Leaf]:
        return self.expr.leaves()


@dataclass(frozen=True)
class Swap(Expr):
    """Along `axis`, the elements that are canonical [a, b, rest] lie in the source as [b, a, rest]."""

    expr: Expr
    a: Groups
    b: Groups
    axis: int

    def compile(self, t: Target) -> Iterator[Fit]:
        a, b, n = _count(self.a, t), _count(self.b, t), t.box.shape[self.axis]
        if t.unit[self.axis - t.out_axis] != 1 or t.per_leaf or n % (a * b):
            raise ZooError(
                f"{n} rows or columns in blocks of {t.unit} cannot be reordered as {a} times {b}; dequantise with --dtype"
            )
        yield from self.expr.compile(t.with_(box=t.box.regroup(self.axis, (a, b, n // a // b), (1, 0, 2))))

    def leaves(self) -> Iterator[Leaf]:
        return self.expr.leaves()


@dataclass(frozen=True)
class Joined(Expr):
    """The rows that `expr` takes from several tensors lie in one, one after the other: all its leaves name that."""

    expr: Expr

    @property
    def n_parts(self) -> int:
        return self.expr.n_parts

    def compile(self, t: Target) -> Iterator[Fit]:
        assert t.out_axis == 0 and not t.per_leaf, "rows of plain tensors"
        fits = list(self.expr.compile(t))
        shape = (sum(f.shape[0] for f in fits), *fits[0].shape[1:])
        start = 0
        for f in fits:
            yield replace(f, shape=shape, source=Box(start + f.source.offset, f.source.axes))
            start += math.prod(f.shape)

    def leaves(self) -> Iterator[Leaf]:
        yield next(self.expr.leaves())


@dataclass(frozen=True)
class PlusOne(Expr):
    """The source holds 1 + w where the layout has w."""

    leaf: Leaf

    def compile(self, t: Target) -> Iterator[Fit]:
        for fit in self.leaf.compile(t):
            yield replace(fit, change="1 +")

    def leaves(self) -> Iterator[Leaf]:
        yield self.leaf


@dataclass(frozen=True)
class MinusExp(Expr):
    """The source holds -exp(w) where the layout has w."""

    expr: Expr

    def compile(self, t: Target) -> Iterator[Fit]:
        for fit in self.expr.compile(t):
            yield replace(fit, change="-exp")

    def leaves(self) -> Iterator[Leaf]:
        return self.expr.leaves()


@dataclass(frozen=True)
class Flatten(Expr):
    """The source tensor has its first two axes (experts and what follows) as one."""

    leaf: Leaf

    def compile(self, t: Target) -> Iterator[Fit]:
        for fit in self.leaf.compile(t):
            a, b, *rest = fit.shape
            yield replace(fit, shape=(a * b, *rest))

    def leaves(self) -> Iterator[Leaf]:
        yield self.leaf


@dataclass(frozen=True)
class Unflatten(Expr):
    """The source tensor has its first axis as two, the first of them of `groups`."""

    leaf: Leaf
    groups: Groups

    def compile(self, t: Target) -> Iterator[Fit]:
        groups = _count(self.groups, t)
        for fit in self.leaf.compile(t):
            n, *rest = fit.shape
            yield replace(fit, shape=(groups, n // groups, *rest))

    def leaves(self) -> Iterator[Leaf]:
        yield self.leaf


@dataclass(frozen=True)
class PerHead(Expr):
    """The output rows are, for each of `groups` heads, the rows of several parts; the source has a tensor
    [groups, rows of a head, columns] for each part. `sizes`: fields of the mixer that give a head's rows."""

    parts: tuple[Expr, ...]
    groups: Groups
    sizes: tuple[str, ...]

    def compile(self, t: Target) -> Iterator[Fit]:
        groups = _count(self.groups, t)
        sizes = tuple(_count(s, t) for s in self.sizes)
        if t.unit != (1, 1) or t.per_leaf or t.box.shape[t.out_axis] != groups * sum(sizes):
            raise ZooError(
                f"{t.box.shape[t.out_axis]} rows are not {groups} heads of {' + '.join(self.sizes)} rows"
            )
        axes = t.box.axes
        ((_, stride),) = axes[t.out_axis]
        start = 0
        for part, size in zip(self.parts, sizes, strict=True):
            head = ((groups, sum(sizes) * stride),)
            box = Box(t.box.offset + start * stride, (head, ((size, stride),), *axes[t.out_axis + 1 :]))
            yield from part.compile(t.with_(box=box, parts=(size,), rows=(size,), out_axis=1))
            start += size

    def leaves(self) -> Iterator[Leaf]:
        for p in self.parts:
            yield from p.leaves()


Source = str | Expr


def leaf(x: Source) -> Expr:
    return Leaf(x) if isinstance(x, str) else x


def _leaf(x: str) -> Leaf:
    return Leaf(x)


def cat(*parts: Source) -> Expr:
    """Concatenation along the output axis, in the order of the layout's parts."""
    return Cat(tuple(leaf(p) for p in parts))


def pieces(*parts: Source) -> Expr:
    """Equal pieces of what the layout has as one, along the output axis, wherever its own parts end: `torch.chunk`'s."""
    return Pieces(tuple(leaf(p) for p in parts))


def stack(expr: Source) -> Expr:
    """One source tensor per expert `{e}`, stacked on a new leading axis."""
    return Stack(leaf(expr))


def transpose(expr: Source) -> Expr:
    """The source holds [in, out] where the layout has [out, in]."""
    return Transpose(leaf(expr))


def deinterleave(expr: Source) -> Expr:
    """Source rows alternate between two fused parts (gate, up, gate, up, ...); the layout has the
    parts one after the other."""
    return Regroup(leaf(expr), 1, 2)


def rope_halves(expr: Source, heads: Groups) -> Expr:
    """Source rows of each head are in interleaved RoPE order (pairs 0,1 / 2,3 / ...); the layout has
    the first members of all pairs, then the second. The whole head is rotary."""
    return Regroup(leaf(expr), heads, 2)


def ungroup(name: str, heads: Groups, parts: int) -> Expr:
    """One source tensor holds for each head a slice of each of `parts` canonical parts."""
    return Ungroup(_leaf(name), heads, parts)


def squeeze(name: str, *axes: int) -> Expr:
    """The source tensor has axes of size 1 (at these positions) that the layout drops."""
    return Unsqueeze(_leaf(name), axes)


def ranks(expr: Source, axis: int | None) -> Expr:
    """Slices along `axis` of tensor-parallel ranks `{r}`; `axis` None: a copy on every rank."""
    return Ranks(leaf(expr), axis)


def swap(expr: Source, a: Groups, b: Groups, axis: int = 0) -> Expr:
    """Source rows (columns: `axis` 1) in the order [b, a, rest] where the layout has them as [a, b, rest]."""
    return Swap(leaf(expr), a, b, axis)


def joined(*parts: Source) -> Expr:
    """Parts that all name one source tensor, and lie in it one after the other: each rearranged as it says."""
    return Joined(cat(*parts))


def plus_one(name: str) -> Expr:
    """The source holds 1 + w where the layout has w. w is taken where w + 1 is the source to the bit, in fp32."""
    return PlusOne(_leaf(name))


def minus_exp(expr: Source) -> Expr:
    """The source holds -exp(w) where the layout has w: a state's decay where that has its logarithm."""
    return MinusExp(leaf(expr))


def flatten(name: str) -> Expr:
    """The source tensor has the experts' axis and the one after it as one."""
    return Flatten(_leaf(name))


def unflatten(name: str, groups: Groups) -> Expr:
    """The source tensor is a vector's elements in `groups` rows."""
    return Unflatten(_leaf(name), groups)


def per_head(groups: Groups, **parts: Source) -> Expr:
    """Rows of each head come from several tensors [groups, rows, columns]; `parts` are they, by the field of
    the layer's mixer that says how many rows of a head each has."""
    return PerHead(tuple(leaf(p) for p in parts.values()), groups, tuple(parts))


# ---------------------------------------------------------------------------------------------------
# Rule sets


@dataclass(frozen=True)
class Rule:
    key: str
    expr: Expr
    when: Callable[[Layer | None, Spec], bool] | None = None

    @property
    def one_by_one(self) -> bool:
        """Whether each expert has source tensors of its own."""
        return any("{e}" in leaf.pattern for leaf in self.expr.leaves())


@dataclass(frozen=True)
class Extra:
    """Source tensors the text model does not use: kept aside byte for byte, with the reason.

    `pattern` is a glob; `{i}` in it stands for the index of a layer that the Spec does not have (beyond
    the last one), or of one for which `when` holds: so a tensor of a real layer can't slip through.
    `beside`: the layer must have the weight of this name too, plain or in codes, so that a real layer that the config does not count can't.
    """

    pattern: str
    reason: str
    when: Callable[[Layer], bool] | None = None
    beside: str | None = None

    @functools.cached_property
    def _regex(self) -> re.Pattern[str]:
        parts = self.pattern.split("{i}")
        body = r"(?P<i>\d+)".join(fnmatch.translate(p).removesuffix(r"\Z").removesuffix(r"\z") for p in parts)
        return re.compile(body + r"\Z")

    def matches(self, name: str, spec: Spec, names: Container[str]) -> bool:
        """Whether the tensor `name` is one, among those called `names`."""
        m = self._regex.match(name)
        if m is None or "i" not in m.groupdict():
            return m is not None
        if self.beside is not None and not any(
            f"{name[: m.end('i')]}.{there}" in names for there in codes_of(self.beside)
        ):
            return False
        i = int(m["i"])
        return i >= spec.n_layers if self.when is None else i < spec.n_layers and self.when(spec.layers[i])


def extra(
    pattern: str, reason: str, when: Callable[[Layer], bool] | None = None, beside: str | None = None
) -> Extra:
    """Source tensors kept aside, by a glob of their names; see `Extra`."""
    return Extra(pattern, reason, when, beside)


RuleLine = tuple[str, Source] | tuple[str, Source, Callable[[Layer | None, Spec], bool]] | Extra


@dataclass(frozen=True)
class RuleSet:
    """All rules of one naming of a family's tensors.

    Several rules may stand for one key: the first whose source tensors exist, of shapes that fit, is taken. `prefixes`
    are alternative spellings of the names' beginnings: the first whose embedding exists is taken. `beside`: beginnings of
    released names of what stands beside the model, and what transformers has in memory ("": other tensors); each group is of one
    class, and meant where there are tensors of each of its beginnings.
    """

    rules: tuple[Rule, ...]
    extras: tuple[Extra, ...]
    prefixes: tuple[tuple[tuple[str, str], ...], ...] = ((),)
    beside: tuple[tuple[tuple[str, str], ...], ...] = ()

    @functools.cached_property
    def by_key(self) -> dict[str, tuple[Rule, ...]]:
        out: dict[str, tuple[Rule, ...]] = {}
        for r in self.rules:
            out[r.key] = (*out.get(r.key, ()), r)
        return out

    @property
    def version(self) -> str:
        """Hash of the rules as written: part of a certificate's provenance."""
        import hashlib  # slow to import, and few ask

        text = repr([(r.key, r.expr) for r in self.rules]) + repr(self.extras) + repr(self.prefixes)
        return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()[:16]


def rules(
    *lines: RuleLine, prefixes: tuple[dict[str, str], ...] = ({},), beside: tuple[dict[str, str], ...] = ()
) -> RuleSet:
    """A rule set from lines `(canonical key, source expression[, when(layer, spec)])` and extras."""
    made = tuple(
        Rule(line[0], leaf(line[1]), line[2] if len(line) > 2 else None)
        for line in lines
        if not isinstance(line, Extra)
    )
    extras = tuple(line for line in lines if isinstance(line, Extra))
    spelt, held = (tuple(tuple(p.items()) for p in each) for each in (prefixes, beside))
    return RuleSet(made, extras, spelt, held)


def respell(rule_set: RuleSet, prefix: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    """The function from a rule's spelling of a name to the source's."""
    if not prefix:
        return lambda name: name

    def spell(name: str) -> str:
        for old, new in prefix:
            if name.startswith(old):
                return new + name[len(old) :]
        return name

    return spell
