"""Plan: rules x headers -> for every canonical tensor, which source elements make it. Nothing is read.

A conversion is a plan before it is an action: it can be printed, checked against the Spec, restricted to
some layers, and run by source file as the files arrive (`zoo.mapping.execute`). A checkpoint that the rules
do not account for to the last tensor has no plan: the error lists everything unexpected, missing or of
another shape, with the nearest names.

Unusual here: a rule is compiled once per kind of layer, not per layer (`zoo.mapping.recipe`). That is what makes the plan of
92,000 tensors a matter of a second.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zoo import families
from zoo.errors import ZooError
from zoo.families import Family
from zoo.formats.base import FLOATS, Checkpoint, TensorRef
from zoo.formats.safetensors import INDEX
from zoo.mapping.fold import span
from zoo.mapping.match import Match, match
from zoo.mapping.recipe import Output
from zoo.mapping.unmatched import PlanError
from zoo.quant import blocks, foreign
from zoo.quant.schemes import scheme as scheme_called
from zoo.spec import Spec

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""What a user may ask for -> safetensors' name."""


@dataclass
class Plan:
    """A conversion, before it is one.

    `outputs` in the order of the layout; `extras`: source tensors kept aside, with the reason.
    `dtype`: what floating-point tensors are converted to (safetensors' name), None: as released.
    `quant`: slot without `.weight` -> scheme, of weights that are carried quantised.
    `layers`: the ones planned for, where that is not all of them. `family_given`: the family was said, not found.
    """

    checkpoint: Checkpoint
    family: Family
    naming: str
    prefix: tuple[tuple[str, str], ...]
    spec: Spec
    outputs: dict[str, Output]
    extras: dict[str, str]
    dtype: str | None = None
    quant: dict[str, str] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    family_given: bool = False

    @property
    def carried(self) -> tuple[str, ...]:
        """Files that go along as they are."""
        return tuple(sorted({*self.checkpoint.carried, *self.checkpoint.synthesised} - {INDEX}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        extras = sum(self.checkpoint.tensors[n].nbytes for n in self.extras)
        return sum(o.nbytes for o in self.outputs.values()) + extras

    @property
    def rules_version(self) -> str:
        return self.family.rules[self.naming].version

    @functools.cached_property
    def digest(self) -> str:
        """Hash of what the plan does: which elements of which source tensors go where, in which dtype.
        Equal digests mean equal canonical bytes from equal sources, whatever the rules are written like."""
        h = hashlib.sha256(repr((self.dtype, self.layers, sorted(self.extras))).encode())
        seen: dict[int, str] = {}
        for o in self.outputs.values():
            if id(o.fits) not in seen:
                seen[id(o.fits)] = repr(
                    [(f.shape, f.source, f.canonical, *((f.change,) if f.change else ())) for f in o.fits]
                )
                h.update(seen[id(o.fits)].encode())
            way = o.mixed or o.scheme
            h.update(repr((o.name, o.dtype, o.shape, way, o.sources, seen[id(o.fits)][:64])).encode())
        return h.hexdigest()[:32]

    def block_type(self, o: Output) -> str | None:
        """The type of ggml's blocks that an output holds as bytes; None if it holds none."""
        stem, _, part = o.name.rpartition(".")
        if (how := self.quant.get(stem)) is None or not blocks.is_one(s := scheme_called(how)):
            return None
        return blocks.type_of(s, part) if any(part == c.name for c in s.components) else None

    def sources_of(self, o: Output, k: int) -> list[str]:
        """All source tensors that the k-th fit of an output needs: the weight and what stands beside it."""
        return [o.sources[k], *o.beside(k).values()]

    def files_needed(self) -> dict[str, int]:
        """Source file -> bytes of it that this plan reads; files that it does not need are left out."""
        out: dict[str, int] = {}
        tensors = self.checkpoint.tensors
        names = {
            n for o in self.outputs.values() for k in range(len(o.sources)) for n in self.sources_of(o, k)
        }
        for name in {*names, *self.extras}:
            ref = tensors[name]
            out[ref.file] = out.get(ref.file, 0) + ref.nbytes
        return dict(sorted(out.items()))

    def restrict(self, layers: Collection[int]) -> Plan:
        """The plan of these layers and what belongs to none (embedding, final norm, head), without extras.

        Raises ZooError for a layer that the model does not have.
        """
        if bad := [i for i in layers if not 0 <= i < self.spec.n_layers]:
            raise ZooError(
                f"layer {bad[0]} does not exist: the model has layers 0 to {self.spec.n_layers - 1}"
            )
        keep = {n: o for n, o in self.outputs.items() if o.layer is None or o.layer in set(layers)}
        quant = {n: q for n, q in self.quant.items() if n + ".weight" in keep}
        return replace(self, outputs=keep, extras={}, quant=quant, layers=tuple(sorted(set(layers))))

    def summary(self) -> str:
        """What a person wants to know first, in a few lines."""
        c, refs = self.checkpoint, self.checkpoint.tensors
        n_sources = len({n for o in self.outputs.values() for n in o.sources})
        lines = [
            f"family     {self.family.name} ({self.naming} names, {c.format} files)",
            f"source     {len(refs):,} tensors in {len(c.files)} file(s), {sum(r.nbytes for r in refs.values()):,} bytes",
            f"canonical  {len(self.outputs):,} tensors of {n_sources:,} source tensors, "
            f"{sum(o.nbytes for o in self.outputs.values()):,} bytes",
            f"dtype      {self.dtype or self._kept()} ({', '.join(sorted({o.dtype for o in self.outputs.values()}))})",
        ]
        if self.quant:
            schemes: dict[str, int] = {}
            for q in self.quant.values():
                schemes[q] = schemes.get(q, 0) + 1
            lines.append("quantised  " + ", ".join(f"{n} weights {q}" for q, n in schemes.items()))
        if self.layers is not None:
            lines.append(f"layers     {span(map(str, self.layers))} of {self.spec.n_layers}")
        if self.extras:
            reasons: dict[str, list[str]] = {}
            for name, reason in self.extras.items():
                reasons.setdefault(reason, []).append(name)
            lines += [f"extras     {len(names):,} tensors: {reason}" for reason, names in reasons.items()]
        return "\n".join([*lines, *(f"note       {n}" for n in (*c.notes, *self.notes))])

    def _kept(self) -> str:
        blocks_too = any(self.block_type(o) for o in self.outputs.values())
        return "blocks as released, all else in fp32" if blocks_too else "as released"

    def to_json(self) -> dict[str, Any]:
        """All of it, with one entry per canonical tensor."""
        return {
            "family": self.family.name,
            "family_given": self.family_given,
            "naming": self.naming,
            "format": self.checkpoint.format,
            "source": str(self.checkpoint.root),
            "rules": self.rules_version,
            "digest": self.digest,
            "dtype": self.dtype,
            "bytes": self.nbytes,
            "quant": self.quant,
            "layers": self.layers,
            "carried": self.carried,
            "notes": [*self.checkpoint.notes, *self.notes],
            "tensors": [
                {
                    "name": o.name,
                    "dtype": o.dtype,
                    "shape": o.shape,
                    "sources": o.sources,
                    "dequantised": o.scheme,
                }
                for o in self.outputs.values()
            ],
            "extras": self.extras,
        }


# ---------------------------------------------------------------------------------------------------
# Making one


MAX_EXTRAS = 1 << 16
"""Tensors that are kept aside; the experts of a layer that predicts more tokens are some thousand."""


def make_plan(ckpt: Checkpoint, family: Family | None = None, dtype: str | None = None) -> Plan:
    """The plan of converting `ckpt`. `dtype`: "bf16", "fp16" or "fp32", or None to keep what is released
    (of GGUF's block types those that can be carried; the others become fp32, which a note says).

    Raises ZooError if no family claims the config, or, with everything that does not fit listed
    (`PlanError`), if the rules and the tensors do not account for each other.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ZooError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    made_up = "config.json" in ckpt.synthesised  # of files of another kind, which say it themselves
    where = str(ckpt.root / (next(iter(ckpt.files), "") if made_up else "config.json"))
    family = family or found(ckpt, where)
    spec, unread = families.read(ckpt.config, family, where)
    namings = [n for n in ckpt.naming if n in family.rules]
    if not namings:
        raise ZooError(
            f"{ckpt.root}: family {family.name} has no rules for {ckpt.format} files (names of "
            f"{' or '.join(ckpt.naming)}); it has rules for {', '.join(family.rules)}"
        )
    asked = DTYPES[dtype] if dtype else None
    if asked is None and ckpt.format == "gguf" and not _has_blocks(ckpt):
        asked = "F32"  # which its norms are in, whatever the rest is
    best: Match | None = None
    tried: list[Match] = []
    for naming in namings:
        m = match(spec, family.rules[naming], ckpt.tensors, ckpt.n_ranks, naming, asked, ckpt.config)
        if spec.tied and m.head:
            m = _judge_head(ckpt, spec, family, m, asked)
        elif set(m.missing) == {"head.weight"} and _unsaid(ckpt.config):
            m = match(
                replace(spec, tied=True),
                family.rules[naming],
                ckpt.tensors,
                ckpt.n_ranks,
                naming,
                asked,
                ckpt.config,
            )
            m.notes.append("the config does not say whether the head is tied, and the files hold none: it is")
        tried.append(m)
        if best is None or m.n_problems < best.n_problems:
            best = m
        if not m.n_problems:
            break
    assert best is not None
    if best.n_problems:
        if best.kept:
            raise ZooError(
                f"{ckpt.root}: {best.kept}; convert with --dtype bf16 (or fp16, fp32); nothing was written"
            )
        if best.unread:
            raise ZooError(
                f"{ckpt.root}: its weights are quantised in a way which zoo does not read: {best.unread}: {PLAIN}"
            )
        if (what := _coded(ckpt, best)) is not None:
            raise ZooError(
                f"{ckpt.root}: its weights are quantised as {what}, which zoo does not read: {PLAIN}"
            )
        raise PlanError(ckpt, family, best, tried)
    if len(best.extras) > MAX_EXTRAS:
        raise ZooError(
            f"{ckpt.root}: {len(best.extras)} tensors are no part of the model (limit {MAX_EXTRAS}), {next(iter(best.extras))!r} for one: "
            f"{next(iter(best.extras.values()))}. No release has as many: refused"
        )
    if (words := foreign.said(ckpt.config)) is not None and not quantised(best, ckpt.tensors):
        best.notes.append(
            f"the config calls the weights quantised ({words}), but they are plain: taken as they are"
        )
    if best.blocks:  # they are moved as the bytes that they lie in
        refs = {n: blocks.as_bytes(r) if n in best.blocks else r for n, r in ckpt.tensors.items()}
        ckpt = replace(ckpt, tensors=refs)
    return Plan(
        ckpt, family, best.naming, best.prefix, best.spec, best.outputs, best.extras, asked, best.quant,
        notes=(*unread, *best.notes),
    )  # fmt: skip


def _has_blocks(ckpt: Checkpoint) -> bool:
    return any(t.dtype.lower() in blocks.TYPES for t in ckpt.tensors.values())


PLAIN = (
    "take the release that was not quantised, or have the tool that made this one write plain weights (transformers, where the "
    "config names a quant_method that it knows: from_pretrained(...).dequantize(), then save_pretrained)"
)


def _coded(ckpt: Checkpoint, m: Match) -> str | None:
    """What the weights that do not fit are quantised as, if zoo does not read it, in one phrase."""
    what = foreign.name_of(ckpt.config, ckpt.tensors)
    if what is None and not quantised(m, ckpt.tensors):
        shapes = (name for at in m.misshapen.values() for name, _ in at)
        missing = (name for names in m.missing.values() for name in names)
        what = foreign.codes_of(ckpt.config, ckpt.tensors, {*m.codes, *shapes, *missing})
    if what is None or foreign.said(ckpt.config) is not None or (told := foreign.beside(ckpt.root)) is None:
        return what
    return f"{what.partition(' (')[0]} ({told})"


def quantised(m: Match, tensors: Mapping[str, TensorRef]) -> bool:
    """Whether any weight of these is."""
    return (
        bool(m.quant)
        or any(o.scheme is not None for o in m.outputs.values())
        or any(tensors[n].dtype not in FLOATS for o in m.outputs.values() for n in o.sources)
    )


def given(config: Mapping[str, Any], family: Family) -> tuple[str, ...]:
    """A note for a family that was said and is not what the config says; none if it is."""
    try:
        claimed = families.find(config).name
    except ZooError:
        claimed = "no family's name"
    if claimed == family.name:
        return ()
    return (
        f"taken for {family.name}, as was said (--family): the config has {claimed} (architectures "
        f"{config.get('architectures')}, model_type {config.get('model_type')!r})",
    )


def found(ckpt: Checkpoint, where: str) -> Family:
    """The family of a checkpoint. One that none claims is refused with those that it fits in all but its name, or else
    with the one whose tensors it has most nearly."""
    try:
        return families.find(ckpt.config, where)
    except families.NoFamily as e:
        fitting: list[tuple[int, str]] = []
        near: dict[tuple[str, ...], list[str]] = {}  # what does not fit -> families
        for family in families.families().values():
            try:
                spec, unread = families.read(ckpt.config, family, where)
            except ZooError:
                continue
            for naming in ckpt.naming:
                if naming in family.rules:
                    m = match(
                        spec, family.rules[naming], ckpt.tensors, ckpt.n_ranks, naming, None, ckpt.config
                    )
                    if not m.n_problems:
                        fitting.append((len(unread), family.name))
                        break
                    near.setdefault(m.odd, []).append(family.name)
        odd = min(near, key=len, default=())
        if not fitting and 0 < len(odd) < len(ckpt.tensors) // 2:
            raise families.NoFamily(
                f"{e.who}. Nearest: {', '.join(near[odd])}, but for {len(odd)} tensor{'s' if len(odd) > 1 else ''} ({', '.join(odd[:3])}"
                f"{', ...' if len(odd) > 3 else ''}); --family {near[odd][0]} says more",
                e.known,
            ) from e
        if not fitting:  # its fields may be a family's, its tensors are none's
            raise families.NoFamily(e.who, e.known) from e
        names = [name for _, name in sorted(fitting)]
        raise ZooError(
            f"{where}: no family claims architectures {ckpt.config.get('architectures')}, model_type "
            f"{ckpt.config.get('model_type')!r}, but its fields and tensors fit {', '.join(names)}. If it computes as "
            f"{'that' if len(names) == 1 else 'one of those'} does, say --family {' or --family '.join(names)}"
        ) from e


def _unsaid(config: Mapping[str, Any]) -> bool:
    """A wrapper that leaves `tie_word_embeddings` to its class, which upstream calls tied."""
    text = config.get("text_config")
    return isinstance(text, Mapping) and all(c.get("tie_word_embeddings") is None for c in (config, text))


def _judge_head(ckpt: Checkpoint, spec: Spec, family: Family, m: Match, dtype: str | None) -> Match:
    """The config ties the head but the files hold one. Equal to the embedding it is a copy; else it is
    the head that was trained, and the spec is corrected (upstream loads it, too).

    The one place where a plan reads weights: no header can tell.
    """
    refs = (
        [ckpt.tensors[m.outputs["embed.weight"].sources[0]], ckpt.tensors[m.head[0]]]
        if "embed.weight" in m.outputs
        else []
    )
    if len(refs) < 2 or len(m.head) > 1 or not all(ckpt.path(r.file).exists() for r in refs):
        m.notes.append(f"{m.head[0]} is taken for a copy of the embedding (tied by the config); not compared")
        return m
    if refs[0].dtype == refs[1].dtype and refs[0].strides == refs[1].strides and _equal(ckpt, *refs):
        return m
    untied = match(
        replace(spec, tied=False),
        family.rules[m.naming],
        ckpt.tensors,
        ckpt.n_ranks,
        m.naming,
        dtype,
        ckpt.config,
    )
    untied.notes.append(
        f"the config ties the head, but {m.head[0]} differs from the embedding: kept as the head"
    )
    return untied


def _equal(ckpt: Checkpoint, a: TensorRef, b: TensorRef) -> bool:
    if a.nbytes != b.nbytes:
        return False
    with open(ckpt.path(a.file), "rb") as f, open(ckpt.path(b.file), "rb") as g:
        f.seek(a.offset)
        g.seek(b.offset)
        left, step = a.nbytes, 4 << 20
        while left:
            n = min(step, left)
            if f.read(n) != g.read(n):
                return False
            left -= n
    return True
