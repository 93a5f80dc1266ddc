"""What a model and a token cost: counted from the Spec, and as the decoder and its cache really are."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import verified
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from zoo import families, manifest, sizes
from zoo.cli import cli
from zoo.describe import describe, flop, published, serving
from zoo.layout import active_params, layout, total_params
from zoo.model.cache import Cache
from zoo.spec import MLP, Attention, LatentAttention, Layer, MoE, Norm, Rope, Router, Spec
from zoo.testing.built import decoder

RELEASES = (
    "deepseek-v3", "glm-5.2", "gemma-3n-e2b", "gemma-4-e2b-it", "qwen3-next-80b-a3b-instruct", "kimi-linear-48b-a3b", "falcon-h1-0.5b",
    "nemotron-3-super-120b-a12b", "lfm2-8b-a1b", "gpt-oss-20b", "llama-4-scout", "gpt2", "bloom-560m", "mimo-v2-flash",
)  # fmt: skip
N = Norm(1e-6)


@functools.cache
def spec_of(name: str) -> Spec:
    m = manifest.find(name)
    assert m.config is not None
    return families.spec_of(m.config, families.get(m.family), name)


@pytest.mark.parametrize("name", RELEASES)
def test_the_parts_are_all_of_a_model_and_the_active_ones_what_a_token_visits(name: str) -> None:
    spec = spec_of(name)
    parts, active = sizes.params_by_part(spec), sizes.active_by_part(spec)
    assert sum(parts.values()) == total_params(spec) and set(parts) <= set(sizes.PARTS)
    assert sum(active.values()) == active_params(spec)
    assert sizes.weight_bytes(spec, "bf16") == 2 * total_params(spec)
    assert (
        sizes.weight_bytes(spec, "int4") < sizes.weight_bytes(spec, "fp8") < sizes.weight_bytes(spec, "bf16")
    )


def test_the_parts_of_a_release_are_named_as_people_name_them() -> None:
    parts = sizes.params_by_part(spec_of("deepseek-v3"))
    expert = 3 * 7168 * 2048
    assert parts["routed experts"] == 58 * 256 * expert and parts["shared experts"] == 58 * expert
    assert parts["router"] == 58 * 256 * (7168 + 1) and parts["dense feed-forward"] == 3 * 3 * 7168 * 18432
    assert parts["embedding"] == parts["head"] == 7168 * 129_280
    assert sizes.active_by_part(spec_of("deepseek-v3"))["routed experts"] == 58 * 8 * expert
    assert "head" not in sizes.params_by_part(spec_of("gemma-3n-e2b"))


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cache_and_state_are_as_large_as_the_decoders(name: str, dtype: torch.dtype) -> None:
    spec, tokens = spec_of(name), 3000
    held = Cache(spec, 2, tokens, dtype, "meta").tensors()
    counted = sizes.kv_bytes(spec, tokens, dtype.itemsize) + sizes.state_bytes(spec, dtype.itemsize)
    assert sum(t.nbytes for t in held) == 2 * counted


ATTENTION = Attention(4, 2, 8, v_head_dim=6, scale=0.3, rope=Rope(100.0, 8), gate=True)
LATENT = LatentAttention(2, 8, 6, 4, 8, 0.3, N, q_rank=12, rope=Rope(100.0, 4))


@pytest.mark.parametrize("mixer", [ATTENTION, LATENT], ids=["attention", "latent"])
@pytest.mark.parametrize("ffn", [MLP(24), MLP(24, "gelu", gated=False)], ids=["gated", "plain"])
def test_operations_are_those_that_torch_counts(mixer: Any, ffn: Any) -> None:
    spec = Spec("t", 16, 40, (Layer(mixer, ffn, N, None, N), Layer(mixer, ffn, N, None, N)), N, True, 64)
    model = decoder(spec, {n: torch.randn(s.shape) for n, s in layout(spec).items()})
    with FlopCounterMode(display=False) as counter:
        model(torch.tensor([[3]]))
    assert counter.get_total_flops() == sizes.flops_per_token(spec, 1)


def test_a_token_costs_its_experts_and_what_its_mixers_see() -> None:
    mlp = MLP(24)
    moe = MoE(8, mlp, Router(2, "softmax"))
    seen = dataclasses.replace(ATTENTION, window=10)

    def cost(mixer: Any, ffn: Any, context: int) -> int:
        return sizes.flops_per_token(
            Spec("t", 16, 40, (Layer(mixer, ffn, N, None, N),), N, False, 64), context
        )

    dense = cost(ATTENTION, mlp, 1)
    assert cost(ATTENTION, moe, 1) == dense + 2 * (3 * 16 * 24 + 8 * 16)  # another expert, and the router
    assert cost(ATTENTION, mlp, 50) - dense == 2 * 4 * (8 + 6) * 49
    assert cost(seen, mlp, 50) == cost(seen, mlp, 10) == cost(ATTENTION, mlp, 10)


@pytest.mark.parametrize(
    "name, why",
    [
        ("qwen3-next-80b-a3b-instruct", "A3B leaves out the embeddings and the head"),  # its manifest's words
        ("glm-4.5-air", "active: 12.2B without embedding and head, rounded"),
        ("deepseek-v3-base", "active: 36.6B without the embedding, rounded"),
        ("kimi-linear-48b-a3b", "active: 3.48B, rounded"),
        ("lfm2-8b-a1b", "active: 1.56B counted, and no part known that the figure leaves out"),
    ],
)
def test_a_published_size_that_is_not_the_count_says_why(name: str, why: str) -> None:
    assert why in published(manifest.find(name), spec_of(name))


def test_a_published_size_that_is_the_count_says_no_more() -> None:
    assert published(manifest.find("llama-3.1-8b"), spec_of("llama-3.1-8b")) == "8.00B total"


def test_show_and_inspect_say_the_numbers_in_words_and_to_programs() -> None:
    def show(*args: str) -> str:
        return CliRunner().invoke(cli, ["show", *args], catch_exceptions=False).stdout

    text = " ".join(show("gemma-3-27b", "--context", "32768", "--batch", "4", "--kv-dtype", "fp8").split())
    assert "10 x (5 S, F), 2 S: S S S S S F S S" in text and "S sliding window, F full attention" in text
    assert "dense feed-forward 21.5B" in text and "50.31 GiB in bf16" in text
    assert "serving 4 x 32,768 tokens: KV cache 5.812 GiB in fp8; " in text
    shown = json.loads(
        show("gemma-3-27b", "--context", "32768", "--batch", "4", "--kv-dtype", "fp8", "--json")
    )
    numbers = shown["numbers"]
    assert numbers["kv_cache_bytes"] == 4 * 16 * 2 * 128 * (10 * 32768 + 52 * 1024)
    assert numbers["batch"] == 4 and numbers["flops_per_token"] > 2 * numbers["params_by_part"]["attention"]
    assert "leaves out the multi-token-prediction layer" in " ".join(show("deepseek-v3").split())
    assert "recurrent state" in serving(spec_of("kimi-linear-48b-a3b"), 1000, 1, "bf16")
    assert "layers" not in describe(spec_of("gpt2")), "all its layers are alike"
    assert [flop(x) for x in (7.0, 15.04e9, 999.6e9, 2e15)] == ["7 FLOP", "15 GFLOP", "1 TFLOP", "2 PFLOP"]


def test_a_folder_is_shown_and_inspected_with_its_numbers(tmp_path: Path) -> None:
    folder = verified.canonical("llama")
    said = [
        CliRunner().invoke(cli, [command, str(folder), "--json"]).stdout for command in ("show", "inspect")
    ]
    shown, inspected = map(json.loads, said)
    assert shown["numbers"] == inspected["numbers"] and shown["name"] == folder.name
    assert sum(shown["numbers"]["params_by_part"].values()) == shown["params"]["total"]
    out = tmp_path / "x.svg"
    assert (
        CliRunner().invoke(cli, ["show", str(folder), "gpt2", "--svg", str(out)]).exit_code == 0
        and out.stat().st_size
    )
    assert "parts" in CliRunner().invoke(cli, ["inspect", str(folder)]).stdout
