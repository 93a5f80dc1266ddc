"""fp8 (e4m3) weights with scales: per block, per output row, or per tensor.

weight = code * scale, the product in fp32, rounded once to the dtype asked for. Rows of scales are counted
per fused part: a part whose rows are no multiple of the block has a last, shorter block of its own.

Unusual: codes are decoded by bits rather than by torch's cast, which takes 15x as long on a CPU. An e4m3
number seen as the upper bits of a half float is the same number times 2^-8, subnormals included.
"""

from __future__ import annotations

import math

import torch

from zoo.errors import ZooError

CHUNK = 1 << 18  # elements at a time: what is made of them stays in a core's cache
_FACTOR = 256.0  # e4m3's bias is 7, a half float's 15
_SIGN_AND_CODE = -16512  # 0xBF80 as int16
_NAN = 127  # e4m3 has no infinity; all ones is NaN


def dequantise(
    components: dict[str, torch.Tensor],
    parts: tuple[int, ...],
    dtype: torch.dtype,
    block: tuple[int, int] = (128, 128),
) -> torch.Tensor:
    """The logical weight [..., out, in]. components: "weight" (codes), "scale". block: rows and columns of
    one scale; 0 stands for all rows of a part, or all columns.

    Raises ZooError if the scales are not those of the weight.
    """
    codes = components["weight"]
    *lead, rows, columns = codes.shape
    scale = per_row(components["scale"], tuple(lead), parts, columns, block)  # [N, S] fp32, N = all rows
    codes = codes.reshape(-1, columns)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    step = min(max(1, CHUNK // max(columns, 1)), max(codes.shape[0], 1))
    bits = torch.empty(step, columns, dtype=torch.int16, device=codes.device)
    values = torch.empty(step, columns, dtype=torch.float32, device=codes.device)
    fits = bool(
        (scale.abs() < 2.0**119).all()
    )  # then times 2^8 is exact, and the decoder's factor goes in here
    if fits:
        scale = scale * _FACTOR
    for at in range(0, codes.shape[0], step):
        n = min(step, codes.shape[0] - at)
        decode_into(codes[at : at + n], bits[:n], values[:n])
        if not fits:
            values *= _FACTOR
        multiply(values[:n], scale[at : at + n], block[1] or columns)
        out[at : at + n] = values[:n]
    return out.reshape(*lead, rows, columns)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """fp32 values of e4m3 codes, exactly."""
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    decode_into(codes, torch.empty_like(values, dtype=torch.int16), values)
    return values * _FACTOR


def decode_into(codes: torch.Tensor, bits: torch.Tensor, values: torch.Tensor) -> None:
    """values = codes / 256 in fp32, exactly; `bits` is scratch of the same shape."""
    raw = codes.contiguous().view(torch.int8)
    bits.copy_(raw)  # the sign is extended
    bits.bitwise_left_shift_(7).bitwise_and_(_SIGN_AND_CODE)
    values.copy_(bits.view(torch.float16))
    magnitude = raw & 127
    if raw.numel() and int(magnitude.max()) == _NAN:
        values[magnitude == _NAN] = math.nan


def multiply(values: torch.Tensor, scale: torch.Tensor, width: int) -> None:
    """values [N, C] *= scale [N, S], in place; a scale stands for `width` columns, the last one for the rest."""
    n, columns = values.shape
    whole = columns // width
    if whole:
        view = values[:, : whole * width].view(n, whole, width) if columns == whole * width else None
        if view is None:  # ragged: a strided view
            view = values.as_strided((n, whole, width), (columns, width, 1))
        view *= scale[:, :whole, None]
    if columns > whole * width:
        values[:, whole * width :] *= scale[:, whole:]


def per_row(
    scale: torch.Tensor, lead: tuple[int, ...], parts: tuple[int, ...], columns: int, block: tuple[int, int]
) -> torch.Tensor:
    """Scales as fp32 [all rows, blocks along the columns], one row of scales for each row of the weight."""
    values = scale_grid(scale, lead, parts, columns, block)
    values = values.reshape(math.prod(lead), *values.shape[-2:])
    repeats = [min(block[0] or p, p - at) for p in parts for at in range(0, p, block[0] or p)]
    spread = torch.repeat_interleave(values, torch.tensor(repeats, device=values.device), dim=1)
    return spread.reshape(-1, values.shape[-1])


def scale_grid(
    scale: torch.Tensor, lead: tuple[int, ...], parts: tuple[int, ...], columns: int, block: tuple[int, int]
) -> torch.Tensor:
    """Scales as fp32 [*lead, blocks along the rows of each part, blocks along the columns]. Raises ZooError if they are not
    those of such a weight."""
    rows = sum(math.ceil(p / (block[0] or p)) for p in parts)
    want = (*lead, rows, math.ceil(columns / block[1]) if block[1] else 1)
    # Without blocks there is one number for all, for each matrix, or for each of its parts, and no shape to speak of.
    n = math.prod(lead)
    ok = scale.shape == want if any(block) else scale.numel() in (1, n, math.prod(want))
    if not ok:
        raise ZooError(
            f"a weight of {'+'.join(map(str, parts))} rows and {columns} columns in blocks of {block[0]} x {block[1]} "
            f"needs scales {list(want)}, found {list(scale.shape)}"
        )
    values = exponents(scale) if scale.dtype == torch.uint8 else scale.to(torch.float32)
    if values.numel() != math.prod(want):
        values = values.reshape(-1, 1, 1).expand(n, *want[-2:])
    return values.reshape(want)


def exponents(codes: torch.Tensor) -> torch.Tensor:
    """e8m0 scales, held as bytes: 2^(code - 127); 255 is NaN."""
    return codes.contiguous().view(torch.float8_e8m0fnu).to(torch.float32)
