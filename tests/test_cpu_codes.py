"""Codes times a few rows on a CPU: what float64 makes of the dequantised weight."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from zoo.kernels import cpu
from zoo.kernels.weights import Weight, quantised
from zoo.model.linear import Linear
from zoo.quant import dequantise

SCHEMES = ("fp8-block", "fp8-channel", "mxfp4", "int4-group32", "int4-group128")


@pytest.fixture(scope="module")
def codes() -> ModuleType:
    module = cpu.kernels("quantised")
    if module is None:
        pytest.skip("numba does not run here: torch multiplies")
    return module  # type: ignore[no-any-return]


def components(scheme: str, parts: tuple[int, ...], k: int, *lead: int) -> dict[str, Tensor]:
    """Every code, and scales of several sizes."""
    n = sum(parts)
    if scheme == "mxfp4":
        return {
            "weight": torch.randint(0, 256, (*lead, n, k // 32, 16), dtype=torch.uint8),
            "scale": torch.randint(118, 131, (*lead, n, k // 32), dtype=torch.uint8),
        }
    if scheme.startswith("int4"):
        group = int(scheme.removeprefix("int4-group"))
        return {
            "weight": torch.randint(-(2**31), 2**31, (*lead, n, k // 8)).int(),
            "scale": torch.rand(*lead, n, k // group).bfloat16(),
        }
    byte = torch.randint(0, 256, (*lead, n, k), dtype=torch.uint8)
    byte[byte & 127 == 127] = 0  # NaN
    grid = (sum(-(-p // 128) for p in parts), -(-k // 128)) if scheme == "fp8-block" else (n, 1)
    return {"weight": byte.view(torch.float8_e4m3fn), "scale": torch.rand(*lead, *grid)}


def made(scheme: str, parts: tuple[int, ...], k: int, *lead: int) -> tuple[Weight, Tensor]:
    """The weight as kernels read it, and in float64."""
    torch.manual_seed(k)
    c = components(scheme, parts, k, *lead)
    w = quantised(scheme, c, parts)
    assert w is not None
    return w, dequantise(scheme, c, parts, torch.float64)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("parts", [(64,), (100, 30), (7,)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_few_rows_are_what_the_dequantised_weight_makes_of_them(
    scheme: str, parts: tuple[int, ...], threads: int, codes: ModuleType
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        w, full = made(scheme, parts, 384)
        for rows in (1, 3):
            x, bias = torch.randn(rows, 384), torch.randn(sum(parts))
            torch.testing.assert_close(
                codes.times(x, w, bias).double(), x.double() @ full.T + bias, rtol=1e-5, atol=2e-4
            )
            narrow = codes.times(x.bfloat16(), w)
            assert narrow.dtype == torch.bfloat16
            exact = x.bfloat16().double() @ full.T  # rounded once, at the end
            torch.testing.assert_close(narrow.double(), exact, rtol=2**-8, atol=2e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_multiply_their_own_rows_and_no_others(scheme: str, codes: ModuleType) -> None:
    w, full = made(scheme, (32, 16), 256, 4)
    x, bias = torch.randn(5, 256), torch.randn(4, 48)
    experts, counts, tokens = torch.tensor([3, 0]), torch.tensor([1, 3]), torch.tensor([4, 0, 4, 2])
    y = codes.times(x, w, bias, experts, counts, tokens)
    of = torch.tensor([3, 0, 0, 0])
    exact = torch.einsum("mk,mnk->mn", x[tokens].double(), full[of]) + bias[of]
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=2e-4)


def test_every_code_has_its_value(codes: ModuleType) -> None:
    # Row n of the identity in place of x reads column n of the weight alone.
    for scheme in SCHEMES:
        w, full = made(scheme, (256,), 128)
        y = codes.times(torch.eye(128), w)
        torch.testing.assert_close(y.T.double(), full, rtol=1e-6, atol=0)


def test_a_code_that_is_no_number_is_left_to_torch(codes: ModuleType) -> None:
    c = components("fp8-channel", (1024,), 512)
    good = quantised("fp8-channel", c, (1024,))
    assert good is not None and codes.fits(good, 1) and not codes.fits(good, codes.FEW + 1)
    c["weight"].view(torch.uint8)[3, 5] = 0x7F
    bad = quantised("fp8-channel", dict(c), (1024,))
    assert bad is not None and not codes.fits(bad, 1)
    c = components("mxfp4", (1024,), 512)
    assert (w := quantised("mxfp4", c, (1024,))) is not None and codes.fits(w, 1)
    c["scale"][3, 5] = 255
    assert (w := quantised("mxfp4", c, (1024,))) is not None and not codes.fits(w, 1)


def test_a_model_s_matrix_asks_it_where_it_is_large_enough(
    codes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    times = codes.times
    monkeypatch.setattr(codes, "times", lambda x, **how: asked.append(len(x)) or times(x, **how))
    for n, rows, used in ((1024, 1, True), (1024, 3, True), (1024, 100, False), (64, 1, False)):
        torch.manual_seed(0)
        linear = Linear(512, n, bias=True)
        torch.nn.init.normal_(linear.bias)
        linear.quantise("int4-group32", components("int4-group32", (n,), 512))
        asked.clear()
        x = torch.randn(1, rows, 512)
        with torch.inference_mode():
            y, full = linear(x), linear.dense(torch.float32)
        torch.testing.assert_close(y, x @ full.T + linear.bias, rtol=1e-4, atol=1e-3)
        assert bool(asked) == used, (n, rows)
