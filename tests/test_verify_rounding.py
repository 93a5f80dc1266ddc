"""What rounding alone does is no fault: near ties between experts, errors that all of upstream's fp32 has in common; and
inputs reach what a model does far out, whether its Spec says so or not."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import vendor
from safetensors.torch import load_file, save_file
from verified import canonical, rewrite

import zoo
from zoo.model.moe import Router
from zoo.spec import Router as RouterSpec
from zoo.spec import Spec
from zoo.verify import inputs, judge, tolerance
from zoo.verify.choices import Choices, as_another, watched
from zoo.verify.compare import Longest, Measured, measure, settle
from zoo.verify.faults import CATALOGUE
from zoo.verify.inputs import Batch
from zoo.verify.metrics import relative_error
from zoo.verify.oracle import Transformers
from zoo.verify.ours import Ours, margin, nearest_tie, other_choice
from zoo.verify.rounded import TwoPrecisions
from zoo.verify.stream import StreamedTransformers
from zoo.verify.tolerance import Spread

numeric = importlib.import_module("zoo.verify.numeric")

ROUTERS = [
    RouterSpec(3, "softmax", over="chosen"),
    RouterSpec(3, "softmax", over="all", normalize=True),
    RouterSpec(3, "sigmoid", over="all", selection_bias=True),
    RouterSpec(3, "sigmoid", over="all", n_groups=4, top_groups=2, group_top=2),
]

NEAR = RouterSpec(3, "softmax", over="near", near=0.3)


def router_of(spec: RouterSpec, n_experts: int = 12, d: int = 8) -> Router:
    torch.manual_seed(0)
    router = Router(spec, n_experts, d).requires_grad_(False)
    for p in router.parameters():
        p.normal_(0, 1)
    return router


@pytest.mark.parametrize("spec", ROUTERS)
def test_the_other_choice_differs_by_what_hung_by_least(spec: RouterSpec) -> None:
    router, x = router_of(spec), torch.randn(200, 8)
    gap, nudge = nearest_tie(router, x)
    assert torch.equal(gap, margin(router, x)) and (gap >= 0).all()
    chosen, _ = router(x)
    other, weights = other_choice(router, x)
    assert weights.isfinite().all() and not torch.equal(chosen.sort(-1).values, other.sort(-1).values)
    for before, after, moved in zip(chosen.tolist(), other.tolist(), nudge, strict=True):
        gone = set(before) - set(after)
        if spec.n_groups == 1:  # a group may be let go of which no expert was chosen
            (left_out,) = moved.nonzero().flatten().tolist()
            assert len(gone) == 1 and gone == {before[-1]} and left_out in after


def test_who_is_near_and_in_what_order_can_hang_by_little_too() -> None:
    router, x = router_of(NEAR), torch.randn(200, 8)
    gap, nudge = nearest_tie(router, x)
    chosen, weights = router(x)
    other, other_weights = other_choice(router, x)
    assert torch.equal(gap, margin(router, x)) and (gap >= 0).all()
    assert (nudge.count_nonzero(-1) == 1).all()
    kinds = [
        (chosen != other).any(-1),
        (chosen == other).all(-1),
        (chosen.sort(-1).values == other.sort(-1).values).all(-1),
    ]
    assert all(kind.any() for kind in kinds)
    assert ((weights != other_weights).any(-1) | kinds[0]).all()


def test_a_tie_among_experts_of_groups_left_out_is_none() -> None:
    router = router_of(RouterSpec(2, "sigmoid", over="all", n_groups=2, top_groups=1, group_top=2), 6, 6)
    router.weight.data = torch.eye(6)
    # Of the first group 0 and 1 are chosen; 2 is far behind them, and as good as 1 is only one that is not eligible.
    x = torch.tensor([[4.0, 2.0, -4.0, 1.9999, -4.0, -4.0]])
    assert float(margin(router, x)) > 0.5


def test_at_a_near_tie_ours_takes_the_oracles_choice() -> None:
    folder = zoo.load(canonical("qwen3_moe"))
    ours, i = Ours(folder), 0
    while not ours.has_experts(i):
        i += 1
    ids = torch.randint(0, ours.spec.vocab_size, (2, 9))
    batch = Batch(ids, (9, 6), ("a", "b"), (False, False))
    router = next(m for m in ours.decoder.layers[i].modules() if isinstance(m, Router))
    seen: list[torch.Tensor] = []
    handle = router.register_forward_hook(lambda _m, args, _out: seen.append(args[0].clone()))
    ours.run(ids)
    handle.remove()
    x = seen[0][4]  # of the first row's fifth token the last expert and the next are made to score alike
    scores = x @ router.weight.T
    last, following = scores.topk(router.spec.top_k + 1).indices[-2:].tolist()
    with torch.no_grad():
        apart = (scores[last] - scores[following]) * (1 - 1e-6)
        router.weight[following] += apart * x / (x @ x)

    def state() -> torch.Tensor:
        ours.begin(0, ids)
        for n in range(i + 1):
            y = ours.layer(0, n)
        return y

    mine = state()
    theirs = mine.clone()
    theirs[0, 4] = ours.layer_otherwise(0, i)[0, 4]
    error = relative_error(mine[batch.mask], theirs[batch.mask])
    assert error[4] > 1e-3 and error.count_nonzero() == 1
    out = Measured([])
    assert settle(ours, 0, i, batch, theirs[batch.mask], error, 1e-6, out).max() < 1e-5
    assert out.turned == 1 and torch.equal(ours.state[0][0][0, 4], theirs[0, 4])
    # A choice that does not hang by rounding is ours to answer for.
    state()
    theirs[0, 3] = ours.layer_otherwise(0, i)[0, 3]
    error = relative_error(mine[batch.mask], theirs[batch.mask])
    assert settle(ours, 0, i, batch, theirs[batch.mask], error, 1e-6, out)[3] == error[3] > 1e-3


def grown(name: str, factor: float, folder: Path) -> Path:
    """A tiny release whose matrices are so much larger: rounding grows with every layer."""
    source = tiny.make(name, folder)
    for file in source.glob("*.safetensors"):
        tensors = {k: t * factor if t.ndim > 1 else t for k, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("stream", [False, True])
def test_what_departs_in_fp32_is_held_against_float64(
    stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = grown("mimo_v2_flash", 3, tmp_path / "source")
    canon = zoo.convert(source, tmp_path / "canon")
    cert = zoo.verify(canon, stream=stream, write=False)
    assert cert.passed
    assert any("float64" in note for level in cert.levels for note in level.notes)
    assert torch.get_default_dtype() == torch.float32
    monkeypatch.setattr(numeric.Comparison, "_against_float64", lambda *_: None)
    assert not zoo.verify(canon, level="logits", stream=stream, write=False).passed


def test_where_upstream_has_one_way_streamed_float64_is_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dense class with eager attention alone, streamed, no second run in fp32 says how far rounding goes."""
    monkeypatch.setattr(Transformers, "_switch", lambda *_: False)
    canon = zoo.convert(grown("llama", 3, tmp_path / "source"), tmp_path / "canon")
    monkeypatch.setattr(importlib.import_module("zoo.verify.tolerance"), "FLOOR_FP32", 1e-9)
    cert = zoo.verify(canon, level="logits", stream=True, write=False)
    assert cert.passed
    level = cert.level("logits")
    assert level is not None and level.figures["spread"]["ways"] == ("float64", "fp32")
    wrong = rewrite(canon, CATALOGUE["norm_eps"].inject)
    source = StreamedTransformers(tmp_path / "source")
    assert not zoo.verify(wrong, against=source, level="logits", stream=True, write=False).passed


