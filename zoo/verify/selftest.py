"""The verifier verified: every applicable fault is injected into ours, and must be caught.

The oracle is run once and remembered. Each fault is looked for where a real mistake would show: in the hidden
state after each layer, then in the logits. The bytes level is asked as well, but a fault that it alone sees
does count: a damaged file need not change what a few hundred tokens compute. What it cannot see is a mistake
in the rules or in the Spec, which plan and bytes share with the conversion; so faults of the Spec must be
caught by numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.formats.canonical import Canonical
from zoo.verify import exact, judge, tolerance
from zoo.verify.compare import Measured, Sketched, columns_of, drive, judge_rows, near_ties, rows
from zoo.verify.faults import Fault, Subject, applicable
from zoo.verify.inputs import Batch, Inputs
from zoo.verify.metrics import references, relative_error
from zoo.verify.oracle import DTYPES, OnLayer, Oracle
from zoo.verify.ours import Ours, build, in_numbers, subject_of
from zoo.verify.settings import Settings
from zoo.verify.stage import Stage
from zoo.verify.tolerance import Spread

if TYPE_CHECKING:
    from zoo.mapping.plan import Plan


@dataclass
class Recorded:
    """An oracle's run, remembered: it can be compared with again and again."""

    inputs: Inputs
    spread: Spread
    states: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (batch, layer) -> [B, T, D]
    logits: list[Tensor] = field(default_factory=list)
    avoid_ids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, oracle: Oracle, inputs: Inputs, spread: Spread) -> Recorded:
        out = cls(inputs, spread)
        found: dict[int, Tensor] = {}

        def keep(b: int, i: int, x: Tensor | Sketched) -> None:
            if isinstance(x, Tensor):
                out.states[b, i] = x.clone()

        drive(oracle, inputs.batches, keep, found.__setitem__)
        out.logits = [found[b] for b in range(len(inputs.batches))]
        return out

    def describe(self) -> dict[str, Any]:
        return {"kind": "recording"}

    def run(self, ids: Tensor, lengths: Sequence[int], on_layer: OnLayer | None = None) -> Tensor:
        b = next(b for b, x in enumerate(self.inputs.batches) if x.ids is ids)
        if on_layer is not None:
            for i in sorted(i for c, i in self.states if c == b):
                on_layer(i, self.states[b, i])
        return self.logits[b]

    def second_way(self) -> contextlib.AbstractContextManager[tuple[str, str] | None]:
        return contextlib.nullcontext()

    def greedy(self, ids: Tensor, n: int) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Caught:
    """Where a fault first shows. `level` None: nowhere."""

    level: str | None
    layer: int | None = None
    value: float = 0.0
    bound: float = 0.0
    note: str = ""


def run(
    folder: Canonical,
    oracle: Oracle,
    inputs: Inputs,
    spread: Spread,
    plan: Plan | None,
    how: Settings,
) -> dict[str, Any]:
    """Inject every applicable fault; what was caught where, ready for the certificate. Those that change not a
    bit of any output are listed by name, and count for nothing. Raises ZooError where all of them are."""
    recorded = Recorded.of(oracle, inputs, spread)
    dtype = DTYPES[how.dtype]
    clean = in_numbers(subject_of(folder, dtype, device=how.device), dtype)
    results = []
    faults = applicable(folder.spec, clean.quant)
    for n, fault in enumerate(faults):
        how.say(Stage(f"fault {n + 1} of {len(faults)}: {fault.name}", done=n, of=len(faults)))
        results.append(_try(fault, clean, folder, recorded, how.dtype, plan))
    silent = [f.name for f, r in zip(faults, results, strict=True) if r is None]
    made = [r for r in results if r is not None]
    if not made:
        raise ZooError(
            f"{folder.root}: the self-test has nothing to find: of {len(faults)} faults that could be seeded none changes a bit of any "
            "output; verify without it"
        )
    caught = sum(bool(r["caught"]) for r in made)
    return {
        "applicable": len(made), "caught": caught, "score": f"{caught}/{len(made)}", "results": made,
        "without_effect": silent,
    }  # fmt: skip


