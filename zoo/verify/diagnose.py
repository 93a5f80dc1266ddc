"""When it fails: where it departs first, in which part, and what single mistake would explain it.

The part is found by giving each part of our layer the input that upstream's own part had, so that no error
is inherited. The cause is found by running the catalogue of faults in reverse: a wrong layer with one more
fault injected that agrees with upstream names its mistake, because most mistakes are undone by being made
again. Only the departing layer is run, on upstream's input to it: the search costs seconds.

Streamed, upstream goes through its layers once more up to that one, and ours has no other in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from zoo import families
from zoo.formats.canonical import Canonical
from zoo.spec import Attention, LatentAttention, Norm, Rope, Spec
from zoo.verify import tolerance
from zoo.verify.compare import Measured, Sketched, drive, rows
from zoo.verify.faults import CATALOGUE, Fault, Subject
from zoo.verify.faults.spec import map_spec
from zoo.verify.inputs import Batch, Inputs
from zoo.verify.metrics import relative_error
from zoo.verify.oracle import DTYPES, Oracle
from zoo.verify.ours import build, subject_of, used_rows
from zoo.verify.tolerance import Spread

EMBEDDING, HEAD = "the embedding", "the final norm or the head"
KINDS = (
    ("norm", ("norm", "ln_")),
    ("attention", ("attn", "attention", "mixer", "mamba", "delta")),
    ("feed-forward", ("mlp", "moe", "ffn", "feed_forward")),
)
LARGE = 1 << 30
"""Bytes of a tensor whose mistakes are not made again when streaming: each takes a copy of it or two."""


def diagnose(
    folder: Canonical,
    oracle: Oracle,
    asked: Inputs,
    measured: Measured,
    dtype: str,
    expected: Spec | None = None,
    stream: bool = False,
) -> dict[str, Any]:
    """Where ours departs first, and what would explain it; ready for the certificate. `expected`: the Spec that
    the source's config gives. `stream`: hold no layers but those that must be run."""
    first = next(
        (i for i, tokens in enumerate(measured.layers)
         if tokens and not tolerance.representative(dtype, tokens) <= _finite_bound(dtype, i, measured.spread)),
        None,
    )  # fmt: skip
    shown = any(measured.layers)
    out: dict[str, Any] = {"layer": first, "part": None, "where": _where(first, shown), "suggestions": []}
    if shown and measured.oracle_layers != folder.spec.n_layers:
        out["where"] = f"ours has {folder.spec.n_layers} layers, the oracle {measured.oracle_layers}"
    if expected is not None and expected != folder.spec:
        out["suggestions"] = spec_differences(folder.spec, expected)
    if not shown:
        return out
    try:
        batch = _telling(asked, measured, dtype, first)
        _search(out, folder, oracle, batch, measured.spread, dtype, first, stream)
    except (MemoryError, RuntimeError) as e:
        if not stream:
            raise
        # The verdict stands without it.
        out["suggestions"].append(f"the search for the cause ended early: {e}")
    return out


def _telling(asked: Inputs, measured: Measured, dtype: str, first: int | None) -> Batch:
    """The batch to look for the cause in: where layer `first` departs most. A fault of a window shows in the rows
    that cross it alone. Of batches that depart about as much the smallest, which costs least."""
    sizes = [sum(batch.lengths) for batch in asked]
    if first is None or len(measured.layers[first]) != sum(sizes):
        return asked.batches[0]
    tokens = iter(measured.layers[first])
    errors = [tolerance.representative(dtype, list(islice(tokens, n))) for n in sizes]
    enough = min(max(errors), max(max(errors) / 2, _finite_bound(dtype, first, measured.spread)))
    return asked.batches[min((n, b) for b, n in enumerate(sizes) if errors[b] >= enough)[1]]


def _finite_bound(dtype: str, layer: int, spread: Spread) -> float:
    """The layer's bound; none is kept where upstream itself is not finite, for infinity is within infinity."""
    bound = tolerance.layer_bound(dtype, layer, spread).value
    return bound if math.isfinite(bound) else -math.inf


