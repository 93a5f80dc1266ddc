"""Quantised weights: described in `schemes` (no tensor library), dequantised in a module per scheme.

`dequantise` chooses the module by the scheme's name. Each has

    dequantise(components: dict[str, torch.Tensor], parts: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor

of components named as in `schemes` ("weight" are the codes), giving the logical weight [..., out, in];
those of schemes with a block size take it as a further argument `block=(rows, columns)`. `host` has all of
them in numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from zoo.quant.schemes import block_size, scheme

if TYPE_CHECKING:
    import torch

_MODULES = {"fp8": "zoo.quant.fp8", "mxfp4": "zoo.quant.mxfp4", "int4": "zoo.quant.int4"}


def dequantise(
    name: str, components: dict[str, torch.Tensor], parts: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The logical weight [..., out, in] in `dtype` of a slot quantised by scheme `name`.

    components: "weight" (codes), "scale", ... as stored. parts: rows of each fused part, since scale rows
    are counted per part. The arithmetic is in fp32, rounded once to `dtype`.
    """
    scheme(name)  # an unknown one is refused here
    module = importlib.import_module(_MODULES[name.split("-")[0]])
    out: torch.Tensor = module.dequantise(components, parts, dtype, block=block_size(name))
    return out
