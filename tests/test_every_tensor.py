"""Every tensor of a checkpoint matters: changing any one of them changes our logits, or it is an extra.

A tensor that is read, checked and stored but never used would pass every comparison of bytes; a tensor
that the decoder takes for a constant would pass parity if upstream's test model left it at its default.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from assemble import assemble, view

from zoo.formats import open_checkpoint
from zoo.mapping.plan import Plan, make_plan
from zoo.mapping.rules import Box
from zoo.model import Decoder

Region = tuple[str, Box]  # elements of a canonical tensor


def regions(plan: Plan) -> dict[str, list[Region]]:
    """Source tensor -> the canonical elements that come from it."""
    out: dict[str, list[Region]] = {}
    for o in plan.outputs.values():
        for source, fit in zip(o.sources, o.fits, strict=True):
            out.setdefault(source, []).append((o.name, fit.canonical))
    return out


def difference(
    model: Decoder,
    ids: torch.Tensor,
    before: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    where: list[Region],
) -> float:
    """The largest change of a logit when noise of the tensor's own size is added to these elements."""
    parts = [view(tensors[name].view(-1), box) for name, box in where]
    kept = [part.clone() for part in parts]
    generator = torch.Generator().manual_seed(5)
    for part in parts:
        noise = torch.randn(part.shape, generator=generator) * (0.1 + part.float().abs().mean())
        part += noise.to(part.dtype)
    logits = model(ids)
    for part, old in zip(parts, kept, strict=True):
        part.copy_(old)
    assert logits.isfinite().all()
    return float((logits - before).abs().max())


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_changing_any_one_source_tensor_changes_the_logits(name: str, tmp_path: Path) -> None:
    tiny.make(name, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    plan = make_plan(checkpoint)
    where = regions(plan)
    assert set(where) | set(plan.extras) == set(checkpoint.tensors)
    assert not set(where) & set(plan.extras)
    assert all(plan.extras.values())

    tensors = assemble(checkpoint, plan)
    model = Decoder(plan.spec)
    model.load_state_dict(tensors, assign=True)
    idle = list(where)
    for batch in (4, 60):
        ids = tiny.tokens(name, batch=batch)
        if batch > 4:  # experts that few tokens choose, or none because of their selection bias
            for key in tensors:
                if key.endswith("selection_bias"):
                    tensors[key].zero_()
        before = model(ids)
        idle = [s for s in idle if not difference(model, ids, before, tensors, where[s]) > 1e-4]
        assert torch.equal(model(ids), before), "the last change was not taken back"
        if not idle:
            break
    assert not idle
