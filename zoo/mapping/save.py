"""A state that was trained -> a canonical folder: `zoo.save`.

The rules that read a release read a state as well: its names may be the canonical ones, those of the release or
those that transformers has in memory, in a trainer's wrappers or not. Each canonical tensor is put together by
itself, of source tensors that are asked for one at a time; so shards are gathered one by one, and a
checkpoint in pieces is read piece by piece.

Unusual here: where tensors are sharded, gathering them is work of all ranks. Everything that can be refused is refused
by all of them before the first is gathered, and the rank that writes goes on gathering when its disk is full: no rank
is left waiting for another.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import families
from zoo.errors import ZooError
from zoo.families import Family
from zoo.formats import canonical, dcp
from zoo.formats.base import HF_NAMINGS, Checkpoint, TensorRef
from zoo.formats.canonical import Canonical
from zoo.formats.trained import Mapped, open_trained
from zoo.formats.wrapped import trainers, unwrapped
from zoo.layout import layout
from zoo.mapping.execute import Progress
from zoo.mapping.match import TIED, Match, match
from zoo.mapping.names_out import family_of, held_aside
from zoo.mapping.plan import DTYPES
from zoo.mapping.recipe import Output
from zoo.mapping.rules import Box, Fit, RuleSet, respell, rules
from zoo.mapping.unmatched import PlanError
from zoo.mapping.values import New, Values, extras_of, refuse_part, unchanged
from zoo.model.load import DTYPES as TORCH
from zoo.quant.schemes import scheme
from zoo.spec import Spec, differences
from zoo.together import first_said

StrPath = str | os.PathLike[str]
BESIDE = (
    "optimizer", "optimizers", "optim", "lr_scheduler", "lr_schedulers", "scheduler", "dataloader", "train_state", "trainer", "step", "epoch",
    "rng_state", "scaler",
)  # fmt: skip
"""What trainers put beside a model, also where its own names stand outermost (torchtitan)."""
CALLED = {dtype: name for name, dtype in TORCH.items()}


@dataclass(frozen=True)
class State:
    """Tensors by name, which `get` gives one at a time: on the CPU, or None on a rank that does not write. `get` is
    called for the same names in the same order on all ranks. `what`: what errors call it. `notes`: on what is left out."""

    refs: Mapping[str, TensorRef]
    get: Callable[[str], Tensor | None]
    what: str
    notes: tuple[str, ...] = ()


def save(
    values: nn.Module | Mapping[str, Any] | StrPath,
    like: StrPath,
    to: StrPath,
    *,
    dtype: str | None = None,
    force: bool = False,
    shard_size: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the canonical folder `to`: the Spec of the canonical folder `like`, and these values; return it.

    `values`: a model, the path of a trainer's checkpoint (`of_path`), or tensors by name: the canonical names, those of Hugging Face's
    files, or those that transformers has in memory; a trainer's wrappers in names are looked through. Each floating-point tensor may have any
    floating-point dtype, and keeps it unless `dtype` says otherwise ("bf16", "fp16", "fp32"; as `zoo convert` does).
    Where tensors are DTensors, every rank calls this, and rank 0 writes; one tensor at a time is gathered. What `like` keeps
    aside (a vision tower, MTP heads) goes along as it is, unless the state has it too.

    Raises ZooError, listing by pattern all that is missing, over, or of another shape or dtype; if `like` is no canonical
    folder or holds only some layers; and as `Folder` does. Nothing is written then.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ZooError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    ranks: _Alone = _Alone()
    if not isinstance(values, str | os.PathLike):
        if not isinstance(values, nn.Module | Mapping):
            raise ZooError(
                f"a {type(values).__name__} to save; expected a model, tensors by name (model.state_dict()), or the path of a "
                "torch.distributed.checkpoint folder"
            )
        values = dict(values.state_dict() if isinstance(values, nn.Module) else values)
        ranks = _Together() if any(_is_sharded(t) for t in values.values()) else ranks
    with ranks.agreeing():
        old = canonical.read(like)
        refuse_part(old)
        state = of_tensors(values, ranks) if isinstance(values, dict) else of_path(Path(values), old)
        fitted = fit(old, state, DTYPES[dtype] if dtype else None)
    _refuse_other_head(fitted, state, ranks)
    with contextlib.ExitStack() as stack:
        new = Values(
            old, to, fitted.tensors, fitted.extras, fitted.quant, {"by": "zoo.save, of a state that was trained"},
            notes=state.notes, force=force, shard_size=shard_size, progress=progress,
        )  # fmt: skip
        with ranks.agreeing():
            if ranks.writes:
                stack.enter_context(new)
        failed: BaseException | None = None
        for tensor in new.tensors:
            if tensor.same is not None:
                continue
            pieces = put_together(fitted.outputs[tensor.name], state, ranks.writes)
            try:
                if ranks.writes and failed is None:
                    new.put(tensor, pieces)
            except (ZooError, OSError) as e:
                failed = e
            for _ in pieces:
                pass
        with ranks.agreeing():
            if failed is not None:
                raise failed
            if ranks.writes:
                new.finish()
    return new.folder.dst


def of_tensors(named: Mapping[str, Any], ranks: _Alone | None = None) -> State:
    """Tensors in memory. Raises ZooError for what is none, or has no values."""
    if (nameless := next((n for n in named if not isinstance(n, str)), None)) is not None:
        raise ZooError(
            f"the state has a tensor called {nameless!r:.60}: expected names, as model.state_dict() has them"
        )
    if (odd := next((n for n, t in named.items() if not isinstance(t, Tensor)), None)) is not None:
        raise ZooError(
            f"the state holds {odd!r}, a {type(named[odd]).__name__}: expected tensors only; give the part of it that is the "
            "model's (state['model'], say)"
        )
    if (odd := next((n for n, t in named.items() if t.is_meta), None)) is not None:
        raise ZooError(f"{odd} of the state is on the device meta: it has no values to save")
    if (odd := next((n for n, t in named.items() if t.layout is not torch.strided), None)) is not None:
        raise ZooError(
            f"{odd} of the state lies in memory as {named[odd].layout}: expected plain tensors (t.to_dense())"
        )
    if (odd := next((n for n, t in named.items() if t.dtype not in CALLED), None)) is not None:
        raise ZooError(f"{odd} of the state is {named[odd].dtype}, which no checkpoint holds")
    try:
        plain = unwrapped(named) or {n: n for n in named}
    except ZooError as e:
        raise ZooError(f"the state: {e}") from None
    tensors = {plain[n]: t for n, t in named.items()}
    refs = {
        n: TensorRef(n, CALLED[t.dtype], tuple(t.shape), "memory", 0, t.numel() * t.element_size())
        for n, t in tensors.items()
    }
    return State(refs, lambda name: (ranks or _Alone()).whole(tensors[name]), "the state")


def of_path(path: Path, like: Canonical) -> State:
    """The model in a trainer's checkpoint: a folder of torch.distributed.checkpoint, safetensors, PyTorch's pickles. What else the trainer
    keeps there is left out, with a note.

    Raises ZooError if there is no model of that family, or two, or if a config beside it says another architecture.
    """
    if dcp.detect(path):
        saved = dcp.open_saved(path)
        return _of_files(path, saved.tensors, like, saved.get, saved.other)
    found = open_trained(path)
    if found.config:
        _refuse_another(path, families.spec_of(found.config, where=str(path)), like)
    mapped = Mapped(found.root)
    state = _of_files(path, found.tensors, like, lambda name: mapped.tensor(found.tensors[name]))
    return replace(state, notes=(*found.notes, *state.notes))


def _refuse_another(path: Path, spec: Spec, like: Canonical) -> None:
    """Raises ZooError for another architecture; what says how values are stored, and whether two matrices are one, is no part of that."""
    ours = like.spec
    same = replace(spec, family=ours.family, dtype=ours.dtype, notes=ours.notes, tied=ours.tied)
    for told in differences(ours, same):
        raise ZooError(
            f"{path}: its config.json (family {spec.family}) is of another model than {like.root}: {told}. Is it what was trained of it? If "
            "not, convert it without --like"
        )


def _of_files(
    path: Path,
    tensors: Mapping[str, TensorRef],
    like: Canonical,
    get: Callable[[str], Tensor],
    other: Iterable[str] = (),
) -> State:
    """The model among these tensors, and a note on the rest and on `other` entries."""
    prefix = _model_in(path, tensors, _first_names(like))
    theirs = {n for n in tensors if not n.startswith(prefix) or n.partition(".")[0] in BESIDE}
    named = {n.removeprefix(prefix): n for n in tensors if n not in theirs}
    try:
        plain = unwrapped(named) or {n: n for n in named}
    except ZooError as e:
        raise ZooError(f"{path}: {e}") from None
    full = {plain[n]: whole for n, whole in named.items()}
    refs = {n: replace(tensors[whole], name=n) for n, whole in full.items()}
    left = [*(n for n in tensors if n in theirs), *other]
    kinds = ", ".join(sorted({n.partition(".")[0] for n in left})[:8])
    notes = (
        (f"left out: {len(left)} entries of {path.name} that are not the model's ({kinds})",) if left else ()
    )
    return State(refs, lambda name: get(full[name]), str(path), notes)


def _first_names(like: Canonical) -> set[str]:
    """What the embedding may be called."""
    family = family_of(like)
    return {
        respell(ruleset, prefix)(leaf.pattern)
        for ruleset in namings(like.spec, family).values()
        for rule in ruleset.by_key.get("embed.weight", ())
        for leaf in rule.expr.leaves()
        for prefix in ruleset.prefixes
    }


def _model_in(path: Path, names: Mapping[str, TensorRef], first: set[str]) -> str:
    """What all names of the model begin with in a trainer's checkpoint ("", "model.", "app.model.", ...)."""
    found = {n.removesuffix(e) for n in names for e in first if n == e or n.endswith(f".{e}")}
    outer = [p for p in sorted(found) if not any(p != q and p.startswith(q) for q in found)]
    if len(outer) == 1:
        return outer[0]
    if outer:
        raise ZooError(
            f"{path}: holds several models ({', '.join(repr(p) for p in outer)}): save the one that is meant by itself"
        )
    if (whose := trainers(names)) is not None:
        raise ZooError(f"{path}: {whose}")
    shown = ", ".join(list(names)[:4])
    raise ZooError(
        f"{path}: holds no tensor called {' or '.join(sorted(first))}, alone or below another name; it has {shown}, ..."
    )


