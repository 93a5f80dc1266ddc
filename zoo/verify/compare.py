"""Two runs side by side: an oracle's and ours, layer by layer, batch by batch.

The oracle is run two ways in lock step, a batch at a time, or, streamed, a layer at a time: its second way goes first and is
kept as sketches of its hidden states and as its logits; during the first way, ours advances one layer whenever the oracle
has finished one, so that neither side's hidden states are ever all in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.verify import tolerance
from zoo.verify.inputs import Batch, Inputs
from zoo.verify.metrics import Columns, LogitMetrics, Reference, best_ids, references, relative_error
from zoo.verify.oracle import Oracle, Transformers
from zoo.verify.ours import Ours
from zoo.verify.sharing import Sharing
from zoo.verify.stage import Clock
from zoo.verify.tolerance import QUANTILES, Spread, representative

SKETCH = 64
"""Random directions that a recorded hidden state is projected on; a relative error is kept to about 9 %."""


class Sketch:
    """Projections of hidden states on fixed random directions: distances survive, memory does not grow with D."""

    def __init__(self, d: int, k: int = SKETCH, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.directions = torch.randn(d, k, generator=generator) / k**0.5  # [D, k]

    def __call__(self, x: Tensor) -> Tensor:  # [N, D] -> [N, k]
        if self.directions.device != x.device:
            self.directions = self.directions.to(x.device)
        out: Tensor = x.float() @ self.directions
        return out


@dataclass(frozen=True)
class Sketched:
    """A recorded hidden state: the real positions' projections [N, k] on `directions` [D, k]."""

    values: Tensor
    directions: Tensor

    def of(self, x: Tensor) -> Tensor | None:
        """The same projections of our state [N, D]; None where D is another."""
        return x.float() @ self.directions.to(x.device) if x.shape[-1] == len(self.directions) else None


class Kept:
    """Logits of several batches, in memory, or in a temporary file what is more than 512 MiB beside others; those of a GPU stay
    there while a quarter of its memory is free."""

    LIMIT = 512 << 20

    def __init__(self) -> None:
        self._memory: dict[int, Tensor] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, b: int, logits: Tensor) -> None:
        if logits.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(logits.device)
            if free > total // 4:
                self._memory[b] = logits
                return
        held = [x.nbytes for x in self._memory.values() if x.device.type == "cpu"]
        if held and sum(held) + logits.nbytes > self.LIMIT:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="zoo-verify-")
            torch.save(logits, Path(self._folder.name) / f"{b}.pt")
        else:
            self._memory[b] = logits

    def pop(self, b: int) -> Tensor:
        if b in self._memory:
            return self._memory.pop(b)
        assert self._folder is not None
        path = Path(self._folder.name) / f"{b}.pt"
        logits: Tensor = torch.load(path, weights_only=True)
        path.unlink()
        return logits

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()


@dataclass
class Measured:
    """What one comparison gives. Tokens are in the order of the inputs."""

    layers: list[list[float]]  # per layer, relative error of each token; empty where it can't be compared
    settled: LogitMetrics = field(default_factory=LogitMetrics)
    ties: LogitMetrics = field(default_factory=LogitMetrics)  # tokens at a near tie between experts
    oracle_layers: int = 0  # how many layers the oracle showed; 0: it shows none
    turned: int = 0  # choices of experts at a near tie that were made as the oracle's
    leads: list[float] = field(
        default_factory=list
    )  # oracle's lead of best over second, where best ids differ
    columns: Columns | None = None  # of all tokens, in lower precision
    chooses: bool = False  # whether tokens choose experts or keys
    spread: Spread = field(default_factory=Spread)
    theirs_are: str | None = None  # what the oracle gives in place of logits, or of logits in the dtype

    def __iadd__(self, later: Measured) -> Measured:
        """With what the tokens after these give; `spread` is of all, and stays."""
        for mine, others in zip(self.layers, later.layers, strict=True):
            mine += others
        self.settled += later.settled
        self.ties += later.ties
        self.oracle_layers = max(self.oracle_layers, later.oracle_layers)
        self.turned += later.turned
        self.leads += later.leads
        if self.columns is not None and later.columns is not None:
            self.columns += later.columns
        self.theirs_are = self.theirs_are or later.theirs_are
        return self

    @property
    def everything(self) -> LogitMetrics:
        if not self.ties.n:
            return self.settled
        out = LogitMetrics()
        out += self.settled
        out += self.ties
        return out


