"""The levels that run both sides: layers, logits and decode, and what is looked for where they fail."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future
from dataclasses import dataclass

from zoo.errors import ZooError
from zoo.formats.canonical import Canonical
from zoo.model.load import load
from zoo.verify import inputs, judge
from zoo.verify.against import Against
from zoo.verify.certificate import Certificate, Level
from zoo.verify.compare import Longest, Measured, measure
from zoo.verify.device import exact as exact_on
from zoo.verify.exact import Bytes, converted_to, plan_of
from zoo.verify.golden import Golden
from zoo.verify.inputs import Inputs
from zoo.verify.oracle import DTYPES, CannotRun, Oracle, Transformers
from zoo.verify.ours import Ours, Streamed, build, subject_of
from zoo.verify.ranks import Following, Leading, Ranks
from zoo.verify.reading import Window
from zoo.verify.rounded import rounding_of
from zoo.verify.settings import Settings

NO_DECODE = "not done while streaming (it would read all weights once per token)"


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how."""

    folder: Canonical
    other: Against
    how: Settings
    window: Window | None
    """What an oracle is read through that goes through its layers beside ours."""
    of_bytes: Bytes | None
    """The bytes level, where it rides along there."""
    ranks: Ranks | None = None
    """That share ours, whole."""

    @property
    def oracle(self) -> Oracle:
        assert self.other.oracle is not None
        return self.other.oracle

    @property
    def dtype(self) -> str:
        return self.how.dtype

    def into(self, cert: Certificate, texts: Future[inputs.Texts] | None) -> tuple[Inputs, Measured]:
        """Judge the levels wanted. Of ranks that stream together the first judges, and goes on alone.

        Raises ZooError if a recording is of another model or dtype."""
        sharing = None if self.window is None else self.window.sharing
        asked = self._asked(cert, texts)
        if sharing is not None:
            asked = sharing.all(asked)[0]
        spread = getattr(self.oracle, "spread", None)
        led = self._led(self.oracle)
        if led is not None:
            led.task(asked, spread)
        with self.how.clock("reading ours"):
            ours = self._ours(self.dtype, self.window)
        self.how.say(f"layers and logits of {asked.n_tokens} tokens")
        began = time.perf_counter()
        if self._recorded not in (None, self.dtype):  # made in fp32, and ours in less
            wide = self._ours("fp32", None)
            spread = self.oracle.held_to(rounding_of(wide, ours, asked, self.dtype), self.dtype)  # type: ignore[attr-defined]
            del wide
        measured = measure(
            led or self.oracle,
            ours,
            asked,
            self.dtype,
            spread=spread,
            clock=self.how.clock,
            sharing=sharing,
        )
        spent = time.perf_counter() - began
        if self.window is not None and sharing is not None:
            if self.of_bytes is not None:
                self.of_bytes.told()
            self.window.sharing = None
            if not sharing.first:
                return asked, measured
        if self.of_bytes is not None:
            with self.how.clock("plan and bytes"):
                cert.levels.append(self.of_bytes.level())
        levels = judged(measured, self.dtype)
        if self.dtype == "fp32" and any(x.verdict == "failed" for x in levels.values()):
            with self.how.clock("float64"):
                again = self._against_float64(ours, asked)
            if again is not None:
                measured, levels = again
        idle, experts = ours.idle_experts()
        if idle:
            levels["logits"].notes.append(
                f"{idle} of {experts} experts were not run: no test token is routed to them"
            )
        levels["logits"].seconds = spent
        self._enter(cert, levels)
        if "decode" in self.how.wanted and self.how.stream:
            cert.not_checked.append(f"decode: {NO_DECODE}")
        elif "decode" in self.how.wanted:
            cert.levels.append(self._decode(led, ours, asked, measured))
        if any(x.verdict == "failed" for x in cert.levels if x.name in ("layers", "logits")):
            self._diagnose(cert, asked, measured)
        return asked, measured

    @property
    def _recorded(self) -> str | None:
        """The dtype that the oracle was recorded in; None: it is no recording."""
        return self.oracle.about["dtype"] if isinstance(self.oracle, Golden) else None

    def _asked(self, cert: Certificate, texts: Future[inputs.Texts] | None) -> Inputs:
        """What both sides are run on."""
        asked: Inputs = getattr(self.oracle, "inputs", None) or inputs.make(
            self.folder.spec,
            self.folder.root,
            getattr(self.oracle, "avoid_ids", frozenset()),
            self.how.max_length,
            theirs=getattr(self.oracle, "limits", None),
            dtype=self.dtype,
            made=None if texts is None else texts.result(),
        )
        vocab_size, recorded = self.folder.spec.vocab_size, self._recorded
        if (highest := max(int(b.ids.max()) for b in asked.batches)) >= vocab_size:
            raise ZooError(
                f"{cert.oracle.get('path', 'the inputs')}: has the id {highest}; the folder's vocabulary has "
                f"{vocab_size}: it was recorded of another model, or with another tokenizer"
            )
        if recorded not in (None, self.dtype, "fp32"):
            raise ZooError(f"the recording was made in {recorded}; verify with --dtype {recorded}")
        if self.ranks is not None and recorded not in (None, self.dtype):
            raise ZooError(
                f"the recording was made in {recorded}: on several ranks, verify with --dtype {recorded}"
            )
        cert.inputs = asked.to_json()
        cert.not_checked += [
            f"behaviour beyond {what} positions: longer than --max-length" for what in asked.not_crossed
        ]
        return asked

    def _led(self, oracle: Oracle) -> Leading | None:
        return None if self.ranks is None else Leading(oracle, self.ranks)

    def _ours(self, dtype: str, window: Window | None) -> Ours:
        if self.ranks is not None:
            return shared(self.folder, dtype, self.ranks)
        if not self.how.stream:
            return Ours(build(subject_of(self.folder, DTYPES[dtype], device=self.how.device)))
        ours = Streamed(self.folder, DTYPES[dtype], self.how.device, window)
        if window is not None:
            window.riders.append(ours)
        return ours

    def _enter(self, cert: Certificate, levels: dict[str, Level]) -> None:
        """Put layers and logits into the certificate, as far as they are wanted and there is something to judge."""
        for name in (n for n in levels if n in self.how.wanted):
            made = levels[name]
            if not made.checks:
                cert.not_checked.append(
                    f"{name}: the oracle gives no hidden states that ours can be compared with"
                )
                continue
            if cert.oracle.get("note") and not any(x.name in levels for x in cert.levels):
                made.notes.append(cert.oracle["note"])
            cert.levels.append(made)

    def _decode(self, led: Leading | None, ours: Ours, asked: Inputs, measured: Measured) -> Level:
        self.how.say(f"{self.how.n_greedy} greedy tokens")
        began = time.perf_counter()
        if led is not None:
            led.task(
                asked, getattr(self.oracle, "spread", None), measured=measured, n_greedy=self.how.n_greedy
            )
        with self.how.clock("decode"):
            level = judge.decode_level(
                led or self.oracle, ours, asked, measured, self.dtype, self.how.n_greedy
            )
        level.seconds = time.perf_counter() - began
        return level

    def _diagnose(self, cert: Certificate, asked: Inputs, measured: Measured) -> None:
        """Layer, part and cause of what departs."""
        from zoo.verify import diagnose

        self.how.say("looking for the cause")
        expected = None if self.other.checkpoint is None else plan_of(self.folder, self.other.checkpoint).spec
        with self.how.clock("diagnosis"):
            cert.diagnosis = diagnose.diagnose(self.folder, self.oracle, asked, measured, expected, self.how)
        if (copied := converted_to(self.folder)) in ("bf16", "fp16") and self.dtype == "fp32":
            cert.diagnosis["suggestions"].insert(
                0,
                f"the copy was rounded to {copied}, upstream has the source's own values: verify with --dtype {copied}",
            )

    def _against_float64(self, ours: Ours, asked: Inputs) -> tuple[Measured, dict[str, Level]] | None:
        """The levels that failed in fp32, held against upstream in float64; None if they fail there too, or can't be."""
        from zoo.verify.float64 import InFloat64, StreamedInFloat64
        from zoo.verify.stream import StreamedTransformers

        oracle = self.oracle
        if not isinstance(oracle, Transformers):
            return None
        wide = StreamedInFloat64(oracle) if isinstance(oracle, StreamedTransformers) else InFloat64(oracle)
        if not wide.fits:
            return None
        self.how.say("upstream in float64, for how far its fp32 is from that")
        try:
            with wide:
                led = self._led(wide)
                if led is not None:
                    led.task(asked, None)
                measured = measure(led or wide, ours, asked, "fp32", longest=Longest())
        except CannotRun:  # of which every rank hears
            return None
        except (RuntimeError, TypeError, ValueError):
            # Of a model that can't be run so nothing is learnt.
            if self.ranks is not None:  # the others are waiting in the middle of it
                raise
            return None
        levels = judged(measured, "fp32")
        if any(x.verdict == "failed" for x in levels.values()):
            return None
        for level in levels.values():
            level.notes.append(
                "held against upstream in float64: upstream's own fp32 is further from that than its two ways in fp32 are apart, or "
                "what departed was left of a state that had been much longer"
            )
        return measured, levels


def judged(measured: Measured, dtype: str) -> dict[str, Level]:
    return {"layers": judge.layers_level(measured, dtype), "logits": judge.logits_level(measured, dtype)}


def shared(folder: Canonical, dtype: str, ranks: Ranks) -> Ours:
    """This rank's part of ours."""
    return Ours(load(folder.root, ranks.device, DTYPES[dtype], mesh=ranks.mesh))


def follow(folder: Canonical, dtype: str, ranks: Ranks) -> Certificate:
    """What a rank does that is not the first: ours, as far as it has it, whenever that goes through it."""
    ours = None
    with exact_on(ranks.device):
        while (task := ranks.said()) is not None:
            oracle = Following(task, ranks)
            ours = ours or shared(folder, dtype, ranks)
            if task.measured is None:
                with contextlib.suppress(CannotRun):  # the first rank says so in the certificate
                    measure(oracle, ours, task.asked, dtype, spread=task.spread)
            else:
                judge.decode_level(oracle, ours, task.asked, task.measured, dtype, task.n_greedy)
    cert: Certificate = ranks.said()
    return cert
