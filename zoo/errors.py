"""The one exception that is meant for people."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from zoo.printable import printable

P = ParamSpec("P")
R = TypeVar("R")
MAX_TEXT = 2000
"""Characters of a message. Names, shapes and values in it come from files: one of a megabyte is nothing to read."""


class ZooError(Exception):
    """Something the user can act on: its text names the file and tensor, what was expected and found,
    and what to do. The CLI prints it and exits 1; a traceback shows only with `--debug`.

    Whatever it was made of, its text is printable and has at most `MAX_TEXT` characters: its beginning, which says what
    is wrong, and its end, which says what to do."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > MAX_TEXT:  # before anything goes over all of it
            text = f"{text[: MAX_TEXT - 400]} ... ({len(text) - MAX_TEXT + 400} characters) ... {text[-350:]}"
        text = printable(text)
        return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 4] + " ..."


def translated(function: Callable[P, R]) -> Callable[P, R]:
    """For the functions that others call: what the system refuses (a full disk, too many open files, a name that no
    file can have) is a ZooError too, with what the system said as its cause."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise ZooError(f"{where}{error.strerror or error}") from error
        except ValueError as error:
            if "null byte" not in str(error) and "null character" not in str(error):
                raise
            raise ZooError("a name of a file has the character NUL in it, which no name can have") from error

    return wrapped
