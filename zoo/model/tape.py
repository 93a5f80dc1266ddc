"""One token after the other through a decoder on a CPU: what its layers call is kept, and called again.

What `graph` is on a GPU. The layers of a token are run once as they are; where all that they computed were calls of our own kernels
(`zoo.kernels.cpu.shares.Tape`), the next token is one native call for all of them. Where torch computed anything, or a kernel that is not
kept, the layers are run as they are each time.

Margin, one thread of a Xeon with AVX-512 that had other work beside, time of the processor for a token: SmolLM2 135M in Q8_0 88 ms as it was, 64
with attention in one call, 30 replayed (medians of 4 turns); Gemma 3 270M in Q4_K_M 140, 85 and 60 (the least of 4).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.kernels.cpu import kernels
from zoo.model.attention import LONG
from zoo.model.cache import Cache, Context
from zoo.model.graph import Model
from zoo.model.linear import Weights
from zoo.spec import Attention, Rope


def tapeable(model: Model, batch: int) -> bool:
    """Whether it is worth trying: one sequence, on a CPU, weights in codes (around others torch computes), nobody's hooks between layers."""
    if batch != 1 or model.device.type != "cpu" or model.across is not None or model.held is not None:
        return False
    if kernels("shares") is None or _hooked(model.layers.modules()):
        return False
    spec = model.spec
    # What a token sees of its chunk changes with more than its position.
    chunks = any(isinstance(x.mixer, Attention) and x.mixer.chunk for x in spec.layers)
    codes = any(isinstance(m, Weights) and m.scheme is not None for m in model.layers.modules())
    return codes and not (chunks or spec.altup or spec.hyper or spec.per_layer_embedding or spec.reads_ids)


class Step:
    """`step(token)` is `model(token[:, None], cache)[:, -1]`, for a cache on a CPU that already holds the prompt."""

    def __init__(self, model: Model, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.tape: Any = None
        self.tried = False
        self.modules = list(model.layers.modules())

    @torch.inference_mode()
    def __call__(self, token: Tensor) -> Tensor:
        """token [1] -> logits [1, V] of the next. Raises ZooError if the cache is full."""
        cache, model = self.cache, self.model
        position = cache.length
        try:
            x, ctx = model.start(token[:, None], cache)
            # Kernels are gone in a process that was forked meanwhile.
            if (
                self.tape is None
                or position >= LONG
                or kernels("shares") is None
                or self._where() != self.known
            ):
                x = self._first(x, ctx)
            else:
                self.x.copy_(x)
                for rope, table in self.tables.items():
                    for to, new in zip(table, ctx.rope(rope), strict=True):
                        to.copy_(new)
                for call in self.tape.moves:
                    call.move(position)
                self.tape.replay()
                x = self.out
        except BaseException:
            cache.advance(position - cache.length)
            raise
        return model.finish(x)[:, -1]

    def _first(self, x: Tensor, ctx: Context) -> Tensor:
        """The layers as they are; kept, the first time, if that can be."""
        if self.tried:
            return self.model.through(x, ctx)
        self.tried = True
        ropes = {getattr(layer.mixer, "rope", None) for layer in self.model.spec.layers}
        self.tables: dict[Rope, tuple[Tensor, Tensor]] = {r: ctx.rope(r) for r in ropes if r is not None}
        self.x = x.clone()
        tape, meanwhile = kernels("shares").Tape(), _Meanwhile()
        with tape.running(), meanwhile:
            self.out = self.model.through(self.x, ctx)
        if tape.whole and meanwhile.nothing:
            tape.kept += [meanwhile.made, *self._tensors()]
            self.tape, self.known = tape, self._where()
        return self.out

    def _tensors(self) -> list[Tensor]:
        """All that the layers read which is not made for the token."""
        found = [
            t for m in self.modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
        ]
        return found + [t for entry in self.cache.slots if entry is not None for t in entry.tensors]

    def _where(self) -> object:
        """What a replay goes by: weights and cache that lie where they lay, and nobody's hooks. It is asked before each: weights may be
        replaced, and hooks come, between two tokens."""
        return [t.data_ptr() for t in self._tensors()], _hooked(self.modules)


def _hooked(modules: Iterable[nn.Module]) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


class _Meanwhile(TorchDispatchMode):
    """Whether torch computes `nothing`: memory is taken, or looked at otherwise. And the tensors that it `made`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nothing = True
        self.made: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.made.append(out)
        taken = func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty)
        self.nothing = self.nothing and not func._schema.is_mutable and (taken or _views(out, args))
        return out


def _views(out: Any, args: Any) -> bool:
    """Whether these are tensors that lie where the first argument does."""
    found = out if isinstance(out, (tuple, list)) else (out,)
    if not args or not all(isinstance(x, Tensor) for x in (args[0], *found)):
        return False
    return all(x.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr() for x in found)
