"""Random weights as the quantisation schemes store them."""

from __future__ import annotations

from typing import Any


def components(scheme: str, parts: tuple[int, ...], columns: int, *lead: int) -> dict[str, Any]:
    """Codes and scales of weights [*lead, sum(parts), columns], on torch's default device. What they stand for is of the
    order of 0.1; scales are as releases have them: bf16 of int4, exponents of mxfp4, fp32 of fp8. `scheme` ends in a star: its columns
    are in groups of an order of their own."""
    import torch

    from zoo.quant.schemes import block_size
    from zoo.quant.schemes import scheme as named

    n = sum(parts)
    if scheme.endswith("*"):
        group = torch.randperm(columns) // named(scheme[:-1]).group
        return {**components(scheme[:-1], parts, columns, *lead), "order": group.int()}
    if named(scheme).module:
        return _described(named(scheme), parts, columns, lead)
    height, width = block_size(scheme)
    grid = sum(-(-p // (height or p)) for p in parts), -(-columns // (width or columns))
    if scheme == "mxfp4":
        codes = torch.randint(0, 256, (*lead, n, columns // 32, 16), dtype=torch.uint8)
        return {"weight": codes, "scale": torch.randint(118, 125, (*lead, *grid), dtype=torch.uint8)}
    scale = (torch.rand(*lead, *grid) + 0.5) / 16
    if scheme.startswith("int4"):
        codes, scale = (
            torch.randint(-(2**31), 2**31 - 1, (*lead, n, columns // 8), dtype=torch.int32),
            scale.bfloat16(),
        )
    else:
        codes = torch.randn(*lead, n, columns, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
        if width == 32:  # mxfp8
            scale = torch.randint(120, 124, (*lead, *grid), dtype=torch.uint8)
    return {"weight": codes, "scale": scale}


def _described(s: Any, parts: tuple[int, ...], columns: int, lead: tuple[int, ...]) -> dict[str, Any]:
    """By what the scheme's file says of its tensors. Zero points and biases are about the middle of the codes."""
    import torch

    from zoo.quant.base import grid

    out = {}
    for c in s.components:
        if c.optional or c.name == "shape":
            continue
        if c.unit is None:
            out[c.name] = torch.rand(*lead, len(parts)) + 0.5
            continue
        rows, rest = grid(c, parts, columns)
        shape = (*lead, sum(rows), *rest)
        if c.name == "shift":
            out[c.name] = -out["scale"] * (1 << s.bits - 1)
        elif c.name == "scale":
            scale = (torch.rand(shape) + 0.5) / 16
            if "BF16" in c.dtypes:
                out[c.name] = scale.half() if s.module in ("gptq", "awq") else scale.bfloat16()
            else:
                e4m3 = "F8_E4M3" in c.dtypes or s.name == "mlx-nvfp4"
                codes = (
                    scale.to(torch.float8_e4m3fn)
                    if e4m3
                    else torch.randint(118, 125, shape, dtype=torch.uint8)
                )
                out[c.name] = codes if "F8_E4M3" in c.dtypes else codes.view(torch.uint8)
        elif c.dtypes == ("U8",):
            out[c.name] = torch.randint(0, 256, shape, dtype=torch.uint8)
        elif c.dtypes == ("I8",):
            out[c.name] = torch.randint(-128, 128, shape, dtype=torch.int8)
        else:
            words = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
            out[c.name] = words.view(torch.uint32) if c.dtypes == ("U32",) else words
    return out
