"""A variant's checkpoint on both sides: upstream's logits, and our decoder filled by the naive assembler."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from assemble import assemble

from zoo.formats import open_checkpoint
from zoo.mapping.plan import make_plan
from zoo.model import Decoder
from zoo.spec import Spec


@dataclass
class Built:
    spec: Spec
    tensors: dict[str, torch.Tensor]
    ids: torch.Tensor  # [B, T]
    upstream: dict[str, torch.Tensor]  # logits [B, T, V] by how upstream computed them


@functools.cache
def built(name: str, dtype: str = "float32") -> Built:
    """Canonical tensors of a variant, and upstream's logits: "eager" in `dtype`; for bf16 also "sdpa" and
    "fp32" (the same weights, computed in fp32)."""
    ids = tiny.tokens(name, batch=2 if dtype == "float32" else 8)
    with tempfile.TemporaryDirectory() as folder:
        path = tiny.make(name, Path(folder) / name, dtype=dtype)
        plan = make_plan(open_checkpoint(path))
        tensors = assemble(path, plan)
        logits = {"eager": tiny.logits(tiny.upstream(path, dtype=dtype), ids)}
        if dtype != "float32":
            logits["sdpa"] = tiny.logits(tiny.upstream(path, dtype=dtype, attn="sdpa"), ids)
            logits["fp32"] = tiny.logits(tiny.upstream(path), ids)
    return Built(plan.spec, tensors, ids, logits)


def decoder(spec: Spec, tensors: dict[str, torch.Tensor]) -> Decoder:
    """A decoder that holds these tensors."""
    model = Decoder(spec)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)
