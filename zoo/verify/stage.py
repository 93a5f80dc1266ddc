"""What a run says of itself while it works: a text, and what is known of its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self


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
