"""A variant on both sides, made once per process: its files, upstream's logits, our decoder filled the naive way."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.formats import open_checkpoint
from zoo.mapping.plan import Plan, make_plan
from zoo.model import Decoder
from zoo.spec import Spec

from . import build
from .assemble import assemble
from .case import FamilyCase
from .variant import Variant


@dataclass
class Built:
    """`upstream`: logits [B, T, V] by how upstream computed them."""

    plan: Plan
    tensors: dict[str, torch.Tensor]
    ids: torch.Tensor  # [B, T]
    upstream: dict[str, torch.Tensor]

    @property
    def spec(self) -> Spec:
        return self.plan.spec


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="zoo-testing-")


@functools.cache
def checkpoint(case: FamilyCase, variant: Variant, dtype: str = "float32", **how: Any) -> Path:
    """The variant's files, written once. Not to be changed."""
    dst = Path(tempfile.mkdtemp(dir=_root().name)) / variant.name
    return build.make(case, variant, dst, dtype=dtype, **how)


@functools.cache
def built(case: FamilyCase, variant: Variant, dtype: str = "float32") -> Built:
    """Canonical tensors of a variant, and upstream's logits: "eager" in `dtype`; for bf16 also "sdpa", "batched" (sdpa,
    and experts whose outputs are added up in fp32, as in upstream's default, where its eager ones add in bf16) and
    "fp32" (the same weights, computed in fp32)."""
    ids = build.tokens(variant, batch=2 if dtype == "float32" else 8)
    path = checkpoint(case, variant, dtype)
    plan = make_plan(open_checkpoint(path))
    logits = {"eager": build.logits(build.upstream(case, path, dtype=dtype), ids)}
    if dtype != "float32":
        logits["sdpa"] = build.logits(build.upstream(case, path, dtype=dtype, attn="sdpa"), ids)
        batched = build.upstream(case, path, dtype=dtype, attn="sdpa", experts="batched_mm")
        logits["batched"] = build.logits(batched, ids)
        logits["fp32"] = build.logits(build.upstream(case, path), ids)
    return Built(plan, assemble(path, plan), ids, logits)


def decoder(spec: Spec, tensors: dict[str, torch.Tensor]) -> Decoder:
    """A decoder that holds these tensors."""
    model = Decoder(spec)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)
