"""Random weights as the quantisation schemes store them."""

from __future__ import annotations

from typing import Any


def components(scheme: str, parts: tuple[int, ...], columns: int, *lead: int) -> dict[str, Any]:
    """Codes and scales of weights [*lead, sum(parts), columns], on torch's default device. What they stand for is of the
    order of 0.1; scales are as releases have them: bf16 of int4, exponents of mxfp4, fp32 of fp8."""
    import torch

    from zoo.quant.schemes import block_size

    n = sum(parts)
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
    return {"weight": codes, "scale": scale}
