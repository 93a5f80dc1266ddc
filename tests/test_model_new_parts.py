"""Parts that few families have, each against its formula in float64, and each in a whole small decoder."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F_

from zoo import config
from zoo.config import Config
from zoo.describe import describe
from zoo.errors import ZooError
from zoo.kernels.rope import rotate
from zoo.layout import layout
from zoo.model import Decoder, moe, rope
from zoo.model.cache import alibi_slopes
from zoo.model.ffn import XIELU, activate
from zoo.soundness import refuse_unsound
from zoo.spec import (
    MLP,
    Alibi,
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
    PerLayerEmbedding,
    QKNorm,
    Rope,
    RopeScaling,
    Rounding,
    Router,
    ShortConv,
    Spec,
)
from zoo.verify.faults import CATALOGUE, Subject
from zoo.verify.faults.parts import PARTS as PART_FAULTS
from zoo.verify.ours import other_choice

D, V, F = 16, 40, 12
N = Norm(1e-5)
LN = Norm(1e-5, kind="layer", rounding="last")
ROPE = Rope(100.0, 8)
ATTENTION = Attention(4, 2, 8, 8**-0.5, ROPE)
LONG = RopeScaling(
    "longrope", 4.0, 8, attention_factor=1.2, short=(1.0, 1.1, 1.2, 1.3), long=(1.0, 2.0, 3.0, 4.0)
)
LATENT = LatentAttention(2, 8, 6, 4, 8, 0.3, N, rope=Rope(100.0, 4))
INDEXER = Indexer(2, 6, 3, Rope(100.0, 4, interleaved=True), Norm(1e-6, kind="layer"))
BESIDE = MoE(5, MLP(6, "gelu_tanh"), Router(2, "softmax", normalize=True, expert_scale=True, norm=N, input_scale=D**-0.5),
             MLP(F, "gelu_tanh"), norm=N, post_norm=N, shared_post_norm=N)  # fmt: skip

MAMBA = Mamba(
    4,
    3,
    2,
    5,
    3,
    replace(N, rounding="last"),
    in_scale=1.2,
    parts_scales=(0.7, 1.3, 0.5, 1.6, 0.9),
    out_scale=0.4,
)
SCALED = MoE(5, MLP(6), Router(2, "sigmoid", selection_bias=True, normalize=True), MLP(F), routed_scale=1.7)


WEIGHTLESS = replace(N, weight="none")
LAST = Rope(100.0, 4, interleaved=True, rounding="last")
COMPRESSED = CompressedAttention(
    4, 8, 10, 3, 8**-0.5, LAST, N, WEIGHTLESS, 2, 5, Compressor(2, True, N), Indexer(3, 6, 1, LAST, N)
)


def model(*layers: Layer, **ends: object) -> Spec:
    return Spec("t", D, V, layers, N, ends.pop("tied", False), 64, **ends)  # type: ignore[arg-type]


def block(mixer: object = ATTENTION, ffn: object = MLP(F), **more: object) -> Layer:
    return Layer(mixer, ffn, **{"attn_norm": N, "ffn_norm": N, **more})  # type: ignore[arg-type]


# A decoder with the part, and what `describe` says of it.
PARTS: dict[str, tuple[Spec, str]] = {
    "longrope": (model(block(replace(ATTENTION, rope=replace(ROPE, scaling=LONG)))), "LongRoPE x4 from 8"),
    "proportional RoPE": (model(block(replace(ATTENTION, rope=replace(ROPE, turning=1)))), "2 of 8 channels turn"),
    "backwards RoPE": (model(block(replace(ATTENTION, rope=replace(ROPE, backwards=True)))), "RoPE, theta 100, backwards"),
    "one norm for both": (model(block(ffn_norm=None, parallel=True)), "side by side, one norm for both"),
    "a norm for each": (model(block(parallel=True, residual_scale=0.5)), "side by side, a norm each, branches x 0.5"),
    "LayerNorm without bias": (model(block(attn_norm=replace(LN, bias=False))), "LayerNorm without bias"),
    "residual multiplier": (model(block(residual_scale=0.22)), "branches x 0.22"),
    "multiplied after a norm": (model(block(residual_scale=0.22, attn_post_norm=N, ffn_post_norm=N)), "branches x 0.22"),
    "softplus per head": (
        model(block(replace(ATTENTION, gate=True, gate_act="softplus", gate_over="head"))), "softplus output gate per head"),
    "clamped SwiGLU": (model(block(ffn=MLP(F, limit=0.2))), "SwiGLU clamped at 0.2"),
    "Step's SwiGLU": (model(block(ffn=MLP(F, limit=0.2, limit_after=True))), "clamped at 0.2 after its activation"),
    "ReLU": (model(block(ffn=MLP(F, "relu", gated=False, bias=True))), "ReLU, d_ff 12, biases"),
    "quick GELU": (model(block(ffn=MLP(F, "quick_gelu", gated=False))), "GELU (sigmoid)"),
    "xIELU": (model(block(ffn=MLP(F, "xielu", gated=False))), "xIELU"),
    "dense beside experts": (model(block(ffn=BESIDE, ffn_post_norm=N, scalar=True)), "each between norms of its own"),
    "scaled experts": (model(block(ffn=SCALED)), "their sum x 1.7"),
    "short convolution": (model(block(ShortConv(3)), block()), "gated short convolution of 3 tokens"),
    "short convolution, biases": (model(block(ShortConv(3, bias=True))), "gated short convolution of 3 tokens, biases"),
    "state space beside attention": (
        model(block(beside=MAMBA), block(beside=replace(MAMBA, out_norm=None)),
              block(replace(MAMBA, norm_first=True, parts_scales=(), in_scale=1.0, out_scale=1.0))),
        "heads of 8, beside Mamba-2, 4 heads of 3, 2 groups, state 5"),
    "the first Mamba": (
        model(block(Mamba1(12, 5, 3, 4, N))), "Mamba, 12 channels, state 5, dt from 4, norms of dt, B and C"),
    "the first Mamba, bare": (
        model(block(Mamba1(10, 5, 2, 3, conv_bias=False))), "Mamba, 10 channels, state 5, dt from 3"),
    "scaled MLP": (model(block(ffn=MLP(F, gate_scale=0.6, out_scale=1.7))), "gate x 0.6, output x 1.7"),
    "compressed attention in streams": (
        model(block(COMPRESSED), block(replace(COMPRESSED, compressor=Compressor(5, False, N), indexer=None)),
              block(replace(COMPRESSED, compressor=None, indexer=None)), hyper=HyperConnections(3, WEIGHTLESS, 0.02, 4)),
        "CSA, 4 heads of 8 on one latent, queries through 10, sliding window 3 and entries, one for each 2 tokens, made of 4 tokens"),
    "experts by token": (
        model(block(ffn=MoE(5, MLP(6), Router(2, "sqrt_softplus", normalize=True, by_token=V)))), "experts by the token's id"),
    "shared index": (
        model(block(replace(LATENT, indexer=INDEXER)), block(replace(LATENT, indexer_from=0))), "an earlier layer's indexer"),
    "ALiBi": (model(block(replace(ATTENTION, rope=None, alibi=Alibi())), embed_norm=LN), "ALiBi: a bias by distance"),
    "offset positions": (
        model(block(replace(ATTENTION, rope=None)), positions=30, positions_offset=2, head_bias=True), "head with a bias"),
    "values from keys": (
        model(block(replace(ATTENTION, value_from_key=True, qk_norm=QKNorm(N), value_norm=Norm(1e-5, weight="none")))),
        "values are the keys before their norm and RoPE"),
    "a norm's weight for each head": (
        model(block(replace(ATTENTION, qk_norm=QKNorm(replace(LN, bias=False), over="each_head")))),
        "LayerNorm without bias per head, a weight each"),
    "an RMS norm's weight for each head": (
        model(block(replace(ATTENTION, qk_norm=QKNorm(N, over="each_head")))), "RMSNorm per head, a weight each"),
    "clipped": (model(block(replace(ATTENTION, clip=0.4, qkv_bias=True))), "q, k, v clipped at 0.4"),
    "values from plain keys": (model(block(replace(ATTENTION, value_from_key=True))), "values are the keys"),
    "per-layer embedding": (
        model(block(scalar=True), block(), per_layer_embedding=PerLayerEmbedding(V, 4, N, rounding="last")),
        "per-layer embeddings of 4"),
    "layer scalar": (model(block(scalar=True), block()), "a learned scale at the layer's end"),
}  # fmt: skip


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(a: Tensor, b: Tensor, atol: float = 3e-6) -> None:
    torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=1e-5)


def filled(spec: Spec, dtype: torch.dtype = torch.float32) -> Decoder:
    m = Decoder(spec)
    m.load_state_dict(tensors_of(spec, dtype), assign=True)
    return m


def tensors_of(spec: Spec, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        n: rand(V, 5, seed=i).argsort(-1)[:, :2]
        if s.counts
        else ((rand(*s.shape, seed=i) * (0.5 if len(s.shape) > 1 else 0.3)) + (len(s.shape) == 1)).to(dtype)
        for i, (n, s) in enumerate(layout(spec).items())
    }


def ids(n: int = 7) -> Tensor:
    return torch.randint(0, V, (2, n), generator=torch.Generator().manual_seed(1))


# --- every part, in a decoder -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_a_decoder_with_the_part_has_the_tensors_of_its_layout_and_is_described(name: str) -> None:
    spec, says = PARTS[name]
    refuse_unsound(spec, "here")
    assert Spec.from_dict(spec.to_dict()) == spec
    shapes = {n: tuple(p.shape) for n, p in Decoder(spec).named_parameters()}
    assert shapes == {n: s.shape for n, s in layout(spec).items()}
    assert says in " | ".join(describe(spec).values())


@pytest.mark.parametrize("name", PARTS)
def test_with_a_cache_the_part_computes_the_same(name: str) -> None:
    m = filled(PARTS[name][0])
    whole, cache = m(ids()), m.cache(2, 12)
    pieces = torch.cat([m(p, cache) for p in ids().split((3, 1, 2, 1), 1)], 1)
    # As a whole, since the largest of 560 roundings is twice another machine's: of streams, which multiply them, 1.2e-6 on a Xeon
    # with AMX, of all else at most 5e-7.
    assert (pieces - whole).norm() < 4e-6 * whole.norm()


@pytest.mark.parametrize("name", PARTS)
def test_every_tensor_of_the_part_matters(name: str) -> None:
    spec = PARTS[name][0]
    tensors = tensors_of(spec)
    text = ids(33 if "compressed" in name else 7)  # entries to choose from
    plain = filled(spec)(text)
    for n in tensors:
        m = Decoder(spec)
        t = tensors[n]
        other = t * 0.5 + 0.1 * rand(*t.shape) if t.is_floating_point() else t.roll(1, 0)
        m.load_state_dict({**tensors, n: other}, assign=True)
        assert (m(text) - plain).abs().max() > 1e-5, n


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in PARTS
        if n
        not in ("dense beside experts", "scaled experts", "shared index", "compressed attention in streams")
    ],
)  # no choices flip
def test_in_bf16_the_part_is_near_what_it_is_in_fp32(name: str) -> None:
    spec = PARTS[name][0]
    half = filled(spec, torch.bfloat16)
    wide = Decoder(spec)
    floats = {n: t.float() if t.is_floating_point() else t for n, t in half.state_dict().items()}
    wide.load_state_dict(floats, assign=True)
    a, b = half(ids()).float(), wide(ids())
    assert half(ids()).dtype == torch.bfloat16
    assert (a - b).norm() < 0.03 * b.norm()


# --- positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("long_factor", "magnitudes"), [(None, (1.2, 1.2)), (1.7, (1.2, 1.7))])
def test_longrope_divides_by_the_short_table_until_a_position_lies_beyond(
    long_factor: float | None, magnitudes: tuple[float, float]
) -> None:
    r = replace(ROPE, scaling=replace(LONG, long_attention_factor=long_factor))
    for T, divisors, m in [(8, LONG.short, magnitudes[0]), (9, LONG.long, magnitudes[1])]:
        assert rope.is_far(r, T) == (T > 8)
        cos, sin = rope.tables(r, torch.arange(T), torch.float32, rope.is_far(r, T))
        for t in range(T):
            for j, divisor in enumerate(divisors):
                angle = t / (divisor * 100.0 ** (2 * j / 8))
                assert cos[t, j].item() == pytest.approx(m * math.cos(angle), abs=2e-6)
                assert sin[t, j].item() == pytest.approx(m * math.sin(angle), abs=2e-6)


def test_longrope_is_read_from_a_config_by_the_names_that_a_family_has_for_it() -> None:
    told = {
        "type": "su",
        "short_factor": [1, 2],
        "long_factor": [3, 4.5],
        "original_max_position_embeddings": 4096,
    }
    ends = {"max_position_embeddings": 131072, "rope_theta": 10000.0}
    c = Config({**ends, "rope_scaling": told})
    names = ("longrope", "su", "yarn")
    s = config.rope(c, config.rope_parameters(c), 4, longrope=names).scaling
    assert s is not None and s.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert (s.kind, s.factor, s.original_context, s.short, s.long) == (
        "longrope",
        32,
        4096,
        (1.0, 2.0),
        (3.0, 4.5),
    )
    assert s.long_attention_factor is None
    c = Config({**ends, "rope_scaling": {**told, "short_mscale": 1.1, "long_mscale": 1.2}})
    s = config.rope(c, config.rope_parameters(c), 4, longrope=names).scaling
    assert s is not None and (s.attention_factor, s.long_attention_factor) == (1.1, 1.2)
    with pytest.raises(ZooError, match="rope_type is 'su'"):
        config.rope(c, config.rope_parameters(c), 4)


def test_tokens_of_both_longrope_tables_are_never_mixed() -> None:
    m = filled(PARTS["longrope"][0])
    text = ids(12)
    cache = m.cache(2, 16)
    m(text[:, :6], cache)
    with pytest.raises(
        ZooError, match="beyond 8 positions .* 6 tokens in the cache .* run the whole text again"
    ):
        m(text[:, 6:9], cache)
    assert cache.length == 6
    close(m(text[:, 6:8], cache), m(text[:, :8])[:, 6:], atol=2e-5)
    cache.reset()
    pieces = [m(p, cache) for p in text.split((9, 1, 2), 1)]
    close(torch.cat(pieces, 1)[:, 8:], torch.cat([m(text[:, :9])[:, 8:], m(text)[:, 9:]], 1), atol=2e-5)


def test_generation_past_the_border_of_longrope_reads_the_text_anew() -> None:
    m = filled(PARTS["longrope"][0])
    text = ids(5)
    expected = text
    for _ in range(8):
        expected = torch.cat((expected, m(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(m.generate(text, 8), expected)


def test_proportional_rope_turns_the_first_pairs_by_the_angles_of_the_whole_head() -> None:
    freqs = rope.inverse_frequencies(Rope(100.0, 12, RopeScaling("linear", 2.0), turning=2))
    assert freqs.tolist() == pytest.approx([0.5, 0.5 * 100 ** (-2 / 12), 0, 0, 0, 0])


def test_rope_backwards_undoes_rope() -> None:
    x, at = rand(1, 5, 2, 8), torch.arange(5)
    there = rotate(x, *rope.tables(ROPE, at, torch.float32), False)
    back = rope.tables(replace(ROPE, backwards=True), at, torch.float32)
    close(rotate(there, *back, False), x)
    assert not torch.allclose(rotate(x, *back, False), there, atol=0.1)


@pytest.mark.parametrize("n", [1, 2, 6, 8, 12, 71])
def test_alibi_slopes_are_powers_of_two_to_the_minus_eight_over_n(n: int) -> None:
    # By the reference's own recursion, from arXiv 2108.12409.
    def slopes(n: int) -> list[float]:
        if n & (n - 1) == 0:
            return [2 ** (-8 * i / n) for i in range(1, n + 1)]
        lower = 2 ** math.floor(math.log2(n))
        return slopes(lower) + slopes(2 * lower)[0::2][: n - lower]

    assert alibi_slopes(n) == pytest.approx(slopes(n), rel=1e-12)


@pytest.mark.parametrize("a", [Alibi(), Alibi(scale=0.5), Alibi(bf16=True)])
def test_alibi_adds_to_a_score_by_the_position_of_the_key(a: Alibi) -> None:
    spec = model(block(replace(ATTENTION, n_heads=6, n_kv_heads=3, rope=None, alibi=a), None))
    m, x = filled(spec), rand(1, 5, D)
    _, ctx = m.start(torch.arange(5)[None])
    layer = m.layers[0].attn
    q, k, v = (layer.qkv.weight.double() @ x[0].double().T).T.split((48, 24, 24), -1)
    out = []
    for t in range(5):
        heads = []
        for h in range(6):
            slope = 2.0 ** (-2 * (h + 1)) if h < 4 else 2.0 ** -(2 * (h - 4) + 1)
            scores = []
            for s in range(t + 1):
                bias = torch.tensor(slope).bfloat16() * s if a.bf16 else slope * s
                key = k[s, 8 * (h // 2) : 8 * (h // 2 + 1)]
                scores.append(q[t, 8 * h : 8 * h + 8] @ key * 8**-0.5 + a.scale * float(bias))
            p = torch.stack(scores).softmax(0)
            heads.append(p @ v[: t + 1, 8 * (h // 2) : 8 * (h // 2 + 1)])
        out.append(layer.out.weight.double() @ torch.cat(heads))
    close(layer(x, ctx)[0].detach(), torch.stack(out).detach(), atol=1e-5)


def test_learned_positions_start_at_a_row() -> None:
    m = filled(PARTS["offset positions"][0])
    x, _ = m.start(torch.tensor([[3, 4, 3]]))
    assert torch.equal(x[0], m.embed.weight[[3, 4, 3]] + m.positions.weight[[2, 3, 4]])
    with pytest.raises(ZooError, match="has 30 positions"):
        m(torch.zeros(1, 31, dtype=torch.int64))


def test_an_embedding_is_normed_before_the_first_layer_and_the_head_adds_its_bias() -> None:
    m = filled(
        model(embed_norm=Norm(1e-3, weight="none"), head_bias=True, embed_scale=3.0, embed_rounding="last")
    )
    x = m.embed.weight[[5]].double() * 3
    x = x / (x.square().mean() + 1e-3).sqrt()
    close(m.start(torch.tensor([[5]]))[0][0], x)
    normed = x / (x.square().mean() + 1e-5).sqrt() * m.norm.weight
    close(m(torch.tensor([[5]]))[0], normed @ m.head.weight.double().T + m.head.bias, atol=1e-5)


# --- the layer ----------------------------------------------------------------------------------------------


def rms(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize(("parallel", "one_norm"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("scale", "scalar"), [(1.0, False), (0.3, True)])
@pytest.mark.parametrize("T", [1, 4])
def test_a_layers_branches_stand_side_by_side_or_follow(
    parallel: bool, one_norm: bool, scale: float, scalar: bool, T: int
) -> None:
    norm = {"ffn_norm": None} if one_norm else {}
    spec = model(block(parallel=parallel, residual_scale=scale, scalar=scalar, **norm))
    m = filled(spec)
    wide = Decoder(spec)
    wide.load_state_dict({n: t.double() for n, t in m.state_dict().items()}, assign=True)
    layer, x = wide.layers[0], rand(1, T, D).double()
    _, ctx = m.start(torch.arange(T)[None])
    ctx.dtype = torch.float64
    with torch.no_grad():
        n1 = layer.attn_norm.weight
        mixed = x + scale * layer.attn(rms(x, n1), ctx)
        read = x if parallel else mixed
        y = mixed + scale * layer.mlp(rms(read, n1 if one_norm else layer.ffn_norm.weight))
        y = y * layer.scalar if scalar else y
        _, ctx = m.start(torch.arange(T)[None])
        close(m.layers[0](x.float(), ctx), y, atol=2e-5)


def test_in_bf16_branches_side_by_side_are_added_in_the_order_that_the_spec_says() -> None:
    x, sums = rand(1, 4, D).bfloat16(), {}
    for adds in ("sum", "in_turn"):
        m = filled(model(block(parallel=True, adds=adds)), torch.bfloat16)
        _, ctx = m.start(torch.arange(4)[None])
        layer = m.layers[0]
        with torch.no_grad():
            sums[adds] = layer(x, ctx)
            a, b = (
                layer.attn(layer.attn_norm(x), m.start(torch.arange(4)[None])[1]),
                layer.mlp(layer.ffn_norm(x)),
            )
        assert torch.equal(sums[adds], x + (a + b) if adds == "sum" else (x + a) + b)
    assert not torch.equal(sums["sum"], sums["in_turn"])


def test_layer_norm_has_no_bias_or_no_weight_either_and_is_rounded_once() -> None:
    x = (rand(3, D) + 2).bfloat16()
    exact = torch.nn.functional.layer_norm(x.double(), (D,), None, None, 1e-5)
    for weight in ("plain", "none"):
        m = filled(replace(model(), norm=replace(LN, bias=False, weight=weight)), torch.bfloat16).norm
        w = 1.0 if m.weight is None else m.weight.double()
        assert m.bias is None and (m.weight is None) == (weight == "none")
        found = m(x).double()
        assert (
            (found - exact * w).abs() <= torch.finfo(torch.bfloat16).eps / 2 * (exact * w).abs() + 1e-6
        ).all()


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_each_head_may_have_a_norm_weight_of_its_own(kind: str) -> None:
    n = QKNorm(Norm(1e-5, kind=kind, bias=False), over="each_head")  # type: ignore[arg-type]
    part, x = (
        filled(model(block(replace(ATTENTION, rope=None, qk_norm=n), None))).layers[0].attn,
        rand(2, 3, 32),
    )
    heads = x.double().unflatten(-1, (4, 8))
    centred = heads - heads.mean(-1, keepdim=True) if kind == "layer" else heads
    _, ctx = filled(model()).start(ids(3))
    assert part.q_norm.weight.shape == (4, 8) and part.k_norm.weight.shape == (2, 8)
    expected = rms(centred, part.q_norm.weight.double()).transpose(1, 2)
    close(part._position(x, 4, "q_norm", ctx).detach(), expected.detach(), atol=1e-5)


@pytest.mark.parametrize("act", ["sigmoid", "softplus"])
@pytest.mark.parametrize("over", ["channel", "head"])
def test_attention_is_gated_by_channel_or_by_head(act: str, over: str) -> None:
    spec = replace(ATTENTION, gate=True, gate_act=act, gate_over=over)
    m, x = filled(model(block(spec, None))), rand(1, 3, D)
    gated, plain = m.layers[0].attn, filled(model(block(replace(ATTENTION), None))).layers[0].attn
    q, gate, k, v = gated.qkv.weight.split(gated.qkv.parts)
    assert gate.shape == ((32 if over == "channel" else 4), D)
    with torch.no_grad():
        plain.qkv.weight.data = torch.cat((q, k, v))
        plain.out.weight.data = torch.eye(32)
        _, ctx = m.start(torch.arange(3)[None])
        heads = plain(x, ctx).double().unflatten(-1, (4, 8))
        g = (x.double() @ gate.double().T).unflatten(-1, (4, -1))
        g = g.sigmoid() if act == "sigmoid" else (1 + g.exp()).log()
        close(gated(x, ctx), (heads * g).flatten(2) @ gated.out.weight.double().T, atol=1e-5)


def test_values_are_the_keys_before_their_norm_and_rotation() -> None:
    spec = PARTS["values from keys"][0]
    m, x = filled(spec), rand(1, 3, D)
    other = filled(model(block(replace(spec.layers[0].mixer, value_from_key=False))))  # type: ignore[type-var]
    mine, theirs = m.layers[0].attn, other.layers[0].attn
    q, k = mine.qkv.weight.split(mine.qkv.parts)
    with torch.no_grad():
        theirs.load_state_dict({**mine.state_dict(), "qkv.weight": torch.cat((q, k, k))})
        _, ctx = m.start(torch.arange(3)[None])
        close(mine(x, ctx), theirs(x, ctx))


def test_queries_keys_and_values_are_clipped_as_projected() -> None:
    m, x = filled(PARTS["clipped"][0]), rand(1, 3, D)
    other = filled(model(block(replace(ATTENTION, qkv_bias=True))))
    mine, theirs = m.layers[0].attn, other.layers[0].attn
    with torch.no_grad():
        _, ctx = m.start(torch.arange(3)[None])
        projected = (x @ mine.qkv.weight.T + mine.qkv.bias)[0]  # [T, q | k | v], of the three tokens
        assert (projected.abs() > 0.4).float().mean() > 0.3
        # An input of unit vectors, and the clipped values as the weight's columns: the other projects to just these.
        theirs.qkv.weight.zero_()[:, :3] = projected.clamp(-0.4, 0.4).T
        theirs.qkv.bias.zero_()
        theirs.out.weight.copy_(mine.out.weight)
        close(mine(x, ctx), theirs(torch.eye(D)[None, :3], ctx))


# --- feed-forward and experts -------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
def test_a_plain_clamp_of_swiglu_stands_before_its_activation_or_after(after: bool) -> None:
    h = rand(50, 12) * 3
    gate, up = h.double().chunk(2, -1)
    silu = gate / (1 + (-gate).exp()) if after else gate.clamp(max=0.7) / (1 + (-gate.clamp(max=0.7)).exp())
    expected = (silu.clamp(max=0.7) if after else silu) * up.clamp(-0.7, 0.7)
    close(activate(h, MLP(6, limit=0.7, limit_after=after)), expected)


def test_relu_quick_gelu_and_xielu_are_what_they_are_called() -> None:
    x = torch.cat((rand(50) * 3, torch.tensor([0.0, -1e-9])))
    y = x.double()
    close(activate(x, MLP(6, "relu", gated=False)), y.clamp(min=0))
    close(activate(x, MLP(6, "quick_gelu", gated=False)), y / (1 + (-1.702 * y).exp()))
    act = XIELU()
    values = {"positive": torch.tensor([0.3]), "negative": torch.tensor([-0.4])}
    act.load_state_dict(values | {"beta": torch.tensor(0.6), "near": torch.tensor(-0.2)})
    p, n = math.log1p(math.exp(0.3)), 0.6 + math.log1p(math.exp(-0.4))
    expected = [
        p * v * v + 0.6 * v if v > 0 else n * (math.expm1(min(v, -0.2)) - v) + 0.6 * v for v in y.tolist()
    ]
    close(act(x).detach(), torch.tensor(expected, dtype=torch.float64))


ROUTERS = {
    "softmax over all, bias in the choice only": Router(
        3, "softmax", selection_bias=True, normalize=True, normalize_floor=0.9),
    "group by its best": Router(2, "softmax", n_groups=4, top_groups=2, group_top=1, masked_groups="zero", scale=3.0),
    "sigmoid of the chosen, normalised": Router(3, "sigmoid", over="chosen", normalize=True),
    "learned scale per expert": Router(3, "softmax", normalize=True, expert_scale=True),
    "norm of its own": Router(3, "softmax", norm=Norm(1e-5), input_scale=0.25),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_choose_and_weigh(kind: str) -> None:
    r = ROUTERS[kind]
    m, x = moe.Router(r, 8, D), rand(30, D)
    m.load_state_dict(
        {n: rand(*p.shape) * 0.3 + (n in ("expert_scale", "norm.weight")) for n, p in m.named_parameters()}
    )
    chosen, weights = m(x)
    for i in range(30):
        read = x[i].double()
        if r.norm is not None:
            read = rms(read, m.norm.weight.double()) * 0.25
        logits = m.weight.double() @ read
        scores = logits.softmax(0) if r.score == "softmax" else logits.sigmoid()
        choice = scores if m.selection_bias is None else scores + m.selection_bias
        eligible = range(8)
        if r.n_groups > 1:
            best = sorted(range(4), key=lambda g: -max(choice[2 * g : 2 * g + 2].tolist()))[:2]
            eligible = [e for e in range(8) if e // 2 in best]
        expected = sorted(eligible, key=lambda e: -choice[e].item())[: r.top_k]
        assert set(expected) == set(chosen[i].tolist())
        w = scores[chosen[i]]
        if r.normalize:
            w = w / w.sum().clamp(min=r.normalize_floor)
        if m.expert_scale is not None:
            w = w * m.expert_scale[chosen[i]].double()
        close(weights[i].detach(), (w * r.scale).detach())


def test_a_cap_on_a_routers_logits_is_computed_in_fp32_whatever_their_dtype() -> None:
    r, logits = Router(3, "sigmoid", softcap=0.8), rand(9, 8).bfloat16()
    chosen, weights = moe.route(logits, None, r)
    scores = (0.8 * torch.tanh(logits.double() / 0.8)).sigmoid()
    assert torch.equal(chosen.sort(-1).values, scores.topk(3, -1).indices.sort(-1).values)
    close(weights, scores.gather(-1, chosen))


def test_what_experts_give_is_rounded_scaled_and_rounded_again_and_the_shared_expert_is_not_scaled() -> None:
    once, scaled = (
        filled(model(block(None, s)), torch.bfloat16).layers[0].moe
        for s in (replace(SCALED, routed_scale=1.0), SCALED)
    )
    x = rand(30, D).bfloat16()
    shared = once.shared(x)
    routed = moe.experts(x, *once.router(x), once.gate_up, once.down, once.spec)
    assert torch.equal(once(x), routed + shared)
    assert torch.equal(scaled(x), routed * 1.7 + shared)


def test_the_nearest_tie_of_a_router_is_seen_behind_its_norm_and_its_scales() -> None:
    m, x = filled(model(block(None, BESIDE))).layers[0].moe.router, rand(20, D) * 3
    with torch.no_grad():
        chosen, weights = m(x)
        other, other_weights = other_choice(m, x)
        logits = m.logits(x).double()
    for i in range(20):
        order = logits[i].argsort(descending=True).tolist()
        assert set(chosen[i].tolist()) == set(order[:2])
        assert set(other[i].tolist()) == {order[0], order[2]}
        kept = order[0]  # its weight is by its scale, and by what share of the two is its own
        scale = m.expert_scale[kept]
        p = logits[i].softmax(0)
        mine, theirs = weights[i][chosen[i] == kept] / scale, other_weights[i][other[i] == kept] / scale
        close(mine.detach(), (p[kept] / (p[kept] + p[order[1]]))[None])
        close(theirs.detach(), (p[kept] / (p[kept] + p[order[2]]))[None])


def test_a_dense_mlp_and_experts_side_by_side_have_norms_of_their_own() -> None:
    m = filled(PARTS["dense beside experts"][0])
    layer, part, x = m.layers[0], m.layers[0].moe, rand(1, 6, D)
    with torch.no_grad():
        dense = rms(part.shared(rms(x, layer.ffn_norm.weight)).double(), part.shared_post_norm.weight)
        own = rms(x.double(), part.norm.weight)
        logits = (rms(x.double(), part.router.norm.weight) * D**-0.5) @ part.router.weight.double().T
        routed = torch.zeros(6, D, dtype=torch.float64)
        for t in range(6):
            p = logits[0, t].softmax(0)
            best = p.topk(2).indices.tolist()
            for e in best:
                gate, up = (part.gate_up.weight[e].double() @ own[0, t]).chunk(2)
                h = torch.nn.functional.gelu(gate, approximate="tanh") * up
                share = p[e] / p[best].sum() * part.router.expert_scale[e]
                routed[t] += share * (part.down.weight[e].double() @ h)
        y = x + rms(dense + rms(routed, part.post_norm.weight)[None], layer.ffn_post_norm.weight)
        close(layer.feed(layer.ffn_norm(x), x, x), y, atol=3e-5)


@pytest.mark.parametrize("rounding", ["first", "last"])
def test_a_layer_adds_of_its_vector_of_the_second_embedding(rounding: Rounding) -> None:
    spec = model(
        block(None, None, scalar=True), per_layer_embedding=PerLayerEmbedding(V, 5, N, rounding=rounding)
    )
    m, text = filled(spec), ids()
    x, ctx = m.start(text)
    ends, part = m.per_layer, m.layers[0].per_layer
    with torch.no_grad():
        e = x.double()
        projected = rms((e @ ends.proj.weight.double().T) * D**-0.5, ends.norm.weight)
        vector = (projected + ends.embed.weight[text].double() * 5**0.5) * 2**-0.5
        h = torch.nn.functional.gelu(e @ part.gate.weight.double().T, approximate="tanh") * vector
        y = (e + rms(h @ part.out.weight.double().T, part.norm.weight)) * m.layers[0].scalar
        close(m.layers[0](x, ctx), y, atol=1e-5)
        if (
            rounding == "last"
        ):  # constants are rounded with their products, once; the table's is rounded before
            half = filled(spec, torch.bfloat16)
            x, ctx = half.start(text)
            own = half.per_layer.embed.weight[text] * torch.tensor(5**0.5, dtype=torch.bfloat16)
            p = half.per_layer.norm((half.per_layer.proj(x).float() * D**-0.5).bfloat16())
            assert ctx.per_layer is not None
            assert torch.equal(ctx.per_layer[:, :, 0], ((p + own).float() * 2**-0.5).bfloat16())


def test_a_shared_expert_may_be_averaged_with_the_routed_ones() -> None:
    spec = MoE(4, MLP(6), Router(2, "softmax"), MLP(6))
    m = filled(model(block(None, spec))).layers[0].moe
    half = filled(model(block(None, replace(spec, scale=0.5)))).layers[0].moe
    x = rand(1, 5, D)
    with torch.no_grad():
        close(half(x), m(x) / 2)


def test_a_scaled_mlp_scales_its_gate_before_the_activation_and_what_comes_out() -> None:
    m, x = filled(model(block(ffn=MLP(F, gate_scale=0.6, out_scale=1.7)))).layers[0].mlp, rand(3, D)
    gate, up = (x @ m.gate_up.weight.T).chunk(2, -1)
    expected = 1.7 * (F_.silu(0.6 * gate) * up) @ m.down.weight.T
    with torch.no_grad():
        close(m(x), expected.detach(), atol=1e-5)
        close(m(x, x), x + expected.detach(), atol=1e-5)


# --- mixers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_short_convolution_is_gated_before_and_after(bias: bool) -> None:
    m, x = filled(model(block(ShortConv(3, bias), None))), rand(2, 6, D)
    part = m.layers[0].short_conv
    _, ctx = m.start(torch.zeros(2, 6, dtype=torch.int64))

    def of(p: Tensor | None) -> Tensor | float:
        return 0.0 if p is None else p.double()

    b, c, u = (x.double() @ part.in_proj.weight.double().T + of(part.in_proj.bias)).chunk(3, -1)
    y = torch.zeros(2, 6, D, dtype=torch.float64)
    for t in range(6):
        for tap in range(3):
            if t - 2 + tap >= 0:
                y[:, t] += (b * u)[:, t - 2 + tap] * part.conv.weight[:, tap]
    y = (c * (y + of(part.conv.bias))) @ part.out.weight.double().T + of(part.out.bias)
    close(part(x, ctx).detach(), y.detach(), atol=1e-5)


@pytest.mark.parametrize("of", ["norm before gate", "norm after gate", "no norm"])
def test_a_state_space_beside_attention_is_the_recurrence_and_their_sum_the_branch(of: str) -> None:
    norm = None if of == "no norm" else N
    s = replace(MAMBA, out_norm=norm, norm_first=of == "norm before gate", dt_min=0.4)
    m, x = filled(model(block(beside=s, ffn=None))), rand(2, 6, D)
    layer = m.layers[0]
    part = layer.mamba.double()
    scale = torch.tensor(
        [k for k, n in zip(s.parts_scales, (12, 12, 10, 10, 4), strict=True) for _ in range(n)]
    )
    normed = layer.attn_norm(x).detach()
    z, u, dt = ((1.2 * normed.double() @ part.in_proj.weight.T) * scale.double()).split((12, 32, 4), -1)
    u = F_.pad(u, (0, 0, 2, 0)).unfold(1, 3, 1)  # [B, T, channels, taps]
    u = F_.silu((u * part.conv.weight).sum(-1) + part.conv.bias)
    dt = F_.softplus(dt + part.dt_bias).clamp(min=0.4)
    state, out = torch.zeros(2, 4, 3, 5, dtype=torch.float64), []
    for t in range(6):
        v, b, c = u[:, t].split((12, 10, 10), -1)
        v = v.view(2, 4, 3)
        b, c = (g.view(2, 2, 5).repeat_interleave(2, 1) for g in (b, c))
        decay = torch.exp(-torch.exp(part.A_log) * dt[:, t])[..., None, None]
        state = decay * state + (dt[:, t, :, None] * v)[..., None] * b[:, :, None]
        out.append(((state * c[:, :, None]).sum(-1) + part.D[:, None] * v).flatten(1))
    y, gate = torch.stack(out, 1), F_.silu(z)

    def normalised(y: Tensor) -> Tensor:
        if norm is None:
            return y
        groups = y.unflatten(-1, (2, 6))
        groups = groups / (groups.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        return groups.flatten(2) * part.norm.weight

    y = normalised(y) * gate if s.norm_first else normalised(y * gate)
    y = (y @ part.out.weight.T * s.out_scale).detach()
    part.float()
    _, ctx = m.start(torch.zeros(2, 6, dtype=torch.int64))
    with torch.no_grad():
        close(layer(x, ctx), x + layer.attn(normed, ctx) + y, atol=1e-5)


def test_a_layer_without_an_indexer_sees_what_an_earlier_one_chose() -> None:
    spec = PARTS["shared index"][0]
    m = filled(spec)
    x, ctx = m.start(ids())
    with torch.no_grad():
        x = m.layers[0](x, ctx)
        shared = m.layers[1](x, ctx)
        chosen = ctx.chosen[0]
        assert chosen.allowed is not None and chosen.allowed.sum(-1).max() == 3
        assert set(ctx.chosen) == {0}
        plain = filled(replace(spec, layers=(spec.layers[0], block(LATENT)))).layers[1]
        plain.load_state_dict(m.layers[1].state_dict())
        ctx._made[("visible", None, None)] = chosen
        close(shared, plain(x, ctx))


def test_an_entry_pools_its_own_tokens_and_those_of_the_window_before_each_channel_by_a_softmax_of_its_own() -> (
    None
):
    spec = PARTS["compressed attention in streams"][0]
    m, n, d = filled(spec), 2, COMPRESSED.head_dim
    part, x = m.layers[0].attn.compressor, rand(1, 7, D)
    _, ctx = m.start(torch.zeros(1, 7, dtype=torch.int64))
    with torch.no_grad():
        made = part(x, ctx, None)
        c, z = (x @ part.kv_gate.weight.T)[0].chunk(2, -1)
    assert made.shape == (1, 3, d)  # the seventh token's window is not full
    for w in range(3):
        of = [(t, slice(0, d)) for t in range(n * (w - 1), n * w) if w] + [
            (t, slice(d, None)) for t in range(n * w, n * (w + 1))
        ]
        values = torch.stack([c[t, s] for t, s in of]).double()
        scores = torch.stack([z[t, s] + part.positions[t % n, s] for t, s in of]).double()
        pooled = (scores.exp() / scores.exp().sum(0) * values).sum(0)
        y = pooled * (pooled.square().mean() + part.norm.spec.eps).rsqrt() * part.norm.weight
        angle = n * w * 100.0 ** -torch.tensor([0.0, 0.5], dtype=torch.float64)
        a, b = y[-4::2].clone(), y[-3::2].clone()
        y[-4::2], y[-3::2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        close(made[0, w], y, atol=3e-5)


def test_hyper_connections_mix_streams_by_a_matrix_whose_columns_sum_to_one_and_rows_nearly() -> None:
    h = HyperConnections(3, WEIGHTLESS, 1e-6, 40)
    m = filled(model(block(), hyper=h))
    part, x = m.layers[0].attn_hyper, rand(3, 2, 5, D)
    with torch.no_grad():
        read, streams, b, mix = part(x)
        new = part.put(read, streams, b, mix)
    close(mix.sum(-2), torch.ones(2, 5, 3), atol=1e-5)
    close(mix.sum(-1), torch.ones(2, 5, 3), atol=0.02)
    flat = x[:, 1, 4].double().flatten()
    z = (part.weight.double() @ flat) * (flat.square().mean() + WEIGHTLESS.eps).rsqrt()
    z = z * part.factors.double().repeat_interleave(torch.tensor([3, 3, 9])) + part.bias.double()
    a = z[:3].sigmoid() + 1e-6
    close(read[1, 4], (a[:, None] * x[:, 1, 4]).sum(0), atol=1e-5)
    for k in range(3):
        kept = sum(mix[1, 4, j, k] * x[j, 1, 4] for j in range(3))
        close(new[k, 1, 4], kept + 2 * z[3 + k].sigmoid() * read[1, 4], atol=1e-5)


# --- what makes no model ------------------------------------------------------------------------------------

UNSOUND = {
    "LongRoPE over 8 channels needs 4 divisors": block(
        replace(ATTENTION, rope=replace(ROPE, scaling=replace(LONG, long=(1.0,))))),
    "a divisor of LongRoPE is 0": block(
        replace(ATTENTION, rope=replace(ROPE, scaling=replace(LONG, long=(1.0, 0.0, 1.0, 1.0))))),
    "would turn 5 of 4 pairs": block(replace(ATTENTION, rope=replace(ROPE, turning=5))),
    "ALiBi is for attention without RoPE": block(replace(ATTENTION, alibi=Alibi())),
    "keys and values are clipped at -1": block(replace(ATTENTION, clip=-1.0)),
    "a kind of output gate is given": block(replace(ATTENTION, gate_over="head")),
    "cannot be keys of 8": block(replace(ATTENTION, value_from_key=True, v_head_dim=4)),
    "a limit belongs to gated SiLU": block(ffn=MLP(F, "gelu", limit=1.0)),
    "without a gate only": block(ffn=MLP(F, "xielu")),
    "of 0 positions shows nothing": block(replace(COMPRESSED, window=0)),
    "4 heads do not make 3 groups": block(replace(COMPRESSED, out_groups=3)),
    "would rotate 10 of 8 channels": block(replace(COMPRESSED, rope=replace(LAST, dim=10))),
    "an indexer picks entries": block(replace(COMPRESSED, compressor=None)),
    "that of queries without a weight": block(replace(COMPRESSED, query_norm=N)),
    "no bias, no groups": block(ffn=MoE(4, MLP(6), Router(2, "sigmoid", selection_bias=True, by_token=V))),
    "other than the": block(ffn=MoE(4, MLP(6), Router(2, "sigmoid", by_token=V + 1))),
    "scores over all experts": block(ffn=MoE(4, MLP(6), Router(2, "sqrt_softplus", over="chosen"))),
    "experts have no learned activation": block(ffn=MoE(2, MLP(F, "xielu", gated=False), Router(1, "softmax"))),
    "near is more than 0, not 0.0": block(ffn=MoE(4, MLP(6), Router(2, "softmax", over="near"))),
    "a convolution of 1 tokens": block(ShortConv(1)),
    "a state space of 5 numbers to a channel, with dt from 0": block(Mamba1(12, 5, 3, 0)),
    "stands beside attention, and there is none": block(LATENT, beside=MAMBA),
    "with beta up to 3.0 grows without bound": block(
        DeltaNet(2, 2, 4, 4, 3, "head", "silu", Norm(1e-5), beta_scale=3.0)),
    "has five parts; there are 2 scales": block(replace(MAMBA, parts_scales=(1.0, 2.0))),
    "norm comes first, and there is none": block(replace(MAMBA, out_norm=None, norm_first=True)),
    "is neither clamped nor sparse": block(ffn=MLP(F, gate_scale=2.0, limit=1.0)),
    "experts have no scales": block(ffn=MoE(2, MLP(F, out_scale=2.0), Router(1, "softmax"))),
    "no earlier layer with an indexer": block(replace(LATENT, indexer_from=0)),
    "an indexer of its own and that of layer 0": block(replace(LATENT, indexer=INDEXER, indexer_from=0)),
}  # fmt: skip


@pytest.mark.parametrize("why", UNSOUND)
def test_choices_that_exclude_each_other_are_refused(why: str) -> None:
    with pytest.raises(ZooError, match=why):
        refuse_unsound(model(UNSOUND[why]), "here")


def test_a_bias_of_a_tied_head_and_an_offset_of_no_positions_are_refused() -> None:
    with pytest.raises(ZooError, match="a head that is the embedding has no bias"):
        refuse_unsound(model(block(), tied=True, head_bias=True), "here")
    with pytest.raises(ZooError, match="there is none"):
        refuse_unsound(model(block(), positions_offset=2), "here")


# --- seeded faults ------------------------------------------------------------------------------------------

# What no family has yet, and a decoder that shows a mistake in it.
WITH_FAULTS: dict[str, Spec] = {
    **{name: spec for name, (spec, _) in PARTS.items()},
    "grouped experts": model(block(ffn=MoE(16, MLP(6), Router(
        2, "sigmoid", n_groups=4, top_groups=1, group_top=1, normalize=True, normalize_floor=1.9)))),
}  # fmt: skip


@pytest.mark.parametrize("fault", sorted(PART_FAULTS))
def test_a_seeded_fault_of_a_part_changes_what_is_computed(fault: str) -> None:
    f = CATALOGUE[fault]
    specs = [s for s in WITH_FAULTS.values() if f.applies(s)]
    assert specs, "nothing shows it"
    shown = []
    for spec in specs:
        clean = Subject(spec, tensors_of(spec))
        faulty = f.inject(clean)
        text = ids(20)
        shown.append((built_of(faulty)(text) - built_of(clean)(text)).abs().max() > 1e-4)
    assert any(shown)


def built_of(s: Subject) -> Decoder:
    m = Decoder(s.spec)
    m.load_state_dict(s.tensors, assign=True)
    return m