OnLayer = Callable[[int, int, Tensor | Sketched], None]  # batch, layer, state
OnLogits = Callable[[int, Tensor], None]


def is_upstream(oracle: Oracle) -> bool:
    """Whether it runs upstream's own classes, be it by way of another rank."""
    return isinstance(oracle, Transformers) or getattr(oracle, "upstream", False)


def drive(oracle: Oracle, batches: Sequence[Batch], on_layer: OnLayer, on_logits: OnLogits) -> None:
    """Run all batches. An oracle that streams runs all of them through a layer before the next."""
    all_at_once: Any = getattr(oracle, "drive", None)
    if all_at_once is not None:
        all_at_once(batches, on_layer, on_logits)
        return
    for b, batch in enumerate(batches):
        logits = oracle.run(batch.ids, batch.lengths, lambda i, x, b=b: on_layer(b, i, x))  # type: ignore[misc]
        on_logits(b, logits)


def rows(x: Tensor, batch: Batch, d: int) -> Tensor | None:
    """The real positions of a hidden state [B, T, D] as [N, D]; of several streams side by side [N, S D]."""
    if x.ndim == 4:  # [S, B, T, D]
        x = x.permute(1, 2, 0, 3).flatten(2)
    if x.ndim != 3 or x.shape[:2] != batch.ids.shape or x.shape[-1] % d:
        return None
    return x[batch.mask]


def form_of(logits: Tensor, dtype: str) -> str | None:
    """What some rows of an oracle's logits [N, V] are, where they do not look like logits in `dtype`; None if they do."""
    x = logits.double()
    if bool((x == x[:, :1]).all()):
        return "one number throughout, for every id"
    if bool((x <= 1e-6).all()) and bool(((x.exp().sum(-1) - 1).abs() < 1e-3).all()):
        return "log-probabilities: give what log_softmax is made of"
    if bool((x >= 0).all()) and bool(((x.sum(-1) - 1).abs() < 1e-3).all()):
        return "probabilities: give what softmax is made of"
    for name, narrow in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if dtype == "fp32" and torch.equal(x.to(narrow).double(), x):
            return f"all numbers of {name}: computed or stored in that, they say no more (a recording says so: dtype {name})"
    return None


