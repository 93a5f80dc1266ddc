"""A Spec in words: what `zoo show` and `zoo inspect` print, and what the documentation's tables are made of.

Unusual here: everything is derived from the Spec, so two releases that differ in words differ in structure.
The words are those of "The Big LLM Architecture Comparison" (S. Raschka): attention kind, norm placement,
MoE shape, positional scheme, KV cache per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from zoo.layout import active_params, total_params
from zoo.order import MEANINGS, order, pattern
from zoo.sizes import (
    BITS,
    KV_BYTES,
    flops_per_token,
    horizon,
    kv_bytes,
    kv_bytes_per_token,
    kv_numbers,
    params_by_part,
    state_bytes,
    weight_bytes,
)
from zoo.spec import (
    MLP,
    Attention,
    CompressedAttention,
    DeltaNet,
    LatentAttention,
    Layer,
    Mamba,
    Mamba1,
    Mixer,
    MoE,
    Norm,
    QueryScale,
    Rope,
    ShortConv,
    Spec,
)
from zoo.untrusted.printable import count

if TYPE_CHECKING:
    from zoo.manifest import Manifest

T = TypeVar("T")

ACTIVATIONS = {"silu": "SwiGLU", "gelu": "GeGLU", "gelu_tanh": "GeGLU (tanh)", "relu2": "squared ReLU, gated",
               "relu": "ReGLU", "quick_gelu": "GeGLU (sigmoid)", "silu_clamped": "clamped SwiGLU"}  # fmt: skip
UNGATED = {"silu": "SiLU", "gelu": "GELU", "gelu_tanh": "GELU (tanh)", "relu2": "squared ReLU", "relu": "ReLU",
           "quick_gelu": "GELU (sigmoid)", "xielu": "xIELU"}  # fmt: skip


QUESTIONS = (
    "family", "parameters", "parts", "memory", "compute", "shape", "layers", "vocabulary", "context", "attention",
    "attention extras", "positions", "norm", "QK-norm", "feed-forward", "KV cache", "ends",
)  # fmt: skip
"""What `describe` answers, in order."""


def describe(spec: Spec) -> dict[str, str]:
    """The architecture, one line a question. A question that doesn't arise is left out."""
    mixers = _mixers(spec)
    ffns = [layer.ffn for layer in spec.layers if layer.ffn is not None]
    total, active = total_params(spec), active_params(spec)
    lines = {
        "family": spec.family,
        "parameters": f"{count(total)} total"
        + (f", {count(active)} active per token" if active < total else ""),
        "parts": ", ".join(f"{part} {count(n)}" for part, n in params_by_part(spec).items()),
        "memory": "weights " + ", ".join(f"{size(weight_bytes(spec, dtype))} in {dtype}" for dtype in BITS),
        "compute": _compute(spec),
        "shape": f"{spec.n_layers} layers, d_model {spec.d_model:,}",
        "layers": _layers(spec),
        "vocabulary": f"{spec.vocab_size:,}, head {'tied to the embedding' if spec.tied else 'of its own'}",
        "context": f"{spec.context_length:,} tokens",
        "attention": _each((x.mixers for x in spec.layers if x.mixers), _side_by_side, spec.n_layers),
        "attention extras": _each([m for m in mixers if _extras(m)], _extras, spec.n_layers),
        "positions": _positions(spec, mixers),
        "norm": _each(spec.layers, _placement, spec.n_layers),
        "QK-norm": _each([m for m in mixers if _qk_norm(m)], _qk_norm, spec.n_layers),
        "feed-forward": _each(ffns, _ffn, spec.n_layers),
        "KV cache": _cache(spec),
        "ends": _ends(spec),
    }
    return {k: v for k, v in lines.items() if v}


def published(m: Manifest, spec: Spec | None) -> str:
    """The publisher's figures; where what is counted from the Spec differs, why: the manifest's words, or which of the
    counts rounds to the figure."""
    figures = [(m.params_total, "total"), (m.params_active, "active")]
    said = ", ".join(f"{count(n)} {what}" for n, what in figures if n)
    if not said or m.params_convention or spec is None:
        return said + (f" ({m.params_convention})" if said and m.params_convention else "")
    counts = (total_params(spec), active_params(spec))
    why = [_why(n, what, counted, spec) for (n, what), counted in zip(figures, counts, strict=True) if n]
    return said + (f" ({'; '.join(filter(None, why))})" if any(why) else "")