def cancelling(token: int, nudges: dict[int, float]) -> Ours:
    """A tiny model in which `token` has a state 10,000 long, of which the last layer leaves a thousandth. `nudges`: factors of
    the first channel of some ids."""
    decoder = zoo.load(canonical("llama"), dtype=torch.float32).requires_grad_(False)
    decoder.embed.weight[token, 0] = 1e4
    last = decoder.layers[-1]
    last.ffn_norm.weight[0] = 1
    gate, up = last.mlp.gate_up.weight.chunk(2)
    gate[0], up[0] = 0, 0
    gate[0, 0] = up[0, 0] = 1
    width = len(last.ffn_norm.weight)  # what a state of one channel is normalised to, squared
    last.mlp.down.weight[:, 0] = 0
    last.mlp.down.weight[0, 0] = -0.999e4 / width
    for row, factor in nudges.items():
        decoder.embed.weight[row, 0] *= factor
    return Ours(decoder)


def test_what_is_left_of_a_long_state_is_held_against_the_longest_that_it_was() -> None:
    """One rounding of the whole is a thousand of the rest, in which another run has it or not."""
    asked = inputs.make(zoo.spec(canonical("llama")))
    first, second = asked.batches[0].ids[0, :2].tolist()

    def passes(longest: Longest | None, nudges: dict[int, float]) -> bool:
        theirs = cancelling(first, nudges)
        oracle = TwoPrecisions(theirs, theirs, "fp32")
        measured = measure(oracle, cancelling(first, {}), asked, "fp32", longest=longest)
        return judge.layers_level(measured, "fp32").verdict == "passed"

    rounded = {first: 1 + 2.0**-23}
    assert passes(None, {}) and not passes(None, rounded)
    assert passes(Longest(), rounded)
    assert not passes(Longest(), {second: 1.01})
    assert not passes(Longest(), {first: 1 + 2.0**-12})


def test_float64_excuses_no_fault(tmp_path: Path) -> None:
    source = grown("mimo_v2_flash", 3, tmp_path / "source")
    canon = rewrite(zoo.convert(source, tmp_path / "canon"), CATALOGUE["norm_eps"].inject)
    assert not zoo.verify(canon, against=Transformers(source), level="logits", write=False).passed


