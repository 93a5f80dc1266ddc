"""Golden files: an oracle's run, recorded, so that verifying against it needs no upstream.

One safetensors file, which is also the protocol by which anybody's own code can be an oracle
(docs/verification.md has a worked example). Tensors, for each batch `b` of right-padded rows:

    ids.{b}          int64 [B, T]     what was put in; `lengths.{b}` [B] says how much of a row is real
    logits.{b}       float [N, V]     of the N real positions, row by row
    states.{b}.{i}   float [N, k]     optional: the hidden state after layer i, times `directions` [D, k]
    prompt, greedy   int64            optional: a prompt [T] and its greedy continuation [n]

A recording of no batch, or of rows of no token, is refused: it proves nothing. A claimed spread sets bounds only as far as
rounding can go (`PLAUSIBLE`), and is shown as claimed.

The metadata's `zoo` is JSON: schema, dtype, who the oracle was, what it was loaded from (with hashes), its own
spread, versions. Only `schema` and `dtype` are required.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoo.errors import ZooError
from zoo.formats.base import FLOATS
from zoo.untrusted.bounded import parse_json
from zoo.verify.certificate import machine
from zoo.verify.compare import (
    Claimed,
    OnLayer,
    OnLogits,
    Sketch,
    Sketched,
    SpreadMeter,
    drive_both,
    rounding,
    rows,
)
from zoo.verify.inputs import Batch, Inputs, prompt_of
from zoo.verify.metrics import references
from zoo.verify.oracle import CannotRun, Oracle
from zoo.verify.oracle import OnLayer as OnOneLayer
from zoo.verify.tolerance import Spread

SCHEMA = "zoo-golden-1"
SEE = "docs/verification.md has what a golden file holds"
N_GREEDY = 64
_FP32, _TAIL = 2.0**-14, 1.0  # a token that chose other experts may be as far off as logits are large
PLAUSIBLE = {
    "fp32": dict.fromkeys(("p50", "p90", "p99", "p99.9", "max"), _FP32),
    "bf16": {"p50": 2.0**-5, "p90": 2.0**-2, "p99": _TAIL, "p99.9": _TAIL, "max": _TAIL},
    "fp16": {"p50": 2.0**-8, "p90": 2.0**-7, "p99": 2.0**-2, "p99.9": _TAIL, "max": _TAIL},
}
"""The largest spread of logits that is believed without having been measured here, by quantile, as a share of the largest
logit; of divergences, its square. Measured, eager against sdpa and the dtype against fp32, on the main tiny variants of all
25 families: at most 2^-18 in fp32 (any quantile), in bf16 0.005, 0.06, 0.26, 0.47 and 0.83, in fp16 0.0006, 0.002, 0.07, 0.32
and 0.84. The caps are four times that and more, 16 times in fp32, where nothing hangs by it."""
LAYERS = {"fp32": _FP32, "bf16": 2.0**-3, "fp16": 2.0**-6}
"""The same of a layer's representative token: measured at most 4.2e-6, 0.029 and 0.0036."""
PERPLEXITY = {"fp32": _FP32, "bf16": 2.0**-4, "fp16": 2.0**-7}
TOP1 = 0.8
"""The smallest share of equal best ids that is believed: measured at least 0.87."""
OUTLIER = 64
"""How many times as large as most logits the largest is believed to be."""
MAX_BATCHES, MAX_TOKENS = 256, 1 << 17
"""Of a recording, padding among the tokens: those that zoo makes have some ten batches, and 131,072 tokens of a vocabulary of that size are
68 GB of logits. A file of kilobytes could name millions of batches."""
_WHOLE = ("I64", "I32", "I16", "I8", "U8")
_HELD = {
    "ids": (_WHOLE, 2), "lengths": (_WHOLE, 1), "prompt": (_WHOLE, 1), "greedy": (_WHOLE, 1),
    "logits": (FLOATS, 2), "states": (FLOATS, 2), "directions": (FLOATS, 2),
}  # fmt: skip
"""The dtypes that the tensors may have, and their axes."""
MAX_HEADER = 8 << 20
"""Bytes of its header: an entry takes some 100, and what is said of the recording a few thousand."""


