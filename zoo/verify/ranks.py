"""A comparison in which ours is shared by several ranks (`zoo.load(mesh=)`).

The first rank does all that one process would, and has the oracle. The others hold their part of ours and go the same way
through it: what the oracle says is handed to them as it comes, and all that is decided on the way hangs on that and on
logits, of which every rank has the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from zoo.together import of_first
from zoo.verify.compare import Batch, Measured, OnLayer, OnLogits, Sketched, drive, is_upstream
from zoo.verify.inputs import Inputs
from zoo.verify.oracle import CannotRun, Oracle
from zoo.verify.oracle import OnLayer as OfOneBatch
from zoo.verify.tolerance import Spread


@dataclass(frozen=True)
class Task:
    """What the other ranks are to do next: `measure`, or, with what that gave, the decode level of `n_greedy` tokens."""

    asked: Inputs
    spread: Spread | None
    upstream: bool  # whether the oracle is
    fixed_inputs: bool
    only_switches: bool
    measured: Measured | None = None
    n_greedy: int = 0


class Ranks:
    """The ranks of a mesh, as they talk about a comparison on `device`, this rank's."""

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self.mesh, self.group, self.device = mesh, mesh.get_group(), device
        self.first = mesh.get_local_rank() == 0
        self._source = dist.get_global_rank(self.group, 0)

    def said(self, value: Any = None) -> Any:
        """What the first rank says, on all."""
        return of_first(value if self.first else None, self.group)

    def tensor(self, x: Tensor | None = None) -> Tensor:
        """The first rank's tensor, on all and on their device."""
        shape, dtype = self.said(None if x is None else (tuple(x.shape), x.dtype))
        x = torch.empty(shape, dtype=dtype, device=self.device) if x is None else x.to(self.device)
        x = x.contiguous()
        dist.broadcast(x, src=self._source, group=self.group)
        return x


class Leading:
    """The oracle, on the first rank: the others hear what it says."""

    def __init__(self, oracle: Oracle, ranks: Ranks) -> None:
        self.oracle, self.ranks = oracle, ranks
        self.avoid_ids: frozenset[int] = getattr(oracle, "avoid_ids", frozenset())
        self.fixed_inputs: bool = getattr(oracle, "fixed_inputs", False)
        self.only_switches: bool = getattr(oracle, "only_switches", False)
        self.upstream = is_upstream(oracle)

    def task(self, asked: Inputs, spread: Spread | None, **decode: Any) -> None:
        """Tell the other ranks what comes."""
        self.ranks.said(Task(asked, spread, self.upstream, self.fixed_inputs, self.only_switches, **decode))

    def describe(self) -> dict[str, Any]:
        return self.oracle.describe()

    def drive(self, batches: Sequence[Batch], on_layer: OnLayer, on_logits: OnLogits) -> None:
        def layer(b: int, i: int, x: Tensor | Sketched) -> None:
            whole = isinstance(x, Tensor)
            self.ranks.said((b, i, None if whole else x))
            on_layer(b, i, self.ranks.tensor(x) if isinstance(x, Tensor) else x)

        def logits(b: int, x: Tensor) -> None:
            self.ranks.said((b, None, None))
            on_logits(b, self.ranks.tensor(x))

        with self._failure_told():
            drive(self.oracle, batches, layer, logits)
        self.ranks.said(None)

    def run(self, ids: Tensor, lengths: Sequence[int], on_layer: OfOneBatch | None = None) -> Tensor:
        with self._failure_told():
            logits = self.oracle.run(ids, lengths)
        self.ranks.said(None)
        return self.ranks.tensor(logits)

    @contextlib.contextmanager
    def second_way(self) -> Iterator[tuple[str, str] | None]:
        with self.oracle.second_way() as ways:
            yield self.ranks.said(ways)

    def greedy(self, ids: Tensor, n: int) -> Tensor | None:
        with self._failure_told():
            found = self.oracle.greedy(ids, n)
        return self.ranks.said(None if found is None else found.cpu())  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _failure_told(self) -> Iterator[None]:
        """Upstream's own failure is raised on every rank: the others wait for what it says."""
        try:
            yield
        except CannotRun as e:
            self.ranks.said(e)
            raise


class Following:
    """The first rank's oracle, as another rank hears it."""

    avoid_ids: frozenset[int] = frozenset()

    def __init__(self, task: Task, ranks: Ranks) -> None:
        self.ranks, self.upstream = ranks, task.upstream
        self.fixed_inputs, self.only_switches = task.fixed_inputs, task.only_switches

    def describe(self) -> dict[str, Any]:
        return {"kind": "another rank's"}

    def drive(self, batches: Sequence[Batch], on_layer: OnLayer, on_logits: OnLogits) -> None:
        while (event := self._said()) is not None:
            b, i, sketched = event
            if i is None:
                on_logits(b, self.ranks.tensor())
            else:
                on_layer(b, i, self.ranks.tensor() if sketched is None else sketched)

    def run(self, ids: Tensor, lengths: Sequence[int], on_layer: OfOneBatch | None = None) -> Tensor:
        self._said()
        return self.ranks.tensor()

    @contextlib.contextmanager
    def second_way(self) -> Iterator[tuple[str, str] | None]:
        yield self.ranks.said()

    def greedy(self, ids: Tensor, n: int) -> Tensor | None:
        return self._said()  # type: ignore[no-any-return]

    def _said(self) -> Any:
        if isinstance(said := self.ranks.said(), CannotRun):
            raise said
        return said
