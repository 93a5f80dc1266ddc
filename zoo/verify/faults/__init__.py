"""Seeded faults: the mistakes people really make when they convert, as a catalogue that is injected on purpose.

A verifier that misses one of these is broken. Each fault acts on a `Subject` (a Spec and the canonical
tensors) in memory, at one site: a tensor (mistakes in weights), or all layers it concerns (mistakes in the
Spec). Where it applies follows from Spec and layout alone; no family is known by name.

The same catalogue read backwards suggests causes: if ours with mistake X undone agrees with upstream, then X
was the mistake (`zoo.verify.diagnose`). Many undo themselves when made again; others have their `undo` here.

Left out on purpose are mistakes that cannot show: whole experts permuted together with their router rows,
a RoPE order changed in q and k where nothing is rotated, a softmax over all experts against one over the
chosen where the weights are renormalised.
"""

from __future__ import annotations

from collections.abc import Mapping

from zoo.spec import Spec
from zoo.verify.faults import parts as _parts
from zoo.verify.faults import spec as _spec
from zoo.verify.faults import weights as _weights
from zoo.verify.faults.base import CATALOGUE, Fault, Subject


def applicable(spec: Spec, quant: Mapping[str, str] | None = None) -> list[Fault]:
    """The faults that apply to a Spec; those in scales only if something is quantised."""
    return [f for f in CATALOGUE.values() if f.applies(spec) and (quant or not f.name.startswith("scale_"))]


__all__ = ["CATALOGUE", "Fault", "Subject", "applicable"]
assert _parts and _spec and _weights  # importing them fills the catalogue
