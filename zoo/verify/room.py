"""What a streamed pass holds on the device at its peaks, beside the bytes of files that are copied ahead: the room that is left to
it, so that copying ahead never takes what computing needs.

Counted of upstream's code and ours, allocation by allocation (`tests/test_verify_room.py` counts them again, of a run):

- a layer: upstream's weights, where they are made of other tensors three times (the largest, what it is made of, and its
  transposed copy), and once more in fp32 where its second way is that; its scores of all keys in eager attention; what is
  as wide as its widest matrix;
- the head: ours, whole, if it was not copied ahead; a batch's logits of upstream's two ways, with the pieces that the latter are
  joined of, or ours; and pieces in which they are compared, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.verify.inputs import Batch
from zoo.verify.metrics import CHUNK

ACTIVE = 8
"""Tensors [N, width of the widest matrix] at a time: gate, up, their clamps and products."""
COMPARED = 11
"""Tensors of a piece of logits in fp32 at a time: both sides, softmax, difference, columns; four of them for one in float64."""
PRODUCTS = 33 << 20
"""Of cuBLAS, for each thread that multiplies."""


def of_pass(
    layers: Sequence[Sequence[Tensor]],
    head: Tensor,
    batches: Sequence[Batch],
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    made: bool,
    widened: bool,
) -> int:
    """Bytes. `layers`: the weights of each (their shapes). `config`: upstream's, of text. `made`: whether weights are made of
    other tensors. `widened`: whether the second way computes in fp32."""
    size = dtype.itemsize
    wide = max(size, 4) if widened else size
    vocab, d_model = head.shape
    largest = max(sum(w.numel() for w in layer) for layer in layers)
    weights = largest * (size * (3 if made else 1) + (4 if widened else 0))
    widest = max(_width(w, _highest(config, "num_experts_per_tok")) for layer in layers for w in layer)
    heads = _highest(config, "num_attention_heads")
    tokens = max((b.ids.numel() for b in batches), default=0)
    pairs = max((b.ids.numel() * b.ids.shape[1] for b in batches), default=0)
    layer = weights + heads * pairs * (3 * wide + 4) + ACTIVE * tokens * widest * wide
    pieces = min(CHUNK[device.type], tokens * vocab)
    logits = vocab * d_model * size + 4 * tokens * vocab * size + COMPARED * 4 * pieces
    states = 4 * sum(b.ids.numel() for b in batches) * d_model * size  # of two ways, each with a copy
    return max(layer, logits) + states + PRODUCTS * (2 * len(batches) + 1)


def _width(w: Tensor, top_k: int) -> int:
    """Numbers to a token that a product with this matrix, or with these of experts, has at most."""
    return max(w.shape[-2:]) * (top_k if w.ndim == 3 else 1) if w.ndim > 1 else 0


def _highest(config: Any, key: str) -> int:
    """A number of upstream's config, or the highest of its layers'; 1 where it has none. A config whose layers differ has no such
    number of the whole model: asking for one is an error there."""
    if getattr(config, "is_heterogeneous", False):
        return max(int(getattr(layer, key, None) or 1) for layer in config.per_layer_config)
    found = getattr(config, key, None) or 1
    return max(found) if isinstance(found, Iterable) else int(found)
