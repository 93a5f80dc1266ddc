"""Spec: what an architecture is, as frozen dataclasses <-> `zoo.json`.

The thesis of the zoo is that the open LLMs differ in a few structural choices. This file is the
complete list of those choices. A family (in `converters/`) turns a released `config.json` into a
`Spec`; `layout.py` turns a `Spec` into canonical tensor names and shapes; `model/` runs it.
Nothing below knows a family by name.

A field whose default is "absent" (None, False, 1.0) is one that most families don't use, and is
left out of `zoo.json`, so that the file lists just what is unusual about a model.

One vocabulary, here and everywhere: d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff,
n_experts, top_k, vocab_size; axes B T D H K E F V.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from zoo.errors import ZooError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu", "silu_clamped", "xielu"]
"""`quick_gelu`: x * sigmoid(1.702 x). `silu_clamped`: (up + 1) * gate * sigmoid(alpha * gate), gate <= limit,
|up| <= limit (gpt-oss card). `xielu` (arXiv 2411.13010), with two learned numbers p and n, and two constants that lie beside
them, beta = 1/2 and near = -1e-6: softplus(p) x^2 + beta x where x > 0, else (beta + softplus(n)) (e^min(x, near) - 1 - x) +
beta x."""


Rounding = Literal["first", "last"]
"""Where a step of a model in bf16 or fp16 rounds: "first", its operands, and it is computed in the model's dtype; or
"last", its result, and it is computed in fp32. In fp32 there is no difference."""


MAX_LAYERS = 1024
"""More than that is no model: the deepest release has 126. Nor has any other list of a Spec more: a layer is hashed with what it lists."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation over the last axis; its statistics are always taken in fp32.

    `kind`: "rms" (x / rms(x)) or "layer" (mean removed; plus a bias, if `bias`).
    `weight`: "plain" (w * x), "plus_one" ((1 + w) * x) or "none".
    `rounding`: of the product with the weight: the normalised x is rounded "first", or what comes out "last"
    (which is what kind "layer" always does).
    """

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    weight: Literal["plain", "plus_one", "none"] = "plain"
    rounding: Rounding = "first"
    bias: bool = True


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `linear`: all frequencies / factor. `llama3`: three bands by wavelength. `yarn`: a ramp between
    interpolation and extrapolation, and cos/sin multiplied by `attention_factor` (resolved when the
    Spec is made, never implied). `longrope`: each frequency / a divisor of its own. There are two tables of
    divisors: `short`, and `long`, which counts for ALL positions of a pass as soon as one of them is
    `original_context` or later. cos/sin are multiplied by `attention_factor`; with the long table by
    `long_attention_factor`, if there is one. `factor` is then how much longer the context is, for information.
    `dynamic`: none within the `original_context`; theta would grow with the length of a text beyond, anew for each length,
    which leaves nothing in a cache true: such a pass is refused.
    Source: arXiv 2309.00071 (YaRN), 2402.13753 (LongRoPE), Llama 3.1 model card.

    A text that outgrows the original context must be read anew from its first token: what a cache holds was
    computed with the short table. A pass that would mix the two is refused; `Decoder.generate` starts over.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope", "dynamic"]
    factor: float
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    long_attention_factor: float | None = None
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding over the FIRST `dim` channels of a head.

    `interleaved`: pairs are (0, 1), (2, 3), ... instead of (0, dim/2), (1, dim/2 + 1), ...
    `turning`: only so many pairs turn, the fastest; the others stand still ("proportional" RoPE: the pairs and
    the frequencies are those of the whole `dim`).
    `rounding`: of the rotation: cos and sin are rounded "first", or the rotated channels "last"; "both": cos and sin are,
    and the rotation by them is computed in fp32 and rounded once.
    `backwards`: pairs turn clockwise, by the negative of the angle (nanochat).
    """

    theta: float
    dim: int
    scaling: RopeScaling | None = None
    interleaved: bool = False
    rounding: Literal["first", "last", "both"] = "first"
    turning: int | None = None
    backwards: bool = False


