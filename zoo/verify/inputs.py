"""Inputs: what a model is verified on. Fixed, so that two runs are comparable, and chosen to reach every branch.

- texts in several scripts, and code, through the model's own tokenizer (the canonical folder's: the ids of `zoo generate`);
- random ids over the whole vocabulary, which reach embedding rows that no text does;
- one row long enough to cross each limit that the Spec or the oracle has: window, chunk, index top-k, temperature step,
  the pieces that a recurrence is computed in, and, below fp32, what it takes to see a scaling of RoPE;
- rows of different lengths in one batch, padded on the right: only real positions are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.spec import Attention, CompressedAttention, DeltaNet, LatentAttention, Mamba, Mamba1, Spec
from zoo.text import Text

TEXTS: tuple[tuple[str, str], ...] = (
    (
        "english",
        "The first thing a careful reader notices is that the two columns do not add up. In 1887 the library "
        "bought 1,204 volumes, yet its catalogue lists 1,240; someone, somewhere, exchanged two digits.",
    ),
    (
        "code",
        "def transpose(rows: list[list[float]]) -> list[list[float]]:\n    return [list(c) for c in zip(*rows)]\n\n\n"
        "assert transpose([[1, 2], [3, 4]]) == [[1, 3], [2, 4]]  # and back again\n",
    ),
    ("chinese", "图书馆在一八八七年购入了一千二百零四册书，但目录上却写着一千二百四十册。"),
    ("arabic", "اشترت المكتبة ألفًا ومئتين وأربعة كتب، لكن الفهرس يذكر عددًا آخر."),
    ("hindi", "पुस्तकालय ने बारह सौ चार पुस्तकें खरीदीं, पर सूची में संख्या कुछ और है।"),
    ("cyrillic", "Библиотека купила 1204 тома, а в каталоге значится 1240."),
    ("emoji", "🧪 → ✅ or ❌? Naïve café, 北京, ½ + ¼ = ¾."),
    ("repetition", "one two three four one two three four one two three four one two three"),
)

MAX_CROSSED = 4096
"""Limits beyond this many tokens are not crossed by default: the certificate says so."""

PIECE = 64
"""Tokens that recurrences (DeltaNet, Mamba) are computed in at a time, here and upstream."""

FAR = 512
"""Positions after which a scaling of RoPE shows in bf16 too: after some thirty, where fp32 shows it, it is within rounding."""


@dataclass
class Batch:
    """ids [B, T], padded on the right with 0; `lengths` are the real ones; `text` rows count for perplexity."""

    ids: Tensor
    lengths: tuple[int, ...]
    labels: tuple[str, ...]
    text: tuple[bool, ...]

    @property
    def mask(self) -> Tensor:
        """bool [B, T]: real positions."""
        return torch.arange(self.ids.shape[1])[None] < torch.tensor(self.lengths)[:, None]

    @property
    def following(self) -> Tensor:
        """[B, T]: the next token of a text row, -1 where there is none or the row is not text."""
        nxt = torch.full_like(self.ids, -1)
        for b, (n, text) in enumerate(zip(self.lengths, self.text, strict=True)):
            if text:
                nxt[b, : n - 1] = self.ids[b, 1:n]
        return nxt


@dataclass
class Inputs:
    batches: list[Batch]
    limits: dict[str, int]
    not_crossed: dict[str, int]
    tokenizer: str | None

    @property
    def n_tokens(self) -> int:
        return sum(sum(b.lengths) for b in self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    @property
    def sha256(self) -> str:
        h = hashlib.sha256()
        for b in self.batches:
            h.update(repr(b.lengths).encode())
            h.update(b.ids.contiguous().numpy().tobytes())
        return h.hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.n_tokens,
            "batches": [
                {"rows": list(b.labels), "lengths": list(b.lengths), "shape": list(b.ids.shape)}
                for b in self.batches
            ],
            "tokenizer": self.tokenizer,
            "limits_crossed": self.limits,
            "limits_not_crossed": self.not_crossed,
            "sha256": self.sha256,
        }


def limits(spec: Spec, dtype: str = "fp32") -> dict[str, int]:
    """Every number of positions at which the model starts to behave differently, as far as `dtype` shows it."""
    found: dict[str, int] = {}

    def note(what: str, n: float) -> None:
        found[f"{what} {int(n)}"] = int(n)

    for layer in spec.layers:
        m = layer.mixer
        if any(isinstance(x, DeltaNet | Mamba | Mamba1) for x in layer.mixers):
            note("piece of a recurrence", PIECE)
        if isinstance(m, CompressedAttention):
            note("window", m.window)
            if m.compressor is not None:
                note("entry", m.compressor.ratio)
                if m.indexer is not None:
                    note("index top-k", m.indexer.top_k * m.compressor.ratio)
        if not isinstance(m, Attention | LatentAttention):
            continue
        if dtype != "fp32" and m.rope and m.rope.scaling and m.rope.scaling.kind != "dynamic":
            note("scaled RoPE", FAR)
        if isinstance(m, Attention) and m.window is not None:
            note("window", m.window)
        if isinstance(m, Attention) and m.chunk is not None:
            note("chunk", m.chunk)
        if isinstance(m, LatentAttention) and m.indexer is not None:
            note("index top-k", m.indexer.top_k)
        if m.rope is not None and m.rope.scaling is not None and m.rope.scaling.kind == "longrope":
            note("LongRoPE's other angles", m.rope.scaling.original_context)
        if m.query_scale is not None:
            note("query scale period", m.query_scale.period)
    return found


def make(
    spec: Spec,
    folder: Path | None = None,
    avoid: frozenset[int] = frozenset(),
    max_length: int = MAX_CROSSED,
    seed: int = 0,
    theirs: Mapping[str, int] | None = None,
    dtype: str = "fp32",
    made: Texts | None = None,
) -> Inputs:
    """The standard inputs of a model. `folder` is where its tokenizer may be; ids in `avoid`
    (placeholders that the oracle replaces by images) are not drawn. `theirs`: limits that the oracle has, so that one
    that the Spec has lost is crossed too. `made`: what `texts` gave of the folder, if that is known already."""
    known = limits(spec, dtype)
    known |= {k: n for k, n in (theirs or {}).items() if n not in known.values()}
    crossed = {k: n for k, n in known.items() if n < max_length}
    not_crossed = {k: n for k, n in known.items() if n >= max_length}
    vocab, longest = spec.vocab_size, spec.positions or 1 << 30
    generator = torch.Generator().manual_seed(seed)

    def random(n: int) -> list[int]:
        ids = torch.randint(0, vocab, (n,), generator=generator).tolist()
        return [i if i not in avoid else next(j for j in range(vocab) if j not in avoid) for i in ids]

    if made is None:
        made = ([], None) if folder is None else texts(Path(folder), vocab)
    rows, tokenizer = list(made[0]), made[1]
    rows += [("random", random(min(n, longest)), False) for n in (33, 20, 7, 1)]
    if tokenizer is None:  # enough tokens for quantiles all the same
        rows += [("random", random(min(29, longest)), False) for _ in range(8)]
    rows = [(label, ids[:longest], text) for label, ids, text in rows if ids]
    batches = [_batch(rows[i : i + 4]) for i in range(0, len(rows), 4)]
    # One row crosses all limits; a second, shorter one ends just past the smallest.
    if crossed:
        top, low = max(crossed.values()), min(crossed.values())
        lengths = sorted({min(top + top // 2 + 3, top + 64, longest), min(low + 2, longest)}, reverse=True)
        batches.append(_batch([("crossing", random(n), False) for n in lengths]))
    return Inputs(batches, crossed, not_crossed, tokenizer)


def prompt_of(inputs: Inputs) -> Tensor:
    """What is continued greedily: the first text, or else the first row. [1, T]"""
    rows = [(batch, r) for batch in inputs for r in range(len(batch.lengths))]
    batch, r = next(((b, r) for b, r in rows if b.text[r]), rows[0])
    return batch.ids[r : r + 1, : batch.lengths[r]]


Texts = tuple[list[tuple[str, list[int], bool]], str | None]


def texts(folder: Path, vocab: int) -> Texts:
    """The texts' ids, and what they were made with: files by name and hash. A folder without a tokenizer, or with one that
    can't be read, costs the texts, not the verification: the certificate says that there were none."""
    try:
        text = Text(folder)
        rows = [(label, text.encode(said), True) for label, said in TEXTS]
    except ZooError:
        return [], None
    text.close()
    hashes = [
        f"{name} sha256:{hashlib.sha256((folder / name).read_bytes()).hexdigest()}" for name in text.files
    ]
    return [(label, ids, t) for label, ids, t in rows if ids and max(ids) < vocab], ", ".join(hashes)


def _batch(rows: list[tuple[str, list[int], bool]]) -> Batch:
    n = max(len(ids) for _, ids, _ in rows)
    ids = torch.tensor([ids + [0] * (n - len(ids)) for _, ids, _ in rows], dtype=torch.int64)
    return Batch(ids, tuple(len(i) for _, i, _ in rows), tuple(r[0] for r in rows), tuple(r[2] for r in rows))