def _try(
    fault: Fault, clean: Subject, folder: Canonical, recorded: Recorded, dtype: str, plan: Plan | None
) -> dict[str, Any] | None:
    faulty = fault.inject(clean)
    changed = {n: t for n, t in faulty.tensors.items() if n in clean.tensors and t is not clean.tensors[n]}
    if fault.kind == "weights" and faulty.spec == clean.spec:
        if all(torch.equal(t, clean.tensors[n]) for n, t in changed.items()):
            return None  # e.g. rounding what is rounded already
    at = catch(faulty, recorded, dtype)
    if at.level is None and fault.kind == "spec" and _same(clean, faulty, recorded):
        return None  # e.g. a clamp that these weights never reach
    by_bytes = None
    as_stored = all(n in folder.tensors and t.shape == folder.tensors[n].shape for n, t in changed.items())
    if fault.kind == "weights" and plan is not None and changed and as_stored:
        by_bytes = any(c.value > 0 for c in exact.bytes_level(folder, plan, changed).checks)
    if at.level is None and by_bytes:
        at = Caught("bytes")
    return {
        "fault": fault.name, "what": fault.what, "kind": fault.kind, "site": _site(fault, clean.spec),
        "caught": at.level is not None, "level": at.level, "layer": at.layer,
        "value": at.value, "bound": at.bound, "note": at.note, "bytes": by_bytes,
    }  # fmt: skip


def _same(clean: Subject, faulty: Subject, recorded: Recorded) -> bool:
    """Whether a fault changes not one bit of the logits of all inputs."""
    a, b = Ours(build(clean)), Ours(build(faulty))
    return all(torch.equal(a.run(x.ids), b.run(x.ids)) for x in recorded.inputs.batches)


def _site(fault: Fault, spec: Any) -> str:
    sites = fault.sites(spec)
    return sites[len(sites) // 2]


def catch(subject: Subject, recorded: Recorded, dtype: str) -> Caught:
    """Run a faulty model beside a recording, and stop where it departs."""
    try:
        ours = Ours(build(subject))
        for b, batch in enumerate(recorded.inputs.batches):
            if (found := _layers(ours, b, batch, recorded, dtype)) is not None:
                return found
        m = _logits(ours, recorded, dtype)
    except Exception as e:  # a model that cannot be built or run is caught, too
        return Caught("plan", note=f"{type(e).__name__}: {e}"[:200])
    level = judge.logits_level(m, dtype)
    if level.verdict == "failed" and (check := level.tightest) is not None:
        return Caught("logits", None, check.value, check.bound, check.name)
    return Caught(None)


def _layers(ours: Ours, b: int, batch: Batch, recorded: Recorded, dtype: str) -> Caught | None:
    d = recorded.states[b, 0].shape[-1] if (b, 0) in recorded.states else 0
    n_theirs = sum(c == b for c, _ in recorded.states)
    ours.begin(b, batch.ids)
    for i in range(ours.spec.n_layers):
        mine = ours.layer(b, i)
        if i >= n_theirs:
            return (
                Caught("layers", i, note=f"ours has more layers than the oracle's {n_theirs}")
                if n_theirs
                else None
            )
        a, theirs = rows(mine, batch, d), rows(recorded.states[b, i], batch, d)
        if a is None or theirs is None or a.shape != theirs.shape:
            continue
        value = tolerance.representative(dtype, relative_error(a, theirs).tolist())
        bound = tolerance.layer_bound(dtype, i, recorded.spread).value
        if not value <= bound:
            return Caught("layers", i, value, bound)
    if ours.spec.n_layers < n_theirs:
        return Caught(
            "layers", ours.spec.n_layers - 1, note=f"ours has fewer layers than the oracle's {n_theirs}"
        )
    return None


def _logits(ours: Ours, recorded: Recorded, dtype: str) -> Measured:
    m = Measured([], columns=columns_of(dtype), chooses=ours.chooses, spread=recorded.spread)
    for b, batch in enumerate(recorded.inputs.batches):
        mine = ours.finish(b)[batch.mask]
        tied = near_ties(ours.margins(b), batch, recorded.spread.layers, ours, dtype)
        for at, reference in references(recorded.logits[b][batch.mask], batch.following[batch.mask]):
            judge_rows(m, mine[at], reference, tied[at])
    return m
