"""What a fault is, and what it acts on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from zoo.layout import layout
from zoo.model import Decoder
from zoo.spec import Spec

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A model to be: what a decoder is built from. Changes make a new one; no tensor is changed in place."""

    spec: Spec
    tensors: Tensors
    quant: Mapping[str, str] = dataclasses.field(default_factory=dict)
    patch: Callable[[Decoder], None] | None = None  # for a mistake that neither can express
    partial: bool = False  # not all tensors are there: what they would fill is not run

    def put(self, changed: Mapping[str, Tensor]) -> Subject:
        return replace(self, tensors={**self.tensors, **changed})

    def with_spec(self, spec: Spec) -> Subject:
        """The same tensors under another Spec; those it has no slot for are dropped."""
        slots = layout(spec)
        keep = {n: t for n, t in self.tensors.items() if n in slots or n.rsplit(".", 1)[0] in self.quant}
        return replace(self, spec=spec, tensors=keep)


Sites = Callable[[Spec], Sequence[str]]
Apply = Callable[[Subject, str], Subject]


@dataclass(frozen=True)
class Fault:
    """`what` completes "consistent with ...". `sites`: where it can act, by Spec and layout; none: it does
    not apply."""

    name: str
    what: str
    kind: Literal["weights", "spec"]
    sites: Sites
    apply: Apply
    undo: Apply | None = None  # what repairs it; None: nothing can, or nobody knows the right value

    @property
    def again(self) -> bool:
        """Whether making it is what undoes it."""
        return self.undo is self.apply

    def applies(self, spec: Spec) -> bool:
        return bool(self.sites(spec))

    def inject(self, subject: Subject, site: str | None = None) -> Subject:
        """The subject with this fault, at `site` or at the middle one."""
        sites = self.sites(subject.spec)
        return self.apply(subject, site or sites[len(sites) // 2])


CATALOGUE: dict[str, Fault] = {}


def add(
    name: str,
    what: str,
    kind: Literal["weights", "spec"],
    sites: Sites,
    apply: Apply,
    undo: Apply | Literal["again"] | None = None,
) -> None:
    assert name not in CATALOGUE
    CATALOGUE[name] = Fault(name, what, kind, sites, apply, apply if undo == "again" else undo)
