"""Codes times a few rows on a CPU: what float64 makes of the dequantised weight."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.kernels import cpu
from zoo.model.linear import Linear
from zoo.quant import dequantise
from zoo.quant.base import grid
from zoo.quant.schemes import scheme as named

# One process of the tests compiles: another would wait for it, or compile for itself.
pytestmark = pytest.mark.xdist_group("compiled for the CPU")

SCHEMES = (
    "fp8-block", "fp8-channel", "mxfp4", "int4-group32", "int4-group128",
    "awq4-group32", "mlx4-group32", "int8-channel",  # zero points and eight rows to a word, biases, whole bytes
)  # fmt: skip
OTHERS = (
    "packed4-group32-zeros", "packed8-group64-zeros", "nvfp4",
    "fp8-block-1x32", "mxfp4-packed", "nvfp4-packed", "mlx-mxfp4", "mlx-nvfp4", "mlx4-group64", "mlx4-group128", "mlx8-group32",
    "mlx8-group64", "awq4-group64", "awq4-group128", "awq4-channel", "gptq4-group32", "gptq4-group128", "gptq4-v2-group64",
    "gptq4-channel", "gptq8-group128", "packed4-group128-zeros", "packed4-channel", "packed8-group128", "int8-group32-zeros",
    "int8-channel-zeros", "int8-tensor", "int8-tensor-zeros", "mlx-mxfp8", "bnb8",
)  # fmt: skip


@pytest.fixture(scope="module")
def codes() -> ModuleType:
    module = cpu.kernels("quantised")
    if module is None:
        pytest.skip("numba does not run here: torch multiplies")
    return module  # type: ignore[no-any-return]


def components(scheme: str, parts: tuple[int, ...], k: int, *lead: int) -> dict[str, Tensor]:
    """Every code, and scales of several sizes, as the scheme's file describes them."""
    s, out = named(scheme), dict[str, Tensor]()
    for c in s.components:
        if c.optional or c.name == "shape":
            continue
        if c.unit is None:
            shape: tuple[int, ...] = (*lead, len(parts))
        else:
            rows, rest = grid(c, parts, k)
            shape = (*lead, sum(rows), *rest)
        if c.name == "scale" and scheme == "fp8-block-1x32":
            out[c.name] = torch.randint(118, 131, shape, dtype=torch.uint8)
        elif "BF16" in c.dtypes or c.dtypes == ("F32",):
            dtype = torch.float16 if s.module in ("gptq", "awq") else torch.bfloat16
            dtype = torch.float32 if scheme in ("fp8-block", "fp8-channel") or c.unit is None else dtype
            out[c.name] = (torch.rand(shape) - (0.5 if c.name == "shift" else 0)).to(dtype)
        elif c.dtypes[0] == "F8_E4M3":
            byte = torch.randint(0, 256, shape, dtype=torch.uint8)
            byte[byte & 127 == 127] = 0  # NaN
            out[c.name] = byte.view(torch.float8_e4m3fn)
        elif c.dtypes[0] == "U8":
            exponents = c.name == "scale" and scheme != "mlx-nvfp4"
            low, high = (118, 131) if exponents else (30, 120) if c.name == "scale" else (0, 256)
            out[c.name] = torch.randint(low, high, shape, dtype=torch.uint8)
        elif c.dtypes[0] == "I8":
            out[c.name] = torch.randint(-128, 128, shape, dtype=torch.int8)
        else:
            words = torch.randint(-(2**31), 2**31, shape).int()
            out[c.name] = words.view(torch.uint32) if c.dtypes[0] == "U32" else words
            if scheme == "mlx-mxfp8":
                byte = words.view(torch.uint8)
                byte[byte & 127 == 127] = 0  # NaN
    return out


def made(scheme: str, parts: tuple[int, ...], k: int, *lead: int) -> tuple[Any, Tensor]:
    """The weight as kernels read it, and in float64."""
    from zoo.kernels.cpu.carried import carried

    torch.manual_seed(k)
    c = components(scheme, parts, k, *lead)
    w = carried(scheme, c, parts)
    assert w is not None
    return w, dequantise(scheme, c, parts, torch.float64)


