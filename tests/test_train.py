"""A model that is trained: its gradients are upstream's, and nothing of inference stands in their way."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import verified
from test_quant_models import fp8_blocks, quantised
from torch.nn import functional as F

import zoo
from zoo.errors import ZooError
from zoo.testing.gradients import furthest, gradients, unreached

# Between them: every mixer, every kind of norm and router, several streams. `make proofs` asks every variant of every family.
FAMILIES = ("deepseek_v3", "gemma3n", "gpt_oss", "nemotron_h", "qwen3_5_moe")


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_upstreams(name: str) -> None:
    variant = tiny.VARIANTS[name]
    ours, theirs = gradients(tiny.CASES[variant.family], variant)
    assert ours.keys() == theirs.keys()
    error, tensor = furthest(ours, theirs)
    assert error < 1e-4, tensor


def test_a_wrong_gradient_is_one_that_the_comparison_sees() -> None:
    variant = tiny.VARIANTS["gpt_oss"]
    ours, theirs = gradients(tiny.CASES[variant.family], variant)
    q, *rest = ours["layers.1.attn.qkv.weight"].chunk(4)
    ours["layers.1.attn.qkv.weight"] = torch.cat((q * 1.001, *rest))
    assert furthest(ours, theirs)[0] > 1e-4


def test_a_parameter_that_gets_no_gradient_is_named_whichever_it_is() -> None:
    """Of each in turn the model computes with a copy from which nothing leads back; then one gets nothing but zeros."""
    from torch.nn.utils import parametrize

    class Cut(torch.nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return w.detach()

    model = zoo.load(verified.canonical("gpt_oss"), trainable=True)
    ids = torch.arange(24)[None]

    def left_out() -> list[str]:
        model.zero_grad()
        model(ids).square().mean().backward()
        return unreached(model)

    assert left_out() == []
    names = [n for n, _ in model.named_parameters() if n.startswith("layers.1.")]
    assert len(names) == 13
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        parametrize.register_parametrization(module, leaf, Cut())
        assert left_out() == [f"{owner}.parametrizations.{leaf}.original"]
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
        model.get_parameter(name).requires_grad_(True)
    sinks = model.get_parameter("layers.1.attn.sinks")
    sinks.register_hook(torch.zeros_like)
    assert left_out() == ["layers.1.attn.sinks"]

    variant = tiny.VARIANTS["gpt_oss"]
    ours, theirs = gradients(tiny.CASES[variant.family], variant)
    ours["layers.1.attn.sinks"] = torch.zeros_like(ours["layers.1.attn.sinks"])
    assert furthest(ours, theirs) == (1.0, "layers.1.attn.sinks")


def test_a_few_steps_learn_a_text_and_leave_the_files_as_they_are(tmp_path: Path) -> None:
    folder = verified.canonical("gpt_oss")
    before = zoo.load(folder)
    model = zoo.load(folder, trainable=True)
    assert model.training
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set()
    ids = torch.arange(40)[None] % 7
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(8):
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    tuned = zoo.load(zoo.save(model, folder, tmp_path / "tuned"))
    with torch.no_grad():
        assert torch.equal(tuned(ids), model(ids))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), zoo.load(folder).parameters()))


def test_parts_can_be_frozen_and_layers_computed_again_in_the_backward_pass() -> None:
    from torch.utils.checkpoint import checkpoint

    model = zoo.load(verified.canonical("gpt_oss"), trainable=True)
    ids = torch.arange(12)[None]

    def grads() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids).square().mean().backward()
        return [p.grad.clone() for p in model.layers[1].parameters() if p.grad is not None]

    whole = grads()
    model.requires_grad_(False)
    model.layers[1].requires_grad_(True)
    frozen = grads()
    assert len(whole) == len(frozen) == len(list(model.layers[1].parameters()))
    for layer in model.layers:
        layer.forward = (lambda f: lambda x, ctx: checkpoint(f, x, ctx, use_reentrant=False))(layer.forward)
    again = grads()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(whole, frozen, again))
    assert model.embed.weight.grad is None


def test_in_bf16_no_kernel_without_a_backward_pass_is_taken() -> None:
    """Products and norms of this size go to compiled kernels where nothing is recorded."""
    from zoo.kernels.norm import rms_norm
    from zoo.kernels.product import product
    from zoo.spec import Norm

    w = torch.randn(1 << 10, 1 << 10).bfloat16().requires_grad_()
    g = torch.ones(1 << 10).bfloat16().requires_grad_()
    x = torch.randn(8, 1 << 10).bfloat16().requires_grad_()
    norm = Norm(1e-6)
    y = product(rms_norm(x, g, norm), w)
    y.float().sum().backward()
    assert all(t.grad is not None and bool(t.grad.any()) for t in (x, g, w))


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    model = zoo.load(verified.canonical("llama"), trainable=True)
    ids, cache = torch.arange(4)[None], model.cache(1, 8)
    with pytest.raises(ZooError, match="no gradient leads through it"):
        model(ids, cache)
    with torch.no_grad():
        assert model(ids, cache).is_inference()
    assert model.generate(ids, 3).shape == (1, 7)
    folder = zoo.convert(quantised("qwen3", {}, fp8_blocks, tmp_path / "hf"), tmp_path / "canon")
    with pytest.raises(ZooError, match=r"weights are quantised .*: fp8.*, and codes can't be trained"):
        zoo.load(folder, trainable=True)