@dataclass(frozen=True, slots=True)
class QKNorm:
    """Normalisation of queries and keys: per head (weight [head_dim], or [n_heads, head_dim] where "each_head" has its
    own) or over all heads at once (weight [n_heads * head_dim]); before RoPE unless `after_rope`."""

    norm: Norm
    over: Literal["head", "each_head", "all_heads"] = "head"
    after_rope: bool = False


@dataclass(frozen=True, slots=True)
class QueryScale:
    """A factor on attention scores that grows with the query's position (attention temperature).

    `floor_log`: 1 + beta * ln(1 + floor((pos + offset) / period)).
    `log`: log2(pos) / log2(period) where pos > period, else 1.
    `rounding`: of the product with the query: the factor is rounded "first", or the scaled query "last".
    """

    kind: Literal["floor_log", "log"]
    period: float
    beta: float = 1.0
    offset: int = 0
    rounding: Rounding = "first"


@dataclass(frozen=True, slots=True)
class Alibi:
    """Attention with linear biases (arXiv 2108.12409): slope_h * position of the key is added to a head's scores.

    Slopes follow from the number of heads: for n = 2^m they are 2^(-8/n), its square, ...; for another n those of the
    next lower power of 2, then every other one of the next higher. `scale` multiplies them (Falcon adds before it
    scales). `bf16`: slopes, and their products with positions, are rounded to bf16 in every dtype.
    """

    scale: float = 1.0
    bf16: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention with n_heads query heads and n_kv_heads key/value heads.

    `window`: keys visible to a query, itself included (position > pos - window).
    `chunk`: keys in the same block of `chunk` positions only. `sinks`: one learned logit per head
    joins the softmax and is dropped. `gate`: the output is multiplied by `gate_act`(gate(x)), a number for
    each channel, or for each head. `value_from_key`: v is what k is before its norm and RoPE (there is no v matrix).
    `value_scale` multiplies v. `kv_from`: reuse keys and values of that layer (this one has none).
    `value_norm`: weightless RMS norm of v. `softcap`: scores = cap * tanh(scores / cap).
    `v_head_dim`: channels of a head's v; left out, as many as q and k have. `clip`: q, k and v are clamped to -clip..clip as
    soon as they are projected.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    v_head_dim: int = field(kw_only=True, default=None)  # type: ignore[assignment]
    scale: float
    rope: Rope | None = None
    window: int | None = None
    chunk: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QKNorm | None = None
    value_norm: Norm | None = None
    query_scale: QueryScale | None = None
    sinks: bool = False
    softcap: float | None = None
    gate: bool = False
    value_scale: float = 1.0
    kv_from: int | None = None
    gate_act: Literal["sigmoid", "softplus"] = "sigmoid"
    gate_over: Literal["channel", "head"] = "channel"
    value_from_key: bool = False
    alibi: Alibi | None = None
    clip: float | None = None
    kind: Literal["attention"] = "attention"

    def __post_init__(self) -> None:
        if self.v_head_dim is None:
            object.__setattr__(self, "v_head_dim", self.head_dim)


