"""mxfp4: 4-bit floats (sign, 2 exponent bits, 1 mantissa bit) in groups of 32 inputs with a power of two.

weight = value * 2^(scale - 127). Source: OCP Microscaling Formats v1.0; the gpt-oss model card. The codes
are [..., out, in / 32, 16] bytes, the low half of a byte first.
"""

from __future__ import annotations

import torch

from zoo.errors import ZooError
from zoo.quant import nibbles
from zoo.quant.fp4 import VALUES
from zoo.quant.fp8 import CHUNK, exponents
from zoo.quant.host import GROUP

_PAIRS = nibbles.table(VALUES)


def dequantise(
    components: dict[str, torch.Tensor],
    parts: tuple[int, ...],
    dtype: torch.dtype,
    block: tuple[int, int] = (1, GROUP),
) -> torch.Tensor:
    """The logical weight [..., out, in]. Raises ZooError if codes and scales do not fit together."""
    codes, scale = components["weight"], components["scale"]
    if codes.ndim < 3 or codes.shape[-1] != GROUP // 2 or codes.shape[-3] != sum(parts):
        raise ZooError(
            f"mxfp4 codes should be [..., {sum(parts)}, groups, 16] bytes, found {list(codes.shape)}"
        )
    if scale.shape != codes.shape[:-1]:
        raise ZooError(
            f"mxfp4 codes {list(codes.shape)} need scales {list(codes.shape[:-1])}, found {list(scale.shape)}"
        )
    groups = codes.reshape(-1, GROUP // 2)  # [G, 16]
    powers = exponents(scale.reshape(-1, 1).view(torch.uint8))  # [G, 1] fp32
    out = torch.empty(groups.shape[0], GROUP, dtype=dtype, device=codes.device)
    step = min(CHUNK // GROUP, max(groups.shape[0], 1))
    decode = nibbles.Decoder(_PAIRS, step * (GROUP // 2), codes.device)
    for at in range(0, groups.shape[0], step):
        values = decode(groups[at : at + step])
        power = powers[at : at + step]
        if dtype == torch.bfloat16:  # a power of two is exact in bf16: the one rounding is the product's
            torch.mul(values, power.to(torch.bfloat16), out=out[at : at + step])
        else:
            out[at : at + step] = values.to(torch.float32) * power
    *lead, n_groups, _ = codes.shape
    return out.reshape(*lead, n_groups * GROUP)
