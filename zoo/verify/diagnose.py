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
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from zoo import families
from zoo.errors import ZooError
from zoo.formats.canonical import Canonical
from zoo.spec import Spec
from zoo.verify import tolerance
from zoo.verify.compare import Measured, Sketched, drive, rows
from zoo.verify.faults import CATALOGUE, Fault, Subject
from zoo.verify.inputs import Batch, Inputs
from zoo.verify.metrics import relative_error
from zoo.verify.oracle import DTYPES, Oracle
from zoo.verify.ours import build, in_numbers, subject_of, table_of, used_rows, whole_table, with_embedding
from zoo.verify.remedies import (
    PLACES,
    Remedy,
    embedding_fitted,
    for_head,
    for_layer,
    logits_fitted,
    rope_of_config,
    routed_scale_fitted,
    searched,
)
from zoo.verify.settings import Settings
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
    expected: Spec | None,
    how: Settings,
) -> dict[str, Any]:
    """Where ours departs first, and what would explain it; ready for the certificate. `expected`: the Spec that
    the source's config gives. Streamed, no layers are held but those that must be run."""
    dtype = how.dtype
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
    if measured.theirs_are is not None:
        out["suggestions"].append(f"the oracle's logits are {measured.theirs_are}")
    told = bool(out["suggestions"])
    if shown:
        try:
            _search(out, folder, oracle, _telling(asked, measured, dtype, first), measured, first, how)
            told = bool(out["suggestions"])
        except (MemoryError, RuntimeError) as e:
            if not how.stream:
                raise
            # The verdict stands without it.
            out["suggestions"].append(f"the search for the cause ended early: {e}")
    if not told:
        if "hypotheses" in out:
            out["suggestions"].append("no single mistake of the catalogue explains it")
        out["suggestions"] += _unread(folder)
    return out


def _unread(folder: Canonical) -> list[str]:
    """What the family leaves unread of the config, where no cause is found: one of these may be it."""
    said = folder.source.get("config")
    if not isinstance(said, dict):
        return []
    try:
        return families.unread_keys(said, families.get(folder.spec.family))
    except ZooError:  # not a config that this family reads: then the Spec is not of it either
        return []


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
    measured: Measured,
    first: int | None,
    how: Settings,
) -> None:
    """Add to `out` the part that departs in layer `first` (None: in the ends), and what would explain it."""
    spec, spread, dtype, device = folder.spec, measured.spread, how.dtype, how.device
    feeding = [] if first is None else _feeding(spec, first)
    last = spec.n_layers - 1 if first is None else first
    seen = watch(oracle, batch, first, {last - 1, last, *(i - 1 for i in feeding)}, device)
    if how.stream:
        ids, clean = one_layer(folder, DTYPES[dtype], first, feeding, batch.ids, device)
    else:
        ids, clean = batch.ids, subject_of(folder, DTYPES[dtype], device=device)
    clean = in_numbers(clean, DTYPES[dtype])
    ids = ids.to(device)
    bound = tolerance.layer_bound(dtype, last, spread).value
    said = folder.source.get("config")
    config = said if isinstance(said, dict) else {}
    probe = Probe(seen, batch, ids, dtype, first, spec.n_layers, bound, config)
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
        every = None
        if not how.stream and first is not None and measured.oracle_layers == spec.n_layers > 1:
            every = Whole(watch(oracle, batch, None, set(range(spec.n_layers)), device), dtype, spread)
        _made_again(out, probe, clean, before, LARGE if how.stream else None, every)
    out["suggestions"] = list(dict.fromkeys(out["suggestions"]))[:8]


@dataclass
class Found:
    """What was tried and makes what departs agree, or brings it far nearer."""

    name: str
    says: str  # a sentence, or (of a remedy) what completes "agrees when ...", with {} for the layers
    site: str
    error: float
    subject: Subject
    remedy: bool