@dataclass(frozen=True, slots=True)
class Indexer:
    """DeepSeek sparse attention: a small scorer picks the `top_k` keys each query may see.

    score = sum_h w_h * relu(q_h . k * head_dim^-0.5), w = weights_proj(x) * n_heads^-0.5, in fp32.
    """

    n_heads: int
    head_dim: int
    top_k: int
    rope: Rope
    key_norm: Norm


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (MLA, arXiv 2405.04434): keys and values are rebuilt from one
    cached latent of `kv_rank` channels plus one rotary key of `rope_dim` shared by all heads.

    Per head q is [nope | rope]; the latent gives [k_nope | v]. `rope` None leaves the rope part
    unrotated. `q_rank` None means queries are not compressed. `indexer_from`: this layer has no indexer and sees the keys
    that the indexer of that earlier layer chose.
    """

    n_heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_head_dim: int
    scale: float
    latent_norm: Norm
    q_rank: int | None = None
    rope: Rope | None = None
    query_scale: QueryScale | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    indexer: Indexer | None = None
    indexer_from: int | None = None
    kind: Literal["latent_attention"] = "latent_attention"


@dataclass(frozen=True, slots=True)
class Compressor:
    """What stands for tokens that a window has gone past: an entry for each `ratio` of them (DeepSeek-V4, CSA and HCA).

    entry = norm(sum_j softmax_j(z_j + position_j) * c_j), a softmax for each channel, c and z two projections of x, all in
    fp32. `overlap`: c and z have as many channels again, and entry w is of 2 * ratio candidates: the first channels of the
    tokens of window w - 1, and the last of those of window w. Tokens of a window that is not full have no entry yet.
    """

    ratio: int
    overlap: bool
    norm: Norm


@dataclass(frozen=True, slots=True)
class CompressedAttention:
    """Attention to a `window` of tokens and to entries that stand for all tokens before (DeepSeek-V4).

    A token, and an entry, is ONE latent of head_dim channels: key and value of all heads. `rope` turns the LAST channels of
    queries and latents; an entry's position is that of its first token. So values are turned too, and the last channels of
    what a head gives are turned back by the query's angle. Queries come from a latent of `q_rank`; `latent_norm`: of it and
    of the tokens' latents; `query_norm`: of each head. One learned logit per head joins the softmax (sinks).
    `out_groups`: the heads, in so many groups, give `out_rank` channels each, by a matrix for each group; `out` reads these.
    `compressor` None: the window alone. `indexer`: picks the entries that a query sees, by keys that a compressor like this
    one makes (in place of a matrix; `key_norm` is its norm); its `rope` turns the last channels, too.
    """

    n_heads: int
    head_dim: int
    q_rank: int
    window: int
    scale: float
    rope: Rope
    latent_norm: Norm
    query_norm: Norm
    out_groups: int
    out_rank: int
    compressor: Compressor | None = None
    indexer: Indexer | None = None
    kind: Literal["compressed_attention"] = "compressed_attention"


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Gated delta rule (arXiv 2412.06464; KDA: arXiv 2510.26692): a linear-attention state per head.

    S = decay * S; S += k (beta (v - S^T k))^T; o = S^T q.
    `decay`: one number per head ("head", Gated DeltaNet) or one per key channel ("channel", KDA).
    `out_gate`: the normalised output is multiplied by silu or sigmoid of a gate.
    `out_norm` is over v_head_dim. `beta_scale` multiplies beta, which is otherwise below 1: with 2 the state can also turn
    against a key (negative eigenvalues, arXiv 2411.12537). `fp32_decay`: the log of the decay (A_log) stays in fp32 in a model of
    lower precision.
    """

    n_k_heads: int
    n_v_heads: int
    k_head_dim: int
    v_head_dim: int
    conv: int
    decay: Literal["head", "channel"]
    out_gate: Literal["silu", "sigmoid"]
    out_norm: Norm
    beta_scale: float = 1.0
    fp32_decay: bool = False
    kind: Literal["delta"] = "delta"


@dataclass(frozen=True, slots=True)
class Mamba:
    """Mamba-2 (arXiv 2405.21060): n_heads * head_dim = inner channels, n_groups shared B and C of
    size `state`. `dt_min`: lower clamp of dt; the output norm is over inner / n_groups channels, after the gate, or
    before it (`norm_first`); without a norm the gate alone is left. `in_scale` multiplies what the mixer reads, `out_scale`
    what it gives, and `parts_scales`, rounded to the model's dtype, what the input matrix gives: gate, input, B, C, dt."""

    n_heads: int
    head_dim: int
    n_groups: int
    state: int
    conv: int
    out_norm: Norm | None
    conv_bias: bool = True
    dt_min: float = 0.0
    norm_first: bool = False
    in_scale: float = 1.0
    parts_scales: tuple[float, ...] = ()
    out_scale: float = 1.0
    kind: Literal["mamba"] = "mamba"


