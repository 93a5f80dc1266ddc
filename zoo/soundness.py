"""Which Specs can be computed with: what the types of `Spec` cannot say, one sentence for each way to break it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

from zoo.errors import ZooError
from zoo.layout import layout
from zoo.spec import (
    MAX_LAYERS,
    MLP,
    Attention,
    CompressedAttention,
    Compressor,
    DeltaNet,
    HyperConnections,
    Indexer,
    LatentAttention,
    Layer,
    Mamba,
    Mamba1,
    MoE,
    Norm,
    QueryScale,
    Rope,
    RopeScaling,
    Router,
    ShortConv,
    Spec,
)

MAX_EXPERTS = 1 << 16
MAX_SIZE = 1 << 40
MAX_ROUNDS = 1 << 10
"""Beyond these a config is broken: the deepest release has 126 layers, the most experts of one 512, the widest axis
262,400 entries."""


def layer_count(n: Any, key: str, where: str) -> int:
    """`n`, checked before anything is as long as it says. Raises ZooError, naming `where` and `key`."""
    if not isinstance(n, int) or not 0 < n <= MAX_LAYERS:
        raise ZooError(f"{where}: {key} is {str(n)[:40]}; expected 1 to {MAX_LAYERS}")
    return n


def refuse_unsound(spec: Spec, where: str) -> None:
    """Raises ZooError, naming `where`, for a Spec that can be written down but not computed with."""
    if (why := next(chain(_unsound(spec, "spec"), _unshared(spec)), None)) is not None:
        raise ZooError(f"{where}: {why}")
    odd = next(
        (s for s in layout(spec).values() if not 0 < min((1, *s.shape)) <= max((1, *s.shape)) < MAX_SIZE),
        None,
    )
    if odd is not None:
        raise ZooError(f"{where}: its sizes give {odd.name} the shape {list(odd.shape)}"[:400])
    if spec.context_length < 1:
        raise ZooError(f"{where}: its context is {spec.context_length} positions")


def _unsound(x: Any, name: str) -> Iterator[str]:
    """What in a Spec can be written down but not computed with, one sentence each."""
    if isinstance(x, float) and not math.isfinite(x):
        yield f"{name} comes to {x}"
    elif isinstance(x, tuple):
        for n, part in enumerate(dict.fromkeys(x)):
            yield from _unsound(part, f"{name}[{n}]")
    elif dataclasses.is_dataclass(x):
        for f in dataclasses.fields(x):
            yield from _unsound(getattr(x, f.name), f.name)
    yield from _unsound_part(x)
    match x:
        case Norm(eps=eps) if eps < 0:
            yield f"the eps of a norm is {eps}"
        case Attention(n_heads=q, n_kv_heads=kv) if kv < 1 or q % kv:
            yield f"{q} query heads cannot share {kv} key/value heads"
        case DeltaNet(n_v_heads=v, n_k_heads=k) if k < 1 or v % k:
            yield f"{v} value heads cannot share {k} key heads"
        case Attention(window=int(n)) | Attention(chunk=int(n)) if n < 1:
            yield f"a window or chunk of {n} positions shows nothing"
        case Rope(theta=theta) if theta <= 0 or (theta == 1 and x.scaling is not None):
            yield f"rope_theta is {theta}"
        case Rope(dim=dim) if dim < 2 or dim % 2:
            yield f"RoPE needs pairs of channels, and would rotate {dim}"
        case RopeScaling(factor=factor) if factor <= 0:
            yield f"the factor of scaled RoPE is {factor}"
        case RopeScaling(kind="llama3", low_freq_factor=low, high_freq_factor=high) if low <= 0 or high < low:
            yield f"high_freq_factor {high} should not be below low_freq_factor {low}, and both above 0"
        case RopeScaling(kind="yarn" | "llama3" | "dynamic", original_context=n) if n < 1:
            yield f"the original context of scaled RoPE is {n}"
        case MoE(n_experts=n) if n > MAX_EXPERTS:
            yield f"{n} experts are more than {MAX_EXPERTS}"
        case Attention(scale=s) | LatentAttention(scale=s) if not s > 0:
            yield f"scores times {s} tell no key from another"
        case MLP(sparsity=share) if not 0 <= share < 1:
            yield f"a share of {share} of activations cannot be left out"
        case QueryScale(period=period) if period <= 0:
            yield f"queries are scaled by positions over {period}"
        case Indexer(top_k=n) if n < 1:
            yield f"an index of {n} keys shows nothing"
        case RopeScaling(kind="yarn", beta_fast=a, beta_slow=b) if min(a, b) <= 0:
            yield f"the betas of YaRN are {a} and {b}"
        case MoE(n_experts=n, router=Router(top_k=k)) if not 0 < k <= n:
            yield f"{k} of {n} experts cannot be chosen"
        case Attention(head_dim=d, rope=Rope(dim=dim)) if dim > d:
            yield f"RoPE would rotate {dim} of {d} channels"
        case MoE(n_experts=n, router=Router(n_groups=g, group_top=t)) if g > 1 and not n % g and n // g < t:
            yield f"groups of {n // g} experts cannot be judged by their best {t}"
        case MoE(n_experts=n, router=Router(n_groups=g, top_groups=t)) if g < 1 or n % g or not 0 < t <= g:
            yield f"{n} experts in {g} groups, of which {t} are eligible: they do not divide"
        case MoE(n_experts=n, router=Router(top_k=k, n_groups=g, top_groups=t)) if k > n // g * t:
            yield f"{k} experts cannot be chosen of the {n // g * t} in {t} of {g} groups"


def _unsound_part(x: Any) -> Iterator[str]:
    """What `_unsound` says of choices that exclude each other."""
    match x:
        case RopeScaling(kind="longrope", original_context=n) if n < 2:
            yield f"the original context of LongRoPE is {n}"
        case Rope(dim=d, scaling=RopeScaling(kind="longrope", short=a, long=b)) if {len(a), len(b)} != {
            d // 2
        }:
            yield f"LongRoPE over {d} channels needs {d // 2} divisors; there are {len(a)} short and {len(b)} long"
        case RopeScaling(kind="longrope", short=a, long=b) if min(*a, *b, 1.0) <= 0:
            yield f"a divisor of LongRoPE is {min(*a, *b)}"
        case Rope(dim=d, turning=int(n)) if not 0 < n <= d // 2:
            yield f"RoPE would turn {n} of {d // 2} pairs"
        case Rope(turning=int(), scaling=RopeScaling(kind=kind)) if kind != "linear":
            yield f"RoPE of which some pairs turn has no {kind} scaling"
        case Attention(alibi=a, rope=r, window=w, chunk=c) if a and (r or w or c):
            yield "ALiBi is for attention without RoPE, window or chunks"
        case Attention(clip=float(n)) if n <= 0:
            yield f"queries, keys and values are clipped at {n}"
        case Attention(gate=False, gate_over="head") | Attention(gate=False, gate_act="softplus"):
            yield "a kind of output gate is given, and no gate"
        case Attention(value_from_key=True, head_dim=k, v_head_dim=v, kv_from=n) if k != v or n is not None:
            yield f"values of {v} channels cannot be keys of {k}, or of another layer"
        case MLP(act="silu_clamped", limit=None):
            yield "a clamped activation needs a limit"
        case MLP(limit=float(), sparsity=share) if share:
            yield "sparse activations have no limit"
        case MLP(limit=float(n)) if n <= 0:
            yield f"activations are clamped at {n}"
        case MLP(limit=float(), act=act, gated=gated) if act not in ("silu", "silu_clamped") or not gated:
            yield f"a limit belongs to gated SiLU, not to {'gated' if gated else 'ungated'} {act}"
        case MLP(act="xielu", gated=True):
            yield "xIELU has learned numbers for an MLP without a gate only"
        case MLP(act="silu_clamped", gated=False):
            yield "a clamped activation is for an MLP with a gate"
        case MoE(expert=MLP(act="xielu")):
            yield "experts have no learned activation"
        case Router(over="near", score=score, near=near, n_groups=g, selection_bias=bias) if (
            score != "softmax" or near <= 0 or g > 1 or bias
        ):
            yield f"scores over the near are a softmax, without groups or bias, and near is more than 0, not {near}"
        case Layer(mixer=m, beside=b) if b is not None and not isinstance(m, Attention):
            yield "a state space stands beside attention, and there is none"
        case DeltaNet(beta_scale=n) if not 0 < n <= 2:
            yield f"a delta rule with beta up to {n} grows without bound"
        case Mamba(parts_scales=scales) if len(scales) not in (0, 5):
            yield f"a state space's input has five parts; there are {len(scales)} scales"
        case Mamba(out_norm=None, norm_first=True):
            yield "a state space's norm comes first, and there is none"
        case MLP(gated=gated, act=act, sparsity=share, limit=n, gate_scale=k) if k != 1.0 and (
            not gated or act == "silu_clamped" or share or n
        ):
            yield "a gate that is scaled is neither clamped nor sparse, and there is one"
        case MoE(expert=MLP(gate_scale=a, out_scale=b)) if (a, b) != (1.0, 1.0):
            yield "experts have no scales of their own"
        case Mamba1(state=n, dt_rank=r) if n < 1 or r < 1:
            yield f"a state space of {n} numbers to a channel, with dt from {r}, carries nothing"
        case Mamba1(conv=n) | ShortConv(conv=n) if n < 2:
            yield f"a convolution of {n} tokens sees nothing before"
        case LatentAttention(indexer=i, indexer_from=int(n)) if i is not None:
            yield f"a layer has an indexer of its own and that of layer {n}"
        case CompressedAttention(window=n) | Compressor(ratio=n) if n < 1:
            yield f"a window, or an entry, of {n} positions shows nothing"
        case CompressedAttention(n_heads=h, out_groups=g) if g < 1 or h % g:
            yield f"{h} heads do not make {g} groups"
        case CompressedAttention(head_dim=d, rope=Rope(dim=dim)) if dim > d:
            yield f"RoPE would rotate {dim} of {d} channels"
        case CompressedAttention(compressor=None, indexer=i) if i is not None:
            yield "an indexer picks entries, and there are none"
        case CompressedAttention(indexer=Indexer(head_dim=d, rope=Rope(dim=dim))) if dim > d:
            yield f"RoPE would rotate {dim} of {d} channels of an indexer"
        case CompressedAttention(query_norm=a, latent_norm=b) if (a.weight, a.kind, b.kind) != (
            "none",
            "rms",
            "rms",
        ):
            yield "norms of compressed attention are RMS norms, that of queries without a weight"
        case HyperConnections(n_streams=n, rounds=r) if n < 1 or not 0 < r <= MAX_ROUNDS:
            yield f"{n} streams and {r} rounds of Sinkhorn make no hyper-connections"
        case HyperConnections(norm=Norm(kind=kind, weight=w)) if (kind, w) != ("rms", "none"):
            yield "the norm of hyper-connections is an RMS norm without a weight"
        case Spec(hyper=h, altup=a, per_layer_embedding=p) if h is not None and (
            a is not None or p is not None
        ):
            yield "hyper-connections go with no other streams and no per-layer inputs"
        case Spec(hyper=h, layers=layers) if h is not None and any(
            x.parallel or x.scalar or x.beside is not None for x in layers
        ):
            yield "hyper-connections are of layers whose branches follow one another, without a scale of the whole"
        case Spec(vocab_size=v, layers=layers) if any(
            isinstance(x.ffn, MoE) and x.ffn.router.by_token not in (None, v) for x in layers
        ):
            yield f"experts are given by token for other than the {v} ids that there are"
        case Router(by_token=int(), over=over, selection_bias=bias, n_groups=g) if (
            over != "all" or bias or g > 1
        ):
            yield "experts that a token's id says are not chosen: no bias, no groups"
        case Router(score="sqrt_softplus", over=over) if over != "all":
            yield f"roots of a softplus are scores over all experts, not over {over}"
        case Spec(tied=True, head_bias=True):
            yield "a head that is the embedding has no bias"
        case Spec(positions=None, positions_offset=int(n)) if n:
            yield "positions start at a row of a table, and there is none"


def _unshared(spec: Spec) -> Iterator[str]:
    """What keys and values taken from another layer (`kv_from`) do not have there, one sentence for each layer."""
    for i, layer in enumerate(spec.layers):
        a = layer.mixer
        if isinstance(a, LatentAttention) and (n := a.indexer_from) is not None:
            b = spec.layers[n].mixer if 0 <= n < i else None
            if not isinstance(b, LatentAttention) or b.indexer is None:
                yield f"layer {i} sees the keys that layer {n} chose, which is no earlier layer with an indexer"
        if not isinstance(a, Attention) or a.kv_from is None:
            continue
        says = f"layer {i} takes its keys and values from layer {a.kv_from}"
        if not 0 <= a.kv_from < i:
            yield f"{says}, which is not one of the {i} layers before it"
            continue
        b = spec.layers[a.kv_from].mixer
        if not isinstance(b, Attention) or b.kv_from is not None:
            yield f"{says}, which has none of its own"
        elif (mine := (a.n_kv_heads, a.head_dim, a.v_head_dim)) != (
            theirs := (b.n_kv_heads, b.head_dim, b.v_head_dim)
        ):
            yield f"{says}, whose key/value heads, head_dim and v_head_dim are {theirs}; its own are {mine}"
