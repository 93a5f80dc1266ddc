"""JSON from strangers, under one budget: what it can make of a machine's memory and time is counted before it is parsed.

Sixty megabytes of `[],[],` become two gigabytes of lists, and a number of 400 digits an error wherever it is first
used as a float. So: brackets, commas and colons are counted in the text, numbers are looked at where they are read.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MAX_CONTAINERS = 2 << 20
"""Lists and objects of one text. A header of 140,000 tensors (a trillion parameters in fp8) has 420,000."""
MAX_VALUES = 4 << 20
"""Commas of one text."""
MAX_KEYS = 3 << 19
"""Colons of one text. Each key may be another: four million of them take ten seconds. A header of 262,144 tensors has a million."""
MAX_KEY, MAX_TEXT = 4 << 10, 4 << 20
"""Bytes of a key and of a text. A template has some 100,000, the notes of a trainer in a header a million; where one letter of
a text is wide, each takes four bytes, and so it does in whatever is made of it."""
MAX_QUOTES = 1 << 20
"""Quotation marks in texts, which hide how long these are."""
MAX_DIGITS = 20
"""Of a whole number that counts something: 2^64 has 20."""
MAX_WHOLE = 40
"""Digits of any whole number of JSON. transformers saves a tokenizer that has no longest text with a `model_max_length` of int(1e30)."""

_SPACES = (b" ", b"\n", b"\t", b"\r")  # a header may be padded with any number
_DIGITS = bytes.maketrans(b"123456789E", b"000000000e")

Pairs = Callable[[list[tuple[str, Any]]], Any]


def whole(text: str, digits: int = MAX_DIGITS) -> int | None:
    """The whole number that `text` spells with the digits 0 to 9, and no others; None where it is none, or has more of them."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= digits else None


def parse_json(text: bytes | str, pairs: Pairs | None = None) -> Any:
    """The value that `text` spells. Raises ValueError, with what is wrong: no JSON, or more of it than any release has.

    `pairs`: makes an object of its pairs instead of a dict, as json's `object_pairs_hook`. NaN and Infinity are numbers
    here: released configs have them.
    """
    raw = text.encode() if isinstance(text, str) else text
    if not (encoding := json.detect_encoding(raw)).startswith("utf-8"):  # in which no digit is a byte
        raw = raw.decode(encoding).encode()
    if (n := raw.count(b"[") + raw.count(b"{")) > MAX_CONTAINERS:
        raise ValueError(f"it has {n} lists and objects; at most {MAX_CONTAINERS} are read")
    if (n := raw.count(b",")) > MAX_VALUES:
        raise ValueError(f"it has {n} values; at most {MAX_VALUES} are read")
    if (n := raw.count(b":")) > MAX_KEYS:
        raise ValueError(f"it has {n} keys; at most {MAX_KEYS} are read")
    _refuse_long(raw)
    numbers: dict[str, Any] = {"parse_int": _whole, "parse_float": _real} if _long_number(raw) else {}
    try:
        with uncollected():
            return json.loads(raw, object_pairs_hook=pairs, **numbers)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextmanager
def uncollected() -> Iterator[None]:
    """Meanwhile nothing is looked through for garbage: of many small objects that are all kept, which takes longer than making them."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _refuse_long(raw: bytes) -> None:
    """Raises ValueError for a key or a text that is too long. Looks for quotation marks at steps of less than either may have:
    nearly all that is honest has one within each."""
    if (n := raw.count(b'\\"')) > MAX_QUOTES:
        raise ValueError(f"it has {n} quotation marks in its texts; at most {MAX_QUOTES} are read")
    at, step = 0, MAX_KEY // 2
    while at + step < len(raw):
        if raw.find(b'"', at, at + step) >= 0:
            at += step
            continue
        begin, end = raw.rfind(b'"', 0, at) + 1, raw.find(b'"', at)
        end = len(raw) if end < 0 else end
        if end - begin > MAX_KEY and raw[end + 1 : end + 65].lstrip().startswith(b":"):
            raise ValueError(f"it has a key of {end - begin} bytes; at most {MAX_KEY} are read")
        if end - begin > MAX_TEXT and end - begin - sum(map(raw[begin:end].count, _SPACES)) > MAX_TEXT:
            raise ValueError(
                f"it has a text, or numbers, of {end - begin} bytes; at most {MAX_TEXT} are read"
            )
        at = end + 1


def _long_number(raw: bytes) -> bool:
    """Whether any number may need a look: 20 digits, or an exponent of three. Two searches for fixed bytes: a regular
    expression for the same took most of the time of reading a large header."""
    plain = raw.translate(_DIGITS, delete=b"+")
    return b"0" * 20 in plain or b"e000" in plain


def _whole(text: str) -> int:
    if len(text) > MAX_WHOLE + 1:
        raise ValueError(f"it has a number of {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    value = float(text) if len(text) <= 400 else math.inf
    if math.isinf(value):
        raise ValueError(f"it has the number {text[:40]}, which is beyond all floats")
    return value
