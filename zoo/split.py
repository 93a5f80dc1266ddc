"""A Spec over several ranks: which part of each canonical tensor a rank holds, and the Spec of what is left to it.

Beside `zoo.layout`: that says what there is, this along which axis it is cut, and by what unit. No torch is needed to
know it.

| unit | what it cuts |
|---|---|
| query heads | q, an output gate, sinks, the columns of `out`; of latent attention what is made for each head |
| key/value heads | k and v; with fewer of them than ranks, ranks hold the same one, whose query heads they share |
| value and key heads, or heads and groups | a linear mixer, in the same way: what is made for a head goes with it |
| channels | a short convolution |
| inner channels | an MLP |
| experts | a mixture, of which every rank has the router |
| ids | embedding and head, and the second embedding of per-layer inputs, where ranks divide their ids |

All else is whole on every rank. A matrix of which the columns are cut gives partial sums; the ranks add them up, and its
bias is the first rank's. No tensor is cut along two axes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from zoo.errors import ZooError
from zoo.formats.base import ITEMSIZE, TensorRef
from zoo.layout import Slot, layout
from zoo.quant.base import Component
from zoo.spec import (
    MLP,
    Attention,
    CompressedAttention,
    DeltaNet,
    LatentAttention,
    Layer,
    Mamba,
    Mixer,
    MoE,
    ShortConv,
    Spec,
)

MOST = 1024
"""Ranks of which it is said whether they would do."""


@dataclass(frozen=True, slots=True)
class Share:
    """The `n` units from `first` on, of the `of` that there are."""

    first: int
    n: int
    of: int

    def range(self, size: int) -> tuple[int, int]:
        """Where the share begins and ends on an axis of `size` entries."""
        return size * self.first // self.of, size * (self.first + self.n) // self.of


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rank holds of a tensor: these ranges of an axis, one after the other, one of each fused part. No range: nothing."""

    axis: int
    parts: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in self.ranges)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is held of a tensor of this shape."""
        return (*whole[: self.axis], sum(self.sizes), *whole[self.axis + 1 :])


# What a layer cuts:
_Cuts = dict[str, tuple[int, tuple[Share, ...]]]  # name in the layer -> axis, share of each part
_NONE: tuple[int, tuple[Share, ...]] = (0, ())


@dataclass(frozen=True)
class Split:
    """`spec` as `rank` of `ranks` has it. `local`: the Spec with this rank's numbers of heads and channels (experts are
    counted as in `spec`: the router has them all). `cuts`: by the names of `layout(spec)`, of what is not whole."""

    spec: Spec
    ranks: int
    rank: int
    local: Spec
    cuts: dict[str, Cut]


def split(spec: Spec, ranks: int, rank: int) -> Split:
    """What `rank` of `ranks` holds of a model. Raises ZooError, naming a layer and its count, if they do not divide it."""
    if (why := next(uneven(spec, ranks), None)) is not None:
        do = ", ".join(map(str, allowed(spec)))
        raise ZooError(f"{ranks} ranks cannot share this model: {why}; numbers of ranks that would do: {do}")
    made: dict[Layer, tuple[Layer, _Cuts]] = {}
    for layer in spec.layers:
        if layer not in made:
            made[layer] = _layer(layer, spec.d_model, ranks, rank)
    named = {f"layers.{i}.{name}": c for i, x in enumerate(spec.layers) for name, c in made[x][1].items()}
    if spec.vocab_size % ranks == 0:
        ids = _even(spec.vocab_size, ranks, rank)
        named |= dict.fromkeys(("embed.weight", "head.weight", "head.bias"), (0, (ids,)))
    if (p := spec.per_layer_embedding) is not None and p.vocab_size % ranks == 0:
        named["per_layer.embed.weight"] = 0, (_even(p.vocab_size, ranks, rank),)
    cuts = {s.name: _cut(s, *named[s.name]) for s in layout(spec).values() if s.name in named}
    local = dataclasses.replace(spec, layers=tuple(made[x][0] for x in spec.layers))
    return Split(spec, ranks, rank, local, cuts)


def allowed(spec: Spec) -> list[int]:
    """The numbers of ranks, of up to `MOST`, that can share the model."""
    return [n for n in range(1, MOST + 1) if next(uneven(spec, n), None) is None]


def uneven(spec: Spec, ranks: int) -> Iterator[str]:
    """What so many ranks cannot share, one sentence each."""
    if ranks > 1 and spec.hyper is not None:
        yield "its residual streams are mixed by hyper-connections, which ranks do not share yet"
    for layer in dict.fromkeys(spec.layers):
        where = f"layer {spec.layers.index(layer)} has"
        if ranks > 1 and isinstance(layer.mixer, CompressedAttention):
            yield f"{where} compressed attention, which ranks do not share yet"
        for even, count, what in _counts(layer, spec.d_model):
            if count % ranks and (even or ranks % count):
                yield f"{where} {count} {what}"
        if ranks > 1 and isinstance(m := layer.ffn, MoE) and m.shared is not None and m.shared.sparsity:
            yield f"{where} a shared MLP of which all gates decide what passes"
        if ranks > 1 and isinstance(m := layer.ffn, MoE) and m.weight_input and m.expert.bias:
            # an expert asked about nothing, in place of one that another rank has, would give its bias
            yield f"{where} experts with biases that are weighted by their input"


def _counts(layer: Layer, d: int) -> Iterator[tuple[bool, int, str]]:
    """(whether ranks must divide it, or may also be a multiple of it; a count; of what)."""
    for mixer in layer.mixers:
        match mixer:
            case Attention(n_heads=q, n_kv_heads=kv):
                yield True, q, "query heads"
                yield False, kv, "key/value heads"
            case LatentAttention(n_heads=q):
                yield True, q, "heads"
            case DeltaNet(n_v_heads=v, n_k_heads=k):
                yield True, v, "value heads"
                yield False, k, "key heads"
            case Mamba(n_heads=h, n_groups=g):
                yield True, h, "state space heads"
                yield False, g, "groups"
            case ShortConv():
                yield True, d, "channels"
    match layer.ffn:
        case MLP():
            yield from _inner(layer.ffn, "inner channels")
        case MoE(n_experts=n, shared=shared):
            yield True, n, "experts"
            if shared is not None:
                yield from _inner(shared, "inner channels in its shared MLP")


def _inner(m: MLP, what: str) -> Iterator[tuple[bool, int, str]]:
    if not m.sparsity:
        yield True, m.d_ff, what


def _even(count: int, ranks: int, rank: int) -> Share:
    return Share(rank * count // ranks, count // ranks, count)


def _joint(count: int, ranks: int, rank: int) -> Share:
    """As `_even`; of fewer units than ranks the one that this rank has with others."""
    return _even(count, ranks, rank) if count % ranks == 0 else Share(rank * count // ranks, 1, count)


def _cut(slot: Slot, axis: int, shares: tuple[Share, ...]) -> Cut:
    rows = 1 if slot.stacked else 0
    parts = slot.parts if axis == rows else slot.shape[axis : axis + 1]
    if not shares:
        return Cut(axis, parts, ())
    ranges, at = [], 0
    for part, share in zip(parts, shares, strict=True):
        start, end = share.range(part)
        ranges.append((at + start, at + end))
        at += part
    return Cut(axis, parts, tuple(ranges))


def _layer(layer: Layer, d: int, ranks: int, rank: int) -> tuple[Layer, _Cuts]:
    mixer, cuts = _mixer(layer.mixer, d, ranks, rank)
    beside, more = _mixer(layer.beside, d, ranks, rank)
    cuts |= more
    ffn = layer.ffn
    even = functools.partial(_even, ranks=ranks, rank=rank)
    match ffn:
        case MLP():
            ffn, more = _mlp(ffn, "mlp", ranks, rank)
            cuts |= more
        case MoE():
            experts = (0, (even(ffn.n_experts),))
            names = ("gate_up", "up", "down")
            cuts |= {f"moe.{name}.{leaf}": experts for name in names for leaf in ("weight", "bias")}
            if ffn.shared is not None:
                shared, more = _mlp(ffn.shared, "moe.shared", ranks, rank)
                ffn = dataclasses.replace(ffn, shared=shared)
                cuts |= more
    return dataclasses.replace(layer, mixer=mixer, beside=beside, ffn=ffn), cuts


M = TypeVar("M", bound=Mixer | None)


def _mixer(m: M, d: int, ranks: int, rank: int) -> tuple[M, _Cuts]:
    even = functools.partial(_even, ranks=ranks, rank=rank)
    joint = functools.partial(_joint, ranks=ranks, rank=rank)
    match m:
        case Attention():
            h, k = even(m.n_heads), joint(m.n_kv_heads)
            qkv = [h, *([h] if m.gate else [])]
            if m.kv_from is None:
                qkv += [k] if m.value_from_key else [k, k]
            cuts: _Cuts = {
                "attn.qkv.weight": (0, tuple(qkv)), "attn.qkv.bias": (0, tuple(qkv)),
                "attn.out.weight": (1, (h,)), "attn.sinks": (0, (h,)),
            }  # fmt: skip
            if m.qk_norm is not None and m.qk_norm.over != "head":
                for leaf in ("weight", "bias"):
                    cuts |= {f"attn.q_norm.{leaf}": (0, (h,)), f"attn.k_norm.{leaf}": (0, (k,))}
            cuts |= _first("attn.out.bias", rank)
            return dataclasses.replace(m, n_heads=h.n, n_kv_heads=k.n), cuts
        case LatentAttention():
            h = even(m.n_heads)
            cuts = {f"attn.{name}.weight": (0, (h,)) for name in ("q", "q_up", "kv_up")}
            cuts |= {"attn.out.weight": (1, (h,)), **_first("attn.out.bias", rank)}
            return dataclasses.replace(m, n_heads=h.n), cuts
        case DeltaNet():
            k, v = joint(m.n_k_heads), even(m.n_v_heads)
            cuts = {
                "delta.qkvz.weight": (0, (k, k, v, v)), "delta.ba.weight": (0, (v, v)),
                "delta.qkv.weight": (0, (k, k, v)), "delta.beta.weight": (0, (v,)),
                "delta.decay_up.weight": (0, (k,)), "delta.gate_up.weight": (0, (v,)),
                "delta.dt_bias": (0, (v if m.decay == "head" else k,)), "delta.A_log": (0, (v,)),
                "delta.conv.weight": (0, (k, k, v)), "delta.out.weight": (1, (v,)),
            }  # fmt: skip
            return dataclasses.replace(m, n_k_heads=k.n, n_v_heads=v.n), cuts
        case Mamba():
            h, g = even(m.n_heads), joint(m.n_groups)
            cuts = {f"mamba.{name}": (0, (h,)) for name in ("A_log", "D", "dt_bias", "norm.weight")}
            cuts |= {
                "mamba.in_proj.weight": (0, (h, h, g, g, h)), "mamba.conv.weight": (0, (h, g, g)),
                "mamba.conv.bias": (0, (h, g, g)), "mamba.out.weight": (1, (h,)),
            }  # fmt: skip
            return dataclasses.replace(m, n_heads=h.n, n_groups=g.n), cuts
        case ShortConv():
            c = even(d)
            cuts = {f"short_conv.in_proj.{leaf}": (0, (c, c, c)) for leaf in ("weight", "bias")}
            cuts |= {f"short_conv.conv.{leaf}": (0, (c,)) for leaf in ("weight", "bias")}
            cuts |= {"short_conv.out.weight": (1, (c,)), **_first("short_conv.out.bias", rank)}
            return m, cuts
    return m, {}


def _mlp(m: MLP, prefix: str, ranks: int, rank: int) -> tuple[MLP, _Cuts]:
    if m.sparsity:  # what passes depends on all its gates
        return m, {}
    f = _even(m.d_ff, ranks, rank)
    cuts: _Cuts = {f"{prefix}.up.{leaf}": (0, (f,)) for leaf in ("weight", "bias")}
    cuts |= {f"{prefix}.gate_up.{leaf}": (0, (f, f)) for leaf in ("weight", "bias")}
    cuts |= {f"{prefix}.down.weight": (1, (f,)), **_first(f"{prefix}.down.bias", rank)}
    return dataclasses.replace(m, d_ff=f.n), cuts


def _first(name: str, rank: int) -> _Cuts:
    """A bias that is added once: by the first rank."""
    return {name: _NONE} if rank else {}


# --- bytes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """`rows` times `nbytes` bytes of a file: the first at `offset`, each `stride` after the one before."""

    offset: int
    nbytes: int
    rows: int = 1
    stride: int = 0


def pieces(ref: TensorRef, cut: Cut | None) -> list[Piece]:
    """Where the bytes are that a rank reads of a tensor, in the order in which it holds them."""
    if cut is None:
        return [Piece(ref.offset, ref.nbytes)]
    rows = math.prod(ref.shape[: cut.axis])
    entry = math.prod(ref.shape[cut.axis + 1 :]) * ITEMSIZE[ref.dtype]
    stride = ref.shape[cut.axis] * entry
    if rows > 1 and len(cut.ranges) > 1:
        raise AssertionError(f"{ref.name}: fused parts are cut along the first axis")
    return [Piece(ref.offset + a * entry, (b - a) * entry, rows, stride) for a, b in cut.ranges]


def component_cut(
    cut: Cut, whole: tuple[int, ...], component: Component, ref: TensorRef, how: str
) -> Cut | None:
    """What a rank holds of a component of a weight quantised by the scheme `how`, where this is what it holds of the weight
    of shape `whole`. None: all of it. Raises ZooError where it would share a block with another rank."""
    if cut.axis < len(whole) - 2:  # experts; one number may be for all of them
        return cut if ref.shape[:1] == whole[:1] else None
    if component.unit is None:  # what the codes' own shape says, or one number for each part
        return Cut(0, (), ()) if component.name == "shape" else None
    unit, per = component.unit[cut.axis - len(whole)], component.per[cut.axis - len(whole)]
    if not unit:
        return None
    ranges, at, grid_at = [], 0, 0
    held = component.holds if cut.axis == len(whole) - 2 else None
    for k, (part, (start, end)) in enumerate(zip(cut.parts, cut.ranges, strict=True)):
        start, end = start - at, end - at
        if start % unit or (end % unit and end != part):
            along = "columns" if cut.axis == len(whole) - 1 else "rows"
            raise ZooError(
                f"{ref.file}: {ref.name} is of {how}, where {unit} {along} go together, and this rank would have {along} "
                f"{start} to {end} of {part}; take fewer ranks, or convert the source again with --dtype bf16"
            )
        if held is not None and k not in held:  # another component has its rows
            at += part
            continue
        ranges.append((grid_at + start // unit * per, grid_at + -(-end // unit) * per))
        at, grid_at = at + part, grid_at + -(-part // unit) * per
    return Cut(cut.axis, (), tuple(ranges))
