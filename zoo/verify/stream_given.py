"""The tensors of a quantised checkpoint for upstream where its own dequantisation needs the whole model (GPTQ, AWQ, ...): what
our formulas say that the codes stand for, under the source's own names, a layer at a time.

What our rules do with names and rows has no part in it: a mistake there shows, as it would not in an export.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.formats.base import TensorRef
from zoo.mapping.plan import Plan
from zoo.mapping.recipe import Output
from zoo.quant.schemes import leaf_of
from zoo.verify.exact import dequantised
from zoo.verify.reading import Range, Window
from zoo.verify.stream_weights import Weights


class GivenWeights(Weights):
    """As `Weights`, of the checkpoint of a plan that dequantises it."""

    def __init__(
        self, model: Any, plan: Plan, dtype: torch.dtype, device: str | torch.device, window: Window
    ) -> None:
        self.plan = plan
        self.coded: dict[str, tuple[Output, int]] = {}  # the weight's name -> whose k-th source it is
        tensors = dict(plan.checkpoint.tensors)
        for output in plan.outputs.values():
            for k, codes in enumerate(output.sources):
                if output.way(k) is None:
                    continue
                for part in plan.sources_of(output, k):
                    del tensors[part]
                self.coded[leaf_of(codes)] = output, k
        for name, (output, k) in self.coded.items():
            tensors[name] = replace(plan.checkpoint.tensors[output.sources[k]], name=name)
        super().__init__(model, replace(plan.checkpoint, tensors=tensors), None, dtype, device, window)

    def ranges(self, module: nn.Module) -> Iterator[Range]:
        for ref in self._refs(module):
            of = self.coded.get(ref.name)
            for name in (ref.name,) if of is None else self.plan.sources_of(*of):
                stored = self.plan.checkpoint.tensors[name]
                yield self.plan.checkpoint.path(stored.file), stored.offset, stored.nbytes

    @property
    def converts(self) -> bool:
        return True

    def used_there(self, module: nn.Module) -> Iterator[Range]:
        """What is not dequantised first."""
        for ref in self._refs(module):
            if ref.name not in self.coded:
                yield self.plan.checkpoint.path(ref.file), ref.offset, ref.nbytes

    def _mapped(self, ref: TensorRef) -> Tensor:
        if (of := self.coded.get(ref.name)) is None:
            return super()._mapped(ref)
        return dequantised(self.window.range, self.plan, *of)
