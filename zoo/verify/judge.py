"""Verdicts: measurements against bounds, level by level."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from zoo.model import Decoder
from zoo.model.rope import far_from
from zoo.verify import limits, tolerance
from zoo.verify.certificate import Check, Level
from zoo.verify.choices import Choices, watched
from zoo.verify.compare import Measured
from zoo.verify.float64 import logits_of
from zoo.verify.inputs import Inputs, prompt_of
from zoo.verify.metrics import LogitMetrics, quantile, references, relative_error
from zoo.verify.oracle import CannotRun, Oracle
from zoo.verify.ours import Ours
from zoo.verify.tolerance import QUANTILES, Bound, Spread

WRONG_CACHE = 0.75
"""Of the bound on the median logit error, with a wrong cache: measured 1.0-42 (27 tiny models that choose experts or keys, three
seeds each, positions off by one), with a right one at most 0.5; by p90 1.3-37 and at most 1.02."""
FEW = 4000
"""Settled tokens, below which the highest thousandth of logits is that of fewer than four."""


def layers_level(m: Measured, dtype: str) -> Level:
    """Hidden states: no layer's representative token may depart by more than the bound."""
    level = Level("layers")
    figures: list[dict[str, Any]] = []
    worst: tuple[float, int, float, Bound] | None = None
    first = None
    for i, tokens in enumerate(m.layers):
        if not tokens:
            continue
        value, bound = tolerance.representative(dtype, tokens), tolerance.layer_bound(dtype, i, m.spread)
        figures.append({
            "layer": i, "value": value, "bound": bound.value, "p50": quantile(tokens, 0.5), "max": max(tokens),
            "spread": m.spread.layers[i] if i < len(m.spread.layers) else None,
        })  # fmt: skip
        share = value / bound.value if math.isfinite(bound.value) else math.inf
        if first is None and share > 1:
            first = i
        if worst is None or share > worst[0]:
            worst = (share, i, value, bound)
    if worst is None:
        return level
    which = "worst token" if dtype == "fp32" else "median token"
    _, i, value, bound = worst
    level.checks = [
        Check(
            f"relative error of the hidden state, {which}, least margin: after layer {i}",
            value,
            bound.value,
            bound.why,
            len(m.layers[i]),
        )
    ]
    extra = abs(m.oracle_layers - len(m.layers))
    level.checks.append(
        Check(
            "layers more or fewer than the oracle's",
            extra,
            0,
            f"the oracle has {m.oracle_layers}",
            len(m.layers),
        )
    )
    if first is not None:
        level.notes.append(f"layer {first} is the first that departs")
    _note_blind(level)
    level.figures = {"first_departing": first, "which": which, "layers": figures}
    return level


