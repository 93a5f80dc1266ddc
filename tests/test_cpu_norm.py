"""A CPU's RMSNorm beside its plain twin: the same roundings, whatever the dtype, the weight and the strides."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from zoo.kernels.cpu import MANY
from zoo.kernels.norm import rms_norm, rms_norm_add, rms_norm_reference
from zoo.spec import Norm

pytest.importorskip("numba")
from zoo.kernels.cpu import norm as cpu

# One process of the tests compiles: another would wait for it, or compile for itself.
pytestmark = pytest.mark.xdist_group("compiled for the CPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 4096), (3, 5, 1000), (70, 2048), (2, 40, 9, 256)]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rand(*shape: int, dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def agree(found: Tensor, expected: Tensor) -> None:
    """All but a few numbers in their last bit: sums of squares are taken in another order."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    exact = found.dtype == torch.float32
    a, b = found.double(), expected.double()
    assert exact or (a != b).double().mean() < 5e-3
    torch.testing.assert_close(a, b, rtol=5e-7 if exact else 2 * torch.finfo(found.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_rounds_where_the_expression_does(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    kernel = cpu.rms_norm
    monkeypatch.setattr(cpu, "rms_norm", lambda *a: calls.append(True) or kernel(*a))
    x, h = rand(*shape, dtype=dtype), rand(*reversed(shape), dtype=dtype).reshape(shape)
    wider = torch.cat([h, x, h], -1)[..., shape[-1] : 2 * shape[-1]]  # a part of a projection
    assert not wider.is_contiguous() or len(shape) < 3
    kinds = itertools.product(("first", "last"), ("plain", "plus_one", "none"), (dtype, torch.float32))
    for rounding, kind, of in kinds:
        norm = Norm(eps=1e-5, rounding=rounding, weight=kind)
        weight = None if kind == "none" else rand(shape[-1], dtype=of)
        expected = rms_norm_reference(x, weight, norm)
        found = rms_norm(x, weight, norm)
        agree(found, expected)
        assert torch.equal(rms_norm(wider, weight, norm), found)
        assert torch.equal(rms_norm_add(h, x, weight, norm), h + found)  # rounded before it is added
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(rms_norm(x, weight, norm), found)
    assert len(calls) == 12 * 5


def test_some_shapes_are_large_enough_for_threads() -> None:
    sizes = [torch.Size(s).numel() for s in SHAPES]
    assert min(sizes) < MANY <= max(sizes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    x = rand(4, 1024, dtype=dtype)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    y = rms_norm(x, torch.ones(1024, dtype=dtype), Norm(eps=1e-6))
    assert y[1].isnan().all() and y[2, 7].isnan() and y[[0, 3]].isfinite().all()


def test_what_the_kernel_does_not_know_torch_computes() -> None:
    norm = Norm(eps=1e-6)
    x = rand(2, 4, 1024, dtype=torch.bfloat16)
    groups = rand(4, 1024, dtype=torch.bfloat16)  # of Mamba's gated norm: a weight for each
    strided = rand(1024, 2, dtype=torch.bfloat16)[:, 0]
    for weight in (groups, strided, strided.double()):
        assert torch.equal(rms_norm(x, weight, norm), rms_norm_reference(x, weight, norm))
    for y in (x.mT.contiguous().mT, x.double()):
        assert torch.equal(rms_norm(y, None, norm), rms_norm_reference(y, None, norm))


def test_where_numba_is_told_to_compile_nothing_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    from zoo.kernels import cpu

    assert cpu.kernels.__wrapped__("norm") is not None
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert cpu.kernels.__wrapped__("norm") is None
