"""Continuing a prompt."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from built import built, decoder
from verified import canonical

import zoo
from zoo.errors import ZooError
from zoo.model import Decoder
from zoo.model.generate import probabilities


def model_of(name: str) -> tuple[Decoder, torch.Tensor]:
    b = built(name)
    return decoder(b.spec, b.tensors), b.ids[:, :9]


@pytest.mark.parametrize("name", ["llama", "gemma3n", "gpt_oss", "deepseek_v3", "qwen3_next", "nemotron_h"])
def test_greedy_tokens_are_the_likeliest_at_each_step(name: str) -> None:
    model, ids = model_of(name)
    out = model.generate(ids, 12)
    assert out.shape == (2, 21) and torch.equal(out[:, :9], ids)
    assert torch.equal(out[:, 9:], model(out[:, :-1])[:, 8:].argmax(-1))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_greedy_tokens_are_upstreams(name: str) -> None:
    model, ids = model_of(name)
    with tempfile.TemporaryDirectory() as folder:
        up = tiny.upstream(tiny.make(name, Path(folder)))
    theirs = up.generate(
        ids, max_new_tokens=20, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids)
    )
    assert torch.equal(model.generate(ids, 20), theirs)


def test_generation_stops_when_every_sequence_has_ended() -> None:
    model, ids = model_of("llama")
    free = model.generate(ids, 12)[:, 9:]
    ends = (int(free[0, 2]), int(free[1, 5]))
    out = model.generate(ids, 12, eos=ends)[:, 9:]
    stops = [next(t for t in range(12) if int(row[t]) in ends) for row in free]
    assert out.shape[1] == max(stops) + 1
    for row, whole, stop in zip(out, free, stops, strict=True):
        assert torch.equal(row[: stop + 1], whole[: stop + 1])
        assert set(row[stop:].tolist()) == {int(whole[stop])}


def test_tokens_can_be_had_as_they_come() -> None:
    model, ids = model_of("llama")
    stream = model.stream(ids, 5)
    first = next(stream)
    assert torch.equal(torch.stack([first, *stream], 1), model.generate(ids, 5)[:, 9:])


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3", "qwen3_next", "phimoe"])
def test_a_cache_that_is_kept_gives_the_tokens_of_one_that_reads_all(name: str) -> None:
    # Latent attention, a ring, a state, LongRoPE: another text is begun where the first lies in the cache.
    model, ids = model_of(name)
    border = max(model.cache(1, 1).borders, default=12)
    cache = model.cache(2, border + 40)
    said = torch.cat((ids, model.generate(ids, 4, temperature=9.0)[:, 9:], ids.repeat(1, border)), 1)
    for length, same in (
        (9, 0),
        (border - 2, 9),
        (border + 8, border - 2),
        (border + 20, border + 5),
        (8, 5),
    ):
        text = said[:, :length].clone()
        text[:, same:] = (text[:, same:] + length) % model.spec.vocab_size
        said[:, :length] = text
        cache.keep(same)
        whole = torch.stack([*model.stream(text, 6)], 1)
        assert torch.equal(torch.stack([*model.stream(text, 6, cache=cache)], 1), whole)
        assert cache.length == length + 5


def test_where_nothing_is_captured_a_pass_is_the_models_own() -> None:
    model, ids = model_of("qwen3_moe")  # on a GPU: benchmarks/gpu_parity.py, for every family
    assert torch.equal(model.captured(*ids.shape)(ids), model(ids))


def test_a_temperature_draws_from_the_distribution() -> None:
    model, ids = model_of("llama")
    torch.manual_seed(0)
    draws = model.generate(ids[:1].expand(4000, -1), 1, temperature=1.5)[:, -1]
    p = (model(ids[:1])[0, -1] / 1.5).softmax(-1)
    share = torch.bincount(draws, minlength=len(p)) / 4000
    assert (share - p).abs().max() < 0.03
    assert draws.unique().numel() > 10


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (40, 0.9), (1, 0.5), (0, 1e-9), (10**6, 1)]
)
def test_tokens_are_drawn_with_the_probabilities_that_upstream_draws_with(top_k: int, top_p: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)) * 3
    logits[:, 7] = logits[:, 70] = logits.sort(-1)[0][:, -5]  # ties at the fifth place
    theirs = process.TemperatureLogitsWarper(0.7)(None, logits)
    if top_k:
        theirs = process.TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = process.TopPLogitsWarper(top_p)(None, theirs)
    ours, wanted = probabilities(logits, 0.7, top_k, top_p), theirs.softmax(-1)
    if top_p == 1:  # of ids that tie at the edge either is right there
        assert torch.equal(ours > 0, wanted > 0)
    assert torch.allclose(ours.sort(-1)[0], wanted.sort(-1)[0], atol=1e-6)
    assert torch.allclose(ours.sum(-1), torch.ones(6))


@pytest.mark.parametrize("how", [{"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"top_p": float("nan")}])
def test_what_can_not_be_drawn_with_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(ZooError, match="top_p is above 0 and at most 1, top_k 0 or more"):
        zoo.load(canonical("llama")).generate(torch.tensor([[1]]), 2, temperature=1.0, **how)


@pytest.mark.parametrize(
    "ids",
    [torch.tensor([1, 2, 3]), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 1, 2).long(), torch.zeros(1, 2), [[1]]],
)  # fmt: skip
def test_ids_that_are_none_are_refused_in_a_sentence(ids: Any) -> None:
    model = zoo.load(canonical("llama"))
    with pytest.raises(ZooError, match="token ids are integers"):
        model(ids)
    with pytest.raises(ZooError, match="token ids are integers"):
        model.generate(ids, 2)


def test_a_call_that_fails_leaves_the_cache_as_it_was() -> None:
    model = zoo.load(canonical("llama"))
    ids = torch.tensor([[5, 6, 7, 8]])
    cache = model.cache(1, 8)
    model(ids[:, :2], cache)
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]), cache)
    with pytest.raises(ZooError, match="the cache is for 1 sequences; found ids of 2"):
        model(torch.cat([ids, ids]), cache)
    assert (model(ids[:, 2:], cache) - model(ids)[:, 2:]).abs().max() <= 5e-5


def test_learned_positions_end_what_is_generated() -> None:
    model = zoo.load(canonical("gpt2"))
    n = model.spec.positions
    assert n is not None
    out = model.generate(torch.zeros(1, n - 3, dtype=torch.int64), 50)
    assert out.shape == (1, n + 1)
    with pytest.raises(ZooError, match=f"the model has {n} positions"):
        model(torch.zeros(1, n + 1, dtype=torch.int64))


@pytest.mark.parametrize("temperature", [-1.0, float("nan")])
def test_a_temperature_below_zero_is_refused(temperature: float) -> None:
    with pytest.raises(ZooError, match="a temperature is 0 or more"):
        zoo.load(canonical("llama")).generate(torch.tensor([[1]]), 2, temperature=temperature)
