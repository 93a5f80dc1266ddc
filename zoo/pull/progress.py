"""Progress handed on: a transfer and a conversion as parts of one whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.hub import Progress


class Quiet:
    """A Progress that tells nobody."""

    def start(self, total: int) -> None: ...
    def advance(self, n: int) -> None: ...
    def phase(self, name: str) -> None: ...
    def note(self, message: str) -> None: ...


class Passed:
    """A transfer as a part of the whole: its total is in the whole's already."""

    def __init__(self, whole: Progress) -> None:
        self.advance, self.phase, self.note = whole.advance, whole.phase, whole.note

    def start(self, total: int) -> None:
        pass


class Steps:
    """The executor's (done, total) as advances."""

    def __init__(self, whole: Progress) -> None:
        self._whole, self._done = whole, 0

    def __call__(self, done: int, total: int) -> None:
        self._whole.advance(done - self._done)
        self._done = done
