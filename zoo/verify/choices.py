"""What tokens chose: experts, and the keys of a sparse indexer; and ties between keys, where any choice is right.

An indexer's score is a sum of relu: keys that no head looks at all score exactly 0. Which of those are among the best is
up to the order that a top-k goes through them, and that changes with how many keys there are: a pass with a cache takes
others than a pass over all tokens at once. Neither is wrong, and both must take the same to be compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.model import Decoder
from zoo.model.mla import Scorer
from zoo.model.moe import Router

HAIR = 1e-6
"""Of the largest score: keys that score alike to within this are a tie, for rounding says which is better."""


@dataclass
class Choices:
    """Of passes that follow one another over the same rows: what was chosen, by layer."""

    experts: dict[int, list[Tensor]] = field(default_factory=dict)  # [B, T, top_k]
    keys: dict[int, list[Tensor]] = field(
        default_factory=dict
    )  # positions [B, T, top_k]; -1: not chosen from
    tied: int = 0  # choices of keys, at a tie, that were made as another pass's

    def differ(self, other: Choices, token: int) -> list[str]:
        """What this token (of any row) chose otherwise than in `other`, the first layer first: "keys in layer 3", ..."""
        out: list[tuple[int, str]] = []
        for what in ("experts", "keys"):
            for layer, mine in getattr(self, what).items():
                theirs = getattr(other, what).get(layer)
                if theirs is None:
                    continue
                a, b = (torch.cat(x, 1)[:, token].sort(-1).values for x in (mine, theirs))
                if not torch.equal(a, b):
                    out.append((layer, what))
        return [f"{what} in layer {layer}" for layer, what in sorted(out)]


@contextlib.contextmanager
def watched(model: Decoder, like: Choices | None = None) -> Iterator[Choices]:
    """Meanwhile what `model` chooses is kept. Where keys tie, it chooses as `like` did."""
    out, undo = Choices(), contextlib.ExitStack()
    with undo:
        for i, layer in enumerate(model.layers):
            for m in layer.modules():
                if isinstance(m, Router):
                    undo.callback(m.register_forward_hook(_experts(out, i, layer, undo)).remove)
                elif isinstance(m, Scorer):
                    _watch_keys(m, i, out, like, undo)
        yield out


def _experts(out: Choices, i: int, layer: Any, undo: contextlib.ExitStack) -> Callable[..., None]:
    rows = [1]

    def begin(_m: Any, args: tuple[Any, ...]) -> None:
        rows[0] = args[0].shape[-3]  # [B, T, D], or [S, B, T, D]

    undo.callback(layer.register_forward_pre_hook(begin).remove)

    def hook(_m: Router, _args: Any, made: tuple[Tensor, Tensor]) -> None:
        out.experts.setdefault(i, []).append(made[0].view(rows[0], -1, made[0].shape[-1]).clone())

    return hook


def _watch_keys(m: Scorer, i: int, out: Choices, like: Choices | None, undo: contextlib.ExitStack) -> None:
    best, start = m.best, [0]

    def begin(_m: Any, args: tuple[Any, ...]) -> None:
        x, ctx = args[0], args[2]
        start[0] = ctx.start
        none = torch.full((*x.shape[:2], m.spec.top_k), -1, device=x.device)
        out.keys.setdefault(i, []).append(none)

    def chosen(scores: Tensor) -> Tensor:
        mine = best(scores)  # [B, T, top_k]
        if like is not None and i in like.keys:
            mine = as_another(
                mine, torch.cat(like.keys[i], 1)[:, start[0] : start[0] + mine.shape[1]], scores, out
            )
        real = scores.gather(-1, mine) > -torch.inf
        out.keys[i][-1] = torch.where(real, mine, -1)
        return mine

    undo.callback(m.register_forward_pre_hook(begin).remove)
    m.best = chosen  # type: ignore[method-assign]
    undo.callback(m.__dict__.pop, "best")


def as_another(mine: Tensor, theirs: Tensor, scores: Tensor, out: Choices) -> Tensor:
    """`theirs` where it is as good as `mine` by the same scores [B, T, S], else `mine`."""
    there = theirs.amax(-1) >= 0
    theirs = torch.where(theirs < 0, theirs.amax(-1, keepdim=True), theirs).clamp(0, scores.shape[-1] - 1)
    a, b = (scores.gather(-1, x).sort(-1).values for x in (mine, theirs))
    finite = scores.masked_fill(scores == -torch.inf, 0).abs().amax(-1, keepdim=True)
    alike = there & ((a == b) | ((a - b).abs() <= HAIR * finite)).all(-1)
    moved = alike & (mine.sort(-1).values != theirs.sort(-1).values).any(-1)
    out.tied += int(moved.sum())
    return torch.where(moved[..., None], theirs, mine)
