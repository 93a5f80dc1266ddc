"""Rotary position embedding over the first `rope.dim` channels of each head.

Unusual: the angles are fp32, but cos and sin are cast to the model's dtype BEFORE they are used, as the
released models were trained to see; `Rope.rounding` "last" keeps them in fp32 and casts the rotated result instead;
"both" rounds them, and rotates in fp32.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from zoo.spec import Rope, RopeScaling, Spec


@functools.lru_cache(maxsize=64)
def inverse_frequencies(rope: Rope, device: torch.device | str | None = None, far: bool = False) -> Tensor:
    """1 / theta^(2i / dim), stretched as `rope.scaling` says; 0 from `rope.turning` on. [dim / 2], fp32. `far`: of a
    pass beyond the original context (see `is_far`)."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64, device=device).float() / rope.dim
    slowing = rope.theta**exponents  # [dim/2]
    freqs = 1.0 / slowing
    if rope.turning is not None:
        freqs[rope.turning :] = 0.0
    s = rope.scaling
    match s:
        case None | RopeScaling(kind="dynamic"):
            return freqs
        case RopeScaling(kind="linear"):
            return freqs / s.factor
        case RopeScaling(kind="llama3"):
            return _llama3(freqs, s)
        case RopeScaling(kind="longrope"):
            return 1.0 / (
                torch.tensor(s.long if far else s.short, dtype=torch.float32, device=device) * slowing
            )
        case _:
            return _yarn(freqs, rope, s)


def _llama3(freqs: Tensor, s: RopeScaling) -> Tensor:
    """Long wavelengths are divided, short ones kept, those between blended."""
    wavelength = 2 * math.pi / freqs
    longest, shortest = s.original_context / s.low_freq_factor, s.original_context / s.high_freq_factor
    blend = (s.original_context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blended = (1 - blend) * freqs / s.factor + blend * freqs
    divided = torch.where(wavelength > longest, freqs / s.factor, freqs)
    between = (wavelength <= longest) & (wavelength >= shortest)
    return torch.where(between, blended, divided)


def _yarn(freqs: Tensor, rope: Rope, s: RopeScaling) -> Tensor:
    """A linear ramp over channels from extrapolation (kept) to interpolation (divided)."""

    def channel(turns: float) -> float:  # which channel makes that many turns within the original context
        return rope.dim * math.log(s.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(s.beta_fast), channel(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32, device=freqs.device) - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return freqs / s.factor * (1 - kept) + freqs * kept


def is_far(rope: Rope, end: int) -> bool:
    """Whether a pass that ends before position `end` takes LongRoPE's long divisors."""
    s = rope.scaling
    return s is not None and s.kind == "longrope" and end > s.original_context


def far_from(spec: Spec) -> frozenset[int]:
    """The lengths beyond which LongRoPE's angles are others: a text that outgrows one must be read anew."""
    ropes = (getattr(layer.mixer, "rope", None) for layer in spec.layers)
    return frozenset(
        r.scaling.original_context for r in ropes if r and r.scaling and r.scaling.kind == "longrope"
    )


def tables(rope: Rope, positions: Tensor, dtype: torch.dtype, far: bool = False) -> tuple[Tensor, Tensor]:
    """cos and sin for `positions` [T]: each [T, dim / 2]."""
    angles = positions.float()[:, None] * inverse_frequencies(rope, positions.device, far)
    s = rope.scaling
    magnitude = 1.0 if s is None else s.attention_factor
    if far and s is not None and s.long_attention_factor is not None:
        magnitude = s.long_attention_factor
    cos, sin = angles.cos(), angles.sin()
    if rope.backwards:
        sin = -sin
    if magnitude != 1.0:  # before the first layer a GPU waits for every launch
        cos, sin = cos * magnitude, sin * magnitude
    if rope.rounding != "last":
        cos, sin = cos.to(dtype), sin.to(dtype)
    return (cos, sin) if rope.rounding == "first" else (cos.float(), sin.float())