def logits_level(m: Measured, dtype: str) -> Level:
    """Logits of settled tokens by quantiles; all tokens by KL, top-1 and perplexity."""
    level = Level("logits")
    everything, settled = m.everything, m.settled if m.settled.n else m.everything
    summary, scale = everything.summary(), everything.largest
    names = ["p50", "p99", "max" if dtype == "fp32" else "p99.9"]
    # A token that chooses other experts departs as far as in bf16, where upstream's spread is 8 times as large.
    if dtype == "fp16" and m.chooses:
        names = ["p50", "p90"]
    # There a thousandth of few tokens' logits is one token, which chose otherwise though its margin is no near tie (a Mixtral with a
    # window on an H200: p99.9 at 1.16 of its bound, p99 at half).
    if dtype == "bf16" and m.chooses and settled.n < FEW:
        names = ["p50", "p99"]
    for name in names:
        bound = tolerance.logit_bound(dtype, name, m.spread, settled.largest)
        level.checks.append(
            Check(
                f"|logit error| {name}",
                settled.error.at(QUANTILES[name]),
                bound.value,
                bound.why,
                settled.n,
                scale,
            )
        )
    if m.columns is not None and m.columns.n:
        share, bound = tolerance.columns_apart(m.columns, m.spread)
        check = Check(
            "logits of one id beside those of others, worst id",
            float(share.max()),
            bound.value,
            bound.why,
            m.columns.n,
        )
        level.checks.append(check)
        if not check.passed:
            level.notes.append(_ids_apart(share, bound.value))
    q, kl = tolerance.kl_bound(dtype, m.spread)
    kl_value = settled.kl.at(tolerance.KL_QUANTILES[q])
    level.checks.append(Check(f"KL divergence {q}", kl_value, kl.value, kl.why, settled.n, scale))
    _add_top1(level, m, dtype, settled)
    if settled.n_next:
        a, b = settled.perplexities
        bound = tolerance.perplexity_bound(dtype, m.spread)
        level.checks.append(
            Check(
                "|ln perplexity difference|", _log_ratio(a, b), bound.value, bound.why, settled.n_next, scale
            )
        )
    if m.ties.n:
        if dtype == "fp32":  # in lower precision it may be any number
            level.checks.append(_share_of_ties(m))
        level.notes.append(
            f"{m.ties.n} of {everything.n} tokens are at a near tie between experts, where either choice is right: "
            f"of these the largest error is {m.ties.error.max:.2g}, the median {m.ties.error.at(0.5):.2g}"
        )
    if m.turned:
        level.notes.append(
            f"{m.turned} choices between experts, which hang by rounding, were made as the oracle's: either is right"
        )
    _note_blind(level)
    level.figures = {
        **summary,
        "spread": m.spread.to_json(),
        "near_ties": {"tokens": m.ties.n, **(m.ties.summary() if m.ties.n else {})},
        "error_histogram": everything.error.histogram(),
        "kl_histogram": everything.kl.histogram(40),
        "scatter": [[round(x, 4), round(y, 4)] for x, y in everything.scatter[:1500]],
    }
    return level


def _ids_apart(share: torch.Tensor, bound: float) -> str:
    """Which ids' logits are off where others' are not, worst first."""
    order = share.argsort(descending=True)[: int((share > bound).sum())].tolist()
    ids = ", ".join(map(str, order[:8])) + (f" and {len(order) - 8} more" if len(order) > 8 else "")
    return f"the logits of {len(order)} ids depart far more than the others': {ids}; look at their rows of the head"


def _note_blind(level: Level) -> None:
    """What can't be judged fails, and says why: of a bound that is wide `why` has how far upstream is from itself."""
    if not all(math.isfinite(c.bound) for c in level.checks):
        why = "none: upstream's own values are not finite"
        level.checks = [c if math.isfinite(c.bound) else replace(c, why=why) for c in level.checks]
        level.notes.append(
            "upstream itself gives values that are infinite or no numbers: nothing can be judged by them"
        )
    level.notes += _of_blind([c for c in level.checks if math.isfinite(c.bound)])


def _of_blind(checks: Iterable[Check]) -> list[str]:
    """Of checks that can't judge, why."""
    return [f"{c.name}: {c.blind}" for c in checks if c.blind]


def _log_ratio(a: float, b: float) -> float:
    return abs(math.log(a / b)) if a > 0 and b > 0 else math.inf


def _add_top1(level: Level, m: Measured, dtype: str, settled: LogitMetrics) -> None:
    if dtype == "fp32":
        reach = 2 * tolerance.logit_bound(dtype, "max", m.spread, settled.largest).value
        beyond = sum(lead > reach for lead in m.leads)
        why = f"not counted: {len(m.leads) - beyond} where the two best are within twice the error bound"
        level.checks.append(Check("tokens whose best id differs", beyond, 0, why, settled.n))
        return
    bound = agreement(m.spread, settled.n)
    if bound.value <= 0:
        level.notes.append(f"top-1 agreement is not judged: of {settled.n} tokens any would do ({bound.why})")
        return
    share = settled.top1 / max(1, settled.n)
    level.checks.append(Check("top-1 agreement", share, bound.value, bound.why, settled.n, at_least=True))


def agreement(spread: Spread, n: int) -> Bound:
    """How many of `n` tokens must have the same best id: twice as many may differ as in upstream's own two runs. Both
    shares are of a sample of tokens: each adds its variance, that of upstream's times the factor squared."""
    n = max(1, n)
    q = 1 - min(spread.top1_agreement, 1 - 1 / n)
    p = max(0.0, 1 - tolerance.FACTOR * q)
    variance = p * (1 - p) / n + tolerance.FACTOR**2 * q * (1 - q) / max(1, spread.tokens or n)
    why = f"{spread.why}: {spread.top1_agreement:.4f}; twice as many may differ, and 3 standard errors more"
    return Bound(p - 3 * math.sqrt(variance) - 1 / n, why)


