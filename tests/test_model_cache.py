"""The static cache: how much it holds, and that it says so when it is full."""

from __future__ import annotations

import itertools

import pytest
import torch
from built import built, decoder

from zoo.errors import ZooError
from zoo.model import Cache
from zoo.model.cache import Slots
from zoo.spec import Attention, LatentAttention


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "mimo_v2_flash", "llama4_scout"])
def test_a_windowed_layer_keeps_its_window_only(name: str) -> None:
    spec = built(name).spec
    cache = Cache(spec, 2, 1000)
    spans = set()
    for layer, entry in zip(spec.layers, cache.slots, strict=True):
        a = layer.mixer
        assert isinstance(a, Attention) and isinstance(entry, Slots)
        span = a.window or a.chunk
        spans.add(span)
        k, v = entry.tensors
        assert k.shape == (2, a.n_kv_heads, span or 1000, a.head_dim)
        assert v.shape == (2, a.n_kv_heads, span or 1000, a.v_head_dim)
    assert len(spans) == 2


def test_latent_attention_caches_the_latent_and_one_rotary_key() -> None:
    spec = built("deepseek_v32").spec
    cache = Cache(spec, 2, 50)
    m = spec.layers[0].mixer
    assert isinstance(m, LatentAttention) and m.indexer is not None
    per_layer = 2 * 50 * (m.kv_rank + m.rope_dim + m.indexer.head_dim)
    assert sum(t.numel() for t in cache.tensors()) == spec.n_layers * per_layer


def test_linear_mixers_cache_the_same_whatever_the_length() -> None:
    spec = built("nemotron_h").spec

    def states(length: int) -> list[torch.Size]:
        return [t.shape for t in Cache(spec, 1, length).carried()]

    assert states(10) == states(10_000) and states(10)


def test_layers_that_share_keys_and_values_have_no_cache_of_their_own() -> None:
    spec = built("gemma3n").spec
    cache = Cache(spec, 1, 8)
    shared = [isinstance(x.mixer, Attention) and x.mixer.kv_from is not None for x in spec.layers]
    assert [e is None for e in cache.slots] == shared and any(shared)


def test_a_full_cache_refuses_more_tokens_and_keeps_what_it_has() -> None:
    b = built("llama")
    model = decoder(b.spec, b.tensors)
    cache = model.cache(2, 10)
    model(b.ids[:, :8], cache)
    with pytest.raises(ZooError, match=r"room for 10 tokens; 8 are stored and 3 more"):
        model(b.ids[:, 8:11], cache)
    last = model(b.ids[:, 8:10], cache)
    assert (last - model(b.ids[:, :10])[:, 8:]).abs().max() < 5e-5


@pytest.mark.parametrize("name", ["mistral_window", "llama4_scout"])
@pytest.mark.parametrize("max_len", [3, 5, 6, 7, 8, 20])
@pytest.mark.parametrize("cuts", list(itertools.product([1, 2, 5], [1, 6, 8]))[:9])
def test_windows_and_chunks_hold_however_the_tokens_arrive(
    name: str, max_len: int, cuts: tuple[int, int]
) -> None:
    """Windows and chunks of 7: caches shorter and longer than them, pieces that end before, on and after."""
    b = built(name)
    model = decoder(b.spec, b.tensors)
    ids = b.ids[:, :max_len]
    pieces, at = [], 0
    cache = model.cache(2, max_len)
    for size in itertools.cycle(cuts):
        if at >= max_len:
            break
        pieces.append(model(ids[:, at : at + size], cache))
        at += size
    assert (torch.cat(pieces, 1) - model(ids)).abs().max() < 5e-5
