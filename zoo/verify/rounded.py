"""What computing in bf16 or fp16 makes of a model's own numbers: its weights in that dtype, and the same weights in fp32.

This is what a copy in lower precision is held to against a recording in fp32, of which nobody ran a second way. A mistake
in ours is in both runs and cancels, so what is measured is rounding alone; how much of it is believed is capped, since
a mistake can also make a model that amplifies it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from zoo.verify.compare import Sketched, SpreadMeter, drive_both, rows
from zoo.verify.inputs import Inputs
from zoo.verify.metrics import references
from zoo.verify.oracle import OnLayer
from zoo.verify.ours import Ours
from zoo.verify.tolerance import Spread


class TwoPrecisions:
    """One model as an oracle that has two ways to run: in fp32, and in `dtype`."""

    avoid_ids: frozenset[int] = frozenset()
    only_switches = True

    def __init__(self, wide: Ours, low: Ours, dtype: str) -> None:
        self.wide, self.low, self.dtype = wide, low, dtype
        self.now = wide

    def describe(self) -> dict[str, str]:
        return {"kind": "ours"}

    def run(self, ids: Tensor, lengths: Sequence[int], on_layer: OnLayer | None = None) -> Tensor:
        return self.now.run(ids, on_layer)

    @contextlib.contextmanager
    def second_way(self) -> Iterator[tuple[str, str] | None]:
        self.now = self.low
        try:
            yield f"ours in {self.dtype}", "in fp32 on the same weights"
        finally:
            self.now = self.wide

    def greedy(self, ids: Tensor, n: int) -> Tensor | None:
        return None


def rounding_of(wide: Ours, low: Ours, inputs: Inputs, dtype: str) -> Spread:
    """The spread between the two on these inputs."""
    oracle = TwoPrecisions(wide, low, dtype)
    meter = SpreadMeter(inputs, wide.spec.d_model, dtype)

    def on_layer(b: int, i: int, x: Tensor | Sketched) -> None:
        if isinstance(x, Tensor) and (r := rows(x, inputs.batches[b], wide.spec.d_model)) is not None:
            meter.on_layer(b, i, r)

    def on_logits(b: int, logits: Tensor) -> None:
        batch, other = inputs.batches[b], meter.second_logits(b)
        assert other is not None
        for at, reference in references(logits[batch.mask], batch.following[batch.mask]):
            meter.on_logits(b, other[batch.mask][at], reference)

    drive_both(oracle, inputs.batches, meter, on_layer, on_logits)
    return meter.result()