class SpreadMeter:
    """How far an oracle is from itself: it hears the second way first, then the first. `ways`: their names, or None."""

    def __init__(self, inputs: Inputs, d: int, dtype: str) -> None:
        """`d`: the model's width."""
        self.batches, self.d, self.dtype = inputs.batches, d, dtype
        self.ways: tuple[str, str] | None = None
        self.layers: dict[int, dict[int, list[float]]] = {}  # layer -> batch -> of each token: what is judged
        self.states: dict[int, dict[int, list[float]]] = {}  # against the state as it is: what a router sees
        self.of = {b: Apart(LogitMetrics(five=False), columns_of(dtype)) for b in range(len(self.batches))}
        self._sketches: dict[tuple[int, int], Tensor] = {}
        self._second = Kept()  # logits that wait for the first way's
        self._sketch: dict[int, Sketch] = {}

    def keep_layer(self, b: int, i: int, x: Tensor | Sketched) -> None:
        if isinstance(x, Tensor) and (r := rows(x, self.batches[b], self.d)) is not None:
            self._sketches[b, i] = self.sketched(r)

    def keep_logits(self, b: int, logits: Tensor) -> None:
        self._second.put(b, logits)

    def sketched(self, x: Tensor) -> Tensor:
        if x.shape[-1] not in self._sketch:
            self._sketch[x.shape[-1]] = Sketch(x.shape[-1])
        return self._sketch[x.shape[-1]](x)

    def on_layer(self, b: int, i: int, x: Tensor, share: Tensor | None = None) -> None:
        """`x` [N, D]: the first way's state. `share` [N]: see `Longest`."""
        if (b, i) in self._sketches:
            error = relative_error(self._sketches.pop((b, i)), self.sketched(x))
            self.states.setdefault(i, {})[b] = error.tolist()
            self.layers.setdefault(i, {})[b] = (error if share is None else error * share).tolist()

    def told(self, i: int, states: Mapping[int, Tensor], sharing: Sharing) -> None:
        """The states after layer i of the first way's batches that this rank has: all ranks know of all batches then."""
        for b, x in states.items():
            if (r := rows(x, self.batches[b], self.d)) is not None:
                self.on_layer(b, i, r)
        for of, judged in sharing.all((self.states.get(i, {}), self.layers.get(i, {}))):
            if of:
                self.states.setdefault(i, {}).update(of)
                self.layers.setdefault(i, {}).update(judged)

    def second_logits(self, b: int) -> Tensor | None:
        return self._second.pop(b) if self.ways is not None else None

    def on_logits(self, b: int, other: Tensor, reference: Reference) -> None:
        """Some rows of the second way's, against the first's."""
        self.of[b].add(other, reference)

    def noise(self) -> list[float]:
        """Per layer, the spread of a representative token, as far as has been seen."""
        return [self.noise_after(i) for i in range(max(self.states, default=-1) + 1)]

    def noise_after(self, i: int, b: int | None = None) -> float:
        """The spread of a representative token after layer i, as far as has been seen, and in batches up to `b`."""
        of = self.states.get(i, {})
        return representative(self.dtype, [x for k in sorted(of) if b is None or k <= b for x in of[k]])

    def result(self) -> Spread:
        self._second.close()
        if self.ways is None:
            return Spread()
        judged = [
            representative(self.dtype, [x for b in sorted(of) for x in of[b]])
            for of in (self.layers.get(i, {}) for i in range(max(self.layers, default=-1) + 1))
        ]
        all_of_it = Apart(LogitMetrics(five=False), columns_of(self.dtype))
        for b in sorted(self.of):
            all_of_it += self.of[b]
        return Spread.of(self.ways, all_of_it.logits, judged, all_of_it.columns)


@dataclass
class Apart:
    """How far logits are from others: by token and, in lower precision, by id."""

    logits: LogitMetrics
    columns: Columns | None

    def add(self, other: Tensor, reference: Reference) -> None:
        self.logits.add(other, reference)
        if self.columns is not None:
            self.columns.add(other, reference)

    def __iadd__(self, later: Apart) -> Apart:
        self.logits += later.logits
        if self.columns is not None and later.columns is not None:
            self.columns += later.columns
        return self


class Longest:
    """How long upstream's states are, beside the longest that each has been.

    In many models the first token of a text is thousands long from an early layer on, nearly all of it in one channel, until a late
    layer takes that away. What is left carries the rounding of what there was: one number's, so that of two right runs one may
    easily be off by several times as much as the other. Against the longest that the state has been it is rounding like any other."""

    def __init__(self) -> None:
        self._longest: dict[int, Tensor] = {}

    def share(self, b: int, theirs: Tensor) -> Tensor:
        """Of batch `b` after its next layer, [N, D] -> [N], at most 1."""
        now = theirs.double().norm(dim=-1)
        longest = self._longest[b] = torch.maximum(now, self._longest.get(b, now))
        share: Tensor = (now / longest).nan_to_num(nan=1.0)
        if len(share):  # what all of a text shrink by, as a layer's scalar makes them, is no excuse
            share = share / share.median().clamp(min=1e-30)
        return share.clamp(min=1e-30, max=1.0)


