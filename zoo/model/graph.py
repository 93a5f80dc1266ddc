"""CUDA graphs: one decode step, replayed for every token; one pass of a fixed shape, replayed for every batch.

Launching a kernel costs the host 10-50 us, more than most kernels of a step or of a short prompt take.
Unusual: a step is warmed up on the real cache. It writes one slot, which the first replay writes again;
what carries a state (a linear mixer) is put back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.kernels.best import likeliest
from zoo.kernels.launch import has_triton
from zoo.model.across import APIECE, Across
from zoo.model.cache import Cache, Context
from zoo.model.linear import Table, Weights
from zoo.spec import MoE, Spec


class Model(Protocol):
    """What decoding and capturing need of a model; the `Decoder` has it."""

    spec: Spec
    embed: Table
    across: Across | None
    held: tuple[int, ...] | None
    layers: nn.ModuleList

    @property
    def device(self) -> torch.device: ...
    def cache(self, batch: int, max_len: int) -> Cache: ...
    def start(self, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Context]: ...
    def through(self, x: Tensor, ctx: Context) -> Tensor: ...
    def run(self, ids: Tensor, cache: Cache | None = None) -> Tensor: ...
    def finish(self, x: Tensor) -> Tensor: ...
    def modules(self) -> Iterable[nn.Module]: ...
    def __call__(self, ids: Tensor) -> Tensor: ...


def capturable(model: Model, tokens: int) -> bool:
    """Whether a pass of so many tokens can be captured: on a GPU, and nothing in it waits for the host."""
    weight = model.embed.weight
    kernels = weight.is_cuda and has_triton(weight) and model.embed.dtype != torch.float64
    if model.across is not None:  # of many tokens each rank counts those that chose its experts
        counted = tokens > APIECE and any(isinstance(x.ffn, MoE) for x in model.spec.layers)
        kernels = kernels and model.across.capturable and not counted
    return kernels and all(
        (w := m.packed()) is not None and (w.whole or not w.lead)
        for m in model.modules()
        if isinstance(m, Weights)
    )


class Step:
    """`step(token)` is `model(token[:, None], cache)[:, -1]`, for a cache on a CUDA device that already holds the
    prompt. The result is overwritten by the next step."""

    def __init__(self, model: Model, cache: Cache, batch: int) -> None:
        self.cache = cache
        cache.fixed = True
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        length, position = cache.length, cache.position.clone()
        states = cache.carried()
        kept = [t.clone() for t in states]
        side = _side(model.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles the kernels, and lets libraries allocate
                    model.finish(model.run(self.ids, cache))
                    self._rewind(length, position)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with _capture(self.graph):
                self.logits = model.finish(model.run(self.ids, cache))[:, -1]
                self.best = likeliest(self.logits)
            self._rewind(length, position)
            for t, k in zip(states, kept, strict=True):
                t.copy_(k)

    def _rewind(self, length: int, position: Tensor) -> None:
        self.cache.length = length
        self.cache.position.copy_(position)

    def __call__(self, token: Tensor) -> Tensor:
        """token [B] -> logits [B, V] of the next. Raises ZooError if the cache is full."""
        if self.cache.length >= self.cache.max_len:
            raise ZooError(f"the cache has room for {self.cache.max_len} tokens and is full")
        self.ids.copy_(token[:, None])
        self.graph.replay()
        self.cache.length += 1
        return self.logits


class Pass:
    """`run(ids)` is `model(ids)` for ids [B, T] of one shape. The result is overwritten by the next pass. Raises ZooError
    for ids of another shape."""

    def __init__(self, model: Model, batch: int, tokens: int) -> None:
        self.ids = torch.zeros(batch, tokens, dtype=torch.int64, device=model.device)
        self.graph = torch.cuda.CUDAGraph()
        with nullcontext() if model.across is None else model.across.to_be_captured():
            side = _side(model.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                model(self.ids)
            torch.cuda.current_stream().wait_stream(side)
            with _capture(self.graph):
                self.logits = model(self.ids)

    def __call__(self, ids: Tensor) -> Tensor:
        if ids.shape != self.ids.shape:
            raise ZooError(f"a pass captured for ids {list(self.ids.shape)} was given {list(ids.shape)}")
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits


def _capture(graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
    """What only this thread does is held against the capture: where there are ranks, torch has a thread that looks after
    what they say."""
    return torch.cuda.graph(graph, capture_error_mode="thread_local")


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """What passes are warmed up on before they are captured. One for all: cuBLAS keeps 32 MB per stream."""
    return torch.cuda.Stream(device)
