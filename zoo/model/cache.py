"""The static cache, and what a pass over some tokens shares between layers: positions, RoPE tables, masks.

Unusual:
- a layer that sees a window (or a chunk) of W positions keeps W slots, used as a ring: position p lies in
  slot p % W. Slots are therefore out of order; masks are made from the position each slot holds.
- positions are kept twice: as an int, for slices, and as a tensor on the device. A decode step with
  `fixed` set reads nothing of the int, so that it can be captured once and replayed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.model import rope as rotary
from zoo.spec import (
    Alibi,
    Attention,
    CompressedAttention,
    DeltaNet,
    LatentAttention,
    Mamba,
    Mamba1,
    Mixer,
    QueryScale,
    Rope,
    ShortConv,
    Spec,
)


@dataclass(frozen=True)
class Visible:
    """Which keys each query sees. `allowed` [T, S] is None where every key is seen (`causal` False) or
    where the keys are the T queries' own (`causal` True). `reach`: the keys are the queries' own, and none
    is seen from further than that (itself counts as 1)."""

    allowed: Tensor | None = None
    causal: bool = False
    reach: int | None = None


class Slots:
    """Tensors of one layer, one slot per position on their second-last axis: [..., size, channels]."""

    def __init__(self, tensors: tuple[Tensor, ...], ring: bool) -> None:
        self.tensors = tensors
        self.size = tensors[0].shape[-2]
        self.ring = ring

    def put(self, ctx: Context, *new: Tensor) -> tuple[Tensor, ...]:
        """Store the new tokens' [..., T, channels]; return all that their queries may see, [..., S, channels].
        The order of S is that of `Context.visible`."""
        T = new[0].shape[-2]
        slots = ctx.slots(self.size, self.ring)
        if not self.ring or T == 1:
            for store, x in zip(self.tensors, new, strict=True):
                store.index_copy_(-2, slots, x)
            n = ctx.n_slots(self.size, self.ring)
            return self.tensors if n == self.size else tuple(t.narrow(-2, 0, n) for t in self.tensors)
        seen = new
        if (n := min(ctx.start, self.size)) > 0:
            seen = tuple(
                torch.cat((t.narrow(-2, 0, n), x), -2) for t, x in zip(self.tensors, new, strict=True)
            )
        for store, x in zip(self.tensors, new, strict=True):
            store.index_copy_(-2, slots[-self.size :], x[..., -self.size :, :])
        return seen


class State:
    """What a linear mixer carries: the last `conv - 1` inputs of its convolution [B, conv - 1, channels] in
    the model's dtype, and its state in fp32 (empty where it has none but these). Both are updated in place."""

    def __init__(self, tail: Tensor, state: Tensor) -> None:
        self.tail = tail
        self.state = state


class Entries:
    """What a compressor carries: of the last `span` tokens, a ring, what it makes of each, in fp32 [B, span, 2 wide]; and the
    entries, window after window [B, n, channels]."""

    def __init__(self, tail: Tensor, made: Tensor) -> None:
        self.tail, self.made = tail, made
        self.span = tail.shape[1]


Entry = Slots | State | None


