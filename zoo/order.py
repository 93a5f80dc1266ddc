"""The order of a Spec's layers: a letter for every kind of mixer and of feed-forward, and the pattern they repeat.

S S S S S F, eight times, says more of Gemma 3 than "52 of 62 layers". What makes no two layers alike, the number of the
layer whose keys are used again, makes no kinds of its own: `relative` takes it out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from zoo.spec import (
    FFN,
    Attention,
    CompressedAttention,
    DeltaNet,
    LatentAttention,
    Mamba,
    Mamba1,
    Mixer,
    MoE,
    ShortConv,
    Spec,
)

T = TypeVar("T", bound=Hashable)

EARLIER = -1
"""Stands for "an earlier layer" where a mixer says which one's keys it uses."""

MEANINGS = {
    "F": "full attention", "S": "sliding window", "C": "attention in chunks", "N": "attention without positions",
    "L": "latent attention", "X": "sparse latent attention", "G": "Gated DeltaNet", "K": "Kimi Delta Attention",
    "Q": "compressed sparse attention", "P": "heavily compressed attention",
    "M": "Mamba-2", "B": "Mamba", "V": "short convolution", "H": "attention and Mamba-2", "D": "dense feed-forward",
    "E": "experts", "-": "nothing",
}  # fmt: skip
"""What a letter stands for; a second kind of the same has the next letter that is free, in lower case."""

_MAX_PERIOD, _MAX_PREFIX = 64, 16
_SPARE = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
"""For the third of a kind and later; a model may have as many kinds as layers, so that CJK follows."""


@dataclass(frozen=True)
class Order:
    """`mixers`, `ffns`: the distinct ones by letter, in order of appearance (None: a layer without that half).
    `mixing`, `feeding`: a letter a layer. Those of the two never stand for the same letter."""

    mixers: dict[str, tuple[Mixer, ...]]
    ffns: dict[str, FFN | None]
    mixing: str
    feeding: str

    @property
    def letters(self) -> str:
        """A letter a layer: of its mixer; where it has none, of its feed-forward."""
        return "".join(f if m == "-" else m for m, f in zip(self.mixing, self.feeding, strict=True))

    @property
    def feeding_varies(self) -> bool:
        """Whether layers that mix differ in their feed-forward: then `letters` does not say all."""
        return len({f for m, f in zip(self.mixing, self.feeding, strict=True) if m != "-"}) > 1


def order(spec: Spec) -> Order:
    """The letters of `spec`'s layers."""
    taken: set[str] = {"-"}
    mixers = _lettered(
        [tuple(map(relative, x.mixers)) for x in spec.layers], lambda m: _mixer_letter(m, spec), taken
    )
    ffns = _lettered([x.ffn for x in spec.layers], _ffn_letter, taken)
    return Order(
        {letter: m for m, letter in mixers.items() if m},
        {letter: f for f, letter in ffns.items()},
        "".join(mixers[tuple(map(relative, x.mixers))] for x in spec.layers),
        "".join(ffns[x.ffn] for x in spec.layers),
    )


def relative(m: Mixer) -> Mixer:
    """The mixer, the number of an earlier layer whose keys it uses replaced by `EARLIER`."""
    if isinstance(m, Attention) and m.kv_from is not None:
        return dataclasses.replace(m, kv_from=EARLIER)
    if isinstance(m, LatentAttention) and m.indexer_from is not None:
        return dataclasses.replace(m, indexer_from=EARLIER)
    return m


def pattern(sequence: Sequence[T]) -> str:
    """'SSSSSFSSSSSFSS' -> '2 x (5 S, F), 2 S': a prefix, a unit that repeats, a rest, with the fewest words.

    A unit is at most 64 long and a prefix 16: what is longer is told run by run.
    """
    n = len(sequence)
    best = _runs(sequence)
    cost = float(len(best))
    text = _join(best)
    for start in range(min(_MAX_PREFIX, n)):
        for period in range(2, min(_MAX_PERIOD, (n - start) // 2) + 1):
            unit = sequence[start : start + period]
            times = 1
            while sequence[start + times * period : start + (times + 1) * period] == unit:
                times += 1
            if times < 2:
                continue
            before, rest = _runs(sequence[:start]), _runs(sequence[start + times * period :])
            inside = _runs(unit)
            if len(before) + len(inside) + len(rest) + 0.5 < cost:
                cost = len(before) + len(inside) + len(rest) + 0.5
                text = ", ".join(filter(None, (_join(before), f"{times} × ({_join(inside)})", _join(rest))))
    return text


def _runs(sequence: Iterable[T]) -> list[tuple[int, T]]:
    return [(len(list(group)), key) for key, group in itertools.groupby(sequence)]


def _join(runs: Iterable[tuple[int, T]]) -> str:
    return ", ".join(f"{n} {thing}" if n > 1 else f"{thing}" for n, thing in runs)


def _lettered(things: Iterable[T], letter: Callable[[T], str], taken: set[str]) -> dict[T, str]:
    out: dict[T, str] = {}
    for thing in dict.fromkeys(things):
        wanted = letter(thing)
        spare = itertools.chain(wanted, wanted.lower(), _SPARE, map(chr, range(0x4E00, 0x9000)))
        out[thing] = wanted if wanted == "-" else next(c for c in spare if c not in taken)
        taken.add(out[thing])
    return out


def sees_all(m: Mixer, context: int) -> bool:
    """Whether softmax attention sees every token of a text of `context` tokens: a window as long as that bounds nothing."""
    reach = (m.window or m.chunk) if isinstance(m, Attention) else None
    return isinstance(m, Attention | LatentAttention) and (reach is None or reach >= context)


def _mixer_letter(mixers: tuple[Mixer, ...], spec: Spec) -> str:
    if not mixers:
        return "-"
    learned = spec.positions is not None
    match mixers[0]:
        case _ if len(mixers) > 1:
            return "H"
        case Attention() as m if not sees_all(m, spec.context_length):
            return "S" if m.window else "C"
        case Attention(rope=None, alibi=None) if not learned:
            return "N"
        case LatentAttention() as m:
            return "L" if m.indexer is None and m.indexer_from is None else "X"
        case CompressedAttention() as m:
            return "S" if m.compressor is None else "P" if m.indexer is None else "Q"
        case DeltaNet() as m:
            return "G" if m.decay == "head" else "K"
        case Mamba():
            return "M"
        case Mamba1():
            return "B"
        case ShortConv():
            return "V"
        case Attention():
            return "F"
    return type(mixers[0]).__name__[0]


def _ffn_letter(f: FFN | None) -> str:
    return "-" if f is None else "E" if isinstance(f, MoE) else "D"
