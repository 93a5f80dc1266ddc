"""Progress of what takes long: a bar for people, events for programs. Both are a `zoo.hub.Progress`."""

from __future__ import annotations

import json
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self, TextIO

import click

from zoo.cli._state import State
from zoo.printable import decimal, printable, printable_json


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
            click.echo(printable(message), err=True)

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
            text = self._phase
            if self._total:
                share = min(1.0, self._done / self._total)
                text += f" [{'#' * int(24 * share):24}] {share:4.0%}  {decimal(self._done)} of {decimal(self._total)}"
                if rate > 0:
                    left = (self._total - self._done) / rate
                    text += f"  {decimal(rate)}/s  {int(left // 60)}:{int(left % 60):02} left"
            self._out.write(f"\r\x1b[K{text}")
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