def _made_again(
    out: dict[str, Any], probe: Probe, clean: Subject, before: float, most: int | None, whole: Whole | None
) -> None:
    """Add to `out` what makes what departs agree: mistakes of the catalogue undone in tensors of at most `most` bytes, and
    remedies. `whole`: what upstream did in all layers, to see where else they help."""
    found: list[Found] = []
    for name, says, site, subject, remedy in _everything(clean, probe, most):
        after = probe.error(subject)
        if after <= probe.bound or after < before / 50:
            found.append(Found(name, says, site, after, subject, remedy))
    if probe.first is not None and not any(f.error <= probe.bound for f in found):
        started = time.perf_counter()
        probe.error(clean)
        seconds = time.perf_counter() - started
        if seconds > SLOW:
            what = "numbers (eps, theta, scales) were not searched for"
            out["suggestions"].append(f"{what}: layer {probe.first} takes {seconds:.1f} s")
        else:
            for r in searched(clean, probe.first, probe.error, probe.departs_at(clean)):
                after = probe.error(r.subject)
                if after <= probe.bound:
                    found.append(Found(r.name, r.says, "spec", after, r.subject, True))
    told = _told(found, probe.bound)
    for f in told:
        if f.name in SAME_AS_ROPE_ORDER and any(g.name == "rope_order" for g in told):
            continue  # said with it
        if not f.remedy:
            out["suggestions"].append(f.says)
            continue
        where = _helped(f, clean, probe, whole) if whole is not None and probe.first is not None else {}
        where = where or {f.says: f"layer {probe.first}"}
        said = "; ".join(says.format(layers) for says, layers in where.items())
        if f.name == "rope_order" and (same := [g.says for g in told if g.name in SAME_AS_ROPE_ORDER]):
            said += f", or, which is the same, with {same[0].removeprefix('consistent with ')} put right"
        nearer = (
            ""
            if f.error <= probe.bound
            else f"comes {before / f.error:.0f} times nearer, not within the bound, "
        )
        out["suggestions"].append(f"{nearer or 'agrees '}when {said}")
    out["hypotheses"] = [
        {"fault": f.name, "site": f.site, "error": f.error, "within_bound": f.error <= probe.bound}
        for f in told
    ][:8]


def _everything(
    clean: Subject, probe: Probe, most: int | None
) -> Iterator[tuple[str, str, str, Subject, bool]]:
    for name, what, site, subject in hypotheses(clean, probe.first, most):
        at = "" if site == "spec" else f" ({site})"
        yield name, f"{'agrees' if name in AGREES else 'consistent'} with {what}{at}", site, subject, False
    for r in probe.remedies(clean):
        if not _unchanged(r.subject, clean):
            yield r.name, r.says, "spec", r.subject, True


def _told(found: list[Found], bound: float) -> list[Found]:
    """Of what helps the best of each kind, once: what merely comes near is not told beside what agrees."""
    best = min((f.error for f in found), default=math.inf)
    enough = max(NEARLY * best, best + bound / 50) if best <= bound else NEARLY * best
    kept: list[Found] = []
    for f in sorted(found, key=lambda f: f.error):
        if f.error > enough:
            break
        # Several things that are the same model are told once, by the simplest, which is tried first.
        if any(f.name == k.name or _unchanged(f.subject, k.subject) for k in kept):
            continue
        kept.append(f)
    return kept


def _helped(f: Found, clean: Subject, probe: Probe, whole: Whole) -> dict[str, str]:
    """In which layers the remedy, or another value of it, makes what departs there agree: what to say of which layers."""
    assert probe.first is not None
    n = clean.spec.n_layers
    said: dict[str, list[int]] = {f.says: [probe.first]}
    for i in range(n):
        if i == probe.first:
            continue
        there = whole.probe(probe, i)
        tried = [r for r in _there(clean, f, probe.first, i) if not _unchanged(r.subject, clean)]
        if not tried or there.error(clean) <= there.bound:
            continue
        errors = [there.error(r.subject) for r in tried]
        at = min(range(len(tried)), key=lambda k: errors[k])
        if errors[at] <= there.bound:
            said.setdefault(tried[at].says, []).append(i)
    return {says: _layers(at, n) for says, at in said.items()}


