"""Each part of the decoder against its formula, written out with loops and in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.kernels import delta, product
from zoo.kernels.rope import rotate
from zoo.model import Decoder, attention, moe, norm, rope
from zoo.model.cache import Context, State, Visible
from zoo.model.delta import Conv
from zoo.model.ffn import activate, stand_out
from zoo.model.linear import Stacked
from zoo.spec import MLP, Attention, Layer, MoE, Norm, Rope, RopeScaling, Rounding, Router, Spec


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(a: Tensor, b: Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=1e-5)


# --- norms --------------------------------------------------------------------------------------------------


def test_rms_norm_divides_by_the_root_mean_square_and_scales() -> None:
    x, w = rand(3, 5, 8) * 3, rand(8)
    rms = (x.double().pow(2).mean(-1, keepdim=True) + 0.1).sqrt()
    close(norm.rms_norm(x, w, Norm(0.1)), x / rms * w)
    close(norm.rms_norm(x, w, Norm(0.1, weight="plus_one")), x / rms * (1 + w))
    close(norm.rms_norm(x, None, Norm(0.1, weight="none")), x / rms)


def test_rms_norm_rounds_to_bf16_before_or_after_the_weight() -> None:
    x, w = rand(64, 32).bfloat16(), (1 + rand(32)).bfloat16()
    exact = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    early = norm.rms_norm(x, w, Norm(1e-5, rounding="first"))
    late = norm.rms_norm(x, w, Norm(1e-5, rounding="last"))
    assert torch.equal(early, exact.bfloat16() * w)
    assert torch.equal(late, (exact * w.float()).bfloat16())
    assert not torch.equal(early, late)


def test_layer_norm_removes_the_mean_and_adds_a_bias() -> None:
    x, w, b = rand(4, 9) + 2, rand(9), rand(9, seed=1)
    mean, var = x.double().mean(-1, keepdim=True), x.double().var(-1, correction=0, keepdim=True)
    close(norm.layer_norm(x, w, b, Norm(0.1, kind="layer")), (x - mean) / (var + 0.1).sqrt() * w + b)


# --- rope ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_pairs_of_the_first_channels_by_position(interleaved: bool) -> None:
    r = Rope(100.0, 6, interleaved=interleaved)
    x = rand(1, 4, 2, 8)
    y = rotate(x, *rope.tables(r, torch.arange(3, 7), torch.float32), interleaved)
    for t in range(4):
        for j in range(3):
            a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + 3)
            angle = (t + 3) * 100.0 ** (-2 * j / 6)
            xa, xb = x[0, t, :, a], x[0, t, :, b]
            close(y[0, t, :, a], xa * math.cos(angle) - xb * math.sin(angle))
            close(y[0, t, :, b], xb * math.cos(angle) + xa * math.sin(angle))
    assert torch.equal(y[..., 6:], x[..., 6:])


def test_rope_tables_are_rounded_to_the_models_dtype_unless_asked_for_in_fp32() -> None:
    positions = torch.arange(50)
    assert rope.tables(Rope(100.0, 6), positions, torch.bfloat16)[0].dtype == torch.bfloat16
    assert rope.tables(Rope(100.0, 6, rounding="last"), positions, torch.bfloat16)[0].dtype == torch.float32
    both = rope.tables(Rope(100.0, 6, rounding="both"), positions, torch.bfloat16)[0]
    assert both.dtype == torch.float32 and torch.equal(
        both, rope.tables(Rope(100.0, 6), positions, torch.bfloat16)[0].float()
    )


def test_llama3_scaling_keeps_short_waves_divides_long_ones_and_blends_between() -> None:
    s = RopeScaling("llama3", 8.0, 100, low_freq_factor=1.0, high_freq_factor=4.0)
    plain = rope.inverse_frequencies(Rope(1e4, 32))
    scaled = rope.inverse_frequencies(Rope(1e4, 32, s))
    kinds = set()
    for p, q in zip(plain.tolist(), scaled.tolist(), strict=True):
        turns = 100 * p / (2 * math.pi)  # within the original context
        kinds.add("kept" if turns > 4 else "divided" if turns < 1 else "blended")
        share = min(max((turns - 1) / 3, 0), 1)
        assert q == pytest.approx(share * p + (1 - share) * p / 8, rel=1e-5)
    assert len(kinds) == 3


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_scales_a_channel_by_how_often_it_turns_and_multiplies_the_tables(truncate: bool) -> None:
    s = RopeScaling("yarn", 4.0, 64, beta_fast=3.6, beta_slow=0.36, truncate=truncate, attention_factor=1.3)
    plain = rope.inverse_frequencies(Rope(97.0, 12)).tolist()
    scaled = rope.inverse_frequencies(Rope(97.0, 12, s)).tolist()

    def channel(turns: float) -> float:  # where 97^(-2c/12) * 64 = 2 pi turns
        return 12 / 2 * math.log(64 / (2 * math.pi * turns), 97)

    low, high = channel(3.6), channel(0.36)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 11)
    for c, (p, q) in enumerate(zip(plain, scaled, strict=True)):
        interpolated = min(max((c - low) / (high - low), 0), 1)
        assert q == pytest.approx(p / 4 * interpolated + p * (1 - interpolated), rel=1e-5)
    cos, sin = rope.tables(Rope(97.0, 12, s), torch.arange(9), torch.float32)
    close(cos**2 + sin**2, torch.full((9, 6), 1.3**2))


# --- attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("V", [4, 7, 9])
@pytest.mark.parametrize(
    "special", [{}, {"softcap": 1.5}, {"sinks": True}, {"softcap": 1.5, "score_scale": True}]
)
def test_attention_is_a_softmax_over_the_visible_keys(T: int, V: int, special: dict[str, object]) -> None:
    B, H, K, S, D = 2, 6, 3, 9, 7
    q, k, v = rand(B, H, T, D), rand(B, K, S, D), rand(B, K, S, V)
    allowed = torch.rand(T, S, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[:, 2] = True
    sinks = rand(H) if special.get("sinks") else None
    factor = 1 + torch.arange(T) / 3 if special.get("score_scale") else None
    cap = special.get("softcap")
    assert cap is None or isinstance(cap, float)
    y = attention.attend(q, k, v, Visible(allowed), 0.4, sinks, cap, factor)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                scores = k[b, h // 2].double() @ q[b, h, t].double() * 0.4
                if cap is not None:
                    scores = cap * torch.tanh(scores / cap)
                if factor is not None:
                    scores = scores * factor[t]
                weights = scores.exp() * allowed[t]
                total = weights.sum() + (0 if sinks is None else sinks[h].double().exp())
                close(y[b, t, h], weights / total @ v[b, h // 2].double())


def test_attention_written_out_in_blocks_of_queries_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, sinks = rand(1, 2, 11, 4), rand(1, 1, 11, 4), rand(1, 1, 11, 4), rand(2)
    whole = attention.attend(q, k, v, Visible(causal=True), 0.5, sinks)
    monkeypatch.setattr(attention, "BLOCK", 3)
    close(attention.attend(q, k, v, Visible(causal=True), 0.5, sinks), whole)


@pytest.mark.parametrize("special", [{}, {"softcap": 1.5}, {"sinks": rand(6)}])
@pytest.mark.parametrize("span", ["window", "chunk"])
@pytest.mark.parametrize("T", [12, 13, 25])
def test_a_window_costs_by_its_size_and_gives_what_the_whole_mask_gives(
    T: int, span: str, special: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORTEST", 4)
    q, k, v = rand(2, 6, T, 8), rand(2, 3, T, 8), rand(2, 3, T, 5)
    visible = Context.begin(T, None, torch.float32, torch.device("cpu")).visible(**{span: 4})
    assert visible.reach == 4 and visible.allowed is not None
    seen = []
    for name in ("_sdpa", "_written_out"):
        whole = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda q, k, *a, f=whole: seen.append(k.shape[2]) or f(q, k, *a))
    y = attention.attend(q, k, v, visible, 0.5, **special)  # type: ignore[arg-type]
    assert max(seen) <= 4 + 3 and len(seen) == math.ceil(T / 4)
    close(y, attention.attend(q, k, v, Visible(visible.allowed), 0.5, **special))  # type: ignore[arg-type]


# --- feed-forward and experts -------------------------------------------------------------------------------


def test_clamped_silu_clamps_gate_from_above_and_up_on_both_sides() -> None:
    h = rand(5, 12) * 3
    gate, up = h[:, :6].double().clamp(max=1.3), h[:, 6:].double().clamp(-1.3, 1.3)
    expected = (up + 1) * gate / (1 + (-1.2 * gate).exp())
    close(activate(h, MLP(6, act="silu_clamped", limit=1.3, alpha=1.2)), expected)


def test_gaussian_top_k_passes_the_share_that_was_asked_for() -> None:
    gate = rand(200, 1000) * 2 + 1
    passed = (stand_out(gate, 0.9) > 0).float().mean()
    assert abs(passed - 0.1) < 0.005
    cutoff = (
        gate.double().mean(-1, keepdim=True) + gate.double().std(-1, correction=0, keepdim=True) * 1.2815516
    )
    close(stand_out(gate, 0.9), (gate - cutoff).clamp(min=0), atol=1e-5)


ROUTERS = {
    "softmax over all": Router(3, "softmax"),
    "softmax over all, normalised": Router(3, "softmax", normalize=True, scale=1.7),
    "softmax over the chosen": Router(3, "softmax", over="chosen"),
    "softmax over the near": Router(3, "softmax", over="near", near=0.6),
    "sigmoid of the chosen": Router(2, "sigmoid", over="chosen"),
    "softcap": Router(2, "softmax", softcap=1.5),
    "selection bias": Router(
        3, "sigmoid", selection_bias=True, normalize=True, normalize_eps=1e-20, scale=2.5
    ),
    "groups": Router(3, "sigmoid", selection_bias=True, n_groups=4, top_groups=2, normalize=True),
    "groups masked with zero": Router(3, "softmax", n_groups=4, top_groups=2, masked_groups="zero"),
}


@pytest.mark.parametrize("kind", ROUTERS)
def test_router_chooses_and_weighs_experts(kind: str) -> None:
    r = ROUTERS[kind]
    logits, bias = rand(40, 8) * 2, rand(8) * 0.3 if ROUTERS[kind].selection_bias else None
    chosen, weights = moe.route(logits, bias, r)
    for n in range(40):
        row = logits[n].double()
        if r.softcap is not None:
            row = r.softcap * torch.tanh(row / r.softcap)
        scores = row.softmax(0) if r.score == "softmax" else row.sigmoid()
        choice = scores if bias is None else scores + bias
        eligible = set(range(8))
        if r.n_groups > 1:
            size = 8 // r.n_groups
            by_group = [sorted(choice[g * size : (g + 1) * size].tolist())[-2:] for g in range(r.n_groups)]
            best = sorted(range(r.n_groups), key=lambda g: -sum(by_group[g]))[: r.top_groups]
            eligible = {g * size + j for g in best for j in range(size)}
        expected = sorted(eligible, key=lambda e: -choice[e].item())[: r.top_k]
        assert set(chosen[n].tolist()) == set(expected)
        w = scores[chosen[n]]
        if r.over == "chosen" and r.score == "softmax":
            w = row[chosen[n]].softmax(0)
        if r.over == "near":
            left, w = list(range(8)), torch.zeros(r.top_k, dtype=torch.float64)
            for i, e in enumerate(expected):
                near = [j for j in left if row[e] - row[j] <= r.near * max(row[j].abs(), row[e])]
                assert chosen[n, i] == e and e in near
                w[i] = row[near].softmax(0)[near.index(e)]
                left.remove(e)
        if r.normalize:
            w = w / w.sum()
        close(weights[n], w * r.scale)


@pytest.mark.parametrize("weight_input", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_experts_sum_what_each_chosen_expert_makes_of_a_token(weight_input: bool, bias: bool) -> None:
    E, F, d, N, k = 6, 5, 7, 13, 2
    spec = MoE(E, MLP(F, bias=bias), Router(k, "softmax"), weight_input=weight_input)
    up, down = Stacked(E, d, F, F, bias=bias), Stacked(E, F, d, bias=bias)
    for i, p in enumerate([*up.parameters(), *down.parameters()]):
        p.data = rand(*p.shape, seed=i)
    x, weights = rand(N, d), rand(N, k).abs()
    chosen = torch.stack(
        [torch.randperm(E - 1, generator=torch.Generator().manual_seed(n))[:k] for n in range(N)]
    )
    expected = torch.zeros(N, d, dtype=torch.float64)
    for n in range(N):
        for e, w in zip(chosen[n].tolist(), weights[n], strict=True):
            inp = x[n].double() * (w if weight_input else 1)
            h = up.weight[e].double() @ inp + (up.bias[e] if up.bias is not None else 0)
            y = down.weight[e].double() @ (torch.nn.functional.silu(h[:F]) * h[F:])
            y = y + (down.bias[e] if down.bias is not None else 0)
            expected[n] += y if weight_input else y * w
    close(moe.experts(x, chosen, weights, up, down, spec).detach(), expected, atol=1e-5)
    assert moe.experts(x[:0], chosen[:0], weights[:0], up, down, spec).shape == (0, d)


def test_an_expert_that_no_token_chose_is_never_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = []
    monkeypatch.setattr(Stacked, "dense", lambda self, dtype, e: touched.append(e) or self.weight[e])
    up, down = Stacked(9, 4, 3, 3), Stacked(9, 3, 4)
    for p in (*up.parameters(), *down.parameters()):
        p.data.normal_()
    with torch.no_grad():
        spec = MoE(9, MLP(3), Router(2, "softmax"))
        moe.experts(rand(2, 4), torch.tensor([[7, 2], [2, 5]]), rand(2, 2), up, down, spec)
    assert sorted(set(touched)) == [2, 5, 7]


# --- linear mixers ------------------------------------------------------------------------------------------


def delta_inputs(T: int, per_channel: bool, strength: float) -> tuple[Tensor, ...]:
    B, H, K, V = 2, 3, 5, 4
    q, k, v = rand(B, H, T, K), rand(B, H, T, K, seed=1), rand(B, H, T, V)
    k = k / k.norm(dim=-1, keepdim=True)
    log_decay = -strength * rand(B, H, T, K if per_channel else 1).abs()
    return q, k, v, log_decay, torch.sigmoid(rand(B, H, T, 1))


@pytest.mark.parametrize("T", [2, 15, 16, 64, 65, 200])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("strength", [0.01, 1.0, 60.0])  # 60: e^-G alone would overflow within a chunk
def test_delta_rule_in_chunks_is_the_recurrence(T: int, per_channel: bool, strength: float) -> None:
    inputs = delta_inputs(T, per_channel, strength)
    start = rand(2, 3, 5, 4)
    state = start.double()
    expected = []
    for t in range(T):
        q, k, v, g, beta = (x[:, :, t].double() for x in inputs)
        state = state * g.exp().unsqueeze(-1)
        error = v - (state * k.unsqueeze(-1)).sum(-2)
        state = state + k.unsqueeze(-1) * (beta * error).unsqueeze(-2)
        expected.append((state * q.unsqueeze(-1)).sum(-2))
    carried = start.clone()
    close(delta.scan(*inputs, carried), torch.stack(expected, 2), atol=2e-5)
    close(carried, state, atol=2e-5)
    carried = start.clone()
    steps = [delta.step(*(x[:, :, t] for x in inputs), carried) for t in range(T)]
    close(torch.stack(steps, 2), torch.stack(expected, 2), atol=2e-5)


@pytest.mark.parametrize("T", [2, 63, 64, 65, 200])
@pytest.mark.parametrize("strength", [0.01, 1.0, 60.0])
def test_state_space_in_chunks_is_the_recurrence(T: int, strength: float) -> None:
    x, g = rand(2, 3, T, 4), -strength * rand(2, 3, T).abs()
    b, c = rand(2, 3, T, 5), rand(2, 3, T, 5, seed=1)
    one, start = torch.ones(2, 3, T, 1), rand(2, 3, 5, 4)
    h, expected = start.double(), []
    for t in range(T):
        h = h * g[:, :, t].double().exp()[..., None, None] + b[:, :, t, :, None] * x[:, :, t, None]
        expected.append((h * c[:, :, t, :, None]).sum(-2))
    carried = start.clone()
    close(
        delta.scan(c, b, x, g.unsqueeze(-1), one, carried, corrected=False),
        torch.stack(expected, 2),
        atol=3e-5,
    )
    close(carried, h, atol=3e-5)
    carried = start.clone()
    inputs = (c, b, x, g.unsqueeze(-1), one)
    steps = [delta.step(*(s[:, :, t] for s in inputs), carried, corrected=False) for t in range(T)]
    close(torch.stack(steps, 2), torch.stack(expected, 2), atol=3e-5)


def test_short_convolution_sees_the_last_tokens_of_the_piece_before() -> None:
    conv = Conv(6, 4, bias=True)
    conv.weight.data, conv.bias.data = rand(6, 4), rand(6)  # type: ignore[union-attr]
    x = rand(2, 11, 6)
    expected = torch.zeros(2, 11, 6, dtype=torch.float64)
    for t in range(11):
        for j in range(4):
            if t - 3 + j >= 0:
                expected[:, t] += x[:, t - 3 + j].double() * conv.weight[:, j]
    expected = torch.nn.functional.silu(expected + conv.bias)
    with torch.no_grad():
        close(conv(x, None), expected.detach())
        state = State(torch.zeros(2, 3, 6), torch.zeros(0))
        pieces = [conv(p, state) for p in x.split((1, 2, 5, 1, 1, 1), 1)]
    close(torch.cat(pieces, 1), expected.detach())


# --- products -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wide", [1, 100, 1 << 19])  # elements widened at a time: less than a row, some, all
def test_a_product_widened_to_fp32_is_rounded_once(
    dtype: torch.dtype, bias: bool, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "_native", lambda _: False)
    monkeypatch.setattr(product, "WIDE", wide)
    x, w = rand(3, 5, 24).to(dtype), rand(17, 24).to(dtype)
    b = rand(17).to(dtype) if bias else None
    exact = x.double() @ w.double().T + (0 if b is None else b.double())
    found = product.product(x, w, b)
    assert found.dtype == dtype
    assert found.shape == (3, 5, 17)
    spacing = torch.finfo(dtype).eps * exact.abs()  # two neighbours are at most this far apart
    assert ((found.double() - exact).abs() <= spacing / 2 + 1e-6).all()


# --- where bf16 rounds


@pytest.mark.parametrize(("rounding", "factor"), [("first", 6.625), ("last", 6.6332495807)])
def test_an_embedding_is_scaled_by_a_rounded_factor_or_rounded_once(
    rounding: Rounding, factor: float
) -> None:
    spec = Spec("t", 44, 9, (), Norm(1e-5), True, 8, embed_scale=44**0.5, embed_rounding=rounding)
    model = Decoder(spec)
    table = rand(9, 44).bfloat16()
    model.load_state_dict({"embed.weight": table, "norm.weight": torch.ones(44).bfloat16()}, assign=True)
    x, _ = model.start(torch.arange(9)[None])
    assert torch.equal(x[0], (table.float() * factor).bfloat16())


@pytest.mark.parametrize("rounding", ["first", "last"])
@pytest.mark.parametrize("weights_rounding", ["first", "last"])
def test_a_routers_logits_and_its_weights_round_each_on_their_own(
    rounding: Rounding, weights_rounding: Rounding
) -> None:
    r = Router(2, "softmax", normalize=True, rounding=rounding, weights_rounding=weights_rounding)
    router = moe.Router(r, 5, 40)
    weight, x = rand(5, 40).bfloat16(), rand(7, 40).bfloat16()
    router.load_state_dict({"weight": weight}, assign=True)
    logits = x @ weight.T if rounding == "first" else x.float() @ weight.float().T
    expected = logits.float().softmax(-1).topk(2, -1).values
    expected = expected / expected.sum(-1, keepdim=True)
    _, weights = router(x)
    assert weights.dtype == (torch.bfloat16 if weights_rounding == "first" else torch.float32)
    torch.testing.assert_close(weights, expected.to(weights.dtype), rtol=1e-6, atol=0)


def test_a_folder_from_before_rounding_had_one_name_is_read() -> None:
    mixer = Attention(2, 2, 8, 1.0, Rope(1e4, 8, rounding="last"))
    router = Router(1, "sigmoid", rounding="last", weights_rounding="last")
    layer = Layer(mixer, MoE(2, MLP(8), router), Norm(1e-5), None, Norm(1e-6, rounding="last"))
    spec = Spec("t", 16, 9, (layer,), Norm(1e-5), True, 8)
    old = spec.to_dict()
    kind = old["layer_kinds"][0]
    kind["mixer"]["rope"] = {"theta": 1e4, "dim": 8, "fp32": True}
    kind["ffn"]["router"] = {"top_k": 1, "score": "sigmoid", "fp32": True}
    kind["ffn_norm"] = {"eps": 1e-6, "scale_in": "fp32"}
    assert Spec.from_dict(old) == spec
