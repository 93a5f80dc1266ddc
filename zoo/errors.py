"""The one exception that is meant for people."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from zoo.untrusted.printable import printable

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


_PATH = "StrPath"
"""How functions annotate a path."""


def translated(function: Callable[P, R]) -> Callable[P, R]:
    """For the functions that others call. What the system refuses (a full disk, too many open files, a name that no file can have) is
    a ZooError too, with what the system said as its cause. So is an argument of another type than its annotation says: a path
    before anything is done, since a number would be an open file; others where they led to a TypeError or an AttributeError."""
    names = function.__code__.co_varnames
    kinds = {name: str(kind).split(" | ") for name, kind in function.__annotations__.items()}

    def refuse_others(given: dict[str, object], paths: bool) -> None:
        for name, value in given.items():
            kind = kinds.get(name, [])
            if kind and ((paths and {*kind} <= {_PATH, "None"}) or not paths) and not _is_one(value, kind):
                asked = " or ".join("a path (str, pathlib.Path)" if k == _PATH else k for k in kind)
                found = "None" if value is None else f"{value!r:.60}, a {type(value).__name__}"
                raise ZooError(f"{function.__name__}: `{name}` is {found}; expected {asked}")

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        given = dict(zip(names, args)) | kwargs
        refuse_others(given, paths=True)
        try:
            return function(*args, **kwargs)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise ZooError(f"{where}{error.strerror or error}") from error
        except ValueError as error:
            if "null byte" not in str(error) and "null character" not in str(error):
                raise
            raise ZooError("a name of a file has the character NUL in it, which no name can have") from error
        except (TypeError, AttributeError) as error:
            try:
                refuse_others(given, paths=False)
            except ZooError as told:
                raise told from error
            raise

    return wrapped


def _is_one(value: object, kinds: list[str]) -> bool:
    """Whether the value is of one of these kinds, as annotations spell them; True of one that only says what it can do."""
    if _PATH in kinds and isinstance(value, str | os.PathLike):
        return True
    classes = {c.__name__ for c in type(value).__mro__} | ({"None"} if value is None else set())
    plain = {"str", "int", "bool", "None", _PATH, "torch.device", "torch.dtype", "DeviceMesh"}
    return not plain.issuperset(kinds) or any(k.rpartition(".")[2] in classes for k in kinds)