def drive_both(
    oracle: Oracle,
    batches: Sequence[Batch],
    meter: SpreadMeter,
    on_layer: OnLayer,
    on_logits: OnLogits,
    clock: Clock | None = None,
) -> None:
    """Run all batches both ways that the oracle has, the second before the first, which `meter` hears. As close to one another as
    it can: an oracle that streams layer by layer; one whose ways are a matter of switches batch by batch; else all batches of one,
    then of the other."""
    clock = clock or Clock()
    together: Any = getattr(oracle, "drive_both", None)
    if together is not None:
        together(batches, meter, on_layer, on_logits, clock)
        return
    groups: list[tuple[int, Sequence[Batch]]] = [(0, batches)]
    if getattr(oracle, "only_switches", False):
        groups = [(b, [batch]) for b, batch in enumerate(batches)]
    for first, some in groups:
        with clock("oracle, second way"), oracle.second_way() as meter.ways:
            if meter.ways is not None:
                _drive_from(first, oracle, some, meter.keep_layer, meter.keep_logits)
        _drive_from(first, oracle, some, on_layer, on_logits)


def _drive_from(
    first: int, oracle: Oracle, batches: Sequence[Batch], on_layer: OnLayer, on_logits: OnLogits
) -> None:
    """As `drive`, of batches whose numbers begin with `first`."""
    drive(
        oracle,
        batches,
        lambda b, i, x: on_layer(first + b, i, x),
        lambda b, logits: on_logits(first + b, logits),
    )


ROUNDED = {"fp32": 2.0**-23, "bf16": 2.0**-8, "fp16": 2.0**-11}
UNITS = 32
"""Units in the last place of the largest logit by which two right runs may differ, twice: where a recording tells no spread.
Measured: upstream's two ways are at most 28 apart over the main tiny variants of all 25 families (gemma3n; 24 where experts are
chosen), zoo and upstream 19 on SmolLM2, whose logits go up to 41."""


class Claimed(Spread):
    """A spread that nobody here measured."""

    said = ""

    @property
    def why(self) -> str:
        return self.said


def rounding(dtype: str, largest: float, why: str) -> Claimed:
    """In place of a spread that nobody measured: rounding, by the scale of the logits (fp32 only: the floors of lower
    precision go by it already)."""
    made = Claimed(
        logits=dict.fromkeys(QUANTILES, UNITS * ROUNDED[dtype] * largest) if dtype == "fp32" else {}
    )
    made.said = f"{UNITS} units in the last place of logits up to {largest:.3g} ({why})"
    return made


def measure(
    oracle: Oracle,
    ours: Ours,
    inputs: Inputs,
    dtype: str,
    spread: Spread | None = None,
    clock: Clock | None = None,
    longest: Longest | None = None,
    sharing: Sharing | None = None,
) -> Measured:
    """Everything that layers and logits are judged by. `spread`: a known one (of a recording), else measured.
    `clock`: what counts the seconds. `longest`: states are held against the longest that they have been. `sharing`: ranks
    that have some of the batches each, if the oracle goes by it; all get the same."""
    clock = clock or Clock()
    together = hasattr(oracle, "drive_both")
    meter = SpreadMeter(inputs, ours.spec.d_model, dtype) if spread is None else None
    # Where experts are chosen, tokens are sorted into settled and tied when the spread of all is known: before any logits if
    # all batches go through the layers together.
    waits = meter is not None and not together and any(map(ours.has_experts, range(ours.spec.n_layers)))
    beside = Beside(ours, inputs.batches, dtype, meter, spread or Spread(), waits, clock, longest)
    with clock("oracle"):
        if meter is None:
            drive(oracle, inputs.batches, beside.on_layer, beside.on_logits)
        else:
            drive_both(oracle, inputs.batches, meter, beside.on_layer, beside.on_logits, clock)
    with clock("metrics"):
        beside.judge_waiting()
    if sharing is not None:
        beside.told(sharing)
    out = beside.result()
    if meter is not None and meter.ways is None and not is_upstream(oracle):
        out.spread = rounding(dtype, out.settled.largest, "the oracle is run one way")
    return out