def _share_of_ties(m: Measured) -> Check:
    n = m.settled.n + m.ties.n
    return Check("share of tokens set apart at near ties", m.ties.n / n, limits.FEW_TIES, "few in fp32", n)


def decode_level(oracle: Oracle, ours: Ours, asked: Inputs, m: Measured, dtype: str, n: int) -> Level:
    """Cached against uncached, and the greedy continuation against the oracle's."""
    level = Level("decode")
    decoder = ours.decoder
    batch = max(asked.batches, key=lambda b: max(b.lengths))
    row = max(range(len(batch.lengths)), key=lambda r: batch.lengths[r])
    ids = batch.ids[row : row + 1, : batch.lengths[row]]
    limit = ours.spec.positions or 1 << 30
    ids = ids[:, : min(ids.shape[1], limit)]
    ids = torch.cat([ids, ids.flip(-1)]).to(ours.device)  # two rows, that none may be taken for the other
    T = ids.shape[1]
    with watched(decoder) as at_once, torch.inference_mode():
        uncached = decoder.run(ids)  # [B, T, D], or [S, B, T, D]
    cache = decoder.cache(len(ids), T)
    # The first token alone, then pieces onto a cache that is not empty, and the last 16 one by one.
    # All on one side of LongRoPE's border: a cache is never carried across.
    border = max((n for n in far_from(ours.spec) if n < T), default=0)
    cuts = sorted({0, *(n for n in (1, min(6, T), *range(max(1, T - 16), T + 1)) if n > border)})
    with watched(decoder, like=at_once) as by_cache, torch.inference_mode():
        by_pieces = torch.cat([decoder.run(ids[:, a:z], cache) for a, z in pairwise(cuts)], -2)
    if by_cache.tied:
        level.notes.append(
            f"{by_cache.tied} choices between keys that score alike were made with a cache as without: any is right"
        )
    at = _looked_at(uncached, by_pieces, ours.spec.vocab_size, dtype)
    whole, cached = (_logits(decoder, x, at) for x in (uncached, by_pieces))
    error = LogitMetrics()
    for mine, theirs in zip(cached, whole, strict=True):
        for rows, reference in references(theirs, torch.full((len(at),), -1)):
            error.add(mine[rows], reference)
    # Rounded otherwise, a few of these few tokens choose other experts or keys, and depart as far as with a wrong cache.
    name = "max" if dtype == "fp32" else "p90" if ours.chooses else "p99.9"
    bound = tolerance.logit_bound(dtype, name, m.spread, error.largest)
    value = error.error.at(QUANTILES[name])
    if dtype == "fp32" and value > bound.value and (exact := logits_of(decoder, ids, at)) is not None:
        far, least = _furthest(cached, exact), _furthest(whole, exact)
        if not at_once.keys:  # of fewer tokens others may be chosen, that score alike
            least = max(least, _uncached(decoder, ids, cuts, at, exact))
        if far <= tolerance.FACTOR * least < math.inf:
            why = "from ours in float64: 2 x how far passes in fp32 are from that"
            value, bound = far, Bound(tolerance.FACTOR * least, why)
    if (
        name == "p90" and value > bound.value
    ):  # more than a few? of right caches the median is at most half of its bound
        median = tolerance.logit_bound(dtype, "p50", m.spread, error.largest)
        why = f"of {median.why}, since p90, {value:.2g}, is beyond {bound.value:.2g}, as where some tokens choose otherwise"
        name, value, bound = (
            "p50",
            error.error.at(0.5),
            Bound(WRONG_CACHE * median.value, f"{WRONG_CACHE:g} {why}"),
        )
    level.checks.append(
        Check(
            f"cached against uncached |logit error| {name}",
            value,
            bound.value,
            bound.why,
            error.n,
            error.largest,
        )
    )
    if not value <= bound.value:  # NaN, too; of a bound that is too wide a note is made below
        whole, cached = (_logits(decoder, x, None) for x in (uncached, by_pieces))
        level.notes.append(_departing(cached, whole, bound.value, by_cache, at_once))
    del whole, cached, uncached, by_pieces
    prompt = prompt_of(asked)[:, : max(1, limit - n)]
    n = min(n, limit - prompt.shape[1])
    continued, why_not = None, "the oracle does not generate"
    try:
        continued = _continued(oracle, ours, prompt, n, level)
    except CannotRun as e:
        why_not = str(e)
    if continued is None:
        level.notes.append(f"the greedy continuation was not compared: {why_not}")
        level.notes += _of_blind(level.checks)
        return level
    mine, theirs = continued
    equal = _equal(mine, theirs)
    if (check := greedy(ours, prompt, theirs, equal, dtype, m.spread, error.largest)) is not None:
        level.checks.append(check)
    else:
        level.notes.append(f"the greedy continuation is not judged: of {len(theirs)} tokens any would do")
    level.notes += _of_blind(level.checks)
    level.figures = {
        "prompt_tokens": prompt.shape[1], "equal": equal, "generated": mine.tolist(), "oracle": theirs.tolist(),
    }  # fmt: skip
    return level


