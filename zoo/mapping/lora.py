"""A PEFT adapter out of two canonical folders: `zoo lora BASE TUNED DST`, the way back from `zoo merge`.

What training changed is, matrix by matrix under the names that transformers has for them,

    D = W_tuned - W_base  ~  B A,      B = U_r sqrt(S_r)  [out, r],    A = sqrt(S_r) V_r'  [r, in]

with the r largest singular values of D: no other product of rank r is nearer (Eckart and Young, 1936). The share of |D|^2 that
B A has is told for each matrix, since nothing says that a difference is of low rank.

Experts that transformers packs are taken one by one, and told together. What is no matrix (a norm, an embedding, a router) is
put whole into the adapter where PEFT can hold it (`modules_to_save`; biases), and refused by name where it cannot. In memory are one
matrix of both folders and the adapter.

Unusual: singular vectors come from the eigenvectors of D D' in fp64; of a large matrix from its range on random vectors, with eight
power iterations (Halko et al., arXiv 0909.4061). What that loses shows in the share.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError, translated
from zoo.formats import canonical
from zoo.formats.base import ITEMSIZE, encoded, files_below
from zoo.formats.canonical import Canonical
from zoo.layout import Slot, layout
from zoo.mapping.execute import Progress
from zoo.mapping.fold import fold
from zoo.mapping.folder import Folder
from zoo.mapping.merge import CONFIG, WEIGHTS, placed
from zoo.mapping.names_out import family_of, outputs_of, prefix_of, rules_of
from zoo.mapping.recipe import Output
from zoo.mapping.rules import respell
from zoo.mapping.save import assembled
from zoo.mapping.values import extras_of, refuse_part, release_of
from zoo.model.load import Source

StrPath = str | os.PathLike[str]
EXACT = 1024
"""Matrices with this many rows or columns at most are decomposed whole: by the eigenvectors of D D', in fp64, in a second at most."""
OVERSAMPLED = 16
"""Random vectors beyond the rank asked for."""
BEGIN = "base_model.model."


@dataclass
class Extracted:
    """The adapter in `path`: `kept`, module -> the share of its difference's energy |D|^2 that the adapter has; `whole`: modules
    and biases that it holds as they are."""

    path: Path
    rank: int
    kept: dict[str, float] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)

    @property
    def worst(self) -> tuple[str, float] | None:
        return min(self.kept.items(), key=lambda x: x[1], default=None)

    def to_json(self) -> dict[str, Any]:
        worst = self.worst
        return {
            "path": str(self.path),
            "rank": self.rank,
            "kept": self.kept,
            "worst": worst and {"module": worst[0], "kept": worst[1]},
            "whole": self.whole,
        }