def _open(path: Path) -> Any:
    """The file by the library, which the header's length does not keep from taking minutes. Raises ZooError for a longer one than
    any recording has, OSError, SafetensorError."""
    with path.open("rb") as f:
        if (n := int.from_bytes(f.read(8), "little")) > MAX_HEADER:
            raise ZooError(f"{path}: a header of {n} bytes (limit {MAX_HEADER}), which no recording has")
    opened: Any = safe_open  # the library does not type it
    return opened(path, "pt")


def is_golden(path: Path) -> bool:
    """Whether a file is a recording rather than weights, by what is in it: whatever it is called, with its metadata or not."""
    if not path.is_file():
        return False
    try:
        return not {"ids.0", "logits.0"}.isdisjoint(_open(path).keys())
    except (OSError, SafetensorError, ZooError):
        return False


class Golden:
    """A recording as an oracle: it knows its own inputs, and no others."""

    avoid_ids: frozenset[int] = frozenset()
    fixed_inputs = True

    def __init__(self, path: Path, family: str | None = None) -> None:
        """Open a recording and look it over. `family`: that of the folder which is to be compared with it."""
        self.path = path
        self.file = _open(path)
        self.names = set(self.file.keys())
        self.about: dict[str, Any] = self._about()
        if self.about.get("schema") != SCHEMA:
            raise ZooError(f"{path}: schema is {self.about.get('schema')!r}; expected {SCHEMA!r}")
        if family is not None and self.about.get("family") not in (None, family):
            raise ZooError(
                f"{path}: recorded of a model of family {self.about['family']}; expected {family}, as the folder is: name "
                "a recording of the model that the folder was converted from"
            )
        self.inputs = self._inputs()
        self.spread = self._spread()
        self.directions = self._directions()

    def _about(self) -> dict[str, Any]:
        """The metadata, of the types that it is read as."""
        if "zoo" not in (self.file.metadata() or {}):
            raise ZooError(
                f"{self.path}: a recording (it has the tensors {', '.join(sorted(self.names)[:3])}, ...) without its metadata: "
                "give those of the inputs on, `save_file(tensors, path, metadata=about)`, or write them: "
                f'{{"zoo": \'{{"schema": "{SCHEMA}", "dtype": "fp32"}}\'}}; {SEE}'
            )
        try:
            about = parse_json(self.file.metadata()["zoo"].encode())
        except (KeyError, TypeError, ValueError) as e:
            raise ZooError(f"{self.path}: its metadata's 'zoo' is not JSON ({e!r:.100}); {SEE}") from None
        if not isinstance(about, dict):
            raise ZooError(
                f"{self.path}: its metadata's 'zoo' is {type(about).__name__}; expected an object; {SEE}"
            )
        kinds: dict[str, tuple[type, ...]] = {
            "family": (str,), "text": (list,), "limits": (dict,), "not_crossed": (dict,), "tokenizer": (str,),
        }  # fmt: skip
        for key, kind in kinds.items():
            if about.get(key) is not None and not isinstance(about[key], kind):
                raise ZooError(
                    f"{self.path}: its metadata's {key!r} is {about[key]!r:.60}; expected {kind[0].__name__}; {SEE}"
                )
        if about.get("dtype") not in PLAUSIBLE:
            raise ZooError(
                f"{self.path}: its metadata's 'dtype' is {about.get('dtype')!r:.60}; expected what it was computed in: "
                f"{', '.join(PLAUSIBLE)}"
            )
        rows = about.get("text") or []
        if not all(isinstance(row, list) and all(type(x) is bool for x in row) for row in rows):
            raise ZooError(
                f"{self.path}: its metadata's 'text' is not a list of true and false for each batch; {SEE}"
            )
        return about

    def _get(self, name: str) -> Tensor | None:
        return self._need(name) if name in self.names else None

    def _need(self, name: str) -> Tensor:
        """The tensor, of the dtype and the axes that one of its name has."""
        self._require(name)
        held = self.file.get_slice(name)
        dtypes, axes = _HELD[name.partition(".")[0]]
        shape = held.get_shape()
        if held.get_dtype() not in dtypes or len(shape) != axes or 0 in shape:
            raise ZooError(
                f"{self.path}: {name} is {held.get_dtype()} {shape}; expected {axes} axes, not empty, of {'/'.join(dtypes)}; {SEE}"
            )
        t: Tensor = self.file.get_tensor(name)
        return t

    def _require(self, name: str) -> None:
        if name not in self.names:
            raise ZooError(
                f"{self.path}: tensor {name!r} is missing; see docs/verification.md for what a golden file holds"
            )

    def _ids(self, b: int) -> Tensor:
        """The token ids of a batch, all of which the recording's own logits must have a column for."""
        name, logits = f"ids.{b}", f"logits.{b}"
        self._require(logits)
        raw, shape = self._need(name), self.file.get_slice(logits).get_shape()
        if len(shape) != 2 or not shape[-1]:
            raise ZooError(
                f"{self.path}: {logits} has shape {list(shape)}; expected [N, V]: real positions, row by row"
            )
        ids, vocab_size = raw.long(), shape[-1]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ZooError(
                f"{self.path}: {name} has ids from {int(ids.min())} to {int(ids.max())}; expected 0 to {vocab_size - 1}, as "
                "the logits have that many columns: record it again"
            )
        return ids

    def _spread(self) -> Spread:
        told = self.about.get("spread")
        if not told:
            return self._rounding()
        try:
            made = Spread.from_json(told)
            numbers = [made.top1_agreement, made.log_perplexity, *made.layers]
            numbers += [*made.logits.values(), *made.kl.values()]
            sound = made.ways is None or len(made.ways) == 2
            sound = sound and all(isinstance(x, int | float) for x in numbers)
        except (KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise ZooError(
                f"{self.path}: 'spread' is {told!r}; expected what zoo golden record writes: record it again, or leave "
                "'spread' out, and the floors are the bounds"
            )
        return self._believed(made)

    def _largest(self) -> float:
        """The largest |logit| of the recording, which is what rounding goes by."""
        found = [self._need(f"logits.{b}").float() for b in range(len(self.inputs.batches))]
        return max(_size(x.abs().nan_to_num(0.0, 0.0, 0.0)) for x in found)

    def _rounding(self) -> Spread:
        """In place of a spread that the recording does not tell: rounding, by the scale of its logits."""
        return rounding(str(self.about["dtype"]), self._largest(), "the recording tells no spread")

    def _believed(self, told: Spread) -> Spread:
        """A spread as the recording claims it, no larger than rounding can be."""
        ways = f", {told.ways[0]} against {told.ways[1]}" if told.ways else ""
        return believed(
            told, str(self.about["dtype"]), self._largest(), f"the spread that the recording claims{ways}"
        )

    def held_to(self, measured: Spread, dtype: str) -> Spread:
        """A spread for ours in `dtype` against this recording in fp32, as `zoo.verify.rounded` measures it."""
        what = f"what {dtype} makes of these weights, beside the same in fp32 (the recording's dtype)"
        return believed(measured, dtype, self._largest(), what)

    def _directions(self) -> Tensor | None:
        """The directions of the hidden states. On one that is zero all states are alike, and any would pass."""
        d = self._get("directions")
        if d is not None and not (d.ndim == 2 and bool((d.isfinite().all(0) & (d != 0).any(0)).all())):
            raise ZooError(
                f"{self.path}: 'directions' has columns that are zero or not finite; expected [D, k] of random numbers: "
                "record it again, or leave out directions and states"
            )
        return None if d is None else d.float()

    def _inputs(self) -> Inputs:
        if (n := sum(name.startswith("ids.") for name in self.names)) > MAX_BATCHES:
            raise ZooError(
                f"{self.path}: {n:,} batches (limit {MAX_BATCHES}): record fewer, of more rows each"
            )
        left = MAX_TOKENS
        batches: list[Batch] = []
        text = self.about.get("text", [])
        while f"ids.{len(batches)}" in self.names:
            b = len(batches)
            ids = self._ids(b)
            if (left := left - ids.numel()) < 0:
                raise ZooError(f"{self.path}: more than {MAX_TOKENS:,} tokens (up to ids.{b}): record fewer")
            lengths = self._get(f"lengths.{b}")
            sizes = tuple(lengths.tolist()) if lengths is not None else (ids.shape[1],) * len(ids)
            if len(sizes) != len(ids) or not all(type(n) is int and 0 < n <= ids.shape[1] for n in sizes):
                raise ZooError(
                    f"{self.path}: lengths.{b} is {list(sizes)!r:.80}; expected {len(ids)} numbers from 1 to {ids.shape[1]}: "
                    "rows of no token prove nothing"
                )
            flags = tuple(text[b]) if b < len(text) else (False,) * len(ids)
            if len(flags) != len(ids):
                raise ZooError(
                    f"{self.path}: its metadata's 'text' has {len(flags)} values for the {len(ids)} rows of ids.{b}; {SEE}"
                )
            batches.append(Batch(ids, sizes, ("recorded",) * len(ids), flags))
        if not batches:
            raise ZooError(f"{self.path}: no tensor 'ids.0': it records nothing, and proves nothing; {SEE}")
        return Inputs(
            batches,
            self.about.get("limits", {}),
            self.about.get("not_crossed", {}),
            self.about.get("tokenizer"),
        )

    def describe(self) -> dict[str, Any]:
        told = {k: self.about.get(k) for k in ("oracle", "source", "versions", "created", "machine")}
        return {
            "kind": "golden",
            "name": f"recording {self.path.name}",
            "path": str(self.path),
            "recorded": told,
        }

    def drive(self, batches: Sequence[Batch], on_layer: OnLayer, on_logits: OnLogits) -> None:
        # All batches after a layer before the next: ours, streamed, reads each once.
        for i in itertools.count():
            found = {b: self._get(f"states.{b}.{i}") for b in range(len(batches))}
            shown = {b: values for b, values in found.items() if values is not None}
            if not shown or self.directions is None:
                break
            for b, values in shown.items():
                on_layer(b, i, Sketched(values, self.directions))
        for b, batch in enumerate(batches):
            on_logits(b, self._spread_out(self._need(f"logits.{b}"), batch))

    def _spread_out(self, logits: Tensor, batch: Batch) -> Tensor:
        """[N, V] -> [B, T, V], zeros at the padding."""
        mask = batch.mask
        if logits.shape[0] != int(mask.sum()):
            raise ZooError(
                f"{self.path}: logits have {logits.shape[0]} rows for {int(mask.sum())} real positions; they are to be of "
                "the real positions, row by row"
            )
        out = logits.new_zeros(*batch.ids.shape, logits.shape[-1])
        out[mask] = logits
        return out

    def run(self, ids: Tensor, lengths: Sequence[int], on_layer: OnOneLayer | None = None) -> Tensor:
        raise ZooError(f"{self.path}: a recording has only its own inputs")

    def second_way(self) -> contextlib.AbstractContextManager[tuple[str, str] | None]:
        return contextlib.nullcontext()

    def greedy(self, ids: Tensor, n: int) -> Tensor | None:
        prompt, tokens = self._get("prompt"), self._get("greedy")
        if prompt is None or tokens is None or not torch.equal(prompt, ids[0]):
            return None
        return tokens[:n]


def _size(logits: Tensor) -> float:
    """The largest of |logits| as far as most bear it out: by one outlier a recording could have any spread believed."""
    return min(float(logits.max()), OUTLIER * float(logits.median()))


def believed(told: Spread, dtype: str, largest: float, said: str) -> Claimed:
    """A spread that nobody measured on upstream here, no larger than rounding can be (`PLAUSIBLE`)."""
    caps, scale = PLAUSIBLE[dtype], max(1.0, largest)
    made = Claimed(
        told.ways,
        {k: min(v, caps[k] * scale) for k, v in told.logits.items()},
        {k: min(v, (caps[k] * scale) ** 2) for k, v in told.kl.items()},
        max(told.top1_agreement, TOP1),
        told.tokens,
        min(told.log_perplexity, PERPLEXITY[dtype]),
        [min(v, LAYERS[dtype]) for v in told.layers],
        told.columns,
    )
    lowered = [f"{made.logits[k]:.2g} at {k}" for k, v in told.logits.items() if made.logits[k] < v]
    made.said = said + (f", lowered to {', '.join(lowered)}" if lowered else "")
    return made


def record(
    oracle: Oracle, inputs: Inputs, d: int, path: Path, dtype: str, about: dict[str, Any] | None = None
) -> list[str]:
    """Run `oracle` on `inputs` both ways and write a golden file to `path`; notes on what it lacks. `d`: the model's width."""
    meter = SpreadMeter(inputs, d, dtype)
    tensors: dict[str, Tensor] = {}
    width = 0

    def on_layer(b: int, i: int, x: Tensor | Sketched) -> None:
        nonlocal width
        if isinstance(x, Tensor) and (r := rows(x, inputs.batches[b], d)) is not None:
            meter.on_layer(b, i, r)
            tensors[f"states.{b}.{i}"] = meter.sketched(r)
            width = r.shape[-1]

    def on_logits(b: int, logits: Tensor) -> None:
        batch = inputs.batches[b]
        theirs, other = logits[batch.mask], meter.second_logits(b)
        other = None if other is None else other[batch.mask]
        tensors.update(
            {f"ids.{b}": batch.ids, f"lengths.{b}": torch.tensor(batch.lengths), f"logits.{b}": theirs}
        )
        for at, reference in references(theirs, batch.following[batch.mask]):
            if other is not None:
                meter.on_logits(b, other[at], reference)

    drive_both(oracle, inputs.batches, meter, on_layer, on_logits)
    if width:
        tensors["directions"] = Sketch(width).directions
    prompt = prompt_of(inputs)
    notes = []
    try:
        if (tokens := oracle.greedy(prompt, N_GREEDY)) is not None:
            tensors |= {"prompt": prompt[0].clone(), "greedy": tokens}
    except CannotRun as e:
        notes.append(f"without a greedy continuation: {e}")
    by = oracle.describe()
    if "loaded_from" in by:  # a recording travels: no path of this machine
        by["loaded_from"] = Path(by["loaded_from"]).resolve().name
    told = {
        "schema": SCHEMA, "dtype": dtype, "oracle": by, "spread": meter.result().to_json(),
        "machine": machine(), **describe_inputs(inputs), **(about or {}),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    write(path, tensors, told)
    return notes


def describe_inputs(inputs: Inputs) -> dict[str, Any]:
    return {
        "text": [list(b.text) for b in inputs], "limits": inputs.limits, "not_crossed": inputs.not_crossed,
        "tokenizer": inputs.tokenizer,
    }  # fmt: skip


def write_inputs(inputs: Inputs, path: Path, dtype: str, family: str | None = None) -> Path:
    """The standard inputs alone: what somebody's own code is to be run on, to make a golden file of."""
    tensors = {f"ids.{b}": batch.ids for b, batch in enumerate(inputs)}
    tensors |= {f"lengths.{b}": torch.tensor(batch.lengths) for b, batch in enumerate(inputs)}
    tensors["prompt"] = prompt_of(inputs)[0].clone()
    write(path, tensors, {"schema": SCHEMA, "dtype": dtype, "family": family, **describe_inputs(inputs)})
    return path


def refuse_long(inputs: Inputs) -> None:
    """Raises ZooError if a recording of these could not be read again: before upstream is run, not after."""
    n = sum(b.ids.numel() for b in inputs.batches)
    if n > MAX_TOKENS or len(inputs.batches) > MAX_BATCHES:
        raise ZooError(
            f"{len(inputs.batches)} batches of {n:,} tokens in all, padding among them; a recording has {MAX_BATCHES} and {MAX_TOKENS:,} at most: "
            "record with a smaller --max-length"
        )


def check_output(path: Path) -> None:
    """Raises ZooError if no file can be made at `path`: before upstream is run, not after."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name:.40}.", dir=path.parent):
            pass
    except OSError as e:
        raise ZooError(f"{path}: cannot be written: {e.strerror}") from None


def write(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    kept = {k: t.cpu().contiguous() for k, t in tensors.items()}
    try:  # in a folder that nobody else can plant a link in: the library opens files by path
        with tempfile.TemporaryDirectory(prefix=f".{path.name:.40}.", dir=path.parent) as own:
            save_file(kept, part := Path(own) / "part", metadata={"zoo": json.dumps(about)})
            os.replace(part, path)
    except (OSError, SafetensorError) as e:
        raise ZooError(f"{path}: cannot be written: {e}") from None
