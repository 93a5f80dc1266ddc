"""Continuing a prompt."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from built import built, decoder

from zoo.model import Decoder


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
