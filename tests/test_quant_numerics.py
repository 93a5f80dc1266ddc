"""Dequantisation against independent implementations, and its refusals. Every result is exact in fp32 and
rounded once."""

from __future__ import annotations

import math

import pytest
import torch
import vendor

from zoo.errors import ZooError
from zoo.quant import dequantise
from zoo.quant.fp8 import decode

FP8 = torch.float8_e4m3fn


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(30).to(FP8)


def positive(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.01).to(dtype)


def by_element(w: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """fp8-block by the sentence that defines it."""
    out = torch.empty(w.shape)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            out[i, j] = w[i, j].float() * scale[i // block[0], j // block[1]].float()
    return out


# --- fp8 ------------------------------------------------------------------------------------------------------


def test_all_256_codes_are_what_torch_casts_them_to() -> None:
    every = torch.arange(256).to(torch.uint8).view(FP8)
    ours, theirs = decode(every[None])[0], every.float()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    number = ~theirs.isnan()
    assert torch.equal(ours[number].signbit(), theirs[number].signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_blocks_are_those_of_transformers(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    w, scale = codes(256, 384), positive(2, 3, dtype=scale_dtype)
    theirs = Fp8Dequantize(None)._dequantize_one(w, scale, torch.float32)
    ours = dequantise("fp8-block", {"weight": w, "scale": scale}, (256,), dtype)
    assert torch.equal(ours, theirs.to(dtype))


@pytest.mark.parametrize("shape", [(300, 200), (128, 1), (1, 130), (129, 128)])
def test_edges_that_are_no_multiple_of_the_block_have_scales_of_their_own(shape: tuple[int, int]) -> None:
    w = codes(*shape)
    scale = positive(math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    ours = dequantise("fp8-block", {"weight": w, "scale": scale}, (shape[0],), torch.float32)
    assert torch.equal(ours, by_element(w, scale, (128, 128)))


def test_a_fused_weight_counts_scale_rows_per_part() -> None:
    parts = (20, 6, 6)
    ws = [codes(n, 10, seed=n) for n in parts]
    scales = [positive(math.ceil(n / 4), 3) * k for k, n in enumerate(parts, 1)]
    fused = dequantise(
        "fp8-block-4x4", {"weight": torch.cat(ws), "scale": torch.cat(scales)}, parts, torch.float32
    )
    apart = [by_element(w, s, (4, 4)) for w, s in zip(ws, scales, strict=True)]
    assert torch.equal(fused, torch.cat(apart))


def test_stacked_experts_are_dequantised_one_by_one() -> None:
    w, scale = codes(30, 10).view(3, 10, 10), positive(3, 4, 3)  # two parts of 5 rows: 2 + 2 rows of scales
    out = dequantise("fp8-block-4x4", {"weight": w, "scale": scale}, (5, 5), torch.bfloat16)
    for e in range(3):
        one = dequantise("fp8-block-4x4", {"weight": w[e], "scale": scale[e]}, (5, 5), torch.bfloat16)
        assert torch.equal(out[e], one)


def test_a_scale_per_row_and_per_tensor() -> None:
    w, rows = codes(6, 5), positive(6, 1)
    assert torch.equal(
        dequantise("fp8-channel", {"weight": w, "scale": rows}, (6,), torch.float32), w.float() * rows
    )
    one = torch.tensor(0.37)
    assert torch.equal(
        dequantise("fp8-tensor", {"weight": w, "scale": one}, (6,), torch.float32), w.float() * one
    )
    each = torch.tensor([0.37, 0.5])
    fused = dequantise("fp8-tensor", {"weight": w, "scale": each}, (4, 2), torch.float32)
    assert torch.equal(fused, torch.cat([w[:4].float() * each[0], w[4:].float() * each[1]]))


def test_scales_that_are_powers_of_two_may_be_stored_as_exponents() -> None:
    w = codes(4, 4)
    exponents = torch.tensor([[120, 130], [127, 0]], dtype=torch.uint8)
    powers = torch.tensor([[2.0**-7, 8.0], [1.0, 2.0**-127]])
    for scale in (exponents, exponents.view(torch.float8_e8m0fnu)):
        out = dequantise("fp8-block-2x2", {"weight": w, "scale": scale}, (4,), torch.float32)
        assert torch.equal(out, by_element(w, powers, (2, 2)))


def test_a_weight_larger_than_a_chunk_is_the_same_everywhere() -> None:
    w, scale = codes(700, 1100), positive(6, 9)
    out = dequantise("fp8-block", {"weight": w, "scale": scale}, (700,), torch.float32)
    spread = scale.repeat_interleave(128, 0)[:700].repeat_interleave(128, 1)[:, :1100]
    assert torch.equal(out, w.float() * spread)


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 4), (6,)])
def test_scales_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ZooError, match=r"256 rows and 384 columns in blocks of 128 x 128 needs scales \[2, 3\], found"
    ):
        dequantise(
            "fp8-block", {"weight": codes(256, 384), "scale": torch.ones(shape)}, (256,), torch.float32
        )


# --- mxfp4 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_what_transformers_makes_of_it(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), generator=g, dtype=torch.uint8)
    scales = torch.randint(90, 160, (3, 10, 4), generator=g, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)  # they give [E, in, out]
    ours = dequantise("mxfp4", {"weight": blocks, "scale": scales}, (5, 5), dtype)
    assert torch.equal(ours, theirs)


def test_mxfp4_is_what_the_gguf_package_makes_of_the_same_numbers() -> None:
    import gguf

    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (10, 4, 16), generator=g, dtype=torch.uint8)
    scales = torch.randint(90, 160, (10, 4), generator=g, dtype=torch.uint8)
    # A byte of GGUF holds elements j and j + 16, one of a release elements 2 j and 2 j + 1.
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    ggml = torch.cat([scales[..., None], codes[..., :16] | codes[..., 16:] << 4], -1)
    theirs = gguf.quants.dequantize(ggml.flatten(1).numpy(), gguf.GGMLQuantizationType.MXFP4)
    ours = dequantise("mxfp4", {"weight": blocks, "scale": scales}, (10,), torch.float32)
    assert torch.equal(ours, torch.from_numpy(theirs))