def _there(clean: Subject, f: Found, first: int, i: int) -> list[Remedy]:
    """The remedies of the same kind for layer i, that which helped in layer `first` before others."""
    # What was found for the first is tried here too: it is now among the values of this Spec.
    same = [r for r in for_layer(f.subject, i) if r.name == f.name]
    if f.says not in (r.says for r in same):  # a number that was looked for
        a, b, here = clean.spec.layers[first], f.subject.spec.layers[first], clean.spec.layers[i]
        other = dataclasses.replace(here, **{
            part: getattr(b, part)
            for part in ("mixer", "beside", "ffn", *PLACES)
            if getattr(a, part) != getattr(b, part) and getattr(a, part) == getattr(here, part)
        })  # fmt: skip
        layers = (*clean.spec.layers[:i], other, *clean.spec.layers[i + 1 :])
        same.append(Remedy(f.name, f.says, clean.with_spec(dataclasses.replace(clean.spec, layers=layers))))
    return sorted(same, key=lambda r: r.says != f.says)


def _layers(at: list[int], n: int) -> str:
    if len(at) == n > 1:
        return "every layer"
    at = sorted(at)
    shown = ", ".join(map(str, at[:12])) + (f", ... ({len(at)} in all)" if len(at) > 12 else "")
    return f"layer{'s' * (len(at) > 1)} {shown}"


@dataclass
class Whole:
    """What upstream did in all layers, to one batch."""

    seen: Seen
    dtype: str
    spread: Spread

    def probe(self, like: Probe, i: int) -> Probe:
        bound = tolerance.layer_bound(self.dtype, i, self.spread).value
        return dataclasses.replace(like, seen=self.seen, first=i, bound=bound)


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
    folder: Canonical,
    dtype: torch.dtype,
    first: int | None,
    feeding: list[int],
    ids: Tensor,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Subject]:
    """Ids, and what runs them through layer `first` (None: through norm and head) when upstream's input to it is known:
    these layers' tensors and, of the embedding, the rows of these ids, renumbered to fit."""
    spec = folder.spec
    layers = set() if first is None else {*feeding, first}

    def wanted(name: str) -> bool:
        if name.startswith("layers."):
            return int(name.split(".")[1]) in layers
        return first is None or not name.startswith("head.")

    subject = subject_of(folder, dtype, wanted, device)
    table, how = table_of(subject)  # mapped
    if first is not None or not spec.tied:
        embedding, ids = used_rows(spec, table, how, ids, dtype)
    else:
        embedding = whole_table(table, how, dtype)
    return ids, with_embedding(subject, embedding.to(device, dtype))


@dataclass
class Seen:
    """What upstream did to one batch."""

    states: dict[int, Tensor] = field(default_factory=dict)  # what layers gave, [B, T, D]
    logits: Tensor | None = None
    input: Tensor | None = None  # of the first layer, if that departs
    calls: list[Call] | None = None  # the parts of the departing layer; None: they cannot be seen


class _Enough(Exception):
    """The departing layer has run."""


