"""A canonical folder's tensors in memory, under the names that others have for them: `zoo.state_dict`.

Nothing is read until a tensor is used: each is a view of the mapped files where its elements lie there in its own
order (a head's rows of a fused projection, an expert of a stack, a transpose), and put together where they do not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.formats import canonical, dcp
from zoo.formats.canonical import Canonical
from zoo.layout import layout
from zoo.mapping.execute import refuse_overlap
from zoo.mapping.export import released_names
from zoo.mapping.match import TIED
from zoo.mapping.names_out import aside_of, family_of, held_aside, outputs_of, prefix_of, rules_of
from zoo.mapping.rules import Fit, respell
from zoo.mapping.save import assembled, elements
from zoo.mapping.values import refuse_part
from zoo.model.load import Source
from zoo.quant import dequantise
from zoo.quant.schemes import scheme
from zoo.untrusted.printable import warn

log = logging.getLogger(__name__)

NAMES = ("hf", "transformers", "canonical")


def state_dict(canon: str | os.PathLike[str] | Canonical, names: str = "hf") -> dict[str, Tensor]:
    """The tensors of the canonical folder `canon` by name. `names`: "hf", those of the release's files, for
    `from_pretrained(None, config=..., state_dict=...)`; "transformers", those that its class has in memory (experts packed, a tied head
    twice), for `load_state_dict`; or "canonical".

    Tensors are views of mapped files where they can be: writing to one changes no file. Blocks of a GGUF, which only "canonical" has names
    for, are dequantised to fp32 in memory. Raises ZooError if `canon` is no
    canonical folder, or its family has no such names.
    """
    if names not in NAMES:
        raise ZooError(f"unknown names {names!r}; expected one of {', '.join(NAMES)}")
    c = canon if isinstance(canon, Canonical) else canonical.read(canon)
    source = Source(c)
    if names == "canonical":
        return {name: source.tensor(ref) for name, ref in c.tensors.items()}
    family = family_of(c)
    rules = rules_of(family, names)
    spell = respell(rules, prefix_of(c, rules, names))
    released: Collection[str] = released_names(c) if names == "hf" else ()
    parts: dict[str, list[tuple[Tensor, Fit]]] = {}
    expanded = {*c.quant} - {*c.codes}  # ggml's blocks, which no other names have
    for o in outputs_of(c, rules, spell, released):
        stem = o.name.removesuffix(".weight")
        if stem in expanded and o.name != stem:
            how = c.quant[stem]
            own = {p.name: source.tensor(c.tensors[f"{stem}.{p.name}"]) for p in scheme(how).components}
            held = dequantise(how, own, layout(c.spec)[o.name].parts, torch.float32)
        else:
            held = source.tensor(c.tensors[o.name])
        for name, fit in zip(o.sources, o.fits):
            parts.setdefault(name, []).append((held, fit))
    out = {name: _one(pieces) for name, pieces in parts.items()}
    aside = aside_of(c, rules) if names == "hf" else held_aside(c)
    for name, called in aside.items():
        if c.extras.get(name) != TIED or names == "hf":
            out[called or name] = source.tensor(c.extra_tensors[name])
    if names == "hf":
        return out
    if left := [name for name, called in aside.items() if not called]:
        warn(
            log, "%s: %d tensors beside the model (%s, ...) have the release's names, and transformers' class has others in their place: "
            "load_state_dict leaves them as they were; `zoo export` and from_pretrained load them",
            c.root, len(left), min(left),
        )  # fmt: skip
    if c.spec.tied:
        head, embed = (
            next(rule.expr.leaves()).pattern
            for key in ("head.weight", "embed.weight")
            for rule in rules.by_key[key][:1]
        )
        out[spell(head)] = out[spell(embed)]
    return out


def _one(pieces: list[tuple[Tensor, Fit]]) -> Tensor:
    """A tensor of its parts: one part that lies in the order of the whole is a view of it."""
    held, fit = pieces[0]
    if len(pieces) == 1 and fit.source.is_contiguous():
        return elements(held, fit.canonical).reshape(fit.shape)
    return assembled(pieces, held.dtype)


def export_dcp(
    canon: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    names: str = "transformers",
    *,
    force: bool = False,
) -> Path:
    """Write the tensors of the canonical folder `canon`, under `names` (see `state_dict`), as a folder of
    torch.distributed.checkpoint, and return it. Raises ZooError as `state_dict` and `Folder` do, and for a part of a model."""
    c = canonical.read(canon)
    refuse_part(c)
    refuse_overlap(c.root, Path(dst))
    return dcp.write(state_dict(c, names), dst, force)