@dataclass(frozen=True, slots=True)
class Mamba1:
    """Mamba (arXiv 2312.00752): each of `inner` channels has a state of its own, of size `state`; B and C are all channels'.
    dt, B and C are made of the input that was convolved, dt by way of `dt_rank` channels; `norm`: of these three before they
    are used (Jamba). The gate is alone: no norm follows."""

    inner: int
    state: int
    conv: int
    dt_rank: int
    norm: Norm | None = None
    conv_bias: bool = True
    kind: Literal["mamba1"] = "mamba1"


@dataclass(frozen=True, slots=True)
class MLP:
    """Feed-forward: down(act(gate x) * up x), or down(act(up x)) when not `gated`.

    `limit` and `alpha` belong to `silu_clamped`. With `silu`, gated, a `limit` alone clamps: the gate from above, before
    its activation, or after it (`limit_after`), and up on both sides. `sparsity`: only gate activations above
    mean + std * icdf(sparsity) pass (Gaussian top-k, Gemma 3n). `gate_scale` multiplies the gate before its activation,
    `out_scale` what comes out.
    """

    d_ff: int
    act: Activation = "silu"
    gated: bool = True
    bias: bool = False
    limit: float | None = None
    alpha: float = 1.702
    sparsity: float = 0.0
    limit_after: bool = False
    gate_scale: float = 1.0
    out_scale: float = 1.0
    kind: Literal["mlp"] = "mlp"


@dataclass(frozen=True, slots=True)
class Router:
    """Chooses `top_k` of the experts for a token and their weights.

    `score`: softmax, sigmoid or the root of the softplus of the logits; `over`: scores are taken over "all" experts before the
    choice, or over the "chosen" ones after it; or an expert's over those "near" it (SparseMixer, arXiv 2409.12136): of the
    experts not chosen before it, those whose logit z is less than its own, m, by at most `near` * max(|z|, m).
    `selection_bias`: a per-expert bias that takes part in
    the choice, never in the weights. `n_groups` / `top_groups`: only the best groups are eligible, a
    group's score being the sum of its `group_top` best. `masked_groups`: what ineligible experts score.
    `normalize`: weights are divided by their sum + `normalize_eps`, or by `normalize_floor` if that is larger. `scale`
    multiplies the weights, `expert_scale` each by a learned number of its expert. `norm`: the router reads the layer's x
    through a norm of its own, times `input_scale`, in place of what the layer's norm makes of it.
    `softcap`: on the logits, in fp32. `rounding`: of the logits: a product in the model's dtype ("first"), or one in fp32 whose
    result is not rounded at all ("last"). `weights_rounding`: of the weighted sum over experts: the weights are rounded
    "first", or stay in fp32 and the sum is rounded "last". `score_rounding`: scores, their sum and their quotients are
    rounded as they are made ("first", LFM2), or computed in fp32.
    `by_token`: the experts of a token are those that a table of so many ids has for it (hash routing); scores only weigh them.
    """

    top_k: int
    score: Literal["softmax", "sigmoid", "sqrt_softplus"]
    over: Literal["all", "chosen", "near"] = "all"
    bias: bool = False
    selection_bias: bool = False
    n_groups: int = 1
    top_groups: int = 1
    group_top: int = 2
    masked_groups: Literal["-inf", "zero"] = "-inf"
    normalize: bool = False
    normalize_eps: float = 0.0
    scale: float = 1.0
    softcap: float | None = None
    rounding: Rounding = "first"
    weights_rounding: Rounding = "first"
    normalize_floor: float = 0.0
    expert_scale: bool = False
    norm: Norm | None = None
    input_scale: float = 1.0
    score_rounding: Rounding = "last"
    near: float = 0.0
    by_token: int | None = None


