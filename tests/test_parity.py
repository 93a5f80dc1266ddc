"""The decoder computes what upstream computes, for every variant of every family, in every way it can be run."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from built import built, decoder
from rounding import agree

from zoo.model import Decoder

NAMES = sorted(tiny.VARIANTS)
# Families whose rounding order in bf16 is upstream's to the bit, given the same attention.
EXACT_IN_BF16 = [
    "llama", "llama_bias", "mistral_window", "ministral3", "qwen3", "smollm3", "olmo2", "olmo3", "gemma3",
    "gemma3n", "nemotron_h",
]  # fmt: skip


def model_of(name: str) -> tuple[Decoder, torch.Tensor, torch.Tensor]:
    b = built(name)
    model = decoder(b.spec, b.tensors)
    return model, b.ids, model(b.ids)


@pytest.mark.parametrize("name", NAMES)
def test_fp32_logits_are_upstreams(name: str) -> None:
    model, ids, logits = model_of(name)
    assert agree(logits, built(name).upstream["eager"], model, ids)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_token_by_token_gives_the_logits_of_one_pass(name: str) -> None:
    model, ids, logits = model_of(name)
    cache = model.cache(len(ids), ids.shape[1])
    steps = [model(ids[:, t : t + 1], cache) for t in range(ids.shape[1])]
    assert agree(torch.cat(steps, 1), logits, model, ids)


@pytest.mark.parametrize("name", NAMES)
def test_feeding_a_prompt_in_uneven_pieces_gives_the_logits_of_one_pass(name: str) -> None:
    model, ids, logits = model_of(name)
    T = ids.shape[1]
    cache = model.cache(len(ids), T + 3)
    cuts = sorted({0, 1, 4, 12, 13, T // 2 + 1, T - 2, T - 1, T})
    pieces = [model(ids[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
    assert agree(torch.cat(pieces, 1), logits, model, ids)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_looks_at_every_slot_gives_the_same_logits(name: str) -> None:
    """What a captured CUDA graph replays: lengths are tensors, nothing is sliced."""
    model, ids, logits = model_of(name)
    T = ids.shape[1]
    cache = model.cache(len(ids), T + 3)
    cache.fixed = True
    pieces = [model(ids[:, :5], cache)] + [model(ids[:, t : t + 1], cache) for t in range(5, T)]
    assert agree(torch.cat(pieces, 1), logits, model, ids)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_was_reset_remembers_nothing(name: str) -> None:
    model, ids, logits = model_of(name)
    cache = model.cache(len(ids), ids.shape[1])
    model(ids.flip(1), cache)
    cache.reset()
    again = [model(ids[:, :3], cache), model(ids[:, 3:], cache)]
    assert agree(torch.cat(again, 1), logits, model, ids)


@pytest.mark.parametrize("name", NAMES)
def test_sequences_of_a_batch_do_not_see_each_other(name: str) -> None:
    model, ids, logits = model_of(name)
    assert agree(model(ids[1:]), logits[1:], model, ids[1:])


@pytest.mark.parametrize("name", NAMES)
def test_layers_run_one_at_a_time_with_their_own_weights_only(name: str) -> None:
    b = built(name)
    ends = Decoder(b.spec)
    ends.load_state_dict(
        {k: v for k, v in b.tensors.items() if not k.startswith("layers.")}, assign=True, strict=False
    )
    x, ctx = ends.start(b.ids)
    for i in range(b.spec.n_layers):
        prefix = f"layers.{i}."
        alone = Decoder(b.spec).layers[i]
        alone.load_state_dict(
            {k.removeprefix(prefix): v for k, v in b.tensors.items() if k.startswith(prefix)}, assign=True
        )
        x = alone(x, ctx)
    assert agree(ends.finish(x, ctx), b.upstream["eager"], decoder(b.spec, b.tensors), b.ids)


def quantiles(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Median and 90 % quantile over tokens of the largest logit difference."""
    error = (a.float() - b.float()).abs().amax(-1).flatten()
    return error.quantile(0.5).item(), error.quantile(0.9).item()


@pytest.mark.parametrize("name", NAMES)
def test_bf16_logits_lie_within_upstreams_own_spread(name: str) -> None:
    """Judged by quantiles: one expert chosen otherwise moves a token's logits by 1 to 4."""
    b = built(name, "bfloat16")
    logits = decoder(b.spec, b.tensors)(b.ids)
    assert logits.dtype == torch.bfloat16
    spread = [quantiles(b.upstream["eager"], b.upstream[other]) for other in ("sdpa", "fp32")]
    median, high = quantiles(logits, b.upstream["eager"])
    assert median <= 1.25 * max(s[0] for s in spread)
    assert high <= 1.5 * max(s[1] for s in spread)
    # and no further from the truth than upstream itself
    ours, theirs = (quantiles(x, b.upstream["fp32"])[0] for x in (logits, b.upstream["eager"]))
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize("name", EXACT_IN_BF16)
def test_bf16_rounds_where_upstream_rounds(name: str) -> None:
    """With the same attention kernel most logits are equal to the bit; a norm that scales in fp32 where
    upstream scales in bf16, or a RoPE table in another dtype, ends that."""
    b = built(name, "bfloat16")
    logits = decoder(b.spec, b.tensors)(b.ids)
    ours = quantiles(logits, b.upstream["sdpa"])[0]
    assert ours <= 0.5 * quantiles(b.upstream["eager"], b.upstream["sdpa"])[0]