@translated
def extract(
    base: StrPath,
    tuned: StrPath,
    to: StrPath,
    *,
    rank: int = 32,
    force: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """Write to the folder `to` the PEFT adapter of rank `rank` that makes the canonical folder `tuned` of `base`, as nearly as one can.

    Raises ZooError if the two are no folders of one architecture, are equal, are quantised, or differ in what an adapter cannot hold
    (listed by pattern); and as `Folder` does.
    """
    old, new = canonical.read(base), canonical.read(tuned)
    _refuse_unlike(old, new)
    out = Extracted(Path(to), rank)
    made = _Adapter(old, rank, out)
    sizes = {n: math.prod(o.fits[k].shape) * ITEMSIZE[o.dtype] for n, ((o, k), *_) in made.names.items()}
    done, total = 0, sum(sizes.values())
    for name, places in made.names.items():
        w, v = _held(Source(old), places), _held(Source(new), places)
        if not torch.equal(w, v):
            made.add(name, w, v)
        done += sizes[name]
        if progress:
            progress(done, total)
    made.refuse(new)
    files = {CONFIG: encoded(made.config(), indent=2) + b"\n", WEIGHTS: made.weights()}
    with Folder(to, {}, uuid.uuid4().hex, force=force, ours=_wrote) as folder:
        for name, data in files.items():
            folder.write(name, data)
        out.path = folder.publish()
    return out


def _wrote(path: Path) -> bool:
    return files_below(path) <= {CONFIG, WEIGHTS}


def _held(source: Source, places: Sequence[tuple[Output, int]]) -> Tensor:
    """A tensor as transformers has it, in fp32."""
    held = source.folder.tensors
    return assembled(((source.tensor(held[o.name]), o.fits[k]) for o, k in places), torch.float32)


def _refuse_unlike(old: Canonical, new: Canonical) -> None:
    for c in (old, new):
        refuse_part(c)
        if c.quant:
            slot, how = next(iter(c.quant.items()))
            raise ZooError(
                f"{c.root}: {slot} is quantised ({how}): an adapter is of differences of numbers; convert the source with --dtype bf16"
            )
    if old.spec != new.spec or old.source["family"] != new.source["family"]:
        raise ZooError(
            f"{new.root}: is of another architecture than {old.root}: `zoo show {old.root} {new.root}` shows in what"
        )


# ---------------------------------------------------------------------------------------------------
# The adapter


class _Adapter:
    """What goes into the files, found tensor by tensor."""

    def __init__(self, old: Canonical, rank: int, report: Extracted) -> None:
        self.old, self.rank, self.report = old, rank, report
        family = family_of(old)
        rules = rules_of(family, "transformers")
        prefix = prefix_of(old, rules, "transformers")
        slots = layout(old.spec)
        self.names: dict[str, list[tuple[Output, int]]] = {}
        self.slots: dict[str, Slot] = {}
        for o in outputs_of(old, rules, respell(rules, prefix)):
            for k, name in enumerate(o.sources):
                self.names.setdefault(name, []).append((o, k))
                self.slots[name] = slots[o.name]
        self.turned = placed(old, rules, prefix).swapped & self.names.keys()
        linear = [n for n in self.names if self._is_linear(n)]
        # A Conv1D holds [in, out]; PEFT is told so of all modules together.
        self.fan_in = bool(linear) and sum(n in self.turned for n in linear) * 2 > len(linear)
        self.low: dict[str, tuple[Tensor, Tensor]] = {}  # module -> A, B
        self.experts: dict[
            str, tuple[Tensor, Tensor]
        ] = {}  # packed experts' parameter -> A, B of all of them
        self.biases: dict[str, Tensor] = {}
        self.saved: dict[str, Tensor] = {}  # tensors of whole modules
        self.refused: list[str] = []

    def _is_linear(self, name: str) -> bool:
        """Whether it is the weight of a linear module of transformers."""
        slot, fit = self.slots[name], self.names[name][0]
        return (
            name.endswith(".weight")
            and slot.multiplies
            and not slot.key.endswith("router.weight")
            and len(fit[0].fits[fit[1]].shape) == 2
        )

    def _is_experts(self, name: str, w: Tensor) -> bool:
        """Whether it is a parameter that holds the matrices of all experts: PEFT's `target_parameters`."""
        return not name.endswith((".weight", ".bias")) and self.slots[name].multiplies and w.dim() == 3

    def add(self, name: str, w: Tensor, v: Tensor) -> None:
        """A tensor that differs."""
        if not bool((v - w).isfinite().all()):
            raise ZooError(
                f"{name} differs by NaN or infinity from that of {self.old.root}, of which nothing can be extracted: was the training sound?"
            )
        slot, (module, _, leaf) = self.slots[name], name.rpartition(".")
        if slot.key == "embed.weight" and self.old.spec.tied:
            self.refused.append(f"{name} (it is the head, too: tied)")
        elif self._is_linear(name) and (name in self.turned) == self.fan_in:
            a, b, self.report.kept[module] = lowered((v - w).T if self.fan_in else v - w, self.rank)
            self.low[module] = a, b
        elif self._is_experts(name, w) and not self.fan_in:
            a, b, self.report.kept[name] = lowered_experts(w, v, self.rank, name in self.turned)
            self.experts[name] = a, b
        elif leaf == "bias" and f"{module}.weight" in self.names and self._is_linear(f"{module}.weight"):
            self.biases[module] = v
            self.report.whole.append(name)
        elif leaf in ("weight", "bias"):
            self._save(module, name, v)
        else:
            self.refused.append(f"{name} (a parameter that is no module's weight)")

    def _save(self, module: str, name: str, v: Tensor) -> None:
        """A module whole: with its other tensors, which are the base's unless they are found to differ."""
        if f"{module}.weight" not in self.saved and f"{module}.bias" not in self.saved:
            source = Source(self.old)
            for other in self.names:
                if other.rpartition(".")[0] == module:
                    self.saved[other] = _held(source, self.names[other])
            self.report.whole.append(module)
        self.saved[name] = v

    def refuse(self, new: Canonical) -> None:
        """Raises ZooError for what differs and has no place in an adapter, and if nothing does."""
        ours, theirs = Source(self.old), Source(new)
        for name in sorted(extras_of(self.old).keys() & new.extra_tensors.keys()):
            a, b = ours.tensor(self.old.extra_tensors[name]), theirs.tensor(new.extra_tensors[name])
            if a.dtype != b.dtype or not torch.equal(a, b):
                self.refused.append(f"{name} (no part of the text model)")
        if self.refused:
            listed = "".join(f"\n  {text}" for text, _ in fold(self.refused)[:12])
            raise ZooError(
                f"{new.root}: {len(self.refused)} tensors differ from {self.old.root} that an adapter cannot hold. Nothing was "
                f"written{listed}"
            )
        if not (self.low or self.experts):
            what = (
                f"differs from {self.old.root} in {', '.join(self.report.whole[:4])} alone"
                if self.report.whole
                else f"has the values of {self.old.root}"
            )
            raise ZooError(f"{new.root}: {what}: there is nothing of low rank to extract")

    def config(self) -> dict[str, Any]:
        """`adapter_config.json`, in the words of PEFT's LoraConfig."""
        ranks = {m: len(a) for m, (a, _) in self.low.items() if len(a) != self.rank}
        base = release_of(self.old.source).get("release", "").partition("@")
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base[0] if base[0].count("/") == 1 else None,
            "revision": base[2] or None if base[0].count("/") == 1 else None,
            "r": self.rank,
            "lora_alpha": self.rank,
            "rank_pattern": ranks,
            "alpha_pattern": ranks,
            "target_modules": sorted(self._called(self.low)) or None,
            "target_parameters": sorted(self._called(self.experts, parts=2)) or None,
            "modules_to_save": sorted({n.rpartition(".")[0] for n in self.saved}) or None,
            "bias": "all" if self.biases else "none",
            "fan_in_fan_out": self.fan_in,
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
        }

    def _called(self, names: Iterable[str], parts: int = 1) -> Iterator[str]:
        """Modules, or parameters, as PEFT finds them: by the last `parts` of the name where all that are called so are meant,
        else by the whole."""
        known = {*self.names, *self.old.extra_tensors}
        wanted, every = set(names), known if parts == 2 else {n.rpartition(".")[0] for n in known}
        by_end: dict[str, set[str]] = {}
        for name in every:
            by_end.setdefault(".".join(name.split(".")[-parts:]), set()).add(name)
        for end, alike in by_end.items():
            if alike & wanted:
                yield from [end] if alike <= wanted else alike & wanted

    def weights(self) -> bytes:
        from safetensors.torch import save

        out = {f"{BEGIN}{name}": t for name, t in self.saved.items()}
        for module, (a, b) in self.low.items():
            out |= {f"{BEGIN}{module}.lora_A.weight": a, f"{BEGIN}{module}.lora_B.weight": b}
        for name, (a, b) in self.experts.items():
            module, later = name.rpartition(".")[0], list(self.experts)
            # PEFT wraps a module once for each of its parameters, the first one innermost.
            depth = sum(n.rpartition(".")[0] == module for n in later[later.index(name) + 1 :])
            at = f"{BEGIN}{module}{'.base_layer' * depth}"
            out |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
        for module, t in self.biases.items():
            out[f"{BEGIN}{module}{'.base_layer' if module in self.low else ''}.bias"] = t
        return save({k: t.contiguous() for k, t in out.items()}, metadata={"format": "pt"})


