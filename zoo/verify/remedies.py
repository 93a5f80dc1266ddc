"""What would make a layer agree: changes to a Spec that people get wrong, each said as the remedy.

Where the catalogue of faults undoes one mistake by making it again, these try the values that a field takes elsewhere: in
the other layers, in other releases, or, where what comes out is a known function of one number, the number that upstream's
own values give.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoo.config import Config, rope_parameters
from zoo.config import rope as rope_of
from zoo.errors import ZooError
from zoo.spec import Attention, LatentAttention, Layer, Mamba, MoE, Norm, Rope, RopeScaling, Spec
from zoo.verify.faults import Subject
from zoo.verify.faults.spec import map_parts

THETAS = (1e4, 1e5, 5e5, 1e6, 5e6, 1e7)
EPSILONS = (1e-12, 1e-8, 1e-6, 1e-5, 1e-4)
SOFTCAPS = (15.0, 20.0, 30.0, 50.0, 100.0)
PLACES = ("attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm")


@dataclass(frozen=True)
class Remedy:
    """`says` completes "agrees when ..."; `{}` in it stands for the layers, as "layer 3" or "layers 3, 7"."""

    name: str
    says: str
    subject: Subject


def for_layer(s: Subject, i: int) -> Iterator[Remedy]:
    """What could be otherwise in layer i, and in that alone."""
    layer = s.spec.layers[i]
    yield from _norms_moved(s, i)
    for name, says, other in itertools.chain(_epsilons(s.spec, layer), _mixers(s.spec, layer)):
        if other != layer:
            yield Remedy(name, says, _with_layer(s, i, other))


def for_head(s: Subject) -> Iterator[Remedy]:
    """What could be otherwise after the last layer."""
    for eps in _all_eps(s.spec) - {s.spec.norm.eps}:
        norm = replace(s.spec.norm, eps=eps)
        yield Remedy("norm_eps", f"eps is {eps:g} in the final norm", s.with_spec(replace(s.spec, norm=norm)))


def rope_of_config(s: Subject, i: int, config: Mapping[str, Any]) -> Iterator[Remedy]:
    """RoPE in layer i, which has none, as the fields of the source's config say it."""
    m = s.spec.layers[i].mixer
    if not isinstance(m, Attention | LatentAttention) or m.rope is not None:
        return
    text = config.get("text_config")
    c = Config(text if isinstance(text, Mapping) else config)
    kinds = c.get("layer_types") or []
    for kind in (None, *dict.fromkeys(kinds if isinstance(kinds, list) else [])):
        try:
            p = rope_parameters(c, layer_type=kind)
            part = float(p.get("partial_rotary_factor") or 1)
            dim = int(m.head_dim * part) if isinstance(m, Attention) else m.rope_dim
            made = rope_of(c, p, dim)
        except (ZooError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            continue  # the config says it in other words, or not at all
        for one in (made, replace(made, interleaved=True)):
            said = f"theta {one.theta:g}, " + (
                "no scaling" if one.scaling is None else f"{one.scaling.kind} scaling"
            )
            says = f"RoPE in {{}} is as the config has it ({said}; it pairs channels {_pairs(one)})"
            layer = replace(s.spec.layers[i], mixer=replace(m, rope=one))
            yield Remedy("rope", says, _with_layer(s, i, layer))


def embedding_fitted(s: Subject, mine: Tensor, theirs: Tensor) -> Iterator[Remedy]:
    """Embeddings of the same tokens, ours and upstream's [N, D]: the factor between them."""
    if mine.shape != theirs.shape:
        return
    scale = _rounded(s.spec.embed_scale * _ratio(mine, theirs), 6)
    root = s.spec.d_model**0.5
    if abs(scale / root - 1) < 0.01:
        scale, value = root, f"multiplied by sqrt(d_model), {root:.4g}"
    elif abs(scale - 1) < 0.01:
        scale, value = 1.0, "not scaled"
    else:
        value = f"multiplied by {scale:g}"
    yield Remedy("embed_scale", f"embeddings are {value}", s.with_spec(replace(s.spec, embed_scale=scale)))


def logits_fitted(s: Subject, raw: Tensor, theirs: Tensor) -> Iterator[Remedy]:
    """`raw`: our logits [N, V] before scale and soft cap; `theirs`: upstream's. Without a cap, by what they are scaled;
    else by what they are capped, if scaled as ours."""
    raw, theirs = raw.double(), theirs.double()
    scale = _rounded(_ratio(raw, theirs), 4)
    plain = replace(s.spec, logit_scale=scale, logit_softcap=None)
    if s.spec.logit_softcap is not None:
        plain = replace(s.spec, logit_softcap=None)
        yield Remedy("logit_softcap", "the logits are not soft-capped", s.with_spec(plain))
    else:
        yield Remedy("logit_scale", f"the logits are multiplied by {scale:g}", s.with_spec(plain))
    cap = _rounded(_cap_of(raw * s.spec.logit_scale, theirs), 3)
    if cap > 0:
        capped = replace(s.spec, logit_softcap=cap)
        yield Remedy("logit_softcap", f"the logits are soft-capped at {cap:g}", s.with_spec(capped))


def routed_scale_fitted(
    s: Subject, i: int, run: Callable[[Subject], Tensor], theirs: Tensor
) -> Iterator[Remedy]:
    """`run` gives what comes out of layer i [N, D], which without a norm after it is linear in the routed scale."""
    ffn = s.spec.layers[i].ffn
    if not isinstance(ffn, MoE) or s.spec.layers[i].ffn_post_norm is not None or ffn.weight_input:
        return

    def scaled(by: float) -> Subject:
        layer = s.spec.layers[i]
        return _with_layer(s, i, replace(layer, ffn=replace(ffn, router=replace(ffn.router, scale=by))))

    one, two = run(scaled(1.0)).double(), run(scaled(2.0)).double()
    routed, rest = two - one, 2 * one - two
    if routed.shape != theirs.shape:
        return
    each = ((theirs.double() - rest) * routed).sum(-1) / routed.square().sum(-1).clamp(min=1e-30)
    scale = _rounded(float(each.median()), 3)
    says = "not scaled" if scale == 1 else f"multiplied by {scale:g}"
    yield Remedy("routed_scale", f"the routed experts' output is {says} in {{}}", scaled(scale))


def searched(s: Subject, i: int, error: Callable[[Subject], float], departs: int | None) -> Iterator[Remedy]:
    """Numbers of layer i that no other layer and no usual release has: looked for between bounds, by what the layer's
    `error` is with each. `departs`: the first position where it shows."""
    layer = s.spec.layers[i]
    m = layer.mixer

    def best(change: Callable[[float], Layer], low: float, high: float, points: int) -> tuple[float, Subject]:
        x = _rounded(_least(lambda x: error(_with_layer(s, i, change(x))), low, high, points), 3)
        return x, _with_layer(s, i, change(x))

    def eps_in(part: Any, eps: float) -> Any:
        return map_parts(part, lambda x: replace(x, eps=eps) if isinstance(x, Norm) else x)

    eps, other = best(lambda x: eps_in(layer, x), 1e-12, 1.0, 13)
    yield Remedy("norm_eps", f"eps is {eps:g} in all norms of {{}}", other)
    if not isinstance(m, Attention | LatentAttention):
        return
    if _parts(m, Norm):
        inner, other = best(lambda x: replace(layer, mixer=eps_in(m, x)), 1e-12, 1.0, 13)
        yield Remedy("norm_eps", f"eps is {inner:g} in the norms inside attention of {{}}", other)
        # Both wrong, each by a number of its own: the one that shows more first, then the other beside it.
        inside = m
        for _ in range(2):
            outer, _other = best(lambda x, m=inside: replace(eps_in(layer, x), mixer=m), 1e-12, 1.0, 13)  # type: ignore[misc]
            around = eps_in(layer, outer)
            inner, other = best(lambda x, a=around: replace(a, mixer=eps_in(m, x)), 1e-12, 1.0, 13)  # type: ignore[misc]
            inside = eps_in(m, inner)
        says = f"eps is {inner:g} in the norms inside attention and {outer:g} in those around it in {{}}"
        yield Remedy("norm_eps", says, other)
    if isinstance(m, Attention):
        if departs:
            narrow = replace(layer, mixer=replace(m, window=departs))
            yield Remedy("window", f"the window is {departs} keys in {{}}", _with_layer(s, i, narrow))
        cap, other = best(lambda x: replace(layer, mixer=replace(m, softcap=x)), 0.1, 1e3, 13)
        yield Remedy("attention_softcap", f"attention scores are soft-capped at {cap:g} in {{}}", other)
    dim = m.head_dim if isinstance(m, Attention) else m.rope_dim
    rope = m.rope or Rope(1e4, dim)
    theta, other = best(
        lambda x: replace(layer, mixer=replace(m, rope=replace(rope, theta=x))), 10.0, 1e9, 65
    )
    said = (
        f"RoPE is given to {{}} (theta {theta:g})" if m.rope is None else f"RoPE in {{}} has theta {theta:g}"
    )
    yield Remedy("rope", said, other)
    scale, other = best(lambda x: replace(layer, mixer=replace(m, scale=x)), m.scale / 100, m.scale * 100, 17)
    yield Remedy("attention_scale", f"attention scores are scaled by {scale:g} in {{}}", other)


def _least(f: Callable[[float], float], low: float, high: float, points: int) -> float:
    """Where f is least: the best of `points` at equal ratios, then narrowed down around it by golden section."""
    at = [math.exp(math.log(low) + k / (points - 1) * math.log(high / low)) for k in range(points)]
    k = min(range(points), key=lambda k: f(at[k]))
    a, b = math.log(at[max(0, k - 1)]), math.log(at[min(points - 1, k + 1)])
    golden = (math.sqrt(5) - 1) / 2
    c, d = b - golden * (b - a), a + golden * (b - a)
    at_c, at_d = f(math.exp(c)), f(math.exp(d))
    for _ in range(22):
        if at_c < at_d:
            b, d, at_d = d, c, at_c
            c = b - golden * (b - a)
            at_c = f(math.exp(c))
        else:
            a, c, at_c = c, d, at_d
            d = a + golden * (b - a)
            at_d = f(math.exp(d))
    return math.exp((a + b) / 2)


# ---------------------------------------------------------------------------------------------------
# Norms


def _norms_moved(s: Subject, i: int) -> Iterator[Remedy]:
    """The layer's norms in every other order, and in the other places that a layer can have norms in."""
    layer = s.spec.layers[i]
    present = [p for p in PLACES if getattr(layer, p) is not None]
    for places in itertools.permutations(PLACES, len(present)):
        moved = {a: b for a, b in zip(present, places, strict=True) if a != b}
        if not moved:
            continue
        norms: dict[str, Any] = dict.fromkeys(PLACES) | {
            b: getattr(layer, a) for a, b in zip(present, places, strict=True)
        }
        other: Layer = replace(layer, **norms)
        tensors = {_moved(n, f"layers.{i}.", moved): t for n, t in s.tensors.items()}
        spec = replace(s.spec, layers=(*s.spec.layers[:i], other, *s.spec.layers[i + 1 :]))
        if len(moved) == 2 and all(moved.get(b) == a for a, b in moved.items()):
            says = " and ".join(moved) + " are exchanged in {}"
        else:
            says = ", ".join(f"{a} is used as {b}" for a, b in moved.items()) + " in {}"
        yield Remedy("norms_moved", says, replace(s, spec=spec, tensors=tensors))


def _moved(name: str, prefix: str, to: dict[str, str]) -> str:
    place, _, leaf = name.removeprefix(prefix).partition(".")
    return f"{prefix}{to[place]}.{leaf}" if name.startswith(prefix) and place in to else name


def _all_eps(spec: Spec) -> set[float]:
    return set(EPSILONS) | {n.eps for n in _parts(spec, Norm)}


def _epsilons(spec: Spec, layer: Layer) -> Iterator[tuple[str, str, Layer]]:
    for eps in sorted(_all_eps(spec)):

        def other(x: Any, eps: float = eps) -> Any:
            return replace(x, eps=eps) if isinstance(x, Norm) else x

        everywhere: Layer = map_parts(layer, other)
        # The narrower first: where the others have this eps already, they are the same.
        m = layer.mixer
        if isinstance(m, LatentAttention) and m.indexer is not None:
            alone = replace(layer, mixer=replace(m, indexer=map_parts(m.indexer, other)))
            yield "norm_eps", f"eps is {eps:g} in the indexer's key norm of {{}}", alone
        if everywhere.mixer != m:
            inside = replace(layer, mixer=everywhere.mixer)
            yield "norm_eps", f"eps is {eps:g} in the norms inside attention of {{}}", inside
            around = replace(everywhere, mixer=m)
            yield "norm_eps", f"eps is {eps:g} in the norms around attention and feed-forward of {{}}", around
        yield "norm_eps", f"eps is {eps:g} in all norms of {{}}", everywhere


# ---------------------------------------------------------------------------------------------------
# Attention


def _mixers(spec: Spec, layer: Layer) -> Iterator[tuple[str, str, Layer]]:
    m = layer.mixer
    if isinstance(m, Attention | LatentAttention):
        for name, says, fields in itertools.chain(_ropes(spec, m), _scales(spec, m)):
            yield name, says, replace(layer, mixer=replace(m, **fields))
    if isinstance(m, Attention):
        for name, says, fields in _masks(spec, m):
            yield name, says, replace(layer, mixer=replace(m, **fields))
        for j, x in enumerate(spec.layers):
            if isinstance(x.mixer, Attention) and x.mixer.kv_from is None and m.kv_from is None:
                yield (
                    "as_another_layer",
                    f"attention in {{}} has rope, window and chunk of layer {j}",
                    replace(
                        layer, mixer=replace(m, rope=x.mixer.rope, window=x.mixer.window, chunk=x.mixer.chunk)
                    ),
                )
    for space in (x for x in layer.mixers if isinstance(x, Mamba) and x.out_norm is not None):
        other = replace(space, norm_first=not space.norm_first)
        says = f"the state space's norm in {{}} is {'before' if other.norm_first else 'after'} its gate"
        yield "norm_and_gate", says, replace(layer, **{"beside" if space is layer.beside else "mixer": other})  # type: ignore[arg-type]
    if isinstance(m, LatentAttention) and m.indexer is not None:
        rope = replace(m.indexer.rope, interleaved=not m.indexer.rope.interleaved)
        yield (
            "indexer_rope_order", f"the indexer's RoPE in {{}} pairs channels {_pairs(rope)}",
            replace(layer, mixer=replace(m, indexer=replace(m.indexer, rope=rope))),
        )  # fmt: skip


def _pairs(rope: Rope) -> str:
    return "(0, 1), (2, 3), ..." if rope.interleaved else "half a head apart"


def _ropes(spec: Spec, m: Attention | LatentAttention) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if m.rope is not None:
        yield "rope", "RoPE is taken off {}", {"rope": None}
        turned = replace(m.rope, interleaved=not m.rope.interleaved)
        yield "rope_order", f"RoPE in {{}} pairs channels {_pairs(turned)}", {"rope": turned}
    seen = [x.mixer.rope for x in spec.layers if isinstance(x.mixer, type(m))]
    others = [r for r in dict.fromkeys(seen) if r is not None]
    for rope in others:
        says = _of(rope, others)
        yield (
            "rope",
            f"RoPE is given to {{}} ({says})" if m.rope is None else f"RoPE in {{}} has {says}",
            {"rope": rope},
        )
    if m.rope is None:
        return
    if isinstance(m, LatentAttention) and m.indexer is not None:
        for theta in THETAS:
            yield "rope", f"RoPE in {{}}, the indexer's too, has theta {theta:g}", _theta(m, theta)
    for theta in THETAS:
        if theta not in (r.theta for r in others):
            yield "rope", f"RoPE in {{}} has theta {theta:g}", {"rope": replace(m.rope, theta=theta)}


def _theta(m: Attention | LatentAttention, theta: float) -> dict[str, Any]:
    """The fields of attention with another theta everywhere in it."""
    turned = map_parts(m, lambda x: replace(x, theta=theta) if isinstance(x, Rope) else x)
    return {"rope": turned.rope} | ({"indexer": turned.indexer} if isinstance(m, LatentAttention) else {})


def _of(rope: Rope, others: Sequence[Rope]) -> str:
    """What tells this RoPE from the model's others."""
    scaling: RopeScaling | None = rope.scaling
    said = f"theta {rope.theta:g}"
    if any(r != rope and r.theta == rope.theta for r in others):
        said += f", {rope.dim} channels, " + ("no scaling" if scaling is None else f"{scaling.kind} scaling")
    return said


def _masks(spec: Spec, m: Attention) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for window in dict.fromkeys(x.mixer.window for x in spec.layers if isinstance(x.mixer, Attention)):
        if window is not None:
            yield "window", f"the window is {window} keys in {{}}", {"window": window}
    yield "window", "there is no window in {}", {"window": None}
    for cap in SOFTCAPS:
        yield "attention_softcap", f"attention scores are soft-capped at {cap:g} in {{}}", {"softcap": cap}
    yield "attention_softcap", "attention scores are not soft-capped in {}", {"softcap": None}


def _scales(spec: Spec, m: Attention | LatentAttention) -> Iterator[tuple[str, str, dict[str, Any]]]:
    width = m.head_dim if isinstance(m, Attention) else m.nope_dim + m.rope_dim
    for why, scale in (
        (f"head_dim^-0.5, of head_dim {width}", width**-0.5),
        ("(d_model / n_heads)^-0.5", (spec.d_model / m.n_heads) ** -0.5),
        ("1", 1.0),
    ):
        yield "attention_scale", f"the scale of attention scores is {why} in {{}}", {"scale": scale}


# ---------------------------------------------------------------------------------------------------


def _with_layer(s: Subject, i: int, layer: Layer) -> Subject:
    return s.with_spec(replace(s.spec, layers=(*s.spec.layers[:i], layer, *s.spec.layers[i + 1 :])))


def _parts(x: Any, kind: type) -> list[Any]:
    found: list[Any] = []

    def look(part: Any) -> Any:
        if isinstance(part, kind):
            found.append(part)
        return part

    map_parts(x, look)
    return found


def _ratio(mine: Tensor, theirs: Tensor) -> float:
    """theirs / mine, of the larger half."""
    a, b = mine.double().flatten(), theirs.double().flatten()
    large = a.abs() >= a.abs().median()
    return float((b[large] / a[large]).median()) if bool(large.any()) else 1.0


def _cap_of(mine: Tensor, theirs: Tensor) -> float:
    """c of theirs = c tanh(mine / c), by the largest; 0 where there is none: it grows with c, so it is halved in."""
    top = mine.abs().flatten().topk(min(64, mine.numel())).indices
    a, b = mine.flatten()[top].abs(), theirs.flatten()[top].abs()
    low, high = b.clone(), torch.full_like(b, 1e4)
    for _ in range(80):
        c = (low + high) / 2
        less = c * torch.tanh(a / c) < b
        low, high = torch.where(less, c, low), torch.where(less, high, c)
    found = float(low.median())
    return found if found < 5e3 else 0.0


def _rounded(x: float, digits: int) -> float:
    return float(f"{x:.{digits}g}")