class Beside:
    """Ours beside a run of an oracle: it hears of each state and of the logits, brings ours there too, and keeps how far they are
    apart. Each batch by itself, and in the end their sum: which were together in a pass leaves no trace in how floats were rounded."""

    def __init__(
        self,
        ours: Ours,
        batches: Sequence[Batch],
        dtype: str,
        meter: SpreadMeter | None,
        spread: Spread,
        waits: bool,
        clock: Clock,
        longest: Longest | None,
    ) -> None:
        """`spread`: what is known of it where no `meter` measures it. `waits`: logits are kept until all are there."""
        self.ours, self.batches, self.dtype, self.meter, self.spread = ours, batches, dtype, meter, spread
        self.clock, self.longest = clock, longest
        self.of = {b: self._nothing() for b in range(len(batches))}
        self.waiting: dict[int, Tensor | None] | None = {} if waits else None  # batch -> its margins
        self.kept_ours, self.kept_theirs = Kept(), Kept()

    def _nothing(self) -> Measured:
        return Measured(
            [[] for _ in range(self.ours.spec.n_layers)],
            columns=columns_of(self.dtype),
            chooses=self.ours.chooses,
        )

    def on_layer(self, b: int, i: int, x: Tensor | Sketched) -> None:
        ours, batch, out, d = self.ours, self.batches[b], self.of[b], self.ours.spec.d_model
        out.oracle_layers = max(out.oracle_layers, i + 1)
        with self.clock("ours"):
            if b not in ours.state:
                ours.begin(b, batch.ids)
            mine = ours.layer(b, i) if i < ours.spec.n_layers else None
        with self.clock("metrics"):
            own = rows(mine, batch, d) if mine is not None else None
            theirs = x.values if isinstance(x, Sketched) else rows(x, batch, d)
            if theirs is None:
                return
            theirs = theirs.to(ours.device)
            if own is not None and isinstance(x, Sketched):
                own = x.of(own)
            share = None if self.longest is None else self.longest.share(b, theirs)
            if self.meter is not None:
                self.meter.on_layer(b, i, theirs, share)
            if own is not None and theirs.shape == own.shape:
                error = relative_error(own, theirs)
                if (
                    self.meter is not None
                    and self.dtype == "fp32"
                    and isinstance(x, Tensor)
                    and ours.has_experts(i)
                ):
                    error = settle(ours, b, i, batch, theirs, error, self.meter.noise_after(i, b), out)
                out.layers[i] += (error if share is None else error * share).tolist()

    def on_logits(self, b: int, theirs: Tensor) -> None:
        ours, batch = self.ours, self.batches[b]
        with self.clock("ours"):
            if b not in ours.state:  # an oracle without hidden states
                ours.begin(b, batch.ids)
            mine = ours.finish(b)
        if theirs.shape[-1] != mine.shape[-1]:
            raise ZooError(
                f"the oracle gives {theirs.shape[-1]} logits for a token, the vocabulary has {mine.shape[-1]}: give those of "
                "its ids alone (columns beyond are padding), or compare with the model that the folder was converted from"
            )
        theirs = theirs.to(ours.device)
        with self.clock("metrics"):
            self.of[b].theirs_are = form_of(theirs[0, : min(8, batch.lengths[0])], self.dtype)
            margins = ours.margins(b)
            if self.waiting is None:
                self._judge(b, mine, theirs, margins)
            else:
                self.waiting[b] = margins
                self.kept_ours.put(b, mine)
                self.kept_theirs.put(b, theirs)

    def judge_waiting(self) -> None:
        """Logits that waited for the spread of all."""
        for b, margins in sorted((self.waiting or {}).items()):
            self._judge(b, self.kept_ours.pop(b), self.kept_theirs.pop(b), margins)
        self.kept_ours.close()
        self.kept_theirs.close()

    def _judge(self, b: int, mine: Tensor, theirs: Tensor, margins: Tensor | None) -> None:
        batch, out, meter = self.batches[b], self.of[b], self.meter
        other = meter.second_logits(b) if meter is not None else None
        other = None if other is None else other.to(self.ours.device)
        noise = self.spread.layers if meter is None else meter.noise()
        tied = near_ties(margins, batch, noise, self.ours, self.dtype)
        first = 0
        for r, n in enumerate(batch.lengths):  # a row at a time: views, no copies of what is large
            for at, reference in references(theirs[r, :n], batch.following[r, :n]):
                if meter is not None and other is not None:
                    meter.on_logits(b, other[r, :n][at], reference)
                judge_rows(out, mine[r, :n][at], reference, tied[first : first + n][at])
            out.settled.sample(mine[r, :n], theirs[r, :n])
            first += n

    def told(self, sharing: Sharing) -> None:
        """What the others have measured, of several ranks, each of which had some of the batches."""
        if (meter := self.meter) is None:
            return
        own = {b: (self.of[b], meter.of[b]) for b in sharing.mine([x.ids.numel() for x in self.batches])}
        for seen, visited in sharing.all((own, {i: v.cpu() for i, v in self.ours.visited.items()})):
            self.of |= {b: measured for b, (measured, _) in seen.items()}
            meter.of |= {b: apart for b, (_, apart) in seen.items()}
            self.ours.has_visited(visited)

    def result(self) -> Measured:
        out = self._nothing()
        for b in sorted(self.of):
            out += self.of[b]
        out.spread = self.spread if self.meter is None else self.meter.result()
        return out