def close(y: Tensor, exact: Tensor, x: Tensor, full: Tensor, rtol: float = 0.0) -> None:
    """As sums in fp32 of terms up to the largest weight are: their halves of a last place, over some 16 steps of rounding."""
    size = float(full.abs().max() * x.double().abs().sum(-1).max())
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=2**-20 * size)


def hold(scheme: str, parts: tuple[int, ...], codes: ModuleType) -> None:
    parts = tuple(-(-p // 8) * 8 for p in parts) if scheme.startswith("awq") else parts
    w, full = made(scheme, parts, 384)
    for rows in (1, 3):
        x, bias = torch.randn(rows, 384), torch.randn(sum(parts))
        close(codes.times(x, w, bias), x.double() @ full.T + bias, x, full)
        narrow, x = codes.times(x.bfloat16(), w), x.bfloat16()
        assert narrow.dtype == torch.bfloat16
        exact = x.double() @ full.T  # rounded once, at the end
        close(narrow, exact, x, full, rtol=2**-8)
        close(codes.times(x, w, dtype=torch.float32), exact, x, full)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("parts", [(64,), (100, 30), (7,)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_few_rows_are_what_the_dequantised_weight_makes_of_them(
    scheme: str, parts: tuple[int, ...], threads: int, codes: ModuleType
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        hold(scheme, parts, codes)
    finally:
        torch.set_num_threads(before)


@pytest.mark.proof  # a second to compile each
@pytest.mark.parametrize("scheme", OTHERS)
def test_and_so_they_are_in_every_other_scheme(scheme: str, codes: ModuleType) -> None:
    hold(scheme, (100, 30), codes)
    hold_experts(scheme, codes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_multiply_their_own_rows_and_no_others(scheme: str, codes: ModuleType) -> None:
    hold_experts(scheme, codes)


def hold_experts(scheme: str, codes: ModuleType) -> None:
    w, full = made(scheme, (32, 16), 256, 4)
    x, bias = torch.randn(5, 256), torch.randn(4, 48)
    experts, counts, tokens = torch.tensor([3, 0]), torch.tensor([1, 3]), torch.tensor([4, 0, 4, 2])
    y = codes.times(x, w, bias, experts, counts, tokens)
    of = torch.tensor([3, 0, 0, 0])
    exact = torch.einsum("mk,mnk->mn", x[tokens].double(), full[of]) + bias[of]
    close(y, exact, x, full)


def test_every_code_has_its_value(codes: ModuleType) -> None:
    # Row n of the identity in place of x reads column n of the weight alone.
    for scheme in SCHEMES:
        w, full = made(scheme, (256,), 128)
        y = codes.times(torch.eye(128), w)
        moved = w.zero is not None or w.shift is not None or w.move  # which is added, in fp32
        atol = 2**-21 * float(full.abs().max()) if moved else 0
        torch.testing.assert_close(y.T.double(), full, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("scheme", ["awq4-group32", "mlx4-group64"])
def test_codes_are_widened_to_what_the_formula_gives_to_the_bit(scheme: str, codes: ModuleType) -> None:
    hold_widened(scheme, codes, torch.bfloat16)


@pytest.mark.proof
@pytest.mark.parametrize(
    "scheme", sorted({*SCHEMES, *OTHERS} - {"fp8-block", "fp8-channel", "fp8-block-1x32", "mlx-mxfp8"})
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_and_so_they_are_of_every_scheme_and_to_every_dtype(
    scheme: str, dtype: torch.dtype, codes: ModuleType
) -> None:
    hold_widened(scheme, codes, dtype)


def hold_widened(scheme: str, codes: ModuleType, dtype: torch.dtype) -> None:
    expand = cpu.kernels("expand")
    c = components(scheme, (512, 96), 512)
    w = codes.carried(scheme, c, (512, 96))
    assert w is not None
    if scheme in ("nvfp4-packed", "bnb8"):  # which divide by a number of fp32, or multiply twice
        assert not expand.widens(w, dtype)
        return
    assert expand.widens(w, dtype) and not expand.widens(w, torch.float64)
    want = dequantise(scheme, c, (512, 96), dtype)
    assert torch.equal(expand.expanded(w, dtype), want)
    stack = {
        n: torch.stack([x, x.flip(0) if x.ndim > 1 and n != "global_scale" else x])
        for n, x in c.items()
        if x.dtype.itemsize > 1
    }
    if len(stack) == len(c):
        both = codes.carried(scheme, stack, (512, 96))
        assert torch.equal(expand.expanded(both, dtype, 0), want)
        assert torch.equal(
            expand.expanded(both, dtype)[1],
            dequantise(scheme, {n: x[1] for n, x in stack.items()}, (512, 96), dtype),
        )


@pytest.mark.parametrize("scheme", ["int8-channel", "fp8-block", "mxfp4", "int4-group32", "awq4-group32"])
def test_codes_may_begin_at_any_byte_that_their_elements_can(scheme: str, codes: ModuleType) -> None:
    """As those of a file do, that is mapped: every second header ends where 16 bytes do."""
    c, x, found = components(scheme, (64,), 384), torch.randn(1, 384), []
    size = c["weight"].element_size()
    for by in (0, size, 8):
        room = torch.empty(c["weight"].nbytes + 32, dtype=torch.uint8)
        first = -room.data_ptr() % 16 + by
        moved = room[first : first + c["weight"].nbytes].view(c["weight"].dtype).view(c["weight"].shape)
        w = codes.carried(scheme, {**c, "weight": moved.copy_(c["weight"])}, (64,))
        assert w is not None and w.codes.data_ptr() % 16 == by
        found.append(codes.times(x, w))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_code_that_is_no_number_is_left_to_torch(codes: ModuleType) -> None:
    c = components("fp8-channel", (1024,), 512)
    good = codes.carried("fp8-channel", c, (1024,))
    assert good is not None and codes.fits(good, 1) and not codes.fits(good, codes.FEW + 1)
    c["weight"].view(torch.uint8)[3, 5] = 0x7F
    assert codes.carried("fp8-channel", dict(c), (1024,)) is None
    for scheme, none in (("mxfp4", 255), ("nvfp4", 0x7F)):
        c = components(scheme, (1024,), 512)
        assert (w := codes.carried(scheme, c, (1024,))) is not None and codes.fits(w, 1)
        c["scale"].view(torch.uint8)[3, 5] = none
        assert codes.carried(scheme, c, (1024,)) is None


@pytest.mark.parametrize("scheme", ["gptq4-group128", "packed8-group64-zeros"])
def test_inputs_in_an_order_of_their_own_are_sorted_by_groups_once(scheme: str, codes: ModuleType) -> None:
    linear, group = Linear(512, 600, 424), named(scheme).group
    c = components(scheme, (600, 424), 512)
    c["order"] = (torch.arange(512) // group).int()
    w = codes.carried(scheme, c, (600, 424))
    assert w is not None and w.order is None
    c["order"] = c["order"][torch.randperm(512)].repeat(2, 1)
    linear.quantise(scheme, c)
    x, full = torch.randn(3, 512), dequantise(scheme, c, (600, 424), torch.float64)
    with torch.inference_mode():
        assert linear.coded(x, 3) is not None
        close(linear(x), x.double() @ full.T, x, full)
        assert torch.equal(linear.dense(torch.bfloat16), full.bfloat16())
    # Parts with orders of their own, groups of more than one size, and experts are left to torch.
    c["order"][1] = c["order"][1].flip(0)
    assert codes.carried(scheme, c, (600, 424)) is None
    odd = c["order"][0].clone()
    odd[0] = (odd[0] + 1) % 4
    assert codes.carried(scheme, c | {"order": odd}, (600, 424)) is None
    stacked = {n: x[None] for n, x in c.items()}
    assert codes.carried(scheme, stacked | {"order": odd.sort().values.flip(0)[None]}, (600, 424)) is None


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
        if rows <= codes.FEW:  # what ranks add up is not rounded before
            exact = x.bfloat16().double() @ full.T.double() + linear.bias.bfloat16().double()
            with torch.inference_mode():
                parts = linear.unrounded(x.bfloat16())
            assert parts.dtype == torch.float32 and len(asked) == 2 * used
            torch.testing.assert_close(
                parts.double(), exact, rtol=1e-4 if used else 2**-7, atol=1e-3 if used else 0.3
            )