def _continued(
    oracle: Oracle, ours: Ours, prompt: torch.Tensor, n: int, level: Level
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Ours and the oracle's greedy tokens [n] after `prompt` [1, T]; None if the oracle can't. Raises CannotRun."""
    if n < 1 or (chosen := oracle.greedy(prompt, n)) is None:
        return None
    theirs = chosen.cpu()
    mine = ours.decoder.generate(prompt.to(ours.device), len(theirs))[0, prompt.shape[1] :].cpu()
    if (equal := _equal(mine, theirs)) < len(theirs) and not getattr(oracle, "fixed_inputs", False):
        if _departs_from_itself(oracle, torch.cat([prompt[0], theirs[: equal + 1]])):
            theirs = greedy_uncached(oracle, prompt, n)
            level.notes.append(
                "the oracle's cached decode departs from its own uncached logits: the latter were followed"
            )
    return mine, theirs


LOOKED_AT = 1 << 25
"""Logits with a cache and without that are compared. Of a vocabulary of 262,144 ids all of them would cost more than both
passes; and a head keeps nothing from one token to the next."""


def _looked_at(a: torch.Tensor, b: torch.Tensor, vocab_size: int, dtype: str) -> torch.Tensor:
    """The positions [n] whose logits are compared, of two runs' last states [..., B, T, D]: all, or as many as `LOOKED_AT`
    has room for at even steps, the last 16 (which came one by one) with them; in fp32, where the worst is judged, those too
    whose states are furthest apart."""
    B, T = a.shape[-3:-1]
    n = max(64, LOOKED_AT // (B * vocab_size))
    if n >= T:
        return torch.arange(T, device=a.device)
    spread = torch.linspace(0, T - 1, n // 2 if dtype == "fp32" else n - 16, device=a.device).long()
    found = [spread, torch.arange(T - 16, T, device=a.device)]
    if dtype == "fp32":
        apart = relative_error(a.flatten(0, -2), b.flatten(0, -2)).view(-1, T).amax(0)
        found.append(apart.topk(n // 2 - 16).indices)
    chosen: torch.Tensor = torch.cat(found).unique()
    return chosen


def _logits(decoder: Decoder, states: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, n, V] of a last layer's output, at some positions."""
    with torch.inference_mode():
        logits: torch.Tensor = decoder.finish(states if at is None else states.index_select(-2, at))
        return logits


def _furthest(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits.double() - exact).abs().max())


def _uncached(
    decoder: Decoder, ids: torch.Tensor, cuts: Sequence[int], at: torch.Tensor, exact: torch.Tensor
) -> float:
    """How far passes in fp32 are from `exact` logits [B, n, V] of positions `at` [n] where each piece between the `cuts` is the end of
    its own, without a cache. Sums of as many tokens as a piece has are rounded otherwise than those of all."""
    off = 0.0
    for a, z in pairwise(cuts):
        its = (a <= at) & (at < z)
        if its.any():
            with torch.inference_mode():
                states = decoder.run(ids[:, :z])
            off = max(off, _furthest(_logits(decoder, states, at[its]), exact[..., its, :]))
    return off