@dataclass(frozen=True, slots=True)
class MoE:
    """Mixture of experts. Every token visits `router.top_k` of `n_experts` MLPs of shape `expert`.

    `shared`: an MLP every token visits; `shared_gate`: times sigmoid(gate(x)). `weight_input`: the
    routing weight multiplies the expert's input, not its output. `latent`: experts work in a
    projection of that many channels. `scale`: multiplies routed + shared (0.5: their average). `routed_scale`: multiplies
    the routed sum alone, after it is rounded (`Router.scale` multiplies the weights, before they are).

    `norm`: experts read the layer's x through a norm of their own, while `shared` reads what the layer's norm makes of
    it. `post_norm`, `shared_post_norm`: of the routed sum, and of the shared output, before they are added. (A dense MLP
    and experts side by side are such a `shared`.)
    """

    n_experts: int
    expert: MLP
    router: Router
    shared: MLP | None = None
    shared_gate: bool = False
    weight_input: bool = False
    latent: int | None = None
    scale: float = 1.0
    routed_scale: float = 1.0
    norm: Norm | None = None
    post_norm: Norm | None = None
    shared_post_norm: Norm | None = None
    kind: Literal["moe"] = "moe"


@dataclass(frozen=True, slots=True)
class ShortConv:
    """A gated short convolution (LFM2): out(C * conv(B * x)), [B | C | x] from one matrix, a causal depthwise convolution
    of `conv` taps without activation. `bias`: of both matrices and of the convolution."""

    conv: int
    bias: bool = False
    kind: Literal["short_conv"] = "short_conv"


Mixer = Attention | LatentAttention | CompressedAttention | DeltaNet | Mamba | Mamba1 | ShortConv
FFN = MLP | MoE