class Cache:
    """Room for `max_len` positions of `batch` sequences of equal length, allocated at once.

    `length` counts the positions stored. `fixed`: decode steps look at every slot, masked by the tensor
    `position`, instead of at the first `length`.
    """

    def __init__(
        self,
        spec: Spec,
        batch: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        ranks: int = 1,
    ) -> None:
        """`ranks`: how many share the model, of which the Spec says what one has."""
        self.batch, self.max_len = batch, max_len
        self.borders = rotary.far_from(spec)
        self.length = 0
        self.fixed = False
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        channels = spec.d_model // ranks
        made = [[_entry(m, channels, batch, max_len, dtype, device) for m in x.mixers] for x in spec.layers]
        self.slots = [next((e for e in layer if isinstance(e, Slots)), None) for layer in made]
        self.states = [next((e for e in layer if isinstance(e, State)), None) for layer in made]
        self.index_keys = [
            Slots((torch.zeros(batch, max_len, m.indexer.head_dim, dtype=dtype, device=device),), ring=False)
            if isinstance(m, LatentAttention) and m.indexer is not None
            else None
            for m in (layer.mixer for layer in spec.layers)
        ]

        def entries(m: Mixer | None, index: bool) -> Entries | None:
            if not isinstance(m, CompressedAttention) or (c := m.compressor) is None:
                return None
            if index and m.indexer is None:
                return None
            channels = m.indexer.head_dim if index and m.indexer is not None else m.head_dim
            span, n = c.ratio * (1 + c.overlap), -(-max_len // c.ratio)
            wide = torch.promote_types(dtype, torch.float32)
            tail = torch.zeros(batch, span, 2 * channels * (1 + c.overlap), dtype=wide, device=device)
            return Entries(tail, torch.zeros(batch, n, channels, dtype=dtype, device=device))

        self.entries = [entries(layer.mixer, False) for layer in spec.layers]
        self.index_entries = [entries(layer.mixer, True) for layer in spec.layers]

    def tensors(self) -> list[Tensor]:
        """All tensors, for counting bytes."""
        slots = [s for s in (*self.slots, *self.index_keys) if s is not None]
        made = [e for e in (*self.entries, *self.index_entries) if e is not None]
        return (
            [t for s in slots for t in s.tensors]
            + self.carried()
            + [t for e in made for t in (e.tail, e.made)]
        )

    def carried(self) -> list[Tensor]:
        """The tensors of the states, which each pass overwrites."""
        return [t for s in self.states if s is not None for t in (s.tail, s.state)]

    def reset(self) -> None:
        """Forget everything. Slots need no clearing: nothing reads one before it is written again. Entries do: what nobody sees is
        multiplied by 0."""
        self.length = 0
        self.position.zero_()
        made = (e for e in (*self.entries, *self.index_entries) if e is not None)
        for t in (*self.carried(), *(t for e in made for t in (e.tail, e.made))):
            t.zero_()

    def keep(self, n: int) -> None:
        """Forget all but the first `n` positions; or all, where the first alone are not there any more: a state or a window
        has gone past them, or LongRoPE has rotated them by the angles of a longer text."""
        gone = any(s is not None for s in (*self.states, *self.entries))
        gone = gone or any(s is not None and s.ring and self.length > s.size for s in self.slots)
        if n < self.length and (gone or any(n <= border < self.length for border in self.borders)):
            self.reset()
        elif n < self.length:
            self.advance(n - self.length)

    def advance(self, n: int) -> None:
        self.length += n
        self.position += n


def _entry(
    m: Mixer, channels: int, B: int, max_len: int, dtype: torch.dtype, device: torch.device | str
) -> Entry:
    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(B, *shape, dtype=dtype, device=device)

    match m:
        case Attention():
            if m.kv_from is not None:
                return None
            span = m.window or m.chunk
            size = min(max_len, span) if span else max_len
            return Slots(
                (zeros(m.n_kv_heads, size, m.head_dim), zeros(m.n_kv_heads, size, m.v_head_dim)),
                span is not None,
            )
        case LatentAttention():
            return Slots((zeros(max_len, m.kv_rank + m.rope_dim),), ring=False)
        case CompressedAttention():
            return Slots((zeros(min(max_len, m.window), m.head_dim),), ring=True)
        case DeltaNet():
            channels = 2 * m.n_k_heads * m.k_head_dim + m.n_v_heads * m.v_head_dim
            state = zeros(m.n_v_heads, m.k_head_dim, m.v_head_dim, dtype=torch.float32)
            return State(zeros(m.conv - 1, channels), state)
        case Mamba():
            channels = m.n_heads * m.head_dim + 2 * m.n_groups * m.state
            return State(
                zeros(m.conv - 1, channels), zeros(m.n_heads, m.state, m.head_dim, dtype=torch.float32)
            )
        case Mamba1():
            return State(zeros(m.conv - 1, m.inner), zeros(m.inner, m.state, dtype=torch.float32))
        case ShortConv():
            return State(zeros(m.conv - 1, channels), zeros(0))


@dataclass
class Context:
    """One pass over T new tokens at positions start .. start + T - 1. Everything in it is made once per
    pass, however many layers ask."""

    positions: Tensor  # [T] int64
    start: int
    dtype: torch.dtype
    cache: Cache | None = None
    per_layer: Tensor | None = None  # [B, T, n_layers, p], see per_layer.PerLayer
    ids: Tensor | None = None  # [B, T], for experts chosen by them
    kv: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )  # keys and values that later layers reuse
    chosen: dict[int, Visible] = field(
        default_factory=dict
    )  # keys that later layers see too, see mla.Indexer
    _made: dict[object, object] = field(default_factory=dict)

    @classmethod
    def begin(cls, T: int, cache: Cache | None, dtype: torch.dtype, device: torch.device) -> Context:
        """The pass over the next T tokens; the cache counts them as stored from here on."""
        positions = torch.arange(T, device=device)
        if cache is None:
            return cls(positions, 0, dtype)
        start = cache.length
        if start + T > cache.max_len:
            raise ZooError(
                f"the cache has room for {cache.max_len} tokens; {start} are stored and {T} more came"
            )
        ctx = cls(positions + cache.position, start, dtype, cache)
        cache.advance(T)
        return ctx

    @property
    def T(self) -> int:
        return len(self.positions)

    @property
    def fixed(self) -> bool:
        return self.cache is not None and self.cache.fixed and self.T == 1

    def stored(self, layer: int) -> Slots | None:
        """Where attention in this layer keeps its keys, if it does."""
        return None if self.cache is None else self.cache.slots[layer]

    def carried(self, layer: int) -> State | None:
        """What the linear mixer of this layer goes on from, if it does."""
        return None if self.cache is None else self.cache.states[layer]

    def rope(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """cos and sin at the new tokens' positions, [T, dim / 2] each. Raises ZooError if the tokens before these, in the
        cache, were rotated by another table (LongRoPE), or these lie where dynamic RoPE changes with every length."""
        if rope not in self._made:
            end, s = self.start + self.T, rope.scaling
            if s is not None and s.kind == "dynamic" and end > s.original_context:
                raise ZooError(
                    f"a pass up to position {end}: beyond {s.original_context} this model's RoPE changes with every length "
                    '("dynamic"), which zoo does not compute; expected a shorter text'
                )
            far = rotary.is_far(rope, self.start + self.T)
            if self.start and far != rotary.is_far(rope, self.start):
                assert rope.scaling is not None
                raise ZooError(
                    f"beyond {rope.scaling.original_context} positions this model rotates all of them by other angles "
                    f"(LongRoPE), and the {self.start} tokens in the cache were computed with those of a short text: "
                    "reset the cache and run the whole text again, as `generate` does"
                )
            self._made[rope] = rotary.tables(rope, self.positions, self.dtype, far)
        return self._made[rope]  # type: ignore[return-value]

    def windows(self, ratio: int) -> Tensor:
        """Which windows of `ratio` tokens this pass fills, [n]; where it looks at every slot, the one that its token is in."""
        if ("windows", ratio) not in self._made:
            if self.fixed:
                made = self.positions // ratio
            else:
                ends = self.start // ratio, (self.start + self.T) // ratio
                made = torch.arange(*ends, device=self.positions.device)
            self._made["windows", ratio] = made
        return self._made["windows", ratio]  # type: ignore[return-value]

    def window_rope(self, rope: Rope, ratio: int) -> tuple[Tensor, Tensor]:
        """cos and sin at the first positions of `windows`, [n, dim / 2] each."""
        if (rope, ratio) not in self._made:
            self._made[rope, ratio] = rotary.tables(rope, self.windows(ratio) * ratio, self.dtype)
        return self._made[rope, ratio]  # type: ignore[return-value]

    def entries_seen(self, ratio: int, n: int) -> Tensor:
        """Which of n windows of `ratio` tokens are full at each new position, [T, n]."""
        if ("entries", ratio, n) not in self._made:
            full = (self.positions + 1) // ratio
            self._made["entries", ratio, n] = torch.arange(n, device=full.device) < full[:, None]
        return self._made["entries", ratio, n]  # type: ignore[return-value]

    def alibi(self, a: Alibi, n_heads: int) -> Tensor:
        """What is added to each head's scores of each key that `visible` counts, [H, S]."""
        if (a, n_heads) not in self._made:
            keys = self._key_positions(None)
            slopes = _slopes(n_heads, keys.device)
            bias = (slopes.bfloat16() * keys if a.bf16 else slopes * keys).to(self.dtype)
            self._made[a, n_heads] = bias if a.scale == 1.0 else bias * a.scale
        return self._made[a, n_heads]  # type: ignore[return-value]

    def query_scale(self, s: QueryScale) -> Tensor:
        """The factor at each new position, [T], in fp32, or rounded to the model's dtype first."""
        if s not in self._made:
            if s.kind == "floor_log":
                steps = torch.floor((self.positions.float() + s.offset) / s.period)
                factor = 1 + s.beta * torch.log1p(steps)
            else:
                pos = self.positions.float().clamp(min=1)
                factor = (pos.log2() / torch.tensor(s.period).log2().item()).clamp(min=1)
            self._made[s] = factor if s.rounding == "last" else factor.to(self.dtype)
        return self._made[s]  # type: ignore[return-value]

    # --- which slots, and who sees them ---------------------------------------------------------------------

    def slots(self, size: int, ring: bool) -> Tensor:
        """Where the new tokens are stored, [T]."""
        key = ("slots", size if ring else 0)
        if key not in self._made:
            self._made[key] = self.positions % size if ring else self.positions
        return self._made[key]  # type: ignore[return-value]

    def n_slots(self, size: int, ring: bool) -> int:
        """How many slots, from the first, a pass reads (a ring: in single-token passes)."""
        return size if self.fixed else min(self.start + self.T, size)

    def visible(self, window: int | None = None, chunk: int | None = None) -> Visible:
        """Who sees whom in a layer with this window or chunk; its keys come from `Slots.put`, or are the
        new tokens' own where there is no cache."""
        key = ("visible", window, chunk)
        if key not in self._made:
            self._made[key] = self._visible(window, chunk)
        return self._made[key]  # type: ignore[return-value]

    def _visible(self, window: int | None, chunk: int | None) -> Visible:
        span, T = window or chunk, self.T
        if self.start == 0 and not self.fixed and (span is None or T <= span):
            return Visible(causal=T > 1)
        if (
            T == 1
            and not self.fixed
            and (chunk is None or (self.start + 1) % chunk == 0 or self.start < chunk)
        ):
            return Visible()
        keys = self._key_positions(span)  # [S]
        allowed = (keys >= 0) & (keys <= self.positions[:, None])  # [T, S]
        if window is not None:
            allowed &= keys > self.positions[:, None] - window
        if chunk is not None:
            allowed &= keys // chunk == self.positions[:, None] // chunk
        return Visible(allowed, reach=span if self.start == 0 and T > 1 else None)

    def _key_positions(self, span: int | None) -> Tensor:
        """The position that each key holds, [S]; negative for a slot never written."""
        if self.cache is None:
            return self.positions
        device = self.positions.device
        if span is None:
            return torch.arange(self.n_slots(self.cache.max_len, False), device=device)
        size = min(self.cache.max_len, span)
        if self.T == 1:
            return self._ring(torch.arange(self.n_slots(size, True), device=device), self.positions, size)
        old = self._ring(torch.arange(min(self.start, size), device=device), self.positions[:1] - 1, size)
        return torch.cat((old, self.positions))

    @staticmethod
    def _ring(slots: Tensor, last: Tensor, size: int) -> Tensor:
        """The newest position <= last that a slot can hold."""
        return last - (last - slots) % size

    @cached_property
    def causal(self) -> Tensor:
        """[T, S] for layers that see everything before them, also where `visible` needs no mask."""
        v = self.visible()
        if v.allowed is not None:
            return v.allowed
        keys = self._key_positions(None)
        return keys <= self.positions[:, None]


def alibi_slopes(n: int) -> list[float]:
    """ALiBi's slope of each of n heads (see `zoo.spec.Alibi`)."""
    lower = 1 << n.bit_length() - 1
    slopes = [2.0 ** (-8 * (h + 1) / lower) for h in range(lower)]
    return slopes + [2.0 ** (-4 * (2 * h + 1) / lower) for h in range(n - lower)]


@functools.lru_cache(maxsize=16)
def _slopes(n: int, device: torch.device) -> Tensor:
    """[n, 1], copied to the device once: nothing may be while a step is captured."""
    return torch.tensor(alibi_slopes(n), dtype=torch.float32, device=device)[:, None]


def checked(ids: Tensor, cache: Cache | None = None) -> None:
    """Raises ZooError if `ids` are not token ids [B, T], or not as many sequences as the cache is for."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ZooError(f"token ids are integers [B, T], one token or more; found {found}")
    if cache is not None and len(ids) != cache.batch:
        raise ZooError(f"the cache is for {cache.batch} sequences; found ids of {len(ids)}")