# ---------------------------------------------------------------------------------------------------
# What goes where


@dataclass
class Fitted:
    """The tensors of the new folder and their making. `outputs` has all that are not copied. `head`: the name in the state
    of a head that the Spec ties, and the one of the embedding."""

    tensors: list[New]
    extras: dict[str, tuple[New, str]]
    outputs: dict[str, Output]
    quant: dict[str, str]
    head: tuple[str, str] | None


def fit(like: Canonical, state: State, dtype: str | None) -> Fitted:
    """Which of the state's tensors are which of the folder's; `dtype` as in `Plan`. Raises PlanError (a ZooError)."""
    refs, quantised = dict(state.refs), list[New]()
    quant = {slot: how for slot, how in like.quant.items() if _carries(like, slot, refs)}
    for slot in quant:
        for part in scheme(quant[slot]).components:
            if (ref := refs.pop(f"{slot}.{part.name}", None)) is not None:
                quantised.append(New(ref.name, ref.dtype, ref.shape))
    family = family_of(like)
    names = namings(like.spec, family)
    tried = [
        match(
            like.spec,
            ruleset,
            refs,
            1,
            naming,
            dtype,
            like.source["config"] if naming in ("hf", "saved") else {},
        )
        for naming, ruleset in names.items()
    ]
    for m in tried:
        for name in [n for n in m.missing if n.removesuffix(".weight") in quant]:
            del m.missing[name]
    m = min(tried, key=lambda m: m.n_problems)
    ours = _aside(m, names[m.naming], like, refs)
    m.unexpected = [n for n in m.unexpected if n not in ours]
    m.problems += _held_twice(like, ours)
    if m.quant or (dtype is None and any(o.scheme for o in m.outputs.values())):
        m.problems.append(
            f"{next(iter(m.quant))}: quantised in the state under a release's names; give the canonical ones, or plain weights"
        )
    if m.n_problems:
        config = dict(like.source["config"])
        errors = [
            PlanError(Checkpoint(Path(state.what), "state", (x.naming,), config, refs, {}), family, x)
            for x in (m, *(x for x in tried if x is not m))
        ]
        raise next((e for e in errors if e.known), errors[0])
    outputs = dict(m.outputs)
    for new in quantised:
        outputs[new.name] = _itself(new.name, new)
    tensors = [New(o.name, o.dtype, o.shape) for o in outputs.values()]
    extras = {n: (unchanged(like.extra_tensors[n]), why) for n, why in extras_of(like).items()}
    for name, (kept, why) in ours.items():
        new = New(kept, refs[name].dtype, refs[name].shape)
        extras[kept] = new, why
        outputs[kept] = _itself(name, new)
    head = (m.head[0], m.outputs["embed.weight"].sources[0]) if m.head else None
    return Fitted(tensors, extras, outputs, quant, head)


