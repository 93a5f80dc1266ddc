"""Weights as the tools of quantised releases write them: tensors by the end of their name, and the values they stand for.

Each `pack` takes (rows, columns, generator) and gives (tensors, values [rows, columns] in fp32). Codes, scales and zero points are
random, so that every code and every place occurs; the values are looked up element by element, as the formula of each is
published, and so share nothing with zoo's unpacking.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Pack = Callable[[int, int, torch.Generator], tuple[Tensors, torch.Tensor]]


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, k * bits / 32] of codes [n, k]: their bits one after the other, from the lowest up."""
    stream = (codes[:, :, None] >> torch.arange(bits)) & 1  # [n, k, bits]
    stream = stream.reshape(len(codes), -1, 32).long()
    value = (stream << torch.arange(32)).sum(-1)
    return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32)


def numbers(low: int, high: int, shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=g)


def scales(
    shape: tuple[int, ...], g: torch.Generator, bits: int, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """Such that values are like those of weights."""
    return ((torch.rand(shape, generator=g) + 0.5) * 0.2 / 2**bits).to(dtype)


def by_group(
    codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, group_of: torch.Tensor
) -> torch.Tensor:
    """(codes - zero) * scale, codes [out, in], of which input k has the zero and scale [out, groups] of group_of[k]."""
    return (codes - zero[:, group_of]).float() * scale.float()[:, group_of]


def gptq(bits: int, group: int, ordered: bool = False, version: int = 1, symmetric: bool = False) -> Pack:
    """AutoGPTQ's `pack`: zero points less one in version 1."""

    def pack(rows: int, columns: int, g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n = columns // group if group else 1
        of = torch.arange(columns) // (group or columns)
        if ordered:
            of = of[torch.randperm(columns, generator=g)]
        codes = numbers(0, 1 << bits, (rows, columns), g)
        # one in a hundred is zero, which in version 1 is borrowed from the next: too few tools agree on it
        zero = torch.full((rows, n), 1 << bits - 1) if symmetric else numbers(1, 1 << bits, (rows, n), g)
        scale = scales((rows, n), g, bits)
        made = {
            "qweight": words(codes, bits).T.contiguous(), "scales": scale.T.contiguous(),
            "qzeros": words(zero.T.contiguous() - int(version == 1), bits), "g_idx": of.to(torch.int32),
        }  # fmt: skip
        return made, by_group(codes, zero, scale, of)

    return pack


def awq(group: int) -> Pack:
    """AutoAWQ's WQLinear_GEMM.from_linear."""

    def packed(codes: torch.Tensor) -> torch.Tensor:
        return words(codes.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]], 4).reshape(len(codes), -1)

    def pack(rows: int, columns: int, g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        of = torch.arange(columns) // group
        codes, zero = numbers(0, 16, (rows, columns), g), numbers(0, 16, (rows, columns // group), g)
        scale = scales((rows, columns // group), g, 4)
        made = {
            "qweight": packed(codes.T.contiguous()),
            "qzeros": packed(zero.T.contiguous()),
            "scales": scale.T.contiguous(),
        }
        return made, by_group(codes, zero, scale, of)

    return pack


def packed(bits: int, group: int, zeros: bool = False, ordered: bool = False) -> Pack:
    """compressed-tensors' pack-quantized, by its compressors/pack_quantized."""

    def pack(rows: int, columns: int, g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        half, n = 1 << bits - 1, columns // group if group else 1
        of = torch.arange(columns) // (group or columns)
        if ordered:
            of = of[torch.randperm(columns, generator=g)]
        codes = numbers(-half, half, (rows, columns), g)
        zero = numbers(-half, half, (rows, n), g) if zeros else torch.zeros(rows, n, dtype=torch.int64)
        scale = scales((rows, n), g, bits, torch.bfloat16)
        made = {
            "weight_packed": words(codes + half, bits), "weight_scale": scale, "weight_shape": torch.tensor([rows, columns]),
        }  # fmt: skip
        if zeros:
            made["weight_zero_point"] = words(zero.T.contiguous() + half, bits).T.contiguous()
        if ordered:
            made["weight_g_idx"] = of.to(torch.int32)
        return made, by_group(codes, zero, scale, of)

    return pack


def int8(group: int | None = 0, zeros: bool = False) -> Pack:
    """compressed-tensors' int-quantized: of a row, of a group, or of all (None) one scale."""

    def pack(rows: int, columns: int, g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        shape = (1,) if group is None else (rows, columns // group if group else 1)
        codes, scale = (
            numbers(-128, 128, (rows, columns), g).to(torch.int8),
            scales(shape, g, 8, torch.bfloat16),
        )
        zero = numbers(-20, 20, shape, g).to(torch.int8) if zeros else torch.zeros(shape, dtype=torch.int8)
        made = {"weight": codes, "weight_scale": scale} | ({"weight_zero_point": zero} if zeros else {})
        of = torch.arange(columns) // (group or columns)
        full = [x.expand(rows, 1) if group is None else x for x in (zero.int(), scale)]
        return made, by_group(codes.int(), *full, of)

    return pack


def bnb4(block: int = 64, nested: bool = True, kind: str = "nf4") -> Pack:
    """bitsandbytes' QuantState.as_dict(packed=True): two codes to a byte, the first in its high half."""

    def pack(rows: int, columns: int, g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n = rows * columns
        blocks = -(-n // block)
        codes, table = numbers(0, 16, (n,), g), torch.rand(16, generator=g) * 2 - 1
        said = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [rows, columns]}
        made = {"weight": (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None], "weight.quant_map": table}
        if nested:
            index, absmaxes = numbers(0, 256, (blocks,), g), torch.rand(256, generator=g) * 2 - 1
            outer = torch.rand(-(-blocks // 256), generator=g) * 0.01
            said |= {
                "nested_blocksize": 256,
                "nested_dtype": "float32",
                "nested_offset": 0.046875 + rows / 2**14,
            }
            absmax = absmaxes[index] * outer[torch.arange(blocks) // 256] + said["nested_offset"]
            made |= {
                "weight.absmax": index.to(torch.uint8),
                "weight.nested_absmax": outer,
                "weight.nested_quant_map": absmaxes,
            }
        else:
            absmax = torch.rand(blocks, generator=g) * 0.1
            made["weight.absmax"] = absmax
        state = json.dumps(said).encode()
        made[f"weight.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(
            bytearray(state), dtype=torch.uint8
        )
        return made, (table[codes] * absmax[torch.arange(n) // block]).reshape(rows, columns)

    return pack


def bnb8(rows: int, columns: int, g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    """bitsandbytes' Linear8bitLt."""
    codes, scale = numbers(-127, 128, (rows, columns), g).to(torch.int8), torch.rand(rows, generator=g) * 0.2
    made = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return made, codes.float() * scale[:, None] * (1 / 127)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp4(tool: str) -> Pack:
    """ "modelopt" or "compressed" NVFP4, or "mx": mxfp4 of compressed-tensors."""

    def pack(rows: int, columns: int, g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes, group = numbers(0, 16, (rows, columns), g), 32 if tool == "mx" else 16
        shape = (rows, columns // group)
        packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
        if tool == "mx":
            power = numbers(118, 125, shape, g)
            made = {"weight_packed": packed, "weight_scale": power.to(torch.uint8)}
            scale = 2.0 ** (power - 127)
        else:
            local = (torch.rand(shape, generator=g) * 400 + 20).to(torch.float8_e4m3fn)
            one = torch.rand((), generator=g) / 4096 + 1 / 8192
            if tool == "modelopt":
                made = {
                    "weight": packed,
                    "weight_scale": local,
                    "weight_scale_2": one,
                    "input_scale": torch.ones(()),
                }
                scale = local.float() * one
            else:
                one = (1 / one).reshape(1)
                made = {"weight_packed": packed, "weight_scale": local, "weight_global_scale": one}
                scale = local.float() / one
        return made, E2M1[codes] * scale[:, torch.arange(columns) // group]

    return pack


def fp8(kind: str, dtype: torch.dtype = torch.float32, static: bool = True) -> Pack:
    """e4m3 with a scale per block ("block", as DeepSeek, Qwen and Z.ai write it), one scale ("tensor"; with `static`, one for what it multiplies beside it), one for each row ("channel"), or "mx":
    an exponent for 32 inputs (ModelOpt's MXFP8QTensor, compressed-tensors' mxfp8-quantized)."""

    def pack(rows: int, columns: int, g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes = torch.randn(rows, columns, generator=g).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
        if kind == "block":  # 128 x 128, the last ones shorter
            scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=g) * 0.001 + 0.0002
            if dtype == torch.float8_e8m0fnu:
                scale = 2.0 ** scale.log2().round()
            values = codes.float() * spread(scale, 128)[:, :columns].repeat_interleave(128, 0)[:rows]
            return {"weight": codes, "weight_scale_inv": scale.to(dtype)}, values
        if kind == "mx":
            power = numbers(112, 121, (rows, columns // 32), g)
            scale = 2.0 ** (power - 127)
            return {"weight": codes, "weight_scale": power.to(torch.uint8)}, codes.float() * spread(scale, 32)
        shape = () if kind == "tensor" else (rows, 1)
        scale = (torch.rand(shape, generator=g) * 0.001 + 0.0002).to(dtype)
        act = {"input_scale": torch.ones((), dtype=dtype)} if kind == "tensor" and static else {}
        return {"weight": codes, "weight_scale": scale} | act, codes.float() * scale.float()

    return pack


def spread(scale: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, groups] for each column."""
    return scale.repeat_interleave(group, 1)


def mlx(bits: int, group: int, dtype: torch.dtype = torch.bfloat16) -> Pack:
    """mlx.core.quantize, mode affine."""

    def pack(rows: int, columns: int, g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes, of = numbers(0, 1 << bits, (rows, columns), g), torch.arange(columns) // group
        shape = (rows, columns // group)
        scale, offset = scales(shape, g, bits, dtype), (-torch.rand(shape, generator=g) / 8).to(dtype)
        made = {"weight": words(codes, bits).view(torch.uint32), "scales": scale, "biases": offset}
        return made, codes * scale.float()[:, of] + offset.float()[:, of]

    return pack


def mlx_float(mode: str) -> Pack:
    """mlx.core.quantize, modes mxfp4, mxfp8 and nvfp4."""

    def pack(rows: int, columns: int, g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        bits, group = 8 if mode == "mxfp8" else 4, 16 if mode == "nvfp4" else 32
        codes = numbers(0, 1 << bits, (rows, columns), g)
        if bits == 8:
            codes[codes & 127 == 127] = 0  # no number
            values = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
        else:
            values = E2M1[codes]
        shape = (rows, columns // group)
        if mode == "nvfp4":
            scale = (torch.rand(shape, generator=g) / 8 + 1 / 64).to(torch.float8_e4m3fn)
            stored, scale = scale.view(torch.uint8), scale.float()
        else:
            power = numbers(112, 121, shape, g)
            stored, scale = power.to(torch.uint8), 2.0 ** (power - 127)
        return {"weight": words(codes, bits).view(torch.uint32), "scales": stored}, values * spread(
            scale, group
        )

    return pack


def quantise(
    tensors: Tensors, pack: Pack, which: Callable[[str], bool], seed: int = 0
) -> tuple[Tensors, Tensors]:
    """(the release, the same with the values that the codes stand for): all weights `which` says, packed."""
    return mixed(tensors, lambda name: pack if which(name) else None, seed)


def mixed(tensors: Tensors, how: Callable[[str], Pack | None], seed: int = 0) -> tuple[Tensors, Tensors]:
    """As `quantise`, each weight packed as `how` says of its name."""
    g = torch.Generator().manual_seed(seed)
    release: Tensors = {}
    plain: dict[str, Any] = {}
    for name, t in tensors.items():
        if t.ndim == 2 and (pack := how(name)) is not None:
            made, plain[name] = pack(*t.shape, g)
            release |= {name.removesuffix("weight") + end: x for end, x in made.items()}
        else:
            release[name] = plain[name] = t
    return release, plain