def lowered(d: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A [r, in] and B [out, r] of the difference d [out, in], and the share of |d|^2 that B A has; r is at most d's sides."""
    a, b, lost, all_ = _lowered(d, rank)
    return a, b, 1 - lost / all_


def lowered_experts(w: Tensor, v: Tensor, rank: int, turned: bool) -> tuple[Tensor, Tensor, float]:
    """The same of E experts' matrices, w and v [E, out, in] (`turned`: [E, in, out]), as PEFT has them: A [E r, in], an expert after
    the other, and B [out, r E], an expert's columns E apart."""
    E, r, lost, all_ = len(w), rank, 0.0, 0.0
    out, in_ = w.shape[:0:-1] if turned else w.shape[1:]
    a, b = torch.zeros(E, r, in_), torch.zeros(out, r, E)
    for e in range(E):
        d = (v[e] - w[e]).T if turned else v[e] - w[e]
        if d.any():
            one, two, rest, whole = _lowered(d, r)
            a[e, : len(one)], b[:, : len(one), e] = one, two
            lost, all_ = lost + rest, all_ + whole
    return a.reshape(E * r, in_), b.reshape(out, r * E), 1 - lost / all_


def _lowered(d: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """A, B, |d - B A|^2 and |d|^2."""
    r = min(rank, *d.shape)
    wide = d if d.shape[0] <= d.shape[1] else d.T
    if len(wide) <= EXACT:
        gram = wide.double() @ wide.double().T
        u = torch.linalg.eigh(gram)[1].flip(-1)[:, :r].to(d.dtype)  # the largest come last
    else:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            u = torch.svd_lowrank(wide, q=min(r + OVERSAMPLED, len(wide)), niter=8)[0][:, :r]
    projected = u.T @ wide  # U' D = S V'
    root = projected.norm(dim=1).sqrt()
    b, a = u * root, projected / root.clamp_min(torch.finfo(d.dtype).tiny)[:, None]
    if wide is not d:
        a, b = b.T, a.T
    lost, all_ = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in (d - b @ a, d))
    return a, b, lost, all_
