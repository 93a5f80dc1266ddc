"""Gradients of a variant on both sides, by canonical name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo import families
from zoo.mapping.match import match
from zoo.mapping.save import namings, of_tensors, put_together
from zoo.model import Decoder
from zoo.model.load import UNTRAINED, train

from . import build
from .built import built, checkpoint, decoder
from .case import FamilyCase
from .variant import Variant

NOISE = 1e-3
"""A gradient below this part of the model's largest is measured against that: where weights are normalised to one expert's, a
router's is nothing but rounding."""


def gradients(case: FamilyCase, variant: Variant) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """d(sum of the logits, each times a number of its own) / d(tensor), by our trainable decoder and by upstream, in fp32.
    Zeros where none leads to a tensor."""
    sides = built(case, variant)
    weights = torch.randn(*sides.ids.shape, variant.vocab_size, generator=torch.Generator().manual_seed(0))
    model = decoder(sides.spec, sides.tensors)
    train(model)
    (model(sides.ids) * weights).sum().backward()
    ours = {name: _of(p, p) for name, p in model.named_parameters()}

    upstream = build.upstream(case, checkpoint(case, variant)).requires_grad_(True)
    for module in upstream.modules():
        if isinstance(module, nn.Embedding):  # it would leave out the gradient of the padding token's row
            module.padding_idx = None
    (upstream(input_ids=sides.ids, use_cache=False).logits * weights).sum().backward()
    learnt = dict(upstream.named_parameters())
    state = of_tensors({name: _of(learnt.get(name), t) for name, t in upstream.state_dict().items()})
    rules = namings(sides.spec, families.get(case.name))
    found = min(
        (match(sides.spec, r, state.refs, 1, name) for name, r in rules.items()), key=lambda m: m.n_problems
    )
    assert not found.n_problems, (found.missing, found.unexpected, found.misshapen, found.problems)
    return ours, {o.name: next(put_together(o, state, True)) for o in found.outputs.values()}


def unreached(model: Decoder) -> list[str]:
    """Parameters that the backward pass which was just run left without a gradient, but for those to which none leads upstream either:
    what chooses (`UNTRAINED`, indexers, a table of experts by token id)."""
    return [
        name
        for name, p in model.named_parameters()
        if not (name.endswith((*UNTRAINED, ".router.table")) or ".indexer." in name)
        and (p.grad is None or not p.grad.any())
    ]


def _of(parameter: Tensor | None, like: Tensor) -> Tensor:
    """The gradient that a parameter has got."""
    if parameter is None or parameter.grad is None:
        return torch.zeros_like(like, requires_grad=False)
    return parameter.grad


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a tensor's gradient, and its name."""
    top = max(float(t.abs().max()) for t in theirs.values())
    return max(
        (float((ours[n] - t).abs().max()) / max(float(t.abs().max()), NOISE * top), n)
        for n, t in theirs.items()
    )
