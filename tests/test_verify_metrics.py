"""The measures themselves: right on what can be worked out by hand, and blind to nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.verify.compare import Sketch
from zoo.verify.inputs import Batch
from zoo.verify.metrics import Columns, LogitMetrics, Quantiles, best_ids, references, relative_error
from zoo.verify.ours import margin
from zoo.verify.tolerance import Spread, columns_apart, layer_bound, logit_bound, representative


def compared(ours: torch.Tensor, theirs: torch.Tensor, following: torch.Tensor | None = None) -> LogitMetrics:
    m = LogitMetrics()
    for at, ref in references(theirs, torch.full((len(theirs),), -1) if following is None else following):
        m.add(ours[at], ref)
    return m


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.floats(1e-9, 1e6), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_never_understated_and_within_one_percent(values: list[float], q: float) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    counted = Quantiles()
    counted.add(x)
    exact = float(x.sort().values[math.ceil(q * len(x)) - 1])
    assert exact <= counted.at(q) <= exact * 1.008 + 1e-30
    assert counted.n == len(values)


def test_equal_logits_have_no_error() -> None:
    x = torch.randn(7, 50)
    m = compared(x, x.clone()).summary()
    assert m["error"]["max"] == m["kl"]["max"] == 0
    assert m["top1_agreement"] == m["top5_agreement"] == 1


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 3e-2, 1.0, 30.0])
def test_kl_is_what_double_precision_says(scale: float) -> None:
    a, b = torch.randn(20, 1000) * 4, torch.randn(20, 1000) * scale
    p, q = a.double().log_softmax(-1), (a + b).double().log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1).mean()
    assert compared(a + b, a).kl.mean == pytest.approx(float(exact), rel=0.02)


def test_a_constant_added_to_all_logits_is_an_error_but_no_divergence() -> None:
    x = torch.randn(5, 100)
    m = compared(x + 0.004, x)
    assert m.error.at(0.5) == pytest.approx(0.004, rel=0.01)
    assert m.kl.max < 1e-12


def test_perplexity_is_of_the_tokens_that_followed_in_the_text() -> None:
    logits = torch.randn(6, 11)
    following = torch.tensor([3, -1, 5, 0, -1, 10])
    ours, theirs = compared(logits, logits, following).perplexities
    real = following >= 0
    nll = torch.nn.functional.cross_entropy(logits[real], following[real])
    assert ours == theirs == pytest.approx(math.exp(float(nll)), rel=1e-5)
    for scale in (1e-4, 1e-2, 1.0, 30.0):  # small and large, each of which has a way of its own
        other = logits + scale * torch.randn(6, 11)
        ours, theirs = compared(other, logits, following).perplexities
        there = torch.nn.functional.cross_entropy(other[real].double(), following[real])
        assert theirs == pytest.approx(math.exp(float(nll)), rel=1e-5)
        assert math.log(ours) == pytest.approx(float(there), rel=1e-6, abs=1e-6)


def test_nan_and_infinity_are_the_worst_error_not_an_unknown_one() -> None:
    theirs = torch.randn(3, 10)
    for bad in (math.nan, math.inf):
        ours = theirs.clone()
        ours[1, 4] = bad
        m = compared(ours, theirs)
        assert m.error.max == math.inf
        assert relative_error(ours, theirs)[1] == math.inf


def test_a_sketch_keeps_relative_distances() -> None:
    x = torch.randn(200, 768)
    y = x + 1e-4 * torch.randn(200, 768)
    sketch = Sketch(768)
    ratio = relative_error(sketch(y), sketch(x)) / relative_error(y, x)
    assert 0.5 < float(ratio.min()) and float(ratio.max()) < 2
    assert float(ratio.mean()) == pytest.approx(1, abs=0.05)


def test_padding_is_not_a_real_position_and_text_ends_have_no_next_token() -> None:
    batch = Batch(torch.tensor([[5, 6, 7], [8, 9, 0]]), (3, 2), ("a", "b"), (True, False))
    assert batch.mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.following.tolist() == [[6, 7, -1], [-1, -1, -1]]


def test_the_bound_is_the_floor_until_upstream_itself_is_wider() -> None:
    narrow, wide = (Spread(("a", "b"), {"max": x}, layers=[x]) for x in (1e-6, 1e-3))
    assert logit_bound("fp32", "max", narrow, 10).value == 5e-5
    assert logit_bound("fp32", "max", wide, 10).value == 2e-3
    assert layer_bound("fp32", 0, wide).value == 2e-3
    assert logit_bound("fp32", "max", Spread(), 10).value == 5e-5


def test_in_fp32_the_worst_token_stands_for_a_layer_in_bf16_the_median() -> None:
    tokens = [1.0, 1.0, 1.0, 9.0]
    assert representative("fp32", tokens) == 9
    assert representative("bf16", tokens) == 1


def test_a_routers_margin_is_what_the_choice_hangs_by() -> None:
    from zoo.model.moe import Router
    from zoo.spec import Router as Spec

    router = Router(Spec(top_k=2, score="softmax", over="chosen"), n_experts=4, d=4)
    router.weight = torch.nn.Parameter(torch.eye(4), requires_grad=False)
    clear, tie = torch.tensor([[4.0, 3.0, 0.0, -1.0]]), torch.tensor([[4.0, 1.0, 1.0 - 1e-6, -1.0]])
    assert float(margin(router, clear)) > 1
    assert float(margin(router, tie)) < 1e-5


def test_what_is_not_zero_is_infinitely_far_from_zero() -> None:
    ours = torch.tensor([[0.0, 0.0], [1e-20, 0.0], [math.nan, 0.0], [3.0, 4.0]])
    theirs = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 5.0]])
    assert relative_error(ours, theirs).tolist() == [0.0, math.inf, math.inf, pytest.approx(34**-0.5)]


def columns(ours: torch.Tensor, theirs: torch.Tensor, ulp: float = 2.0**-8) -> Columns:
    out = Columns(ulp)
    for at, ref in references(theirs, torch.full((len(theirs),), -1)):
        out.add(ours[at], ref)
    return out


@pytest.mark.parametrize("n", [1, 5, 300])
def test_an_id_with_the_row_of_another_stands_out_from_rounding_and_from_tokens_that_went_elsewhere(
    n: int,
) -> None:
    theirs = torch.randn(n, 5000) * 3
    noise = torch.randn(n, 5000) * 0.05
    noise[::7] *= 30  # tokens that chose other experts
    spread = Spread(("a", "b"), columns=columns(theirs + torch.randn(n, 5000) * 0.05, theirs).mean)
    for known in (spread, Spread()):
        share, bound = columns_apart(columns(theirs + noise, theirs), known)
        assert share.max() < bound.value
        wrong = theirs + noise
        wrong[:, 41] = theirs[:, 40]
        share, bound = columns_apart(columns(wrong, theirs), known)
        assert (share > bound.value).nonzero().flatten().tolist() == [41] or n == 1


def test_a_rounding_of_one_logit_among_equal_ones_does_not_stand_out() -> None:
    theirs = torch.randn(50, 5000)
    ours = theirs.clone()
    ours[::5, 7] += theirs[::5, 7].abs() * 2**-8
    share, bound = columns_apart(
        columns(ours, theirs), Spread(("a", "b"), columns=columns(theirs, theirs).mean)
    )
    assert 0 < share.max() < bound.value / 4


def test_columns_leave_out_what_is_not_finite() -> None:
    theirs = torch.randn(4, 9)
    ours = theirs + 0.01
    ours[1, 3] = math.nan
    found = columns(ours, theirs)
    assert found.n == 3 and bool(found.mean.isfinite().all())
    assert columns(torch.full((2, 9), math.inf), theirs[:2]).n == 0


@pytest.mark.parametrize("n", [100, 128 * 21, 5000])
def test_the_best_ids_are_those_of_a_whole_search(n: int) -> None:
    x = torch.randn(7, n)
    x[1, -1], x[2, :3] = 9.0, torch.tensor([8.0, 9.0, 7.0])
    assert torch.equal(best_ids(x, 5), x.topk(5).indices)
    assert torch.equal(best_ids(x, 1)[:, 0], x.argmax(-1))
    x[3, 70] = math.nan
    assert best_ids(x, 1)[3] == 70


def test_rows_that_are_equal_have_an_error_of_zero_and_no_other() -> None:
    x = torch.randn(3, 40)
    (_, reference), *_ = references(x, torch.full((3,), -1))
    m = LogitMetrics()
    m.add(x.clone(), reference)
    assert m.error.at(0.5) == m.error.at(1.0) == 0.0 and int(m.error.counts[0]) == m.error.n
    assert m.error.histogram()["counts"] == []
