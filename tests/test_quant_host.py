"""numpy's dequantisation, which a conversion uses, against torch's, which a model uses: the same bits.

torch's is held to independent implementations in test_quant_numerics.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.quant import dequantise, host
from zoo.quant.floats import exponents, to_fp32
from zoo.quant.schemes import block_size

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
GROUP = {"fp8": 1, "mxfp4": 32, "int4": 8}


def every_byte(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random bytes, all 256 of them among them where there is room."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def made(
    name: str, rows: int, columns: int, scale: torch.Tensor | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Components of random codes and, unless given, random scales."""
    height, width = block_size(name)
    grid = (math.ceil(rows / height) if height else 1, math.ceil(columns / width) if width else 1)
    if scale is None and name == "mxfp4":
        scale = torch.randint(
            110, 135, grid, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
        )
    elif scale is None:
        scale = torch.randn(grid, generator=torch.Generator().manual_seed(seed)) / 16
    if name == "mxfp4":
        codes = every_byte(rows, columns // 32, 16, seed=seed)
    elif name.startswith("int4"):
        codes = every_byte(rows, columns // 2, seed=seed).view(torch.int32)
    else:
        codes = every_byte(rows, columns, seed=seed).view(torch.float8_e4m3fn)
    return {"weight": codes, "scale": scale}


def as_numpy(name: str, components: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """As the decoder hands them over: scales in fp32, or mxfp4's exponents."""
    codes, scale = components["weight"], components["scale"]
    raw = codes.numpy() if codes.dtype == torch.int32 else codes.view(torch.uint8).numpy()
    if scale.dtype == torch.uint8:
        s = scale.numpy() if name == "mxfp4" else exponents(scale.numpy())
    else:
        s = scale.to(torch.float32).numpy()
    return {"weight": raw, "scale": s}


def same(name: str, components: dict[str, torch.Tensor], dtype: str) -> None:
    want = dequantise(name, components, (components["weight"].shape[0],), DTYPES[dtype])
    found = host.dequantise(name, as_numpy(name, components), dtype, "w").copy()
    ours = torch.from_numpy(found.view({2: np.int16, 4: np.int32}[found.itemsize])).view(DTYPES[dtype])
    assert ours.shape == want.shape
    nan = want.isnan()
    assert torch.equal(ours.isnan(), nan)
    as_bits = {2: torch.int16, 4: torch.int32}[ours.itemsize]
    assert torch.equal(ours.view(as_bits)[~nan], want.contiguous().view(as_bits)[~nan])


CASES = [
    ("fp8-block", 256, 384),
    ("fp8-block", 300, 200),  # ragged both ways
    ("fp8-block", 1, 130),
    ("fp8-block", 129, 1),
    ("fp8-block-64x32", 130, 100),
    ("fp8-block-1x32", 7, 100),
    ("fp8-channel", 70, 33),
    ("fp8-tensor", 70, 33),
    ("mxfp4", 33, 96),
    ("int4-group32", 33, 96),
    ("int4-group32", 5, 40),  # the last group is shorter
    ("int4-group128", 5, 256),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name,rows,columns", CASES)
def test_numpy_gives_the_bits_of_torch(name: str, rows: int, columns: int, dtype: str) -> None:
    same(name, made(name, rows, columns), dtype)


@pytest.mark.parametrize("name,rows,columns", CASES)
def test_a_weight_larger_than_a_piece_is_the_same_everywhere(
    name: str, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "CHUNK", 2 * columns + 1)  # two rows at a time
    same(name, made(name, rows, columns), "BF16")


SCALES = [0.0, -0.0, 1.0, -3.0, 127.9, 128.0, 1e30, 3e38, 1e-30, 1e-38, 1e-44, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("value", SCALES)
@pytest.mark.parametrize("name", ["fp8-block", "fp8-channel", "fp8-tensor", "int4-group32"])
def test_any_scale_is_taken_as_it_is(name: str, value: float, dtype: str) -> None:
    """Also beside ordinary ones: which scales are there decides how the product is made."""
    components = made(name, 130, 160)
    components["scale"].view(-1)[0] = value
    same(name, components, dtype)
    same(name, made(name, 130, 160, torch.full_like(components["scale"], value)), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_mxfp4_of_every_byte_and_exponent(dtype: str) -> None:
    scale = torch.arange(256, dtype=torch.uint8).repeat_interleave(16).view(256, 16)
    codes = torch.arange(256, dtype=torch.uint8).repeat(256).view(256, 16, 16)
    same("mxfp4", {"weight": codes, "scale": scale}, dtype)


def test_fp8_scales_may_be_exponents() -> None:
    scale = torch.tensor([[0, 1, 120, 127, 134, 254, 255]], dtype=torch.uint8)
    same("fp8-block", made("fp8-block", 128, 7 * 128, scale), "BF16")


@given(
    st.sampled_from([name for name, _, _ in CASES]),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(0, 1000),
    st.sampled_from(["BF16", "F32"]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(name: str, rows: int, groups: int, seed: int, dtype: str) -> None:
    unit = GROUP[name.split("-")[0]]
    same(name, made(name, rows, unit * groups, seed=seed), dtype)


@pytest.mark.parametrize("name,big", [("fp8-block", 1e5), ("int4-group32", 1e5), ("mxfp4", 150)])
def test_what_overflows_fp16_is_refused(name: str, big: float) -> None:
    components = as_numpy(name, made(name, 128, 128))
    components["scale"] = np.full_like(components["scale"], big)
    if name.startswith("fp8"):
        components["weight"] = components["weight"] & 0x77  # finite ones only
    with pytest.raises(ZooError, match="experts.w: .*beyond fp16"):
        host.dequantise(name, components, "F16", "experts.w")


@pytest.mark.parametrize("name", ["fp8-block", "fp8-channel", "mxfp4", "int4-group32"])
def test_scales_of_another_shape_are_refused(name: str) -> None:
    components = as_numpy(name, made(name, 128, 128))
    components["scale"] = np.ones((3, 5), components["scale"].dtype)
    with pytest.raises(ZooError, match=r"experts.w: .*need scales .*found \[3, 5\]"):
        host.dequantise(name, components, "BF16", "experts.w")


def test_bytes_are_scales_only_where_a_scheme_says_so() -> None:
    with pytest.raises(ZooError, match="U8 cannot be converted to a float dtype"):
        to_fp32(np.zeros(4, np.uint8), "U8")


def test_codes_of_another_shape_than_is_said_are_refused_by_name() -> None:
    components = {
        "weight": np.zeros((4, 8), np.int32), "scale": np.ones((4, 2), np.float32), "shape": np.array([4, 63]),
    }  # fmt: skip
    with pytest.raises(
        ZooError, match=r"a\.weight: weight_shape says \[4, 63\], the packed codes hold \[4, 64\]"
    ):
        host.dequantise("int4-group32", components, "F32", "a.weight")
