"""Our side of a comparison: the reference decoder, run one layer at a time beside an oracle.

Two residencies: the whole model, or (`Streamed`) one layer, whose tensors are mapped one by one and let go
with it. Stacked experts stay as stored and mapped, and are cast when used: an expert that no token is routed
to is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.formats import canonical
from zoo.formats.base import TensorRef
from zoo.kernels.route import SCORES, route, route_reference
from zoo.layout import layout
from zoo.model import Decoder
from zoo.model.linear import Stacked, Weights
from zoo.model.load import DTYPES as TORCH
from zoo.model.load import Source, kept, kept_by, refuse_quantised
from zoo.model.moe import Router
from zoo.model.upload import Upload
from zoo.quant import dequantise, looked_up
from zoo.quant.blocks import is_one
from zoo.quant.schemes import scheme
from zoo.spec import CompressedAttention, LatentAttention, Spec
from zoo.spec import Router as RouterSpec
from zoo.verify.faults import Subject
from zoo.verify.reading import Range, Window, mapped


class Ours:
    """A decoder that several batches go through, each at its own layer."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.spec = decoder.spec
        self.gaps: dict[
            int, list[Tensor]
        ] = {}  # batch -> per MoE layer so far, the router's margin per token
        self.state: dict[int, tuple[Tensor, Any]] = {}
        self.entered: dict[int, Tensor] = {}  # batch -> the state before the last layer
        self.done: dict[int, int] = {}  # batch -> layers it has been through
        self.visited: dict[int, Tensor] = {}  # layer -> which experts a token was routed to [E]

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def begin(self, b: int, ids: Tensor) -> None:
        with torch.inference_mode():
            self.state[b] = self.decoder.start(ids.to(self.device))
        self.gaps[b] = []
        self.done[b] = 0

    def layer(self, b: int, i: int) -> Tensor:
        """Batch `b` through layer `i`: the hidden state after it."""
        x, ctx = self.state[b]
        self.entered[b] = x
        y = self._through(i, x, ctx, self._watch(b, i))
        self.state[b] = y, ctx
        self.done[b] = i + 1
        return y

    def layer_otherwise(self, b: int, i: int) -> Tensor:
        """The state after layer `i`, just run, had every token's nearest tie between experts gone the other way."""

        def hook(router: Router, args: tuple[Tensor, Tensor | None], out: Any) -> Any:
            return other_choice(router, args[0]) if router.spec.by_token is None else out

        return self._through(i, self.entered[b], self.state[b][1], hook)

    def has_experts(self, i: int) -> bool:
        ffn = self.spec.layers[i].ffn
        return ffn is not None and ffn.kind == "moe"

    @property
    def chooses(self) -> bool:
        """Whether tokens choose experts or keys: where two are alike, rounding decides."""
        mixers = (layer.mixer for layer in self.spec.layers)
        sparse = any(
            isinstance(m, LatentAttention | CompressedAttention) and m.indexer is not None for m in mixers
        )
        return sparse or any(self.has_experts(i) for i in range(self.spec.n_layers))

    def choose(self, b: int, y: Tensor) -> None:
        """Go on from the state `y` after the last layer."""
        self.state[b] = y, self.state[b][1]

    def _through(self, i: int, x: Tensor, ctx: Any, on_router: Callable[..., Any]) -> Tensor:
        layer = self.resident(i)
        router = next((m for m in layer.modules() if isinstance(m, Router)), None)
        handle = router.register_forward_hook(on_router) if router is not None else None
        try:
            with torch.inference_mode():
                y: Tensor = layer(x, ctx)
        finally:
            if handle is not None:
                handle.remove()
        return y

    def finish(self, b: int) -> Tensor:
        """Logits [B, T, V] of batch `b`, after the layers it has not been through; it is then forgotten."""
        for i in range(self.done[b], self.spec.n_layers):
            self.layer(b, i)
        x, ctx = self.state.pop(b)
        self.entered.pop(b, None)
        with torch.inference_mode():
            logits: Tensor = self.decoder.finish(x, ctx)
        return logits

    def run(self, ids: Tensor, on_layer: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Logits of a batch, all layers at once."""
        self.begin(-1, ids)
        if on_layer is not None:
            for i in range(self.spec.n_layers):
                on_layer(i, self.layer(-1, i))
        return self.finish(-1)

    def resident(self, i: int) -> nn.Module:
        return self.decoder.layers[i]

    def margins(self, b: int) -> Tensor | None:
        """[N, n MoE layers]: by how much each token's chosen experts beat the best one left out, relative to
        the spread of the scores; None without experts."""
        gaps = self.gaps.pop(b, [])
        return torch.stack(gaps, -1) if gaps else None

    def idle_experts(self) -> tuple[int, int]:
        """How many experts, of all layers together, no token was routed to so far; and how many there are."""
        return sum(int((~v).sum()) for v in self.visited.values()), sum(len(v) for v in self.visited.values())

    def _watch(self, b: int, i: int) -> Callable[..., None]:
        def hook(router: Router, args: tuple[Tensor, Any], out: tuple[Tensor, Tensor]) -> None:
            self.gaps[b].append(margin(router, args[0]))
            seen = torch.zeros(len(router.weight), dtype=torch.bool, device=out[0].device)
            seen[out[0].flatten().long()] = True
            self.has_visited({i: seen})

        return hook

    def has_visited(self, seen: Mapping[int, Tensor]) -> None:
        """Of layers, which experts some token was routed to [E]."""
        for i, which in seen.items():
            here = which.to(self.device)
            self.visited[i] = self.visited[i] | here if i in self.visited else here


def margin(router: Router, x: Tensor) -> Tensor:
    """x [N, D] -> [N]: (score of the last chosen - score of the first not chosen) / spread of the scores."""
    return nearest_tie(router, x)[0]


def nearest_tie(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, D] -> the `margin` [N] of the choice of experts, or of groups of them, that hangs by least; and what would have
    to be added to the scores [N, E] for it to go the other way."""
    r = router.spec
    scores = nn.functional.linear(
        router.read(x).float(), router.dense(torch.float32), router.offset(torch.float32)
    )
    if r.over == "all":
        scores = SCORES[r.score](scores)
    if r.by_token is not None:  # nothing is chosen
        return scores.new_full((len(x),), torch.inf), torch.zeros_like(scores)
    if router.selection_bias is not None:
        scores = scores + router.selection_bias
    unit = scores.std(-1).clamp(min=1e-12)
    least = 1e-6 * scores.abs().amax(-1)  # that every score shows
    gap, nudge = scores.new_full((len(x),), torch.inf), torch.zeros_like(scores)
    if r.over == "near":
        for step, expert in _near_ties(scores, r):
            apart = step.abs() / unit[:, None]
            other = torch.zeros_like(scores).scatter(-1, expert, 2 * step + least[:, None].copysign(step))
            nudge = torch.where(apart < gap[:, None], other, nudge)
            gap = torch.minimum(gap, apart.squeeze(-1))
        return gap, nudge
    if r.top_groups < r.n_groups:
        groups = scores.unflatten(-1, (r.n_groups, -1))
        best = groups.topk(min(r.group_top, groups.shape[-1]), -1).values.sum(-1)
        edge = best.topk(r.top_groups + 1, -1)
        apart = edge.values[:, -2] - edge.values[:, -1]
        gap = apart / unit
        group = torch.zeros_like(best).scatter(-1, edge.indices[:, -1:], (2 * apart + least)[:, None])
        nudge = group.repeat_interleave(groups.shape[-1], -1)
        left_out = torch.ones_like(best, dtype=torch.bool).scatter(-1, edge.indices[:, :-1], False)
        scores = groups.masked_fill(left_out[..., None], -torch.inf).flatten(-2)
    if r.top_k < scores.shape[-1]:
        edge = scores.topk(r.top_k + 1, -1)
        apart = edge.values[:, -2] - edge.values[:, -1]  # infinite where no expert is left out of the groups
        expert = torch.zeros_like(nudge).scatter(-1, edge.indices[:, -1:], (2 * apart + least)[:, None])
        nudge = torch.where((apart / unit < gap)[:, None], expert, nudge)
        gap = torch.minimum(gap, apart / unit)
    return gap, nudge


def _near_ties(scores: Tensor, r: RouterSpec) -> Iterator[tuple[Tensor, Tensor]]:
    """For each expert that is chosen, by how much [N, 1] a score would have to move for another to be chosen in its place
    or to be near it where it is not (or the other way round), and whose score that is [N, 1]: the one with the least to go."""
    left = scores
    for _ in range(r.top_k):
        best, expert = left.max(-1, keepdim=True)
        left = left.scatter(-1, expert, -torch.inf)
        to_win, to_edge = best - left, best - r.near * torch.maximum(scores.abs(), best) - left
        way = torch.where(to_edge.abs() < to_win, to_edge, to_win)
        nearest = way.abs().argmin(-1, keepdim=True)
        yield way.gather(-1, nearest), nearest


def other_choice(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the router gives for x [N, D] where every token's nearest tie goes the other way."""
    _, nudge = nearest_tie(router, x)
    logits = router.logits(x)
    if router.spec.over != "all":  # by logits alone; what a near tie moves them by is within rounding
        chosen, weights = route(logits + nudge.to(logits.dtype), None, router.spec, router.weights_dtype(x))
        return chosen, router.scaled(weights, chosen)
    bias = nudge if router.selection_bias is None else nudge + router.selection_bias
    chosen, weights = route_reference(logits, bias, router.spec)
    return chosen, router.scaled(weights, chosen)


class Streamed(Ours):
    """One layer resident at a time, from the files of a canonical folder. Of the embedding only the rows that
    are asked for are read; the head is a layer of its own."""

    def __init__(
        self,
        folder: canonical.Canonical,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        window: Window | None = None,
    ) -> None:
        """`window`: what upstream is read through, if it goes through its layers beside ours."""
        super().__init__(Decoder(folder.spec))
        self.source, self.dtype, self._device = MappedOneByOne(folder, window), dtype, torch.device(device)
        self.current: int | None = None
        self.waiting: set[int] = set()
        refuse_quantised(folder.quant, self.decoder, where=folder.root)  # not all of it is filled by `Source`
        for name, module in self.decoder.named_children():
            if name not in ("layers", "embed", "head"):
                self.source.fill(module, name, device, dtype)

    @property
    def device(self) -> torch.device:
        return self._device

    def begin(self, b: int, ids: Tensor) -> None:
        rows, ids = used_rows(
            self.spec, self._table(), self.source.folder.quant.get("embed"), ids, self.dtype
        )
        self._set_embedding(rows.to(self.device, self.dtype))
        super().begin(b, ids)
        self._set_embedding(torch.empty(0, self.spec.d_model, dtype=self.dtype))
        self.waiting.add(b)

    def finish(self, b: int) -> Tensor:
        self.release()
        if self.spec.tied and not len(self.decoder.embed.weight):
            whole = whole_table(self._table(), self.source.folder.quant.get("embed"), self.dtype)
            self._set_embedding(whole.to(self.device, self.dtype))
        elif not self.spec.tied and self.decoder.head.weight.is_meta:
            self.source.fill(self.decoder.head, "head", self.device, self.dtype)
        logits = super().finish(b)
        self.waiting.discard(b)
        if not self.waiting:
            self._set_embedding(torch.empty(0, self.spec.d_model, dtype=self.dtype))
            if not self.spec.tied:
                self.decoder.head.to("meta")
        return logits

    def ranges(self, layer: int) -> Iterator[Range]:
        """What a pass will read of a layer: not stacked experts, of which perhaps only some are run."""
        for name, ref in self.source.folder.tensors.items():
            if name.startswith(f"layers.{layer}.") and len(ref.shape) < 3:
                yield self.source.folder.path(ref), ref.offset, ref.nbytes

    def computes_with(self, layer: int | None) -> Iterator[Range]:
        """All of a layer, or the head."""
        starts = f"layers.{layer}." if layer is not None else "embed." if self.spec.tied else "head."
        for name, ref in self.source.folder.tensors.items():
            if name.startswith(starts):
                yield self.source.folder.path(ref), ref.offset, ref.nbytes

    def leave(self, layer: int | None) -> None:
        self.release()

    def _table(self) -> dict[str, Tensor]:
        """The embedding [V, D], or what it is quantised as, mapped."""
        parts = (
            (n.removeprefix("embed."), ref)
            for n, ref in self.source.folder.tensors.items()
            if n.startswith("embed.")
        )
        return {n: self.source.tensor(ref) for n, ref in parts}

    def _set_embedding(self, rows: Tensor) -> None:
        self.decoder.embed.weight = nn.Parameter(rows, requires_grad=False)

    def resident(self, i: int) -> nn.Module:
        if self.current != i:
            self.release()
            layer = self.decoder.layers[i]
            self.source.fill(layer, f"layers.{i}", self.device)
            for m in layer.modules():
                if not isinstance(m, Stacked):
                    _cast(m, self.dtype)
            self.current = i
        return self.decoder.layers[i]

    def release(self) -> None:
        """Let go of the resident layer."""
        if self.current is not None:
            with torch.device("meta"):
                fresh = type(self.decoder.layers[self.current])(self.spec, self.current)
            self.decoder.layers[self.current] = fresh
            self.current = None


def _cast(m: nn.Module, dtype: torch.dtype) -> None:
    if isinstance(m, Weights) and m.scheme is not None:
        return
    for name, p in list(m.named_parameters(recurse=False)):
        if p.is_floating_point() and name not in kept_by(m):
            setattr(m, name, nn.Parameter(p.to(dtype), requires_grad=False))


class MappedOneByOne(Source):
    """As `Source`, but each tensor has a map of its own, gone with the tensor (or the `window`, if any, with its layer):
    neither memory nor address space grows with the checkpoint."""

    def __init__(self, folder: canonical.Canonical, window: Window | None = None) -> None:
        super().__init__(folder)
        self.window = window

    def tensor(self, ref: TensorRef) -> Tensor:
        return mapped(self.folder.path(ref), ref, self.window)


def whole_table(table: Mapping[str, Tensor], how: str | None, dtype: torch.dtype) -> Tensor:
    """All rows, as `used_rows`."""
    weight = table["weight"]
    return weight if how is None else dequantise(how, dict(table), (len(weight),), dtype)


def used_rows(
    spec: Spec, table: Mapping[str, Tensor], how: str | None, ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The embedding's rows of these ids, and the ids renumbered to fit; all of it where another table has the same ids. `table`: its
    tensors, of the scheme `how`; from codes rows become `dtype`."""
    if spec.per_layer_embedding is not None or spec.reads_ids:
        return whole_table(table, how, dtype), ids
    used, ids = ids.unique(return_inverse=True)
    return table["weight"][used] if how is None else looked_up(how, dict(table), used, dtype), ids


def subject_of(
    folder: canonical.Canonical,
    dtype: torch.dtype,
    wanted: Callable[[str], bool] | None = None,
    device: str | torch.device = "cpu",
) -> Subject:
    """The canonical tensors in memory, on `device` and in the dtype they are computed in, the embedding dequantised: what faults are
    injected into. Or those `wanted` only, by name: then the embedding, and (on the CPU) what is stacked, stay as stored and mapped."""
    stay = kept(Decoder(folder.spec))
    partial, on_gpu = wanted is not None, torch.device(device).type == "cuda"
    tensors = {}
    with Upload(device) if on_gpu and not partial else nullcontext() as upload:
        source = MappedOneByOne(folder) if partial else Source(folder, upload)
        for name, ref in folder.tensors.items():
            if wanted is not None and not wanted(name):
                continue
            quantised = name.rsplit(".", 1)[0] in folder.quant and not name.endswith(".bias")
            cast = TORCH[ref.dtype].is_floating_point and not quantised and name not in stay
            if partial and (name.startswith("embed.") or (len(ref.shape) > 2 and not on_gpu)):
                tensors[name] = source.tensor(ref)
            else:
                tensors[name] = source.on(device, ref, dtype if cast else None)
    made = Subject(folder.spec, tensors, dict(folder.quant), partial=partial)
    if not partial and "embed" in folder.quant:
        table, how = table_of(made)
        made = with_embedding(made, whole_table(table, how, dtype))
    return made


def in_numbers(subject: Subject, dtype: torch.dtype) -> Subject:
    """With the numbers of `dtype` in place of ggml's blocks: mistakes are made with rows and columns of those."""
    tensors, quant = dict(subject.tensors), dict(subject.quant)
    for slot, how in subject.quant.items():
        if not is_one(scheme(how)):
            continue
        del quant[slot]
        stored = {c.name: tensors.pop(f"{slot}.{c.name}", None) for c in scheme(how).components}
        parts = {name: t for name, t in stored.items() if t is not None}
        if parts:  # of a layer that is looked at
            rows = layout(subject.spec)[f"{slot}.weight"].parts
            tensors[f"{slot}.weight"] = dequantise(how, parts, rows, dtype)
    return replace(subject, tensors=tensors, quant=quant)


def table_of(subject: Subject) -> tuple[dict[str, Tensor], str | None]:
    """The embedding's tensors, and what they are quantised as."""
    own = {n.removeprefix("embed."): t for n, t in subject.tensors.items() if n.startswith("embed.")}
    return own, subject.quant.get("embed")


def with_embedding(subject: Subject, rows: Tensor) -> Subject:
    """With these numbers for an embedding."""
    others = {n: t for n, t in subject.tensors.items() if not n.startswith("embed.")}
    quant = {n: how for n, how in subject.quant.items() if n != "embed"}
    return replace(subject, tensors={**others, "embed.weight": rows}, quant=quant)


def build(subject: Subject) -> Decoder:
    """A decoder of tensors in memory."""
    model = Decoder(subject.spec)
    refuse_quantised(subject.quant, model)
    for name, m in model.named_modules():
        if isinstance(m, Weights) and name in subject.quant:
            names = {c.name: f"{name}.{c.name}" for c in scheme(subject.quant[name]).components}
            own = {part: subject.tensors[n] for part, n in names.items() if n in subject.tensors}
            if own or not subject.partial:
                m.quantise(subject.quant[name], own)
    for name, _ in list(model.named_parameters()):
        if subject.partial and name not in subject.tensors:
            continue
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(subject.tensors[name], requires_grad=False))
    if subject.patch is not None:
        subject.patch(model)
    return model