def _departing(
    cached: torch.Tensor, whole: torch.Tensor, bound: float, by_cache: Choices, at_once: Choices
) -> str:
    """Which token is the first that departs with a cache, and whether it chose otherwise there. Logits [B, T, V]."""
    error = (cached.float() - whole.float()).abs().amax(-1).amax(0)  # [T]
    token = int((~(error <= bound)).nonzero()[0])  # the largest of all is beyond it
    said = f"token {token} is the first that departs with a cache"
    if not at_once.experts and not at_once.keys:
        return said
    if differ := by_cache.differ(at_once, token):
        more = f" (and more in {len(differ) - 3} others)" if len(differ) > 3 else ""
        return f"{said}: it chose other {', other '.join(differ[:3])} than without{more}"
    kinds = " and ".join(k for k in ("experts", "keys") if getattr(at_once, k))
    return f"{said}: it chose the same {kinds} as without"


def _equal(mine: torch.Tensor, theirs: torch.Tensor) -> int:
    """How many tokens are equal before the first that is not."""
    differ = (mine[: len(theirs)] != theirs).nonzero().flatten()
    return int(differ[0]) if len(differ) else len(theirs)


def _departs_from_itself(oracle: Oracle, ids: torch.Tensor) -> bool:
    """Whether the last of `ids`, chosen with a cache, is not what the oracle prefers without one."""
    logits = oracle.run(ids[None, :-1], (len(ids) - 1,))[0, -1]
    return int(logits.argmax()) != int(ids[-1])


def greedy_uncached(oracle: Oracle, prompt: torch.Tensor, n: int) -> torch.Tensor:
    ids = prompt
    for _ in range(n):
        step = oracle.run(ids, (ids.shape[1],))[:, -1:].argmax(-1).cpu()
        ids = torch.cat([ids, step], 1)
    return ids[0, prompt.shape[1] :]


def as_generated(ours: Ours, text: torch.Tensor, begun: int) -> torch.Tensor:
    """Logits [n, V] of the tokens after the first `begun` and more of `text` [1, T], each of the length that the text had then: beyond
    LongRoPE's border the angles of all positions are others."""
    last = text.shape[1]
    ends = sorted({*(n for n in far_from(ours.spec) if begun <= n < last), last})
    parts = [ours.decoder(text[:, :z])[0, a:] for a, z in pairwise([begun - 1, *ends])]
    return torch.cat(parts).float().cpu()


def greedy(
    ours: Ours,
    prompt: torch.Tensor,
    theirs: torch.Tensor,
    equal: int,
    dtype: str,
    spread: Spread,
    largest: float,
) -> Check | None:
    """Every token that the oracle chose is ours too, given the tokens before it, or within a tie of ours. None where there
    are too few to judge by."""
    n = len(theirs)
    if equal == n:
        return Check("greedy tokens that differ", 0, 0, f"{n} tokens, each side with its own cache", n)
    reach = 2 * tolerance.logit_bound("fp32", "max", spread, largest).value
    text = torch.cat([prompt[0], theirs[:-1]])[None].to(ours.device)
    logits = as_generated(ours, text, prompt.shape[1])
    lead = logits.amax(-1) - logits.gather(1, theirs[:, None])[:, 0]
    alike, beyond = int((lead == 0).sum()), int((~(lead <= reach)).sum())
    if dtype != "fp32":
        bound = agreement(spread, n)
        if bound.value <= 0:
            return None
        # Where two ids are apart by less than the usual error of both, either is right.
        tie = 2 * tolerance.logit_bound(dtype, "p50", spread, largest).value
        settled = int((lead <= tie).sum())
        why = f"{equal} of {n} equal running freely, {alike} given the oracle's text; a tie: {tie:.2g}; {bound.why}"
        name = "greedy tokens alike or within a tie, given the oracle's text"
        return Check(name, settled / n, bound.value, why, n, at_least=True)
    return Check(
        "greedy tokens that differ beyond a tie", beyond, 0,
        f"{equal} of {n} equal running freely; {alike} of {n} given the oracle's text, where ours prefers another id by "
        f"at most {float(lead.max()):.2g} (a tie: {reach:.2g}, twice the error bound)", n,
    )  # fmt: skip