def namings(spec: Spec, family: Family) -> dict[str, RuleSet]:
    """The names that a state may have: the canonical ones, and those of the family's rules that transformers has."""
    keys = dict.fromkeys(
        [*(slot.key for slot in layout(spec).values()), "head.weight"]
    )  # tied: a copy, if anything
    own = rules(*((key, key) for key in keys))
    theirs = {n: family.rules[n] for n in HF_NAMINGS if n in family.rules}
    return {"canonical": own, **theirs}


def _carries(like: Canonical, slot: str, refs: Mapping[str, TensorRef]) -> bool:
    """Whether the state has a quantised weight as the folder has it: the same codes and scales, by dtype and shape."""
    own = [like.tensors.get(f"{slot}.{c.name}") for c in scheme(like.quant[slot]).components]
    return all(
        (there := refs.get(ref.name)) is not None and (there.dtype, there.shape) == (ref.dtype, ref.shape)
        for ref in own
        if ref is not None
    )


def _aside(
    m: Match, ruleset: RuleSet, like: Canonical, refs: Mapping[str, TensorRef]
) -> dict[str, tuple[str, str]]:
    """Tensors of the state that the model does not use: (name in the folder, reason). Where the folder has them, they have
    its names, which are the release's."""
    prefix = tuple((a, b) for a, b in like.source["prefix"])
    released = respell(ruleset, prefix) if m.naming == "hf" else (lambda name: name)
    back = respell(ruleset, tuple((new, old) for old, new in m.prefix if new))
    held = {called: name for name, called in held_aside(like).items()}
    out = {}
    for name in (*m.extras, *m.unexpected):
        why = m.extras.get(name)
        if why == TIED:
            continue
        spellings = (
            name, held.get(name), held.get(f"model.{name}"), released(back(name)), name.removeprefix("model."),
        )  # fmt: skip
        kept = next((n for n in spellings if n in like.extra_tensors), None)
        if kept is not None and like.extra_tensors[kept].shape == refs[name].shape:
            out[name] = kept, like.extras.get(kept, why or "kept aside before")
        elif why is not None:
            out[name] = name, why
    return out


