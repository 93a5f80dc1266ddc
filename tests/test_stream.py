"""The kernels in CUDA C++ of a decode step (`zoo.kernels.stream`): how work is shared, everywhere; what they compute, on a GPU of Hopper's
kind or later, against the same in fp32 with the weights expanded."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.kernels import cuda, experts, linear, stream, weights
from zoo.kernels.gated import gated_reference
from zoo.kernels.norm import rms_norm_reference
from zoo.spec import MLP, Norm

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from random_codes import components

on_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and cuda.serves(torch.empty(1, device="cuda"))),
    reason="no GPU of Hopper's kind",
)
SCHEMES = (
    "fp8-tensor", "fp8-channel", "fp8-block", "int4-group128", "awq4-group128", "gptq4-group128", "nvfp4", "int8-channel", "mxfp4",
)  # fmt: skip


@pytest.mark.parametrize(
    "kind", [weights.FP8_ROWS, weights.FP8, weights.INT4, weights.AFFINE4, weights.MXFP4, weights.NVFP4]
)
@pytest.mark.parametrize("multiprocessors", [78, 132, 148])
def test_each_unit_is_somebodys_and_no_program_has_many_more(kind: int, multiprocessors: int) -> None:
    for mode, n, k, top_k in (
        (stream.MATRIX, 28672, 4096, 1), (stream.MATRIX, 4096, 14336, 1), (stream.MATRIX, 1024, 512, 1), (stream.MATRIX, 128256, 4096, 1),
        (stream.UP, 1536, 2048, 8), (stream.UP, 5760, 2880, 4), (stream.DOWN, 2048, 768, 8), (stream.DOWN, 2880, 2880, 4),
    ):  # fmt: skip
        plan = stream._planned(multiprocessors, n, k, kind, mode, top_k)
        units = n // stream.ROWS * (top_k if mode == stream.UP else 1)
        assert plan.programs * plan.units >= units > (plan.programs - 1) * plan.units
        assert plan.units <= stream.MOST and (plan.programs <= multiprocessors or plan.units == stream.MOST)
        slots = top_k if mode == stream.DOWN else 1
        assert stream.WARPS % (plan.team * slots) == 0
        assert plan.first <= plan.at_once < plan.depth


def made(scheme: str, parts: tuple[int, ...], k: int, *lead: int) -> weights.Weight:
    with torch.device("cuda"):
        w = weights.quantised(scheme, components(scheme, parts, k, *lead), parts)
    assert w is not None
    return w


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def exact(x: torch.Tensor, w: weights.Weight, onto: torch.Tensor | None = None) -> torch.Tensor:
    y = x.float() @ weights.expanded(w, torch.float32).T
    y = y if w.bias is None else y + w.bias.float()
    return y if onto is None else onto.float() + y


def near_to(y: torch.Tensor, expected: torch.Tensor) -> None:
    assert bool(torch.isfinite(y).all())
    assert (y.float() - expected).norm() <= 0.008 * expected.norm()


@on_hopper
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (6144, 1024), (1040, 2560), (2048, 14336), (40000, 256)])
def test_a_row_times_codes(n: int, k: int, scheme: str) -> None:
    torch.manual_seed(n)
    w, x, onto = made(scheme, (n,), k), rand(1, k), rand(1, n)
    assert stream.serves(x, w)
    y = linear.linear(x, w, onto)
    near_to(y, exact(x, w, onto))
    assert torch.equal(y, linear.linear(x, w, onto))
    biased = replace(w, bias=rand(n))
    near_to(linear.linear(x, biased), exact(x, biased))
    for norm, factor in (
        (Norm(1e-5), rand(k)), (Norm(1e-6, weight="plus_one", rounding="last"), rand(k).float()), (Norm(1e-5, weight="none"), None),
    ):  # fmt: skip
        if linear.takes_norm(x, w, (factor, norm)):
            near_to(
                linear.linear(x * 3, w, norm=(factor, norm)),
                exact(rms_norm_reference(x * 3, factor, norm), w),
            )
        else:
            assert w.order is not None


@on_hopper
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu2", "quick_gelu", "silu_clamped"])
def test_gate_and_up_of_a_row(act: str, scheme: str) -> None:
    f, k = 1408, 2048
    w, x = made(scheme, (f, f), k), rand(1, k)
    spec = MLP(f, act=act, **({"limit": 7.0, "alpha": 1.702} if act == "silu_clamped" else {}))  # type: ignore[arg-type]
    assert stream.serves(x, w, gated=True)
    near_to(linear.gated_linear(x, w, spec), gated_reference(exact(x, w).bfloat16().float(), spec))


@on_hopper
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "gptq4-group128"])
@pytest.mark.parametrize(
    ("n", "d", "f", "top_k", "gated"),
    [
        (16, 2048, 768, 8, True),
        (8, 2880, 2880, 4, True),
        (8, 4096, 1024, 2, False),
        (4, 1024, 2048, 1, True),
        (16, 2048, 512, 16, True),
    ],
)
def test_a_token_and_its_experts(n: int, d: int, f: int, top_k: int, gated: bool, scheme: str) -> None:
    if (scheme in ("int4-group128", "awq4-group128") and (d % 256 or f % 256)) or (
        scheme == "fp8-block" and f % 128
    ):
        pytest.skip("scales of other channels than a step has")
    spec = MLP(f, gated=gated)
    up, down = made(scheme, (f, f) if gated else (f,), d, n), made(scheme, (d,), f, n)
    up, down = replace(up, bias=rand(n, up.n)), replace(down, bias=rand(n, d))
    x, shared, onto = rand(1, d), rand(1, d), rand(1, d)
    chosen = torch.randperm(n, device="cuda")[:top_k][None].int()
    dense = [weights.expanded(w, torch.float32) for w in (up, down)]
    for dtype in (torch.bfloat16, torch.float32):
        shares = torch.rand(1, top_k, device="cuda").to(dtype)
        assert stream.serves_experts(x, chosen, shares, up, down, spec)
        total = shared.float() + onto.float()
        for e, share in zip(chosen[0].tolist(), shares[0].float().tolist()):
            h = x.float() @ dense[0][e].T + up.bias[e].float()  # type: ignore[index]
            h = gated_reference(h.bfloat16().float(), spec).bfloat16().float()
            total = total + share * (h @ dense[1][e].T + down.bias[e].float())  # type: ignore[index]
        y = experts.experts(x, chosen, shares, up, down, spec, shared=shared, residual=onto)
        near_to(y, total)
        assert torch.equal(
            y, experts.experts(x, chosen, shares, up, down, spec, shared=shared, residual=onto)
        )


@on_hopper
def test_what_does_not_lie_as_it_reads_is_left_to_others() -> None:
    x, chosen = rand(1, 2048), torch.zeros(1, 3, dtype=torch.int32, device="cuda")
    up, down = made("mxfp4", (512, 512), 2048, 4), made("mxfp4", (2048,), 512, 4)
    shares: Any = torch.rand(1, 3, device="cuda")
    assert not stream.serves_experts(x, chosen, shares, up, down, MLP(512))  # not 1, 2, 4, 8 or 16 of them
    assert not stream.serves(x, made("int4-group32", (4096,), 2048))
    assert not stream.serves(x.float(), made("fp8-channel", (4096,), 2048))
    assert not stream.serves(x, made("fp8-channel", (512,), 2048))  # too small to keep a GPU busy
    assert not stream.serves(rand(1, 2049)[:, 1:], made("fp8-channel", (4096,), 2048))  # no whole 16 bytes