def test_an_odd_count_of_blocks_is_refused() -> None:
    blocks, scales = torch.zeros(4, 3, 16, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8)
    with pytest.raises(ZooError, match=r"codes \[4, 3, 16\] need scales \[4, 3\], found \[4, 2\]"):
        dequantise("mxfp4", {"weight": blocks, "scale": scales}, (4,), torch.float32)
    with pytest.raises(ZooError, match=r"groups, 16\] bytes, found \[4, 3, 15\]"):
        dequantise("mxfp4", {"weight": blocks[..., 1:], "scale": scales}, (4,), torch.float32)


# --- int4 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_is_what_compressed_tensors_makes_of_it(dtype: torch.dtype) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    g = torch.Generator().manual_seed(0)
    packed = torch.randint(-(2**31), 2**31, (12, 8), generator=g, dtype=torch.int64).to(torch.int32)
    scale = positive(12, 2, dtype=torch.bfloat16)
    values = unpack_from_int32(packed, 4, torch.Size([12, 64]))  # int8 in [-8, 7]
    theirs = (values.float().view(12, 2, 32) * scale.float()[..., None]).view(12, 64).to(dtype)
    parts = {"weight": packed, "scale": scale, "shape": torch.tensor([[6, 64], [6, 64]])}
    assert torch.equal(dequantise("int4-group32", parts, (6, 6), dtype), theirs)


def test_int4_of_the_tests_is_packed_as_compressed_tensors_packs() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    made = vendor.int4(torch.randn(6, 64))
    values = unpack_from_int32(made["weight_packed"], 4, torch.Size([6, 64]))
    assert torch.equal(pack_to_int32(values, 4), made["weight_packed"])


def test_a_weight_shape_that_lies_is_refused() -> None:
    made = vendor.int4(torch.randn(6, 64))
    parts = {"weight": made["weight_packed"], "scale": made["weight_scale"], "shape": torch.tensor([6, 63])}
    with pytest.raises(ZooError, match=r"weight_shape says \[6, 63\], the packed codes hold \[6, 64\]"):
        dequantise("int4-group32", parts, (6,), torch.float32)


def test_int4_scales_of_another_group_size_are_refused() -> None:
    made = vendor.int4(torch.randn(6, 64), group=16)
    parts = {"weight": made["weight_packed"], "scale": made["weight_scale"]}
    with pytest.raises(ZooError, match=r"groups of 32 need scales \[6, 2\], found \[6, 4\]"):
        dequantise("int4-group32", parts, (6,), torch.float32)


def test_a_scheme_that_is_not_known_is_refused() -> None:
    with pytest.raises(ZooError, match=r"unknown quantisation scheme 'nf4'; known: fp8-block"):
        dequantise("nf4", {}, (1,), torch.float32)
