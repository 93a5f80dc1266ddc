"""Continuing a prompt with the static cache: greedy, or sampled."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.model import tape
from zoo.model.cache import Cache, checked
from zoo.model.graph import Model, Step, capturable

SHORT = 8
"""Capturing a step costs about as much as running this many."""
COLDEST = 1e-30
"""Below this temperature quotients of logits leave fp32, and only the likeliest tokens are drawn anyway."""


def stream(
    model: Model,
    ids: Tensor,
    max_new_tokens: int,
    eos: int | tuple[int, ...] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cache: Cache | None = None,
) -> Iterator[Tensor]:
    """Yield the next token [B] of each sequence in ids [B, T] until `max_new_tokens`, or until every
    sequence has produced one of `eos`. A sequence that has goes on with its `eos`. Learned positions end it, too. Where
    LongRoPE changes its angles, the whole text is read anew.

    `temperature` 0 takes the likeliest token; else tokens are drawn from `probabilities` with torch's global generator (of
    several ranks: the first one's).

    `cache` may hold the first tokens of `ids` already, fewer than all: the others are read. Afterwards it holds all tokens,
    old and new, but the last one yielded.
    """
    checked(ids)
    if not temperature >= 0:
        raise ZooError(f"a temperature is 0 or more; found {temperature}")
    if not 0 < top_p <= 1 or top_k < 0:
        raise ZooError(f"top_p is above 0 and at most 1, top_k 0 or more; found {top_p} and {top_k}")
    if (room := model.spec.positions) is not None:
        max_new_tokens = min(max_new_tokens, max(1, room - ids.shape[1] + 1))  # the last one is not fed
    ends = (eos,) if isinstance(eos, int) else tuple(eos or ())
    if cache is None:
        cache = model.cache(len(ids), ids.shape[1] + max_new_tokens)
    cache.fixed = False
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    token = ids.new_zeros(len(ids))
    graph: Step | tape.Step | None = None
    text, begun, borders = [ids], 0, cache.borders
    if any(cache.length <= border < ids.shape[1] for border in borders):
        cache.reset()
    for n in range(max_new_tokens):
        with torch.inference_mode():
            if n and cache.length in borders:
                cache.reset()
                cache.fixed, graph, begun = False, None, n
            if n == begun + 1 and max_new_tokens - begun > SHORT and capturable(model, len(ids)):
                graph = Step(model, cache, len(ids))
            elif n == begun + 1 and tape.tapeable(model, len(ids)):
                graph = tape.Step(model, cache)
            if graph is not None:
                logits = graph(token)
            else:
                step = torch.cat(text, 1)[:, cache.length :] if n == begun else token[:, None]
                logits = model.finish(model.run(step, cache)[..., -1:, :])[:, -1]  # [B, V]
            picked = pick(logits, temperature, top_k, top_p)
            if temperature and model.across is not None:  # a draw hangs on each rank's generator
                picked = model.across.agreed(picked)
            token = torch.where(done, token, picked)
            for end in ends:
                done = done | (token == end)
            if borders:
                text.append(token[:, None])
        yield token
        if ends and bool(done.all()):
            return


def pick(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One token [B] from logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    try:
        return torch.multinomial(probabilities(logits, temperature, top_k, top_p), 1).squeeze(-1)
    except RuntimeError as e:
        if logits.isfinite().all():
            raise
        raise ZooError(
            "the model's logits hold NaN or infinity, from which no token can be drawn: so do its weights, or it leaves the range of "
            "its dtype (--dtype fp32)"
        ) from e


def probabilities(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What tokens are drawn with [B, V]: softmax(logits / temperature) of the `top_k` likeliest (0: all, and what ties
    with the last of them), and of these the likeliest that together reach `top_p`, at least one."""
    x = logits.float()
    if temperature < COLDEST:
        x, temperature = x - x.amax(-1, keepdim=True), COLDEST
    p = (x / temperature).softmax(-1)
    if 0 < top_k < p.shape[-1]:
        p = p.masked_fill(p < p.topk(top_k)[0][:, -1:], 0.0)
        p = p / p.sum(-1, keepdim=True)
    if top_p < 1:
        falling, order = p.sort(-1, descending=True)
        before = falling.cumsum(-1) - falling  # of those that are likelier
        p = torch.zeros_like(p).scatter(-1, order, falling.masked_fill((before >= top_p) & (before > 0), 0.0))
        p = p / p.sum(-1, keepdim=True)
    return p
