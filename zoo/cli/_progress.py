"""Progress of what takes long: a bar for people, events for programs. Both are a `zoo.hub.Progress`; of what has stages and
no bytes to count, `working` shows the stages."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TextIO

import click

from zoo.cli._common import folded, terminal_width
from zoo.cli._common import note as say_aside
from zoo.cli._state import State
from zoo.untrusted.printable import decimal, printable, printable_json


class Bar:
    """One line on stderr: phase, bytes, rate, time left. Draws nothing where stderr is no terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._out = stream or sys.stderr
        self._live = self._out.isatty()
        self._phase, self._total, self._done = "", 0, 0
        self._began = self._drawn = time.monotonic()
        self._marks: list[tuple[float, int]] = []
        self._lock = threading.Lock()

    def start(self, total: int) -> None:
        self._total, self._done, self._began = total, 0, time.monotonic()
        self._marks = [(self._began, 0)]

    def phase(self, name: str) -> None:
        self._phase = name
        self._draw(force=True)

    def advance(self, n: int) -> None:
        self._done += n
        self._draw()

    def note(self, message: str) -> None:
        with self._lock:
            self._clear()
            say_aside(message)

    def close(self) -> None:
        with self._lock:
            self._clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _clear(self) -> None:
        if self._live:
            self._out.write("\r\x1b[K")
            self._out.flush()

    def _draw(self, force: bool = False) -> None:
        now = time.monotonic()
        if not self._live or not (force or now - self._drawn > 0.1):
            return
        with self._lock:
            self._drawn = now
            self._marks.append((now, self._done))
            while len(self._marks) > 2 and now - self._marks[0][0] > 10:
                del self._marks[0]
            (t0, d0), (t1, d1) = self._marks[0], self._marks[-1]
            rate = (d1 - d0) / (t1 - t0) if t1 > t0 else 0.0
            room, text = terminal_width(80, self._out) - 1, self._phase
            if self._total:
                share = min(1.0, self._done / self._total)
                told = f"{share:4.0%}  {decimal(self._done)} of {decimal(self._total)}"
                if rate > 0:
                    left = (self._total - self._done) / rate
                    told += f"  {decimal(rate)}/s  {_clock(left)} left"
                cells = max(4, min(24, room - len(text) - len(told) - len(" [] ")))
                text += f" [{'#' * int(cells * share):{cells}}] {told}"
            self._out.write(f"\r\x1b[K{text[:room]}")
            self._out.flush()


class Events:
    """The same as JSON, an object a line on stdout: start, phase, progress (twice a second), note, error, done."""

    def __init__(self) -> None:
        self._total = self._done = 0
        self._told = 0.0
        self._lock = threading.Lock()
        State.on_failure = self.error

    def start(self, total: int) -> None:
        self._total, self._done = total, 0
        self.tell("start", total=total)

    def phase(self, name: str) -> None:
        self.tell("phase", name=name)

    def advance(self, n: int) -> None:
        self._done += n
        if time.monotonic() - self._told > 0.5:
            self._told = time.monotonic()
            self.tell("progress", done=self._done, total=self._total)

    def note(self, message: str) -> None:
        self.tell("note", message=message)

    def error(self, message: str) -> None:
        self.tell("error", message=message)

    def tell(self, event: str, **data: Any) -> None:
        with self._lock:
            click.echo(printable_json(json.dumps({"event": event, **data}, ensure_ascii=False)))

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        pass


class Steps:
    """The executor's (bytes done, bytes in all), shown on a bar."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._done = bar, -1

    def __call__(self, done: int, total: int) -> None:
        if self._done < 0:
            self._bar.start(total)
            self._done = 0
        self._bar.advance(done - self._done)
        self._done = done


class Stages:
    """The stages of a run on a terminal: those that are over, a line each with their seconds; the one at work, with the
    time so far and, where it was estimated or the pieces are counted, a bar and the time left."""

    EVERY = 0.2
    """Seconds between two looks at the clock."""

    def __init__(self, stream: TextIO) -> None:
        self._out = stream
        self._stage, self._said = "", False
        self._began = self._since = time.monotonic()
        self._end: float | None = None
        self._share: tuple[int, int] = (0, 0)
        self._lock, self._over = threading.Lock(), threading.Event()
        self._drawing = threading.Thread(target=self._draw_on, daemon=True)
        self._drawing.start()

    def __call__(self, stage: str) -> None:
        with self._lock:
            now = time.monotonic()
            counted = getattr(stage, "of", 0)
            if not (counted and self._share[1] == counted):  # a hundred faults are one line
                self._line(now)
                self._since = now
            self._stage, self._share = str(stage), (getattr(stage, "done", 0), counted)
            seconds = getattr(stage, "seconds", None)
            if seconds is not None:
                self._end = now + seconds
            self._said = seconds is not None
            self._draw(now)

    def close(self) -> None:
        self._over.set()
        self._drawing.join()
        with self._lock:
            self._line(time.monotonic())

    def _line(self, now: float) -> None:
        """The stage is over: what it took stays in sight."""
        text = ""
        if self._stage:
            # What says how long all will take took no time itself.
            took = "" if self._said else f"  {now - self._since:.1f} s"
            text = folded(f"  {printable(self._stage)}{took}", self._out) + "\n"
        self._out.write(f"\r\x1b[K{text}")
        self._out.flush()

    def _draw_on(self) -> None:
        while not self._over.wait(self.EVERY):
            with self._lock:
                self._draw(time.monotonic())

    def _draw(self, now: float) -> None:
        done, of = self._share
        so_far = now - self._began
        text = _clock(so_far)
        share = None
        if of:
            share = done / of
            left = (now - self._since) * (of - done) / done if done else None
        elif self._end is not None:
            # An estimate is none any more once it is over: the bar stays short of its end then, and says no time.
            share = min(0.99, so_far / max(self._end - self._began, 1e-9))
            left = self._end - now if self._end > now else None
        else:
            left = None
        if share is not None:
            text = f"[{'#' * int(24 * share):24}] {text}" + (
                f", about {_clock(left)} left" if left is not None else ""
            )
        width = terminal_width(80, self._out) - 1
        self._out.write(f"\r\x1b[K{f'  {text}  {printable(self._stage)}'[:width]}")
        self._out.flush()


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02}"


@contextmanager
def working(as_json: bool) -> Iterator[Callable[[str], None]]:
    """What hears the stages of a run: on a terminal they are shown, elsewhere nobody looks."""
    if as_json or not sys.stderr.isatty():
        yield lambda _stage: None
        return
    stages = Stages(sys.stderr)
    try:
        yield stages
    finally:
        stages.close()
