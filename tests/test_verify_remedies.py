"""A mistake in reading a config, or in naming norms, is told by its remedy, and no other is told beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from verified import canonical, copy, rewrite

import zoo
from zoo.formats.canonical import read
from zoo.spec import Attention, LatentAttention
from zoo.verify.faults import CATALOGUE, Subject
from zoo.verify.faults.spec import map_spec
from zoo.verify.oracle import Transformers
from zoo.verify.ours import subject_of
from zoo.verify.remedies import logits_fitted, searched

CASES = [
    # THE trap: `post_attention_layernorm` is the norm before the feed-forward in Llama, after attention in Gemma.
    ("gemma3", "every_post_norm", "attn_post_norm and ffn_norm are exchanged in every layer"),
    ("gemma3", "attn_post_norm_ffn_norm_swapped", "attn_post_norm and ffn_norm are exchanged in layer 2"),
    ("gemma3", "attn_norm_ffn_post_norm_swapped", "attn_norm and ffn_post_norm are exchanged in layer 2"),
    ("llama", "norms_swapped", "attn_norm and ffn_norm are exchanged in layer 1"),
    ("gemma3", "logit_softcap_dropped", "the logits are soft-capped at 11"),
    ("gemma3", "logit_softcap_value", "the logits are soft-capped at 11"),
    ("llama", "attention_softcap_added", "attention scores are not soft-capped in every layer"),
    ("gemma3", "embed_scale_dropped", "embeddings are multiplied by sqrt(d_model), 6"),
    ("qwen3_moe", "embed_scale_added", "embeddings are not scaled"),
    ("gemma3", "window_shifted", "there is no window in layer 2; the window is 6 keys in layer 3"),
    ("gemma3", "window_inverted", "the window is 6 keys in layers 0, 1, 3, 4; there is no window in layer 2"),
    ("gemma3", "window_ignored", "the window is 6 keys in layers 0, 1, 3, 4"),
    ("gemma3", "rope_skipped",
     "RoPE in layers 0, 1, 3, 4 is as the config has it (theta 71, no scaling; it pairs channels half a head apart)"),
    ("llama", "rope_skipped",
     "RoPE in every layer is as the config has it (theta 731, llama3 scaling; it pairs channels half a head apart)"),
    ("llama", "norm_eps", "eps is 0.02 in all norms of every layer"),
    ("gemma3", "inner_norm_eps", "eps is 0.02 in the norms inside attention of every layer"),
    ("qwen3_moe", "routed_scale_value", "the routed experts' output is not scaled in layers 0, 2, 3"),
    ("deepseek_v32", "routed_scale_dropped", "the routed experts' output is multiplied by 1.7 in layers 1, 2"),
    ("deepseek_v32", "indexer_rope_order", "the indexer's RoPE in every layer pairs channels half a head apart"),
    ("deepseek_v32", "inner_norm_eps", "eps is 1e-06 in the norms inside attention of every layer"),
    ("gpt_oss", "window_shifted", "the window is 6 keys in layers 0, 2; there is no window in layers 1, 3"),
    ("gpt_oss", "rope_theta", "RoPE in every layer has theta 97"),
    ("smollm3", "nope_ignored", "RoPE is taken off layer 2"),
]  # fmt: skip


def every_post_norm(s: Subject) -> Subject:
    for i in range(s.spec.n_layers):
        s = CATALOGUE["attn_post_norm_ffn_norm_swapped"].inject(s, f"layers.{i}.attn_post_norm.weight")
    return s


def attention_softcap_added(s: Subject) -> Subject:
    return s.with_spec(map_spec(s.spec, lambda a: replace(a, softcap=3.0) if isinstance(a, Attention) else a))


MADE: dict[str, Callable[[Subject], Subject]] = {
    f.__name__: f for f in (every_post_norm, attention_softcap_added)
}


def suggestions(name: str, fault: str, folder: Path) -> list[str]:
    """What is said where the folder's Spec is right by its own source: the mistake is in the rules."""
    canon = rewrite(copy(canonical(name), folder), MADE.get(fault) or CATALOGUE[fault].inject)
    source = canonical(name).parent / f"{name}-float32-source"
    cert = zoo.verify(canon, against=Transformers(source), level="logits", write=False)
    assert not cert.passed and cert.diagnosis is not None
    found: list[str] = cert.diagnosis["suggestions"]
    return found


@pytest.mark.parametrize(("name", "fault", "remedy"), CASES)
def test_a_mistake_is_told_by_its_remedy_and_no_other(
    name: str, fault: str, remedy: str, tmp_path: Path
) -> None:
    assert suggestions(name, fault, tmp_path / "c") == [f"agrees when {remedy}"]


def test_a_logit_scale_is_read_off_the_logits() -> None:
    s = subject_of(read(canonical("llama")), torch.float32)
    raw = torch.randn(20, 50)
    said = [r.says for r in logits_fitted(s, raw, 0.125 * raw)]
    assert said[0] == "the logits are multiplied by 0.125"
    assert not any("soft-capped" in r.says for r in logits_fitted(s, raw, raw))


def test_two_eps_of_a_layer_are_found_beside_each_other() -> None:
    s = subject_of(read(canonical("minicpm3")), torch.float32)

    def error(tried: Subject) -> float:  # as a layer's: the outer one shows more
        layer = tried.spec.layers[1]
        assert layer.attn_norm is not None and isinstance(layer.mixer, LatentAttention)
        inner, outer = layer.mixer.latent_norm.eps, layer.attn_norm.eps
        return abs(math.log(outer / 0.03)) + 1e-3 * abs(math.log(inner / 4e-6))

    says = [r.says for r in searched(s, 1, error, None) if error(r.subject) < 1e-3]
    assert says == ["eps is 4e-06 in the norms inside attention and 0.03 in those around it in {}"]