def _why(figure: int, what: str, counted: int, spec: Spec) -> str:
    """Which parts a published figure leaves out, if the count without them, as exactly as it was published, is the figure."""
    if abs(counted / figure - 1) < 0.01:
        return ""
    parts = params_by_part(spec)
    ends = parts.get("embedding", 0), parts.get("head", 0)
    without = {"": 0, "the embedding": ends[0], "embedding and head": sum(ends) if ends[1] else 0}
    for which, n in without.items():
        if (n or not which) and abs(counted - n - figure) <= _unit(figure) / 2:
            return (
                f"{what}: {count(counted - n)} without {which}, rounded"
                if n
                else f"{what}: {count(counted)}, rounded"
            )
    return f"{what}: {count(counted)} counted, and no part known that the figure leaves out"


def _unit(figure: int) -> int:
    """What a publisher rounded to: 30.5B is a number of 0.1B, 3B one of 1B, and so is 400B."""
    whole = next(n for n in (10**12, 10**9, 10**6, 1) if figure >= n)
    return next(n for n in (whole, whole // 10, whole // 100, 1) if n and figure % n == 0)


def size(n: float) -> str:
    """131072 -> '128 KiB': memory, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} TiB"


# ---- parts


def _compute(spec: Spec) -> str:
    near, far = (flops_per_token(spec, n) for n in (1, spec.context_length))
    at = f", {flop(far)} for the last of {spec.context_length:,}" if far > near else ""
    return f"{flop(near)} for the first token{at}"


def flop(n: float) -> str:
    """15e9 -> '15 GFLOP': operations, in thousands of thousands."""
    for unit in ("", "k", "M", "G", "T"):
        if n < 999.5:
            return f"{n:.3g} {unit}FLOP"
        n /= 1000
    return f"{n:.3g} PFLOP"


def serving(spec: Spec, context: int, batch: int, kv_dtype: str) -> str:
    """What `batch` sequences of `context` tokens need beside the weights."""
    itemsize = KV_BYTES[kv_dtype]
    cache, state = kv_bytes(spec, context, itemsize) * batch, state_bytes(spec, itemsize) * batch
    needs = [f"KV cache {size(cache)} in {kv_dtype}"] if cache else []
    needs += [f"recurrent state {size(state)}"] if state else []
    beyond = f" (beyond its {spec.context_length:,})" if context > spec.context_length else ""
    text = f"{batch:,} x {context:,} tokens{beyond}: " + (", ".join(needs) or "nothing")
    return text + f"; {flop(batch * flops_per_token(spec, context))} for one token more of each"


def _layers(spec: Spec) -> str:
    """The order of kinds: in words, and as a strip. Nothing where all layers are alike."""
    o = order(spec)
    rows = [o.letters] + ([o.feeding] if o.feeding_varies else [])
    rows = [row for row in rows if len(set(row)) > 1]
    if not rows:
        return ""
    used = [x for x in dict.fromkeys((*o.mixers, *o.ffns)) if any(x in row for row in rows)]
    meanings = [f"{x} {'other ' if x.islower() else ''}{MEANINGS.get(x.upper(), '?')}" for x in used]
    return "; feed-forwards ".join(map(_strip, rows)) + f" ({', '.join(meanings)})"


def _strip(row: str) -> str:
    words = pattern(row).replace("×", "x")
    return f"{words}: {' '.join(row)}" if "(" in words else words  # a few runs need no strip


def _mixers(spec: Spec) -> list[Mixer]:
    return [mixer for layer in spec.layers for mixer in layer.mixers]


def _each(things: Iterable[T], say: Callable[[T], str], n_layers: int) -> str:
    """The distinct sayings, each with the number of layers it holds for; without one if it holds for all."""
    said: dict[str, int] = {}
    for thing in things:
        said[say(thing)] = said.get(say(thing), 0) + 1
    return "; ".join(
        text if n == n_layers else f"{n} of {n_layers} layers: {text}" for text, n in said.items() if text
    )


def _side_by_side(mixers: tuple[Mixer, ...]) -> str:
    return ", beside ".join(map(_mixer, mixers))


def _mixer(m: Mixer) -> str:
    match m:
        case Attention():
            kind = "MHA" if m.n_kv_heads == m.n_heads else "MQA" if m.n_kv_heads == 1 else "GQA"
            heads = (
                f"{m.n_heads} heads" if kind == "MHA" else f"{m.n_heads} query and {m.n_kv_heads} KV heads"
            )
            if m.kv_from is not None:
                kind, heads = "GQA with an earlier layer's keys and values", f"{m.n_heads} query heads"
            of = f"{m.head_dim}" if m.head_dim == m.v_head_dim else f"{m.head_dim}, values {m.v_head_dim}"
            seen = (
                f", sliding window {m.window:,}"
                if m.window
                else f", chunks of {m.chunk:,}"
                if m.chunk
                else ""
            )
            return f"{kind}, {heads} of {of}{seen}"
        case LatentAttention():
            q = f", queries through {m.q_rank:,}" if m.q_rank else ""
            sparse = f", sparse: {m.indexer.top_k:,} keys chosen by an indexer" if m.indexer else ""
            if m.indexer_from is not None:
                sparse = ", sparse: keys chosen by an earlier layer's indexer"
            head = f"{m.nope_dim}+{m.rope_dim}, values {m.v_head_dim}"
            return f"MLA, {m.n_heads} heads of {head}, latent {m.kv_rank}{q}{sparse}"
        case CompressedAttention():
            text = f"{m.n_heads} heads of {m.head_dim} on one latent, queries through {m.q_rank:,}, sliding window {m.window:,}"
            if (c := m.compressor) is not None:
                of = f"{2 * c.ratio} tokens" if c.overlap else "these"
                text += f" and entries, one for each {c.ratio} tokens, made of {of}"
            if m.indexer is not None:
                text += f", sparse: {m.indexer.top_k:,} entries chosen by an indexer"
            kind = "shared-latent attention" if c is None else "CSA" if m.indexer else "HCA"
            return f"{kind}, {text}, output by {m.out_groups} groups through {m.out_rank:,}"
        case DeltaNet():
            kind = "Gated DeltaNet" if m.decay == "head" else "Kimi Delta Attention"
            heads = f"{m.n_k_heads} key and {m.n_v_heads} value heads of {m.k_head_dim}"
            return f"{kind} (linear), {heads}, convolution {m.conv}"
        case Mamba():
            return f"Mamba-2, {m.n_heads} heads of {m.head_dim}, {m.n_groups} groups, state {m.state}"
        case Mamba1():
            norms = ", norms of dt, B and C" if m.norm else ""
            return f"Mamba, {m.inner:,} channels, state {m.state}, dt from {m.dt_rank}{norms}"
        case ShortConv():
            return f"gated short convolution of {m.conv} tokens" + (", biases" if m.bias else "")


def _extras(m: Mixer) -> str:
    """What few families do inside attention."""
    out = []
    if isinstance(m, Attention):
        out += ["q, k, v biases"] if m.qkv_bias else []
        out += ["output bias"] if m.out_bias else []
        out += [f"q, k, v clipped at {m.clip:g}"] if m.clip is not None else []
        out += ["sinks (a learned logit per head)"] if m.sinks else []
        per_head = " per head" if m.gate_over == "head" else ""
        out += [f"{m.gate_act} output gate{per_head}"] if m.gate else []
        out += ["values are the keys before their norm and RoPE"] if m.value_from_key else []
        out += [f"scores capped at {m.softcap:g}"] if m.softcap else []
        out += ["values normalised"] if m.value_norm else []
        out += [f"values x {m.value_scale:g}"] if m.value_scale != 1 else []
        out += [f"scale {m.scale:.4g}"] if abs(m.scale * m.head_dim**0.5 - 1) > 1e-6 else []
    if isinstance(m, CompressedAttention):
        out += ["sinks (a learned logit per head)", "values turned with keys, and back"]
    if isinstance(m, LatentAttention):
        out += ["biases"] if m.qkv_bias or m.out_bias else []
    if isinstance(m, Attention | LatentAttention) and m.query_scale is not None:
        out.append(_temperature(m.query_scale))
    if isinstance(m, DeltaNet) and m.beta_scale != 1:
        out.append(f"beta x {m.beta_scale:g}")
    if isinstance(m, DeltaNet) and m.fp32_decay:
        out.append("A_log in fp32")
    if isinstance(m, Mamba):
        parts = ", ".join(f"{x:.4g}" for x in m.parts_scales)
        out += [f"state space's gate, input, B, C and dt x {parts}"] if parts else []
        out += [f"what the state space reads x {m.in_scale:.4g}"] if m.in_scale != 1 else []
        out += [f"state space's output x {m.out_scale:.4g}"] if m.out_scale != 1 else []
        out += ["no norm in the state space"] if m.out_norm is None else []
        out += ["the state space's norm before its gate"] if m.norm_first else []
    return ", ".join(out)


def _temperature(q: QueryScale) -> str:
    return f"temperature grows with the logarithm of position / {q.period:,.0f}"


def _qk_norm(m: Mixer) -> str:
    if isinstance(m, CompressedAttention):
        return f"{_norm(m.query_norm)} of queries per head, no weight"
    if not isinstance(m, Attention) or m.qk_norm is None:
        return ""
    over = {"head": "per head", "each_head": "per head, a weight each", "all_heads": "over all heads"}[
        m.qk_norm.over
    ]
    weight = ", no weight" if m.qk_norm.norm.weight == "none" else ""
    return f"{_norm(m.qk_norm.norm)} {over}, {'after' if m.qk_norm.after_rope else 'before'} RoPE{weight}"


def _positions(spec: Spec, mixers: list[Mixer]) -> str:
    if spec.positions is not None:
        return f"learned, {spec.positions:,} positions"
    attending = [m for m in mixers if isinstance(m, Attention | LatentAttention | CompressedAttention)]
    if not attending:
        return "none"
    if all(_position(m) == "NoPE" for m in attending):
        return "NoPE: none in attention"
    return _each(attending, _position, len(attending)).replace("layers:", "attention layers:")


def _position(m: Attention | LatentAttention | CompressedAttention) -> str:
    if m.rope is not None:
        return _rope(m.rope, m)
    return "ALiBi: a bias by distance" if isinstance(m, Attention) and m.alibi is not None else "NoPE"


def _rope(r: Rope, m: Attention | LatentAttention | CompressedAttention) -> str:
    of = m.rope_dim if isinstance(m, LatentAttention) else m.head_dim
    text = f"RoPE, theta {r.theta:,.0f}"
    if r.dim != of:
        last = "the last " if isinstance(m, CompressedAttention) else ""
        text += f", on {last}{r.dim} of {of} channels"
    if r.turning is not None:
        text += f", {2 * r.turning} of {r.dim} channels turn"
    if r.backwards:
        text += ", backwards"
    if (s := r.scaling) is not None:
        kind = {"yarn": "YaRN", "llama3": "banded (Llama 3)", "longrope": "LongRoPE"}.get(s.kind, s.kind)
        text += f", {kind} x{s.factor:g}" + (f" from {s.original_context:,}" if s.original_context else "")
    return text


def _norm(n: Norm) -> str:
    text = "RMSNorm" if n.kind == "rms" else "LayerNorm"
    text += " without bias" if n.kind == "layer" and not n.bias else ""
    return text + (" (1 + weight)" if n.weight == "plus_one" else "")


def _placement(layer: Layer) -> str:
    text = _norms(layer)
    if layer.parallel:
        of = "one norm for both" if layer.ffn_norm is None else "a norm each"
        text += f", attention and feed-forward side by side, {of}"
    text += f", branches x {layer.residual_scale:.4g}" if layer.residual_scale != 1 else ""
    return text + (", a learned scale at the layer's end" if layer.scalar else "")


def _norms(layer: Layer) -> str:
    before = layer.attn_norm or layer.ffn_norm
    after = layer.attn_post_norm or layer.ffn_post_norm
    match before, after:
        case Norm(), Norm():
            return f"{_norm(before)}, before and after attention and feed-forward"
        case Norm(), None:
            return f"{_norm(before)}, pre-norm"
        case None, Norm():
            return f"{_norm(after)}, post-norm inside the residual branch"
    return "none"


def _mlp(m: MLP) -> str:
    act = (ACTIVATIONS if m.gated else UNGATED)[m.act]
    sparse = f", {m.sparsity:.0%} sparse" if m.sparsity else ""
    if m.act == "silu" and m.limit is not None:
        act = f"SwiGLU clamped at {m.limit:g}{' after its activation' if m.limit_after else ''}"
    scales = f", gate x {m.gate_scale:.4g}" if m.gate_scale != 1 else ""
    scales += f", output x {m.out_scale:.4g}" if m.out_scale != 1 else ""
    return f"{act}, d_ff {m.d_ff:,}" + (", biases" if m.bias else "") + sparse + scales


def _ffn(f: MLP | MoE) -> str:
    if isinstance(f, MLP):
        return f"dense {_mlp(f)}"
    r = f.router
    text = f"MoE, {r.top_k} of {f.n_experts} experts active ({_mlp(f.expert)})"
    if f.shared is not None:
        text += f" + shared expert of {f.shared.d_ff:,}" + (" behind a gate" if f.shared_gate else "")
        text += f", both x {f.scale:g}" if f.scale != 1 else ""
        text += ", each between norms of its own" if f.norm and f.post_norm and f.shared_post_norm else ""
    if f.latent is not None:
        text += f", experts in a latent of {f.latent:,}"
    how: list[str] = [r.score.replace("sqrt_", "root of ")]
    how += ["experts by the token's id"] if r.by_token is not None else []
    how += [f"best {r.top_groups} of {r.n_groups} groups"] if r.n_groups > 1 else []
    how += ["selection bias"] if r.selection_bias else []
    how += ["of its own norm of x"] if r.norm else []
    how += ["a learned scale per expert"] if r.expert_scale else []
    how += [f"x {r.scale:g}"] if r.scale != 1 else []
    how += [f"their sum x {f.routed_scale:g}"] if f.routed_scale != 1 else []
    return f"{text}; router: {', '.join(how)}"


def _cache(spec: Spec) -> str:
    parts = []
    if per_token := kv_bytes_per_token(spec):
        parts.append(f"{size(per_token)} per token in bf16")
        full = kv_bytes(spec, spec.context_length)
        parts.append(f"{size(full)} at {spec.context_length:,} tokens")
        if full < per_token * spec.context_length:
            mixers = _mixers(spec)
            bounded = sum(1 for m in mixers if horizon(m) is not None and kv_numbers(m))
            pooled = sum(1 for m in mixers if isinstance(m, CompressedAttention) and m.compressor)
            parts += [f"{bounded} layers keep only their window"] if bounded else []
            parts += [f"{pooled} layers keep a window and entries"] if pooled else []
    if state := state_bytes(spec):
        parts.append(f"{size(state)} of recurrent state")
    return ", ".join(parts)


def _ends(spec: Spec) -> str:
    out = []
    out += [f"embedding x {spec.embed_scale:.4g}"] if spec.embed_scale != 1 else []
    out += [f"embedding through {_norm(spec.embed_norm)}"] if spec.embed_norm else []
    out += ["head with a bias"] if spec.head_bias else []
    out += [f"logits x {spec.logit_scale:.4g}"] if spec.logit_scale != 1 else []
    out += [f"logits capped at {spec.logit_softcap:g}"] if spec.logit_softcap else []
    if spec.altup is not None:
        out.append(f"AltUp: {spec.altup.n_streams} residual streams; LAuReL of rank {spec.altup.laurel_rank}")
    if (h := spec.hyper) is not None:
        out.append(
            f"hyper-connections (mHC): {h.n_streams} residual streams, mixed by matrices of {h.rounds} Sinkhorn rounds"
        )
    if spec.per_layer_embedding is not None:
        out.append(f"per-layer embeddings of {spec.per_layer_embedding.dim}")
    return ", ".join(out)