def _held_twice(like: Canonical, ours: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    """What the state has beside the model, and the folder too, under names of which it is not known that they mean the same: in one
    folder they would be two, of which a reader takes either."""
    given = {kept for kept, _ in ours.values()}
    for why in dict.fromkeys(why for _, why in ours.values()):
        new = [n for n, (kept, w) in ours.items() if w == why and kept not in like.extra_tensors]
        old = [n for n, w in extras_of(like).items() if w == why and n not in given]
        if new and old:
            yield (
                f"{len(new)} tensors of the state ({new[0]}, ...: {why}), and {len(old)} that {like.root} has under other names ({old[0]}, ...): "
                "leave them out of the state, and the folder's go along; if they were trained, save_pretrained and `zoo convert` that"
            )


def _itself(source: str, new: New) -> Output:
    whole = Box.whole(new.shape)
    return Output(new.name, new.dtype, new.shape, None, (source,), (Fit(source, new.shape, whole, whole),))


def _refuse_other_head(fitted: Fitted, state: State, ranks: _Alone) -> None:
    """A head beside an embedding that the Spec ties it to must be a copy of that."""
    if fitted.head is None:
        return
    head, embed = map(state.get, fitted.head)
    with ranks.agreeing():
        if head is not None and embed is not None and not torch.equal(head, embed):
            raise ZooError(
                f"{state.what}: {fitted.head[0]} differs from {fitted.head[1]}, but the Spec ties them: they were trained apart. Tie "
                "them in the trainer, or export the folder, untie it (tie_word_embeddings), and convert that"
            )


# ---------------------------------------------------------------------------------------------------
# Making them


def put_together(o: Output, state: State, wanted: bool) -> Iterator[Tensor]:
    """The canonical tensor, put together of its sources. Asks for these even where it is not `wanted`."""
    out = None
    held, last = None, ""
    for name, fit in zip(o.sources, o.fits, strict=True):
        if name != last:  # one that several parts are cut from is asked for once
            held, last = state.get(name), name
        if not wanted:
            continue
        assert held is not None
        if (
            held.dtype == TORCH[o.dtype]
            and len(o.fits) == 1
            and fit.source.is_contiguous()
            and fit.canonical.is_contiguous()
        ):
            yield held.reshape(o.shape)
            return
        if out is None:
            out = torch.empty(o.shape, dtype=TORCH[o.dtype])
        elements(out, fit.canonical).copy_(elements(held.contiguous(), fit.source))
    if out is not None:
        yield out


def elements(t: Tensor, box: Box) -> Tensor:
    """A view of the elements of `box` of a contiguous tensor, every sub-axis an axis."""
    sizes, strides = box.flat()
    return torch.as_strided(t, sizes, strides, t.storage_offset() + box.offset)


def assembled(parts: Iterable[tuple[Tensor, Fit]], dtype: torch.dtype) -> Tensor:
    """A released tensor in `dtype`, put together of the canonical ones that hold parts of it; there is at least one."""
    out = None
    for held, fit in parts:
        out = torch.empty(fit.shape, dtype=dtype) if out is None else out
        elements(out, fit.source).copy_(elements(held, fit.canonical))
    assert out is not None
    return out


# ---------------------------------------------------------------------------------------------------
# Ranks


def _is_sharded(t: Any) -> bool:
    return isinstance(t, Tensor) and hasattr(t, "full_tensor")


class _Alone:
    """One process that has everything."""

    writes = True

    def whole(self, t: Tensor) -> Tensor | None:
        """The tensor, on the CPU."""
        return t.detach().cpu()

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """What is raised in here is raised on all ranks."""
        yield


class _Together(_Alone):
    """All ranks of the default group, each of which has its shards; the first writes."""

    def __init__(self) -> None:
        self.writes = torch.distributed.get_rank() == 0

    def whole(self, t: Tensor) -> Tensor | None:
        gather = getattr(t, "full_tensor", None)
        full: Tensor = t if gather is None else gather()
        return full.detach().cpu() if self.writes else None

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        raised: BaseException | None = None
        try:
            yield
        except (ZooError, OSError) as e:
            raised = e
        said = first_said(None if raised is None else str(raised))
        if raised is not None:
            raise raised
        if said is not None:
            raise ZooError(said)