def watch(
    oracle: Oracle, batch: Batch, first: int | None, wanted: set[int], device: str | torch.device
) -> Seen:
    """Upstream once more, as far as layer `first` (None: to the end); what the layers `wanted` give is kept, on `device`."""
    seen = Seen()

    def keep(_b: int, i: int, x: Tensor | Sketched) -> None:
        if isinstance(x, Tensor) and i in wanted:
            seen.states[i] = x.to(device, copy=True)
        if i == first:
            raise _Enough

    def logits(_b: int, y: Tensor) -> None:
        seen.logits = y.to(device)

    def begin(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.input = (args[0] if args else kwargs["hidden_states"]).to(device)

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
    config: Mapping[str, Any] = field(default_factory=dict)  # of the source

    def error(self, subject: Subject) -> float:
        """The relative error of what comes out, for a representative token; infinite if it can't be run."""
        try:
            with torch.inference_mode():
                return self._error(build(subject))
        except Exception:
            return float("inf")

    def departs_at(self, subject: Subject) -> int | None:
        """The first position of any row where the departing layer's output is off."""
        assert self.first is not None
        theirs = self.seen.states.get(self.first)
        if theirs is None:
            return None  # a recording keeps sketches only
        with torch.inference_mode():
            model = build(subject)
            x, ctx = self._begin(model)
            mine = model.layers[self.first](x, ctx)
        if mine.ndim != 3 or mine.shape != theirs.shape:
            return None
        off = relative_error(mine.flatten(0, 1), theirs.flatten(0, 1)).view(mine.shape[:2])
        far = ((off > self.bound) & self.batch.mask.to(off.device)).any(0).nonzero()
        return int(far[0]) if len(far) else None

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

    def remedies(self, subject: Subject) -> Iterator[Remedy]:
        """What could be otherwise in what departs, the numbers that upstream's values give among it."""
        d = subject.spec.d_model
        if self.first is None and self.n_layers - 1 not in self.seen.states:
            return  # upstream has fewer layers
        with torch.inference_mode():
            model = build(subject)
            if self.first is None:
                yield from for_head(subject)
                assert self.seen.logits is not None
                plain = build(
                    subject.with_spec(dataclasses.replace(subject.spec, logit_scale=1.0, logit_softcap=None))
                )
                x, ctx = self._begin(plain)
                raw, theirs = plain.finish(x, ctx)[self.batch.mask], self.seen.logits[self.batch.mask]
                yield from logits_fitted(subject, raw, theirs)
                return
            if self.first == 0 and self.seen.input is not None:
                mine, given = (rows(x, self.batch, d) for x in (model.start(self.ids)[0], self.seen.input))
                if mine is not None and given is not None:
                    yield from embedding_fitted(subject, mine, given)
            yield from for_layer(subject, self.first)
            yield from rope_of_config(subject, self.first, self.config)
            state = self.seen.states.get(self.first)
            made = None if state is None else rows(state, self.batch, d)
            if made is not None:
                yield from routed_scale_fitted(subject, self.first, self._made, made)

    def _made(self, subject: Subject) -> Tensor:
        """What comes out of the departing layer [N, D]."""
        assert self.first is not None
        model = build(subject)
        x, ctx = self._begin(model)
        made = rows(model.layers[self.first](x, ctx), self.batch, subject.spec.d_model)
        assert made is not None
        return made

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
                made = own.run(other.input.to(x))
                theirs_made = other.output.to(made.device)
                if made.shape == theirs_made.shape and _far(made, theirs_made, self.batch, self.bound):
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

SLOW = 0.5
"""Seconds of a layer beyond which no number is searched for: that runs it some 250 times."""
NEARLY = 4.0
"""What helps by this much less than the best is not told: rounding apart, one thing is right."""
SAID_BETTER = frozenset({
    "norms_swapped", "post_norms_swapped", "pre_post_norms_swapped", "norm_eps", "rope_theta", "rope_order", "rope_skipped",
    "window_ignored", "attention_softcap_dropped", "routed_scale_dropped",
})  # fmt: skip
"""Faults whose remedies say more."""
SAME_AS_ROPE_ORDER = frozenset(
    {"rope_rows_interleaved", "rope_rows_deinterleaved", "latent_rope_interleaved"}
)
"""To rotate other pairs, and to have the rows in another order, are one."""
AGREES = frozenset(f.name for f in CATALOGUE.values() if f.kind == "spec" and f.undo is not None and f.again)
"""Faults that are made, to see whether upstream is so: not that ours has them."""
GLOBAL = ("embed.", "head.", "norm.", "positions.")


def hypotheses(
    subject: Subject, layer: int | None, most: int | None = None
) -> Iterator[tuple[str, str, str, Subject]]:
    """(name, what it would mean, site, subject with that mistake undone) of everything that could be wrong in
    `layer`, or (None) in the ends; in tensors of at most `most` bytes."""
    for fault in CATALOGUE.values():
        if fault.undo is None or fault.name in SAID_BETTER:
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


def _unchanged(a: Subject, b: Subject) -> bool:
    """Whether the two are the same model: a mistake that changes nothing explains nothing."""
    return (
        a.spec == b.spec
        and a.patch is b.patch
        and a.quant == b.quant
        and a.tensors.keys() == b.tensors.keys()
        and all(t is b.tensors[name] for name, t in a.tensors.items())
    )


def _sites(fault: Fault, subject: Subject, layer: int | None) -> list[str]:
    sites = list(fault.sites(subject.spec))
    if fault.kind == "spec":
        return ["spec"]
    if layer is None:
        return [s for s in sites if s.startswith(GLOBAL)]
    here = [s for s in sites if s.startswith(f"layers.{layer}.") or str(layer) in s.split()]
    return here + ([s for s in sites if s.startswith(("embed.", "positions."))] if layer == 0 else [])