def _search(
    out: dict[str, Any],
    folder: Canonical,
    oracle: Oracle,
    batch: Batch,
    spread: Spread,
    dtype: str,
    first: int | None,
    stream: bool,
) -> None:
    """Add to `out` the part that departs in layer `first` (None: in the ends), and what would explain it."""
    spec = folder.spec
    feeding = [] if first is None else _feeding(spec, first)
    last = spec.n_layers - 1 if first is None else first
    seen = watch(oracle, batch, first, {last - 1, last, *(i - 1 for i in feeding)})
    if stream:
        ids, clean = one_layer(folder, DTYPES[dtype], first, feeding, batch.ids)
    else:
        ids, clean = batch.ids, subject_of(folder, DTYPES[dtype])
    bound = tolerance.layer_bound(dtype, last, spread).value
    probe = Probe(seen, batch, ids, dtype, first, spec.n_layers, bound)
    given = probe.upstream_is_finite()
    # What is not finite is far from everything: no mistake made again would show for what it is.
    finite = given and math.isfinite(probe.bound) and all(_is_finite(t) for _, t in _concerned(clean, first))
    before = probe.error(clean)
    agrees = finite and before <= probe.bound
    if first == 0 and probe.departs_before(clean):
        out |= {"part": "embedding", "where": EMBEDDING}
    elif agrees:
        out["where"] = "the logits" if first is None else out["where"]
    elif first is not None:
        part = probe.part(clean)
        if part is not None:
            out |= {"part": part, "where": f"layer {first}, {part}"}
    out["suggestions"] += observations(clean, first)
    if not given:
        out["suggestions"].append("upstream itself gives values that are infinite or no numbers here")
    out["hypotheses"] = []
    if agrees:  # every mistake that changes little would seem to explain it
        out["suggestions"].append(_adds_up(first))
    elif finite:
        _made_again(out, probe, clean, before, LARGE if stream else None)
    out["suggestions"] = list(dict.fromkeys(out["suggestions"]))[:8]
    if not out["suggestions"]:
        out["suggestions"] = ["no single mistake of the catalogue explains it"]
        if said := folder.source.get("config"):
            out["suggestions"] += families.unread_keys(said, families.get(spec.family))


def _made_again(out: dict[str, Any], probe: Probe, clean: Subject, before: float, most: int | None) -> None:
    """Add to `out` the mistakes that, undone in tensors of at most `most` bytes, make what departs agree."""
    found: list[dict[str, Any]] = []
    for name, what, site, subject in hypotheses(clean, probe.first, most):
        after = probe.error(subject)
        if after <= probe.bound or after < before / 50:
            found.append({"fault": name, "site": site, "error": after, "within_bound": after <= probe.bound})
            out["suggestions"].append(f"consistent with {what}" + (f" ({site})" if site != "spec" else ""))
    out["hypotheses"] = sorted(found, key=lambda f: f["error"])[:8]


def _adds_up(first: int | None) -> str:
    """Said of what agrees when it is given upstream's own input: what departs came with the input."""
    alone = f"layer {first} alone agrees" if first is not None else "the final norm and the head alone agree"
    return (
        f"{alone} with upstream when given upstream's own input: the error adds up over the layers, "
        "by rounding or by experts chosen differently"
    )


