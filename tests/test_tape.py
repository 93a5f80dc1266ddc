"""One token after the other on a CPU: attention in one call, and the layers as calls that are made again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_gguf_blocks import released

import zoo
from zoo.kernels import gated, norm
from zoo.kernels.attention import attention_reference
from zoo.kernels.rope import place_reference
from zoo.model import attention, moe, tape
from zoo.model.decoder import Decoder
from zoo.spec import MLP, Layer, MoE, Norm, QKNorm, Rope, Router, Spec
from zoo.spec import Attention as AttentionSpec

pytest.importorskip("numba")
from test_cpu_codes import components

from zoo.kernels.cpu import attend, blocks, quantised

# One process of the tests compiles: another would wait for it, or compile for itself.
pytestmark = pytest.mark.xdist_group("compiled for the CPU")

PROMPT = torch.tensor([[3, 5, 7, 11, 13]])
RMS = Norm(1e-6)


@pytest.fixture
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are asked for tiny models, too."""
    for module in (attention, norm, gated):
        monkeypatch.setattr(module, "SOME", 0)
    for module in (blocks, quantised):
        monkeypatch.setattr(module, "LARGE", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_of_a_token_is_that_of_its_parts(dtype: torch.dtype, batch: int) -> None:
    h, kv, d, dv, slots = 6, 2, 32, 48, 20
    norms = (None, Norm(eps=1e-6, rounding="first"), Norm(eps=1e-6, rounding="last", weight="plus_one"))
    more: tuple[tuple[Any, Any], ...] = ((None, None), (torch.randn(h), None), (None, 3.0))
    for n, interleaved, (sinks, softcap) in itertools.product(norms, (False, True), more):
        projected = torch.randn(batch, 1, (h + kv) * d + kv * dv).to(dtype)
        q, k, v = projected.split([h * d, kv * d, kv * dv], -1)
        keys, values = torch.randn(batch, kv, slots, d).to(dtype), torch.randn(batch, kv, slots, dv).to(dtype)
        kind = torch.float32 if interleaved else dtype
        table = torch.randn(1, 12).to(kind), torch.randn(1, 12).to(kind)  # not of all channels
        weights = (None, None) if n is None else (torch.randn(d).to(dtype), torch.randn(d).to(dtype))
        of_keys, of_values = keys.clone(), values.clone()
        slot, seen = 8, 9
        heads = (x.view(batch, 1, -1, c) for x, c in ((q, d), (k, d), (v, dv)))
        placed = place_reference(
            *heads, of_keys.transpose(1, 2), of_values.transpose(1, 2), torch.tensor([slot]), table, interleaved, *weights, n
        )  # fmt: skip
        assert attend.fits(q, k, v, keys, values, table, *weights)
        found = attend.attend(
            q[:, 0], k[:, 0], v[:, 0], keys, values, slot, seen, table, interleaved, n, *weights, 0.2, sinks, softcap
        )  # fmt: skip
        assert torch.equal(values, of_values)
        if n is None:
            assert torch.equal(keys, of_keys)
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
        torch.testing.assert_close(keys, of_keys, **tolerance)
        want = attention_reference(
            placed.float(), *(x[:, :, :seen].transpose(1, 2).float() for x in (of_keys, of_values)), scale=0.2, start=seen - 1,
            sinks=sinks, softcap=softcap,
        )  # fmt: skip
        # scores reach 20 here: the last place of one is as much of its share of the sum
        tolerance["atol"] = max(tolerance["atol"], 64 * torch.finfo(torch.float32).eps)
        torch.testing.assert_close(found.view(batch, 1, h, dv).float(), want, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_activations_of_a_token_round_as_the_expression_does(
    act: Any, dtype: torch.dtype, of_any_size: None
) -> None:
    h, spec = (4 * torch.randn(1, 1, 3000)).to(dtype), MLP(1500, act)
    found, want = gated.gated(h, spec), gated.gated_reference(h, spec)
    if dtype == torch.bfloat16:
        assert (found != want)[want.abs() > 1e-3].double().mean() < 0.02
    # where 1 + tanh is nearly 0 there is less than its last place to agree on
    torch.testing.assert_close(found, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def steps(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, list[tape.Step]]:
    """20 tokens, and what made them."""
    made: list[tape.Step] = []
    begin = tape.Step.__init__
    monkeypatch.setattr(tape.Step, "__init__", lambda self, *a: made.append(self) or begin(self, *a))
    text = model.generate(PROMPT, 20)
    monkeypatch.setattr(tape.Step, "__init__", begin)
    return text, made


# qwen2: biases; gemma2: two windows and capped scores; phi3: a window, which the text outgrows
@pytest.mark.parametrize("name", ["smollm2", "qwen2", "gemma2", "phi3"])
def test_layers_of_a_gguf_are_one_call_from_the_second_token_on(
    name: str, tmp_path: Path, of_any_size: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = tiny.CASES[{"smollm2": "llama"}.get(name, name)]
    file = released(tmp_path, lambda n: "Q4_K" if "ffn" in n else "Q8_0", case, case.gguf[0])
    canon = zoo.convert(file, tmp_path / "canon")
    text, (step,) = steps(zoo.load(canon), monkeypatch)
    assert step.tape is not None and len(step.tape.calls) > 10
    assert torch.equal(
        text, zoo.load(zoo.convert(file, tmp_path / "plain", dtype="fp32")).generate(PROMPT, 20)
    )
    model = zoo.load(canon)
    cache = model.cache(1, 32)
    model(PROMPT, cache)
    again, plainly = tape.Step(model, cache), model.cache(1, 32)
    model(PROMPT, plainly)
    for token in text[0, 5:]:
        assert torch.equal(again(token[None]), model(token[None, None], plainly)[:, -1])
    assert cache.length == plainly.length and int(cache.position) == cache.length
    with pytest.raises(zoo.ZooError, match="room for 32"):
        for token in text[0]:
            again(token[None])
    assert cache.length == 32


def of_codes(scheme: str) -> Decoder:
    """A model of random codes and, of the rest, numbers of bf16."""
    torch.manual_seed(0)
    how = {"scale": 64**-0.5, "qk_norm": QKNorm(RMS, "head"), "rope": Rope(10_000.0, 64), "qkv_bias": True}
    layer = Layer(AttentionSpec(4, 2, 64, **how), MLP(256), attn_norm=RMS, ffn_norm=RMS)
    model = Decoder(Spec("llama", 128, 61, (layer, layer), RMS, tied=False, context_length=64))
    for name, m in list(model.matrices()):
        if name != "head":
            m.quantise(scheme, components(scheme, m.parts, m.weight.shape[-1]))
    for name, p in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        t = torch.randn(p.shape).bfloat16() + ("norm" in name)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(t, requires_grad=False))
    return model


@pytest.mark.parametrize("scheme", ["fp8-channel", "mxfp4", "awq4-group32"])
def test_so_are_layers_of_codes(scheme: str, of_any_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = of_codes(scheme)
    text, (step,) = steps(model, monkeypatch)
    assert step.tape is not None and len(step.tape.calls) == 2 * 8
    cache, plainly = model.cache(1, 32), model.cache(1, 32)
    model(PROMPT, cache), model(PROMPT, plainly)
    again = tape.Step(model, cache)
    for token in text[0, 5:]:
        assert torch.equal(again(token[None]), model(token[None, None], plainly)[:, -1])


def test_hooks_and_weights_that_come_between_two_tokens_are_not_left_out(
    tmp_path: Path, of_any_size: None
) -> None:
    case = tiny.CASES["llama"]
    model = zoo.load(
        zoo.convert(released(tmp_path, lambda _: "Q8_0", case, case.gguf[0]), tmp_path / "canon")
    )
    cache, calls, token = model.cache(1, 32), [], torch.tensor([7])
    model(PROMPT, cache)
    step = tape.Step(model, cache)
    step(token)
    assert step.tape is not None
    handle = model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    step(token)
    handle.remove()
    assert calls == [1]
    norm = model.layers[0].attn_norm
    norm.weight = torch.nn.Parameter(norm.weight * 3, requires_grad=False)
    again = model.cache(1, 32)
    model(torch.cat((PROMPT, token[None], token[None]), -1), again)
    for entry, other in zip(cache.slots, again.slots, strict=True):
        assert entry is not None and other is not None
        for to, new in zip(entry.tensors, other.tensors, strict=True):
            to.copy_(new)
    torch.testing.assert_close(step(token), model(token[None], again)[:, -1], rtol=1e-5, atol=1e-5)


def test_a_text_that_outgrows_the_kernel_goes_on_without_it(
    tmp_path: Path, of_any_size: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = tiny.CASES["llama"]
    model = zoo.load(
        zoo.convert(released(tmp_path, lambda _: "Q8_0", case, case.gguf[0]), tmp_path / "canon")
    )
    want = model.generate(PROMPT, 20)
    for module in (attention, tape):
        monkeypatch.setattr(module, "LONG", 12)
    text, (step,) = steps(model, monkeypatch)
    assert step.tape is not None and torch.equal(text, want)


def test_what_torch_computes_between_is_not_left_out(
    tmp_path: Path, of_any_size: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = tiny.CASES["llama"]
    canon = zoo.convert(released(tmp_path, lambda _: "Q8_0", case, case.gguf[0]), tmp_path / "canon")
    model = zoo.load(canon)
    want = model.generate(PROMPT, 20)
    plain = attention.Attention._one_token
    monkeypatch.setattr(
        attention.Attention, "_one_token", lambda *_: None
    )  # as where the kernel does not serve
    text, (step,) = steps(model, monkeypatch)
    assert step.tape is None and torch.equal(text, want)
    monkeypatch.setattr(attention.Attention, "_one_token", plain)
    calls: list[int] = []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    text, made = steps(model, monkeypatch)
    assert not made and len(calls) == 20 and torch.equal(text, want)


def of_experts(scheme: str, router: Router) -> Decoder:
    """The same with a mixture of experts in place of the MLP."""
    torch.manual_seed(0)
    moe = MoE(8, MLP(128), router)
    layer = Layer(
        AttentionSpec(4, 2, 64, scale=0.125, rope=Rope(10_000.0, 64)), moe, attn_norm=RMS, ffn_norm=RMS
    )
    model = Decoder(Spec("llama", 128, 61, (layer, layer), RMS, tied=False, context_length=64))
    for name, m in list(model.matrices()):
        if name != "head" and "router" not in name:
            *lead, _, k = m.weight.shape
            m.quantise(scheme, components(scheme, m.parts, k, *lead))
    for name, p in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        dtype = torch.float32 if leaf == "selection_bias" else torch.bfloat16
        t = (torch.randn(p.shape) + ("norm" in name)).to(dtype)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(t, requires_grad=False))
    return model


ROUTERS = (
    Router(2, "softmax", normalize=True),
    Router(3, "softmax", over="chosen", bias=True, rounding="last"),
    Router(
        2,
        "sigmoid",
        selection_bias=True,
        normalize=True,
        normalize_eps=1e-20,
        scale=2.5,
        weights_rounding="last",
    ),
)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_token_s_experts_are_those_of_torch_and_calls_that_are_made_again(
    router: Router, of_any_size: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "SOME", 0)
    model = of_experts("int4-group32", router)
    text, (step,) = steps(model, monkeypatch)
    assert step.tape is not None and len(step.tape.calls) == 2 * 11
    cache, plainly = model.cache(1, 32), model.cache(1, 32)
    model(PROMPT, cache), model(PROMPT, plainly)
    again = tape.Step(model, cache)
    for token in text[0, 5:]:
        assert torch.equal(again(token[None]), model(token[None, None], plainly)[:, -1])
    layer = model.layers[0].moe
    for _ in range(20):
        x = torch.randn(1, 128).bfloat16()
        with torch.inference_mode(), monkeypatch.context() as patch:
            chosen, weights = layer.router(x)
            found = layer(x, x)
            patch.setattr(moe.Router, "_of_token", lambda *_: None)
            patch.setattr(moe, "_of_token", lambda *_: None)
            by_torch, order = layer.router(x)[0].sort()
            torch.testing.assert_close(weights, layer.router(x)[1].gather(1, order), rtol=2**-7, atol=0)
            assert torch.equal(chosen, by_torch)
            torch.testing.assert_close(found, layer(x, x), rtol=2**-6, atol=2**-6 * float(found.abs().max()))
