"""What a run says of itself while it works, and what its time was spent on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self


class Stage(str):
    """The text of a stage. `seconds`: what the whole run is thought to take from here, where that was estimated;
    `done`, `of`: how many pieces of a known number are behind it."""

    __slots__ = ("done", "of", "seconds")
    seconds: float | None
    done: int
    of: int

    def __new__(cls, text: str, *, seconds: float | None = None, done: int = 0, of: int = 0) -> Self:
        made = super().__new__(cls, text)
        made.seconds, made.done, made.of = seconds, done, of
        return made


Progress = Callable[[str], None]
"""Hears each stage as it begins: a text, and where more is known a `Stage`."""


def silent(_stage: str) -> None:
    """A `Progress` that nobody hears."""


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stack: list[tuple[str, float]] = []

    def __call__(self, name: str) -> Clock:
        self._name = name
        return self

    def __enter__(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self._spend(now)
        self._stack.append((self._name, now))

    def __exit__(self, *_: Any) -> None:
        now = time.perf_counter()
        self._spend(now)
        self._stack.pop()
        if self._stack:
            self._stack[-1] = (self._stack[-1][0], now)

    def _spend(self, now: float) -> None:
        name, since = self._stack[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - since