def spec_differences(mine: Spec, expected: Spec) -> list[str]:
    """Where zoo.json's Spec is not the one the source's config gives."""

    def flat(x: Any, at: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(x, dict):
            for k, v in x.items():
                yield from flat(v, f"{at}.{k}" if at else k)
        elif isinstance(x, list) and len(x) < 200:
            for n, v in enumerate(x):
                yield from flat(v, f"{at}[{n}]")
        else:
            yield at, x

    a, b = dict(flat(mine.to_dict())), dict(flat(expected.to_dict()))
    keys = [k for k in {**a, **b} if a.get(k) != b.get(k)]
    return [f"zoo.json says {k} is {a.get(k)!r}, the source's config {b.get(k)!r}" for k in keys[:4]]


def observations(subject: Subject, layer: int | None) -> list[str]:
    """What is odd about the tensors themselves: constant, with empty rows, not numbers, the same as elsewhere."""
    mine = f"layers.{layer}." if layer is not None else "layers."
    out = []
    for name, t in _concerned(subject, layer):
        if not t.is_floating_point() or t.numel() < 2:
            continue
        one = float(t.flatten()[0])
        some = t if t.ndim > 2 else t[None]  # of experts one at a time
        if not _is_finite(t):
            out.append(f"{name} holds numbers that are not finite")
        elif all(bool((x.float() == one).all()) for x in some):
            out.append(f"{name} is {one:g} throughout: was it ever filled?")
        elif t.ndim > 1 and not name.startswith("embed.") and (empty := sum(_empty_rows(x) for x in some)):
            out.append(f"{name} has {empty} rows of zeros")
        elif layer is not None and t.ndim > 1:
            same = [n for n, u in subject.tensors.items() if n != name and n.endswith(name.removeprefix(mine))
                    and n.startswith("layers.") and u.shape == t.shape and torch.equal(u, t)]  # fmt: skip
            out += [f"{name} is the same as {n}" for n in same[:1]]
    return out[:4]


def _concerned(subject: Subject, layer: int | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors that what departs has: of layer `layer`, the embedding with the first; None: of the ends."""
    for name, t in subject.tensors.items():
        if layer is None:
            if not name.startswith("layers."):
                yield name, t
        elif name.startswith((f"layers.{layer}.", "embed.") if layer == 0 else f"layers.{layer}."):
            yield name, t


def _is_finite(t: Tensor) -> bool:
    """Experts one at a time: a stack may be mapped."""
    return not t.is_floating_point() or all(
        bool(x.float().isfinite().all()) for x in (t if t.ndim > 2 else t[None])
    )


def _empty_rows(x: Tensor) -> int:
    return int((x.float() == 0).all(-1).sum())


def _feeding(spec: Spec, layer: int) -> list[int]:
    """The layers whose keys and values, or choice of keys, this one reuses."""
    mixer = spec.layers[layer].mixer
    sources = (getattr(mixer, name, None) for name in ("kv_from", "indexer_from"))
    return [n for n in sources if n is not None]


def one_layer(
    folder: Canonical, dtype: torch.dtype, first: int | None, feeding: list[int], ids: Tensor
) -> tuple[Tensor, Subject]:
    """Ids, and what runs them through layer `first` (None: through norm and head) when upstream's input to it is known:
    these layers' tensors and, of the embedding, the rows of these ids, renumbered to fit."""
    spec = folder.spec
    layers = set() if first is None else {*feeding, first}

    def wanted(name: str) -> bool:
        if name.startswith("layers."):
            return int(name.split(".")[1]) in layers
        return first is None or not name.startswith("head.")

    subject = subject_of(folder, dtype, wanted)
    embedding = subject.tensors["embed.weight"]  # mapped
    if first is not None or not spec.tied:
        embedding, ids = used_rows(spec, embedding, ids)
    return ids, subject.put({"embed.weight": embedding.to(dtype)})


@dataclass
class Seen:
    """What upstream did to one batch."""

    states: dict[int, Tensor] = field(default_factory=dict)  # what layers gave, [B, T, D]
    logits: Tensor | None = None
    input: Tensor | None = None  # of the first layer, if that departs
    calls: list[Call] | None = None  # the parts of the departing layer; None: they cannot be seen


class _Enough(Exception):
    """The departing layer has run."""


def watch(oracle: Oracle, batch: Batch, first: int | None, wanted: set[int]) -> Seen:
    """Upstream once more, as far as layer `first` (None: to the end); what the layers `wanted` give is kept."""
    seen = Seen()

    def keep(_b: int, i: int, x: Tensor | Sketched) -> None:
        if isinstance(x, Tensor) and i in wanted:
            seen.states[i] = x.clone()
        if i == first:
            raise _Enough

    def logits(_b: int, y: Tensor) -> None:
        seen.logits = y

    def begin(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.input = args[0] if args else kwargs["hidden_states"]

    with contextlib.ExitStack() as stack:
        layers = getattr(oracle, "layers", None)
        if layers is not None and first is not None:
            seen.calls = stack.enter_context(calls(layers[first]))
            if first == 0:
                stack.callback(layers[0].register_forward_pre_hook(begin, with_kwargs=True).remove)
        with contextlib.suppress(_Enough):
            drive(oracle, [batch], keep, logits)
    return seen


def _where(first: int | None, shown: bool) -> str:
    if first is not None:
        return f"layer {first}"
    return HEAD if shown else "unknown: the oracle shows no hidden states"


@dataclass
class Probe:
    """Runs only what departs: layer `first` on upstream's input to it, or norm and head on upstream's last state."""

    seen: Seen
    batch: Batch
    ids: Tensor  # of the batch, as ours numbers them
    dtype: str
    first: int | None
    n_layers: int
    bound: float

    def error(self, subject: Subject) -> float:
        """The relative error of what comes out, for a representative token; infinite if it can't be run."""
        try:
            with torch.inference_mode():
                return self._error(build(subject))
        except Exception:
            return float("inf")

    def upstream_is_finite(self) -> bool:
        theirs = self.seen.logits if self.first is None else self.seen.states.get(self.first)
        if theirs is None:
            return True
        real = rows(theirs, self.batch, theirs.shape[-1])
        return real is None or bool(real.isfinite().all())

    def _error(self, model: Any) -> float:
        x, ctx = self._begin(model)
        if self.first is None:
            mine, theirs = model.finish(x, ctx), self.seen.logits
        else:
            mine, theirs = model.layers[self.first](x, ctx), self.seen.states[self.first]
        assert theirs is not None
        d = mine.shape[-1]
        a, b = rows(mine, self.batch, d), rows(theirs, self.batch, d)
        if a is None or b is None or a.shape != b.shape:
            return float("inf")
        return tolerance.representative(self.dtype, relative_error(a, b).tolist())

    def _begin(self, model: Any) -> tuple[Tensor, Any]:
        """Upstream's input to what departs, and the pass so far: keys and values that the layer reuses are in it."""
        start, ctx = model.start(self.ids)

        def given(layer: int) -> Tensor:
            x: Tensor = self.seen.states[layer - 1].to(start.dtype) if layer else start
            return x

        if self.first is None:
            return given(self.n_layers), ctx
        for earlier in _feeding(model.spec, self.first):
            model.layers[earlier](given(earlier), ctx)
        return given(self.first), ctx

    def departs_before(self, subject: Subject) -> bool:
        """Whether the first layer's input is wrong already."""
        if self.seen.input is None:
            return False
        try:
            with torch.inference_mode():
                x, _ = build(subject).start(self.ids)
        except Exception:
            return False
        d = x.shape[-1]
        a, b = rows(x, self.batch, d), rows(self.seen.input, self.batch, d)
        return (
            a is not None
            and b is not None
            and a.shape == b.shape
            and float(relative_error(a, b).max()) > self.bound
        )

    def part(self, subject: Subject) -> str | None:
        """Which part of the departing layer is wrong, each given upstream's own input; None if that can't be told."""
        theirs = self.seen.calls
        if theirs is None or self.first is None:
            return None
        model = build(subject)
        with torch.inference_mode():
            x, ctx = self._begin(model)
            layer = model.layers[self.first]
            with calls(layer) as ours:
                layer(x, ctx)
            if [c.kind for c in ours] != [c.kind for c in theirs]:
                mine, others = ", ".join(c.kind for c in ours), ", ".join(c.kind for c in theirs)
                return (
                    f"its parts run in another order ({mine}; upstream: {others})"
                    if len(ours) != len(theirs)
                    else None
                )
            for own, other in zip(ours, theirs, strict=True):
                if own.input.shape != other.input.shape:
                    continue
                made = own.run(other.input.to(x.dtype))
                if made.shape == other.output.shape and _far(made, other.output, self.batch, self.bound):
                    return own.kind if own.kind != "norm" else f"norm ({own.name})"
        return "how its parts are put together (residuals, placement of norms)"


def _far(a: Tensor, b: Tensor, batch: Batch, bound: float) -> bool:
    if a.ndim == 3 and a.shape[:2] == batch.ids.shape:
        a, b = a[batch.mask], b[batch.mask]
    error = relative_error(a.flatten(0, -2), b.flatten(0, -2))
    return not bool(error.isfinite().all()) or float(error.quantile(0.9)) > bound


@dataclass
class Call:
    """One part of a layer as it was run."""

    name: str
    kind: str
    input: Tensor
    output: Tensor
    run: Callable[[Tensor], Tensor]


@contextlib.contextmanager
def calls(layer: nn.Module) -> Iterator[list[Call]]:
    """The direct parts of `layer` that are run meanwhile, in order, with what went in and out."""
    seen: list[Call] = []
    handles = []

    def hook(name: str, kind: str) -> Callable[..., None]:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
            y = out[0] if isinstance(out, tuple) else out
            if not isinstance(x, Tensor) or not isinstance(y, Tensor):
                return

            # Ours add their output onto a residual that they are handed: without it, for the branch alone.
            others = [None if isinstance(a, Tensor) else a for a in args[1:]]

            def again(new: Tensor) -> Tensor:
                z = module(new, *others, **kwargs)
                first: Tensor = z[0] if isinstance(z, tuple) else z
                return first

            seen.append(Call(name, kind, x, y, again))

        return call

    for name, child in layer.named_children():
        kind = next((k for k, words in KINDS if any(w in name.lower() for w in words)), None)
        inner = "per_layer" in name  # ours has its norm one level further down
        if kind is not None and not inner and not isinstance(child, nn.Identity):
            handles.append(child.register_forward_hook(hook(name, kind), with_kwargs=True))
    try:
        yield seen
    finally:
        for h in handles:
            h.remove()


# ---------------------------------------------------------------------------------------------------
# Single mistakes, made again

THETAS = (1e4, 1e5, 5e5, 1e6, 5e6, 1e7)
EPSILONS = (1e-8, 1e-6, 1e-5, 1e-4)
GLOBAL = ("embed.", "head.", "norm.", "positions.")


def hypotheses(
    subject: Subject, layer: int | None, most: int | None = None
) -> Iterator[tuple[str, str, str, Subject]]:
    """(name, what it would mean, site, subject with that mistake undone) of everything that could be wrong in
    `layer`, or (None) in the ends; in tensors of at most `most` bytes."""
    for fault in CATALOGUE.values():
        if fault.undo is None:
            continue
        for site in _sites(fault, subject, layer):
            if most is not None and site in subject.tensors and subject.tensors[site].nbytes > most:
                continue
            try:
                undone = fault.undo(subject, site)
            except Exception:  # this site does not take it
                continue
            if not _unchanged(undone, subject):
                yield fault.name, fault.what, site, undone
    if layer is None:
        return
    for name, what, other in _other_numbers(subject, layer):
        if not _unchanged(other, subject):
            yield name, what, "spec", other


def _other_numbers(subject: Subject, layer: int) -> Iterator[tuple[str, str, Subject]]:
    """The subject with the usual values of numbers of the Spec that are often read wrongly."""
    for theta in THETAS:
        yield "rope_theta", f"a RoPE theta other than {theta:g}", _with(subject, Rope, theta=theta)
    for eps in EPSILONS:
        yield "norm_eps", f"an eps other than {eps:g} in the norms", _with(subject, Norm, eps=eps)
    mixer = subject.spec.layers[layer].mixer
    if isinstance(mixer, Attention | LatentAttention):
        width = mixer.head_dim if isinstance(mixer, Attention) else mixer.nope_dim + mixer.rope_dim
        scales = {
            f"head_dim^-0.5, head_dim {width}": width**-0.5,
            "(d_model / n_heads)^-0.5": (subject.spec.d_model / mixer.n_heads) ** -0.5,
            "1": 1.0,
        }
        for why, scale in scales.items():
            what = f"an attention scale other than {why}"
            yield "attention_scale", what, _with(subject, type(mixer), scale=scale)


def _unchanged(a: Subject, b: Subject) -> bool:
    """Whether the two are the same model: a mistake that changes nothing explains nothing."""
    return (
        a.spec == b.spec
        and a.patch is b.patch
        and a.quant == b.quant
        and a.tensors.keys() == b.tensors.keys()
        and all(t is b.tensors[name] for name, t in a.tensors.items())
    )


def _with(subject: Subject, kind: type, **fields: Any) -> Subject:
    def change(x: Any) -> Any:
        return dataclasses.replace(x, **fields) if isinstance(x, kind) else x  # type: ignore[type-var]

    return subject.with_spec(map_spec(subject.spec, change))


def _sites(fault: Fault, subject: Subject, layer: int | None) -> list[str]:
    sites = list(fault.sites(subject.spec))
    if fault.kind == "spec":
        return ["spec"]
    if layer is None:
        return [s for s in sites if s.startswith(GLOBAL)]
    here = [s for s in sites if s.startswith(f"layers.{layer}.") or str(layer) in s.split()]
    return here + ([s for s in sites if s.startswith(("embed.", "positions."))] if layer == 0 else [])
