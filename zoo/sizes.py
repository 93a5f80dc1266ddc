"""How large a model is and what a token costs: parameters by part, bytes of weights, KV cache and state, operations.

Everything is counted from the Spec. Operations are multiplications and additions of matrices, attention scores and recurrent
states; norms, activations and softmax, which are few, are left out, as publishers leave them out.
"""

from __future__ import annotations

from typing import Any

from zoo.layout import Slot, layout
from zoo.spec import (
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

PARTS = (
    "embedding", "positions", "per-layer embeddings", "attention", "linear mixers", "dense feed-forward", "router",
    "routed experts", "shared experts", "AltUp", "hyper-connections", "norms", "head",
)  # fmt: skip
"""Every tensor is in one of these."""

BITS = {"fp32": 32, "bf16": 16, "fp8": 8, "int4": 4}
"""Weights; below 16 bits those that multiply (`Slot.multiplies`), the others in bf16. Scales are not counted."""

KV_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
"""Per number of a KV cache."""


def part_of(slot: Slot) -> str:
    """Which of `PARTS` a canonical tensor is in. A norm that belongs to a part (of queries, of a state) is a norm."""
    key = slot.key.removeprefix("layers.{i}.")
    first, _, rest = key.partition(".")
    if "norm" in key:
        return "norms"
    if first == "embed":
        return "embedding"
    if first == "head":
        return "head"
    if first == "positions":
        return "positions"
    if first == "per_layer":
        return "per-layer embeddings"
    if first in ("altup", "laurel"):
        return "AltUp"
    if first in ("attn_hyper", "ffn_hyper", "hyper"):
        return "hyper-connections"
    if first == "attn":
        return "attention"
    if first == "mlp":
        return "dense feed-forward"
    if first == "moe":
        of = rest.partition(".")[0]
        return {"router": "router", "shared": "shared experts", "shared_gate": "shared experts"}.get(
            of, "routed experts"
        )
    return "norms" if first == "scalar" else "linear mixers"


def params_by_part(spec: Spec) -> dict[str, int]:
    """Parameters of each part that there is; their sum is `total_params`. A tied head has none of its own."""
    found = dict.fromkeys(PARTS, 0)
    for slot in layout(spec).values():
        found[part_of(slot)] += slot.size
    return {part: n for part, n in found.items() if n}


def active_by_part(spec: Spec) -> dict[str, int]:
    """The same of what one token visits: of the routed experts, those that it is routed to."""
    found = dict.fromkeys(PARTS, 0)
    for slot in layout(spec).values():
        found[part_of(slot)] += round(slot.size * _visited(spec, slot))
    return {part: n for part, n in found.items() if n}


def weight_bytes(spec: Spec, dtype: str) -> int:
    """Bytes of all weights in one of `BITS`."""
    bits = BITS[dtype]
    return sum(s.size * (bits if bits >= 16 or s.multiplies else 16) for s in layout(spec).values()) // 8


def flops_per_token(spec: Spec, context: int) -> int:
    """Operations for one token that sees `context` tokens, itself included: 2 for each weight that multiplies, and what its
    mixers do with the keys and states that they see.

    Latent attention is counted with keys and values rebuilt per head, as in a pass over a prompt; for one token at a
    time implementations fold the matrices into the query, at another cost.
    """
    multiplied = sum(s.size * _visited(spec, s) for s in layout(spec).values() if s.multiplies)
    if spec.tied:
        multiplied += spec.vocab_size * spec.d_model
    return round(2 * multiplied) + sum(_seen(m, context) for m in _mixers(spec))


def kv_bytes_per_token(spec: Spec, itemsize: int = 2) -> int:
    """Bytes that one more token adds to the KV cache while no window is full, at `itemsize` bytes per number.

    Counts keys, values, latents, indexer keys, and a token's share of compressed entries; layers that reuse another's cache and
    recurrent states add none.
    """
    return sum(kv_numbers(m) for m in _mixers(spec)) * itemsize


def kv_bytes(spec: Spec, tokens: int, itemsize: int = 2) -> int:
    """Bytes of the KV cache after `tokens` tokens; windowed layers keep no more than their window."""
    return sum(_kept(m, tokens) for m in _mixers(spec)) * itemsize


def _kept(m: Mixer, tokens: int) -> int:
    if isinstance(m, CompressedAttention):
        return m.head_dim * min(tokens, m.window) + _entry(m) * _entries(m, tokens)
    return kv_numbers(m) * min(tokens, horizon(m) or tokens)


def _entry(m: CompressedAttention) -> int:
    """Numbers of a compressed entry."""
    return m.head_dim + (m.indexer.head_dim if m.indexer else 0)


def _entries(m: CompressedAttention, tokens: int) -> int:
    return tokens // m.compressor.ratio if m.compressor else 0


def state_bytes(spec: Spec, itemsize: int = 2) -> int:
    """Bytes of recurrent state, whatever the length: linear attention in fp32, convolutions at `itemsize`."""
    size = 0
    for m in _mixers(spec):
        if isinstance(m, DeltaNet):
            channels = 2 * m.n_k_heads * m.k_head_dim + m.n_v_heads * m.v_head_dim
            size += 4 * m.n_v_heads * m.k_head_dim * m.v_head_dim + itemsize * channels * (m.conv - 1)
        elif isinstance(m, Mamba):
            channels = m.n_heads * m.head_dim + 2 * m.n_groups * m.state
            size += 4 * m.n_heads * m.head_dim * m.state + itemsize * channels * (m.conv - 1)
        elif isinstance(m, Mamba1):
            size += 4 * m.inner * m.state + itemsize * m.inner * (m.conv - 1)
        elif isinstance(m, ShortConv):
            size += itemsize * spec.d_model * (m.conv - 1)
        elif isinstance(m, CompressedAttention) and (c := m.compressor) is not None:
            # In fp32, of the tokens that the next entry may be made of.
            size += 4 * c.ratio * (1 + c.overlap) * 2 * (1 + c.overlap) * _entry(m)
    return size


def numbers(spec: Spec, context: int | None = None, batch: int = 1, kv_dtype: str = "bf16") -> dict[str, Any]:
    """All of this for programs, of `batch` sequences of `context` tokens (default: as many as the model allows)."""
    tokens, itemsize = context or spec.context_length, KV_BYTES[kv_dtype]
    return {
        "params_by_part": params_by_part(spec),
        "active_params_by_part": active_by_part(spec),
        "weight_bytes": {dtype: weight_bytes(spec, dtype) for dtype in BITS},
        "context": tokens,
        "batch": batch,
        "kv_dtype": kv_dtype,
        "kv_cache_bytes": kv_bytes(spec, tokens, itemsize) * batch,
        "state_bytes": state_bytes(spec, itemsize) * batch,
        "flops_per_token": flops_per_token(spec, tokens),
    }


def kv_numbers(m: Mixer) -> int:
    """Numbers that a token adds to this mixer's cache."""
    if isinstance(m, Attention) and m.kv_from is None:
        return m.n_kv_heads * (m.head_dim + m.v_head_dim)
    if isinstance(m, LatentAttention):
        return m.kv_rank + m.rope_dim + (m.indexer.head_dim if m.indexer else 0)
    if isinstance(m, CompressedAttention):
        return m.head_dim + (_entry(m) // m.compressor.ratio if m.compressor else 0)
    return 0


def caches(m: Mixer) -> list[tuple[int, int]]:
    """(numbers that a token adds, how many tokens are kept; 0: all) of each cache of this mixer."""
    if isinstance(m, CompressedAttention):
        return [(m.head_dim, m.window), (kv_numbers(m) - m.head_dim, 0)]
    return [(kv_numbers(m), horizon(m) or 0)]


def horizon(m: Mixer) -> int | None:
    """How many tokens back this mixer's cache reaches; None: to the first."""
    if isinstance(m, CompressedAttention):
        return m.window if m.compressor is None else None
    return (m.window or m.chunk) if isinstance(m, Attention) else None


def _mixers(spec: Spec) -> list[Mixer]:
    return [mixer for layer in spec.layers for mixer in layer.mixers]


def _visited(spec: Spec, slot: Slot) -> float:
    """The share of a tensor that one token visits."""
    if not slot.stacked or slot.layer is None:
        return 1.0
    ffn = spec.layers[slot.layer].ffn
    return ffn.router.top_k / ffn.n_experts if isinstance(ffn, MoE) else 1.0


def _seen(m: Mixer, context: int) -> int:
    """Operations on keys and values (scores, and their weighted sum), or on a state (what decays, is read, written, read)."""
    match m:
        case Attention():
            return 2 * m.n_heads * (m.head_dim + m.v_head_dim) * min(context, horizon(m) or context)
        case LatentAttention():
            keys, chosen = context, 0
            if m.indexer is not None:
                chosen = 2 * m.indexer.n_heads * m.indexer.head_dim * context
                keys = min(context, m.indexer.top_k)
            return 2 * m.n_heads * (m.nope_dim + m.rope_dim + m.v_head_dim) * keys + chosen
        case CompressedAttention():
            entries, chosen = _entries(m, context), 0
            if m.indexer is not None:
                chosen = 2 * m.indexer.n_heads * m.indexer.head_dim * entries
                entries = min(entries, m.indexer.top_k)
            return 4 * m.n_heads * m.head_dim * (min(context, m.window) + entries) + chosen
        case DeltaNet():
            return 7 * m.n_v_heads * m.k_head_dim * m.v_head_dim
        case Mamba():
            return 5 * m.n_heads * m.head_dim * m.state
        case Mamba1():
            return 5 * m.inner * m.state
    return 0