def settle(
    ours: Ours,
    b: int,
    i: int,
    batch: Batch,
    theirs: Tensor,
    error: Tensor,
    noise: float,
    out: Measured,
) -> Tensor:
    """The errors [N] of layer i's states, where ours has made the oracle's choice at near ties between experts.

    Either choice is right there, and the other one moves the token, and all that look back at it, far. So where a token
    departs and its choice hangs by a hair, the other one is tried, and kept where the state then agrees."""
    # The spread may be less than what all of upstream's ways have in common; trying in vain costs one more layer.
    hair = tolerance.hair("fp32", max(noise, tolerance.FLOOR_LAYER["fp32"]))
    departs = torch.zeros(batch.ids.shape, dtype=torch.bool, device=error.device)
    departs[batch.mask] = error > tolerance.FLOOR_LAYER["fp32"]
    tried = departs & (ours.gaps[b][-1] < hair).view(batch.ids.shape)
    if not tried.any():
        return error
    other = ours.layer_otherwise(b, i)
    found = relative_error(rows(other, batch, ours.spec.d_model), theirs)  # type: ignore[arg-type]
    better = torch.zeros_like(tried)
    better[batch.mask] = found < error / 4
    better &= tried
    if better.any():
        mine, _ = ours.state[b]
        ours.choose(b, torch.where(better[..., None], other, mine))  # [B, T, D], or [S, B, T, D]
        out.turned += int(better.sum())
        error = torch.where(better[batch.mask], found, error)
    return error


def columns_of(dtype: str) -> Columns | None:
    """None in fp32, where the largest error of all is judged."""
    return None if dtype == "fp32" else Columns(tolerance.ULP[dtype])


def judge_rows(out: Measured, mine: Tensor, theirs: Reference, tied: Tensor) -> None:
    if out.columns is not None:
        out.columns.add(mine, theirs)
    if not tied.any():
        out.settled.add(mine, theirs)
    else:
        out.settled.add(mine[~tied], theirs[~tied])
        out.ties.add(mine[tied], theirs[tied])
    differ = (best_ids(mine, 1)[:, 0] != theirs.best[:, 0]) & ~tied
    if differ.any():
        top = theirs.logits[differ].topk(2, -1).values
        out.leads += (top[:, 0] - top[:, 1]).tolist()


def near_ties(margins: Tensor | None, batch: Batch, noise: Sequence[float], ours: Ours, dtype: str) -> Tensor:
    """[N] bool: real positions where some layer's choice of experts hangs by less than upstream's own spread."""
    n = sum(batch.lengths)
    if margins is None or not noise:
        return torch.zeros(n, dtype=torch.bool, device=ours.device)
    moe = [i for i in range(ours.spec.n_layers) if ours.has_experts(i)]
    hairs = [tolerance.hair(dtype, noise[i]) if i < len(noise) else 0.0 for i in moe]
    before = torch.tensor(hairs, device=margins.device)
    return (margins < before).any(-1).view(batch.ids.shape)[batch.mask]
