"""Upstream's reading of a GGUF file, in a fraction of its time.

transformers 5.23 parses the file's metadata twice with gguf-py, number by number through several numpy views each, and makes
gguf-py's table of names anew for every module of the model. Here lists are read as a whole, and what was made is kept. gguf-py
dequantises 16 rows at a time on one core, and joins the pieces at the end: here more rows, on all cores, each piece where it
belongs. What a field means, what a block stands for, and all else that is done to tensors, stays gguf-py's and transformers' own code.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from zoo.verify.certificate import cores

NUMBERS = 1 << 18
"""That are dequantised at a time: what gguf-py makes of them on the way stays in a cache."""


@contextlib.contextmanager
def metadata_once() -> Iterator[None]:
    """Meanwhile upstream parses the metadata of a file once, and dequantises by all cores."""
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf
    from transformers import modeling_gguf_pytorch_utils as upstream

    replaced: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (gguf, "GGUFReader", lambda was: functools.cache(reader_of(was))),
        (gguf, "get_tensor_name_map", functools.cache),
        (upstream, "_gguf_parse_value", value_parser),
        (gguf.quants, "_apply_over_grouped_rows", lambda _was: over_rows),
    ]
    was = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for (module, name, old), (_, _, made_of) in zip(was, replaced, strict=True):
            setattr(module, name, made_of(old))
        yield
    finally:
        for module, name, old in was:
            setattr(module, name, old)


def reader_of(base: Any) -> Any:
    """gguf-py's `GGUFReader` with the same fields, in a plain array in place of a `numpy.memmap` (four times as slow to
    slice), a list as one part."""
    from gguf import GGUFValueType as Kind

    class Reader(base):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            """(bytes, parts, which of them are values, types) of the field that begins at a byte."""
            if raw_type != Kind.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            head = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            of, n = Kind(head[0][0]), int(head[1][0])
            at = orig_offs + 12
            if not n or of == Kind.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            if of != Kind.STRING:
                numbers = self._get(at, self.gguf_scalar_to_np[of], n)
                values, end = numbers.tolist(), at + numbers.nbytes
            else:
                values, end = [], at
                data = self._plain.data
                for _ in range(n):
                    start = end + 8
                    end = start + int.from_bytes(data[end:start], "little")
                    if end > len(data):
                        raise EOFError("the file ends within a list")
                    values.append(str(data[start:end], "utf-8"))
            return end - orig_offs, [*head, Values(values)], [len(head)], [Kind.ARRAY, of]

    return Reader


class Values(list[Any]):
    """A list of the metadata as it stands for itself, where gguf-py has a part for each number and text."""


def value_parser(slow: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """transformers' `_gguf_parse_value`; of a whole list, as upstream makes it of its parts' values."""

    def parse(part: Any, types: Any) -> Any:
        if isinstance(part, Values):
            return part[0] if len(part) == 1 else list(part)
        return slow(part, types)

    return parse


def over_rows(func: Callable[[Any], Any], arr: Any, otype: Any, oshape: tuple[int, ...]) -> Any:
    """gguf-py's `_apply_over_grouped_rows`: `func` of the rows of `arr`, as an array of that dtype and shape."""
    rows = arr.reshape(-1, arr.shape[-1])
    out = np.empty((len(rows), oshape[-1]), otype)
    step = max(1, NUMBERS // oshape[-1])

    def fill(at: slice) -> None:
        out[at] = func(rows[at])

    with ThreadPoolExecutor(cores()) as pool:
        for done in [pool.submit(fill, slice(i, i + step)) for i in range(0, len(rows), step)]:
            done.result()
    return out.reshape(oshape)