def test_a_limit_that_the_spec_has_lost_is_crossed_all_the_same() -> None:
    oracle = Transformers(tiny_source("mistral_window"))
    spec = zoo.spec(canonical("mistral_window"))
    window = max(n for name, n in inputs.limits(spec).items() if name.startswith("window"))
    assert oracle.limits == {f"upstream's sliding_window {window}": window}
    lost = Spec.from_dict(zoo.spec(canonical("llama")).to_dict())
    made = inputs.make(lost, theirs={"upstream's sliding_window 700": 700})
    assert max(n for b in made for n in b.lengths) > 700
    assert made.limits["upstream's sliding_window 700"] == 700
    far = inputs.make(lost, theirs={"upstream's sliding_window 8192": 8192})
    assert far.not_crossed == {"upstream's sliding_window 8192": 8192}


def tiny_source(name: str) -> Path:
    return canonical(name).parent / f"{name}-float32-source"


@pytest.mark.parametrize(
    ("name", "dtype", "least"),
    [
        ("kimi_linear", "fp32", inputs.PIECE),
        ("nemotron_h", "fp32", inputs.PIECE),
        ("llama", "bf16", inputs.FAR),
    ],
)
def test_rows_are_long_enough_for_recurrences_and_scaled_rope(name: str, dtype: str, least: int) -> None:
    made = inputs.make(zoo.spec(canonical(name)), dtype=dtype)
    assert max(n for b in made for n in b.lengths) > least


@pytest.mark.parametrize("heads", [1, 2])
def test_keys_that_score_alike_are_chosen_with_a_cache_as_without(
    heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so few heads many keys score exactly 0, and a top-k over another number of keys takes others of them."""
    source = vendor.make(tmp_path / "source", "deepseek_v32", index_n_heads=heads)
    canon = zoo.convert(source, tmp_path / "canon")
    cert = zoo.verify(canon, write=False)
    assert cert.passed
    (said,) = (note for note in cert.level("decode").notes if "score alike" in note)  # type: ignore[union-attr]
    assert int(said.split()[0]) > 0

    monkeypatch.setattr(judge, "watched", lambda model, like=None: watched(model))
    cert = zoo.verify(canon, write=False)
    assert [x.name for x in cert.levels if x.verdict == "failed"] == ["decode"]
    (said,) = cert.level("decode").notes[:1]  # type: ignore[union-attr]
    assert "is the first that departs with a cache: it chose other keys in layer" in said


def test_keys_that_score_otherwise_are_a_choice_of_ones_own() -> None:
    scores = torch.tensor([[[0.5, 0.0, 0.0, 0.0, -1.0]]])
    mine, at_tie, worse = (torch.tensor([[x]]) for x in ([0, 1], [3, 0], [0, 4]))
    out = Choices()
    assert torch.equal(as_another(mine, at_tie, scores, out), at_tie) and out.tied == 1
    assert torch.equal(as_another(mine, worse, scores, out), mine) and out.tied == 1


def test_a_share_of_few_tokens_is_given_what_few_tokens_vary_by() -> None:
    """Of a right conversion that agrees as often as upstream with itself, 1 run in 700 is beyond 3 standard errors: twice as
    many may differ, so none is here."""
    generator = torch.Generator().manual_seed(0)
    share, many, few = 0.93, 400, 64
    for _ in range(300):
        measured = float((torch.rand(many, generator=generator) < share).float().mean())
        right = float((torch.rand(few, generator=generator) < share).float().mean())
        assert right >= judge.agreement(Spread(("a", "b"), top1_agreement=measured, tokens=many), few).value
    bounds = [
        judge.agreement(Spread(("a", "b"), top1_agreement=0.9, tokens=n), few).value for n in (64, 4096)
    ]
    assert bounds[0] < bounds[1] < 0.8  # one that is known from few tokens allows more


@pytest.mark.parametrize(("name", "judged"), [("mixtral", False), ("llama", True)])
def test_in_bf16_a_token_of_other_experts_does_not_decide_alone(name: str, judged: bool) -> None:
    """A thousandth of 458 tokens' logits are half of those of one."""
    cert = zoo.verify(canonical(name), dtype="bf16", level="logits", write=False)
    level = cert.level("logits")
    assert cert.passed and level is not None
    assert any(c.name == "|logit error| p99" for c in level.checks)
    assert any(c.name == "|logit error| p99.9" for c in level.checks) == judged


def test_of_greedy_tokens_a_tie_is_no_difference() -> None:
    spread = Spread(("a", "b"), {"p50": 0.01}, top1_agreement=1.0, tokens=200)

    def share(lead: float) -> float:
        logits = torch.zeros(1, 41, 6)
        logits[..., 2], logits[..., 3] = 4.0, 4.0 + lead  # the oracle's is 2
        ours = SimpleNamespace(
            decoder=lambda ids: logits[:, : ids.shape[1]],
            device=torch.device("cpu"),
            spec=SimpleNamespace(layers=()),
        )
        prompt, theirs = torch.zeros(1, 1, dtype=torch.int64), torch.full((40,), 2)
        return judge.greedy(ours, prompt, theirs, 0, "bf16", spread, 4.0).value  # type: ignore[arg-type]

    tie = 2 * tolerance.logit_bound("bf16", "p50", spread, 4.0).value
    assert share(0.9 * tie) == 1.0 and share(1.1 * tie) == 0.0