@dataclass(frozen=True, slots=True)
class Layer:
    """One block of two branches: x += post(mixer(pre(x))); x += post(ffn(pre(x))). Norms that a family
    doesn't have, and a missing half, are None.

    `parallel`: both branches read the same x: x += post(mixer(pre(x))) + post(ffn(pre(x))). Where `ffn_norm` is None
    then, the feed-forward reads what the mixer reads: one norm for both. `adds`: their "sum" to x, or each "in_turn":
    (x + mixer) + feed-forward, which rounds otherwise.
    `beside`: a state space that reads what attention, the mixer, reads; their sum is the branch (Falcon-H1).
    `residual_scale` multiplies what each branch gives. `scalar`: at its end x is multiplied by a learned number.
    """

    mixer: Mixer | None
    ffn: FFN | None
    attn_norm: Norm | None = None
    attn_post_norm: Norm | None = None
    ffn_norm: Norm | None = None
    ffn_post_norm: Norm | None = None
    parallel: bool = False
    residual_scale: float = 1.0
    scalar: bool = False
    adds: Literal["sum", "in_turn"] = "sum"
    beside: Mamba | None = None

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The mixer and what stands beside it: none, one or two."""
        return tuple(m for m in (self.mixer, self.beside) if m is not None)


@dataclass(frozen=True, slots=True)
class AltUp:
    """Gemma 3n's streams: `n_streams` copies of the residual of which one is computed per layer and
    the others are predicted and corrected; a low-rank residual (`laurel_rank`) beside attention."""

    n_streams: int
    active: int
    laurel_rank: int
    norm: Norm
    coef_clip: float | None = None
    correct_scale: bool = True


@dataclass(frozen=True, slots=True)
class HyperConnections:
    """Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): `n_streams` residuals X_i, at first all the embedding.

    Each branch has z = W norm(X_1 .. X_n), `norm` weightless and over all streams together, and of its parts with a factor
    and a bias of their own: a = sigmoid(z_a) + eps, b = 2 sigmoid(z_b), M = softmax(z_M) + eps, whose columns and rows are in
    turn divided by their sums + eps, `rounds` times columns, rows in between. The branch reads sum_i a_i X_i; then
    X_k = b_k * branch + sum_j M_jk X_j. What the final norm reads is sum_i a_i X_i of a W of its own. All in fp32.
    """

    n_streams: int
    norm: Norm
    eps: float
    rounds: int


@dataclass(frozen=True, slots=True)
class PerLayerEmbedding:
    """Per-layer inputs: a second embedding of `vocab_size` x (n_layers * dim), mixed with a projection of the first; a layer
    adds norm(out(act(gate(x)) * its vector)) at its end, or to all streams but the first (`AltUp`).

    `rounding`: of the products of the projection and of the sum with their constants, which are rounded "first", or the
    products "last". The second embedding's factor, sqrt(dim), is always rounded first.
    """

    vocab_size: int
    dim: int
    norm: Norm
    act: Activation = "gelu_tanh"
    rounding: Rounding = "first"


@dataclass(frozen=True, slots=True)
class Spec:
    """A whole decoder.

    `tied`: the head is the embedding; `head_bias`: one of its own, that has a bias. `positions`: how many positions
    a learned table has, else None; position p is its row p + `positions_offset`.
    `embed_scale` multiplies embeddings; `embed_rounding`: the factor is rounded "first", or the product "last".
    `embed_norm` comes after that.
    Logits are multiplied by `logit_scale`, then soft-capped. `dtype` is what the config declares, for information.
    """

    family: str
    d_model: int
    vocab_size: int
    layers: tuple[Layer, ...]
    norm: Norm
    tied: bool
    context_length: int
    positions: int | None = None
    embed_scale: float = 1.0
    embed_rounding: Rounding = "first"
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    altup: AltUp | None = None
    per_layer_embedding: PerLayerEmbedding | None = None
    dtype: str | None = None
    notes: tuple[str, ...] = field(default=())
    positions_offset: int = 0
    embed_norm: Norm | None = None
    head_bias: bool = False
    hyper: HyperConnections | None = None

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def reads_ids(self) -> bool:
        """Whether layers look at the tokens' ids: experts that are a token's."""
        ffns = (layer.ffn for layer in dict.fromkeys(self.layers))
        return any(isinstance(f, MoE) and f.router.by_token is not None for f in ffns)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict. Equal layers are written once: `layer_kinds` and a list of indices."""
        d = {
            f.name: _to_json(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name != "layers" and not _is_default(f, getattr(self, f.name))
        }
        kinds: dict[Layer, int] = {}
        for layer in self.layers:
            kinds.setdefault(layer, len(kinds))
        d["layer_kinds"] = [_to_json(k) for k in kinds]
        d["layers"] = [kinds[layer] for layer in self.layers]
        return d

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Spec:
        """Inverse of `to_dict`. Raises ZooError on an unknown, missing or mistyped field."""
        d = dict(d)
        for key in ("layers", "layer_kinds"):  # before anything is built of them
            n = len(d[key]) if isinstance(d.get(key), list) else 0
            if not 0 < n <= MAX_LAYERS:
                raise ZooError(f"zoo.json: spec.{key} is a list of {n}; expected 1 to {MAX_LAYERS}")
        if not all(type(n) is int and 0 <= n < len(d["layer_kinds"]) for n in d["layers"]):
            raise ZooError("zoo.json: spec.layers should be indices into spec.layer_kinds")
        try:
            kinds = [_from_json(Layer, k, f"layer_kinds[{n}]") for n, k in enumerate(d.pop("layer_kinds"))]
            d["layers"] = [kinds[n] for n in d.pop("layers")]
        except (KeyError, IndexError, TypeError) as e:
            raise ZooError(
                f"zoo.json: spec.layers and spec.layer_kinds do not fit together ({e!r})"
            ) from None
        spec = _from_json(cls, d, "spec")
        assert isinstance(spec, Spec)
        return spec


def _is_default(f: dataclasses.Field[Any], value: Any) -> bool:
    return f.name != "kind" and f.default is not dataclasses.MISSING and value == f.default


def _to_json(x: Any) -> Any:
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = [(f, getattr(x, f.name)) for f in dataclasses.fields(x)]
        return {f.name: _to_json(v) for f, v in fields if not _is_default(f, v)}
    if isinstance(x, tuple):
        return [_to_json(v) for v in x]
    return x


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


_ONCE_FP32: dict[Any, dict[str, tuple[str, ...]]] = {
    Norm: {"scale_in": ("rounding",)},
    Rope: {"fp32": ("rounding",)},
    QueryScale: {"fp32": ("rounding",)},
    Router: {"fp32": ("rounding", "weights_rounding")},
}


def _as_named_now(tp: Any, x: dict[str, Any]) -> dict[str, Any]:
    """Fields under the names they had in zoo.json until November 2026, when each class had its own for its rounding."""
    for old, new in _ONCE_FP32.get(tp, {}).items():
        if old in x and not any(name in x for name in new):
            x = {**x, **dict.fromkeys(new, "last" if x[old] in (True, "fp32") else "first")}
            del x[old]
    return x


def _from_json(tp: Any, x: Any, where: str) -> Any:
    """Build a value of type `tp` from JSON, strictly: a typo in zoo.json must not become a default."""
    if dataclasses.is_dataclass(x):
        return x  # already built (the layers)
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin is Literal:
        if x not in args:
            raise ZooError(f"zoo.json: {where} is {x!r:.100}; expected one of {', '.join(map(repr, args))}")
        return x
    if origin is tuple:
        if not isinstance(x, list):
            raise ZooError(f"zoo.json: {where} should be a list, found {type(x).__name__}")
        if len(x) > MAX_LAYERS:
            raise ZooError(f"zoo.json: {where} is a list of {len(x)}; expected at most {MAX_LAYERS}")
        return tuple(_from_json(args[0], v, f"{where}[{n}]") for n, v in enumerate(x))
    if args:  # a union
        if x is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        classes = [a for a in options if dataclasses.is_dataclass(a)]
        if len(classes) > 1:
            kind = x.get("kind") if isinstance(x, dict) else None
            for c in classes:
                if typing.get_args(_hints(typing.cast(type, c))["kind"])[0] == kind:
                    return _from_json(c, x, where)
            raise ZooError(f"zoo.json: {where}.kind is {kind!r}, which this version of zoo does not know")
        return _from_json(options[0], x, where)
    if dataclasses.is_dataclass(tp):
        if not isinstance(x, dict):
            raise ZooError(f"zoo.json: {where} should be an object, found {type(x).__name__}")
        hints = _hints(typing.cast(type, tp))
        x = _as_named_now(tp, x)
        if unknown := sorted(set(x) - set(hints)):
            raise ZooError(
                f"zoo.json: {where} has unknown field(s) {', '.join(unknown)}; written by a newer zoo?"
            )
        try:
            return tp(**{k: _from_json(hints[k], v, f"{where}.{k}") for k, v in x.items()})  # type: ignore[operator]
        except TypeError as e:
            raise ZooError(f"zoo.json: {where}: {e}") from None
    if tp is float and isinstance(x, int) and not isinstance(x, bool):
        try:
            return float(x)
        except OverflowError:
            raise ZooError(f"zoo.json: {where} is a number beyond all floats") from None
    if not isinstance(x, tp) or (tp is int and isinstance(x, bool)):
        raise ZooError(f"zoo.json: {where} should be {tp.__name__}, found {x!r:.100}")
    return x


def differences(want: Any, found: Any, at: str = "spec") -> Iterator[str]:
    """Where two values of one type differ: field, wanted and what would be read."""
    if dataclasses.is_dataclass(want) and type(want) is type(found):
        for f in dataclasses.fields(want):
            yield from differences(getattr(want, f.name), getattr(found, f.name), f"{at}.{f.name}")
    elif isinstance(want, tuple) and isinstance(found, tuple) and len(want) == len(found):
        for i, (a, b) in enumerate(zip(want, found)):
            yield from differences(a, b, f"{at}[{i}]")
    elif want != found:
        yield f"{at} is {want!r:.80}, and it would be read as {found!r:.80}"
