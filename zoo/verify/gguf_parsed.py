"""Upstream's reading of a GGUF file's metadata, in a fraction of its time.

transformers 5.23 parses the file twice with gguf-py, number by number through several numpy views each, and makes gguf-py's table
of names anew for every module of the model. Here lists are cut into the same parts at once, and what was made is kept. What
the parts are of, and all that is done to tensors, stays gguf-py's and transformers' own code.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


@contextlib.contextmanager
def metadata_once() -> Iterator[None]:
    """Meanwhile upstream parses the metadata of a file once, and lists of it at once."""
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf
    from transformers import modeling_gguf_pytorch_utils as upstream

    places = ((gguf, "GGUFReader"), (gguf, "get_tensor_name_map"), (upstream, "_gguf_parse_value"))
    was = [getattr(module, name) for module, name in places]
    reader, names, value = was
    made = functools.cache(reader_of(reader)), functools.cache(names), value_parser(value)
    try:
        for (module, name), new in zip(places, made, strict=True):
            setattr(module, name, new)
        yield
    finally:
        for (module, name), old in zip(places, was, strict=True):
            setattr(module, name, old)


def reader_of(base: Any) -> Any:
    """gguf-py's `GGUFReader` with the same fields, in a plain array in place of a `numpy.memmap` (four times as slow to
    slice), lists cut at once."""
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
                parts = list(numbers[:, None])
                return 12 + numbers.nbytes, [*head, *parts], list(range(2, 2 + len(parts))), [Kind.ARRAY, of]
            data = self._plain
            texts: list[Any] = []
            for _ in range(n):
                length = data[at : at + 8].view(np.uint64)
                end = at + 8 + int(length[0])
                texts += (length, data[at + 8 : end])
                at = end
            return at - orig_offs, [*head, *texts], list(range(3, 3 + 2 * n, 2)), [Kind.ARRAY, of]

    return Reader


def value_parser(slow: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """transformers' `_gguf_parse_value`, with the texts and numbers of lists converted by numpy."""
    from gguf import GGUFValueType as Kind

    def parse(part: Any, types: Any) -> Any:
        if not isinstance(types, list) or len(types) != 2 or types[0] != Kind.ARRAY or types[1] == Kind.ARRAY:
            return slow(part, types)
        return part.tobytes().decode() if types[1] == Kind.STRING else part.item()

    return parse
