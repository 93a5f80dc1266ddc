"""Whose fault an exception is that came out of a family: a value in the config, or the family's code.

Families read configs without checking each value's type, so a text where a number belongs surfaces as a TypeError
in the middle of their arithmetic. A mistake of their own surfaces in the same place. They are told apart by what
cannot come from a value of JSON: a name or an import that does not exist, an attribute of an object that is not
JSON's, a call with the wrong arguments.
"""

from __future__ import annotations

import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from zoo.errors import ZooError

_OF_VALUES = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)
_JSON = (bool, int, float, str, list, dict, type(None))
_CALL = re.compile(
    r"(unexpected keyword|missing \d+ required|positional arguments?\b.*\bgiven|multiple values for|is not callable)"
)


class Unnamed(ZooError):
    """A config that makes no model, said without the field that is to blame."""


# Values by which a field is tried, each with what such a value is.
_TRIED: tuple[tuple[Any, str], ...] = (
    (8, "a whole number above 0"),
    (64, "a whole number above 0"),
    (0.5, "a number"),
    (True, "true or false"),
    ([8, 8], "a list"),
    ([0.5] * 64, "a list of numbers"),
    ("1", "a text"),
)


def named(
    error: Unnamed,
    spec: Callable[[dict[str, Any]], object],
    config: Mapping[str, Any],
    read: Mapping[tuple[str, ...], Any],
    where: str,
) -> ZooError:
    """`error`, saying which of the fields that were `read` (by the path to them) is to blame, if that can be told: the one
    that makes a model (`spec` raises nothing) where it has another value. Failing that, one below 0, not finite or a list with
    whose change the error changes."""
    sure: dict[tuple[str, ...], str] = {}
    perhaps: dict[tuple[str, ...], str] = {}
    for path, value in read.items():
        odd = isinstance(value, list | dict)
        odd |= isinstance(value, int | float) and not 0 < value < math.inf and value is not False
        if value is None or any(inner[: len(path)] == path for inner in sure):
            continue
        for other, what in _TRIED:
            if type(other) is type(value) and not odd:
                continue
            said = f"{'.'.join(path)} is {str(value)[:40]}; expected {what}"
            try:
                spec(_with(config, path, other))
            except Exception as e:
                refuses_other = path[-1] in str(e)
                if odd and str(e) != str(error) and not refuses_other:
                    perhaps.setdefault(path, said)
            else:
                sure[path] = said
                break
    found = list((sure or perhaps).values())
    if not 0 < len(found) <= 3:
        return error
    reason = str(error).removeprefix(f"{where}: ")
    return ZooError(f"{where}: {', or '.join(found)} ({reason})")


def _with(config: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of a config in which one field has another value."""
    key, *rest = path
    return {**config, key: _with(config[key], tuple(rest), value) if rest else value}


def error(e: Exception, family: str, at: str, where: str, model: str) -> ZooError:
    """The error of `e`, raised by the family's reading of the config at `where`: a value that makes no `model`, or, with
    its file and line, a mistake in the family. `at`: where the family's code is, for an error raised outside it."""
    why = f"{type(e).__name__}: {e}"
    if not is_code(e):
        return Unnamed(f"{where}: a field has a value that makes no {model} ({why})")
    return ZooError(
        f"{place(e) or at}: the code of family {family} fails on {where} ({why}). The mistake is the family's, not "
        "the config's"
    )


def is_code(e: Exception) -> bool:
    """Whether no value of JSON could have caused `e`."""
    if isinstance(e, AttributeError):
        # A list has no `items`, but an object would: the config's. Nothing of JSON has a `window`: the code's.
        return not isinstance(e.obj, _JSON) or not any(hasattr(t, str(e.name)) for t in _JSON)
    if isinstance(e, TypeError):
        return _CALL.search(str(e)) is not None
    return not isinstance(e, _OF_VALUES)


def place(e: Exception) -> str | None:
    """file:line of the last frame of `e` that is a family's, or outside zoo itself and Python's library."""
    for frame, line in reversed(list(traceback.walk_tb(e.__traceback__))):
        module = str(frame.f_globals.get("__name__"))
        top = module.partition(".")[0]
        if module.startswith("zoo.converters.") or (top != "zoo" and top not in sys.stdlib_module_names):
            return f"{frame.f_code.co_filename}:{line}"
    return None
