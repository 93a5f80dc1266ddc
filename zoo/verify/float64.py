"""Upstream in float64: how far its own fp32 is from what its weights stand for.

Two ways to run upstream in fp32 differ in attention and experts only, and share the rounding of all the rest. Where weights
are large, the error that they have in common is many times what they differ by, and a right conversion would fail. So what
departs in fp32 is held against float64 before it is called wrong: ours may be twice as far from it as upstream's fp32 is.
A token's state is held against the longest that it has been (`compare.Longest`): it carries the rounding of that.
Likewise decoding with a cache: twice as far from ours in float64 as ours in one pass.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zoo.model import Decoder
from zoo.verify.compare import OnLayer as OnBatchLayer
from zoo.verify.compare import OnLogits, SpreadMeter
from zoo.verify.device import has_room
from zoo.verify.inputs import Batch
from zoo.verify.oracle import OnLayer, Transformers
from zoo.verify.stage import Clock
from zoo.verify.stream import StreamedTransformers


class InFloat64:
    """An oracle: a `Transformers` in float64, while it is open; its second way is fp32. Made for a model that is in fp32."""

    def __init__(self, oracle: Transformers) -> None:
        self.oracle = oracle
        self.avoid_ids = oracle.avoid_ids

    def __enter__(self) -> None:
        self._set(torch.float64)

    def __exit__(self, *_: Any) -> None:
        self._set(torch.float32)

    def _set(self, dtype: torch.dtype) -> None:
        model = self.oracle.model
        model.double() if dtype == torch.float64 else model.float()

    def describe(self) -> dict[str, Any]:
        return self.oracle.describe() | {"dtype": "float64"}

    def run(self, ids: Tensor, lengths: Sequence[int], on_layer: OnLayer | None = None) -> Tensor:
        if next(self.oracle.model.parameters()).dtype != torch.float64:
            return self.oracle.run(ids, lengths, on_layer)
        with Widened() as widened:
            return self.oracle.run(ids, lengths, on_layer and widened.without(on_layer))

    @contextlib.contextmanager
    def second_way(self) -> Iterator[tuple[str, str]]:
        self._set(torch.float32)
        try:
            yield "float64", "fp32"
        finally:
            self._set(torch.float64)

    def greedy(self, ids: Tensor, n: int) -> Tensor | None:
        return self.oracle.greedy(ids, n)

    @property
    def fits(self) -> bool:
        """Whether the weights that are held at a time take, in float64, at most half of the memory that is free."""
        return has_room(self.oracle.device, 8 * self._held())

    def _held(self) -> int:
        return sum(p.numel() for p in self.oracle.model.parameters())


class StreamedInFloat64(InFloat64):
    """Of upstream streamed: each layer's weights, read once, are widened for one of the ways."""

    oracle: StreamedTransformers

    def __init__(self, oracle: StreamedTransformers) -> None:
        super().__init__(oracle)
        self._narrow = oracle.weights.fp32

    def _set(self, dtype: torch.dtype) -> None:
        oracle, wide = self.oracle, dtype == torch.float64
        oracle.weights.dtype, oracle.weights.fp32 = dtype, frozenset() if wide else self._narrow
        oracle.around_pass = _WidenedPass if wide else contextlib.nullcontext
        oracle.around_step = _default_float64 if wide else contextlib.nullcontext
        for name in ("one", "mapped_one", "load"):  # a pass reads weights, too: those as they lie in the file
            oracle.weights.__dict__.pop(name, None)
            if wide:
                setattr(oracle.weights, name, _as_written(getattr(oracle.weights, name)))
        for m in oracle.model.modules():
            for name, b in m._buffers.items():
                if b is not None and b.is_floating_point() and not b.is_meta:
                    m._buffers[name] = b.to(dtype)

    def drive_both(
        self,
        batches: Sequence[Batch],
        meter: SpreadMeter,
        on_layer: OnBatchLayer,
        on_logits: OnLogits,
        clock: Clock,
    ) -> None:
        self.oracle.drive_both(batches, meter, on_layer, on_logits, clock, self.second_way)

    def _held(self) -> int:
        return max(sum(p.numel() for p in x.parameters()) for x in self.oracle.layers)


def _as_written(read: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return read(*args, **kwargs)

    return call


@contextlib.contextmanager
def _default_float64() -> Iterator[None]:
    """While a pass runs, and not between its steps: the default dtype is that of all threads."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def logits_of(decoder: Decoder, ids: Tensor, at: Tensor | None = None) -> Tensor | None:
    """What a decoder of ours gives for ids [B, T] in float64, [B, T, V], or at positions `at` [n] only, [B, n, V]; None where
    it can't be run so."""
    numbers = sum(t.numel() for t in decoder.state_dict().values())
    if decoder.across is not None or not has_room(decoder.device, 12 * numbers):  # a copy, then widened
        return None
    try:
        wide = copy.deepcopy(decoder).double()
        with Widened(), torch.inference_mode():
            x = wide.run(ids)
            return wide.finish(x if at is None else x.index_select(-2, at))
    except (RuntimeError, TypeError, ValueError):
        return None


class Widened(TorchFunctionMode):
    """Meanwhile whatever asks torch for float32, or for no dtype, gets float64: upstream widens to fp32 by name in many
    places."""

    paused = False

    def __enter__(self) -> Widened:
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(torch.float32)

    def without(self, listen: OnLayer) -> OnLayer:
        """`listen`, to be called from within, as it is outside."""

        def call(i: int, x: Tensor) -> None:
            self.paused = True
            torch.set_default_dtype(torch.float32)
            try:
                listen(i, x)
            finally:
                torch.set_default_dtype(torch.float64)
                self.paused = False

        return call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*_widened(args), **_widened(kwargs or {}))


class _WidenedPass(Widened):
    """`Widened`, in the thread of a pass that is run by steps."""

    def __enter__(self) -> Widened:
        TorchFunctionMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        TorchFunctionMode.__exit__(self, *error)


def _widened(x: Any) -> Any:
    if x is torch.float32:
        return torch.float64
    if type(x) in (tuple, list):
        return type(x)(_widened(v) for v in x)
    if type(x) is dict:
        return {k: _widened(v) for k, v in x.items()}
    return x
