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

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.layout import Slot, layout
from zoo.model import Decoder
from zoo.model.moe import Router as RouterModule
from zoo.model.moe import route
from zoo.spec import MLP, Attention, DeltaNet, LatentAttention, Layer, Mamba, MoE, Norm, Rope, Router, Spec

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A model to be: what a decoder is built from. Changes make a new one; no tensor is changed in place."""

    spec: Spec
    tensors: Tensors
    quant: Mapping[str, str] = dataclasses.field(default_factory=dict)
    patch: Callable[[Decoder], None] | None = None  # for a mistake that neither can express

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

    def applies(self, spec: Spec) -> bool:
        return bool(self.sites(spec))

    def inject(self, subject: Subject, site: str | None = None) -> Subject:
        """The subject with this fault, at `site` or at the middle one."""
        sites = self.sites(subject.spec)
        return self.apply(subject, site or sites[len(sites) // 2])


CATALOGUE: dict[str, Fault] = {}


def _add(
    name: str, what: str, kind: Literal["weights", "spec"], sites: Sites, apply: Apply, undo: Apply | Literal["again"] | None = None
) -> None:
    assert name not in CATALOGUE
    CATALOGUE[name] = Fault(name, what, kind, sites, apply, apply if undo == "again" else undo)


def applicable(spec: Spec, quant: Mapping[str, str] | None = None) -> list[Fault]:
    """The faults that apply to a Spec; those in scales only if something is quantised."""
    return [f for f in CATALOGUE.values() if f.applies(spec) and (quant or not f.name.startswith("scale_"))]


# ---------------------------------------------------------------------------------------------------
# Helpers for weights


def _slots(suffix: str, when: Callable[[Spec, Slot], bool] = lambda _s, _t: True) -> Sites:
    """Sites: slots whose name ends so."""

    def sites(spec: Spec) -> list[str]:
        return [s.name for s in layout(spec).values() if s.name.endswith(suffix) and when(spec, s)]

    return sites


def _mixer(spec: Spec, slot: Slot | str) -> Any:
    s = layout(spec)[slot] if isinstance(slot, str) else slot
    return None if s.layer is None else spec.layers[s.layer].mixer


def _edit(change: Callable[[Tensor, Spec, Slot], Tensor]) -> Apply:
    """Replace the site's tensor by `change(tensor, spec, slot)`."""

    def apply(s: Subject, site: str) -> Subject:
        new = change(s.tensors[site], s.spec, layout(s.spec)[site])
        return s.put({site: new.contiguous()})

    return apply


def _swap_parts(a: int, b: int) -> Callable[[Tensor, Spec, Slot], Tensor]:
    def change(t: Tensor, _spec: Spec, slot: Slot) -> Tensor:
        axis = int(slot.stacked)
        pieces = list(t.split(_rows(t, slot), axis))
        pieces[a], pieces[b] = pieces[b], pieces[a]
        return torch.cat(pieces, axis)

    return change


def _rows(t: Tensor, slot: Slot) -> list[int]:
    """Part sizes along the tensor's own output axis (codes of a quantised slot keep the row count)."""
    return list(slot.parts)


def _part(i: int, change: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Spec, Slot], Tensor]:
    """Change one fused part only; `change` gets the part and the layer's mixer."""

    def whole(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
        axis = int(slot.stacked)
        pieces = list(t.split(_rows(t, slot), axis))
        pieces[i] = change(pieces[i], _mixer(spec, slot))
        return torch.cat(pieces, axis)

    return whole


def _interleave(t: Tensor, heads: int) -> Tensor:
    """Rows of each head from half order (first members, then second) to pair order."""
    return t.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(t.shape)


def _deinterleave(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(t.shape)


def _rotated(spec: Spec, slot: Slot) -> bool:
    m = _mixer(spec, slot)
    return isinstance(m, Attention) and m.rope is not None and m.rope.dim == m.head_dim > 2


def _q_and_k(change: Callable[[Tensor, int], Tensor], q: bool = True, k: bool = True) -> Apply:
    """Change the rows of q and of k, in the weight and in the bias if there is one."""

    def apply(s: Subject, site: str) -> Subject:
        m = _mixer(s.spec, site)
        new: Tensors = {}
        for name in (site, site.removesuffix("weight") + "bias"):
            if name in s.tensors and name in layout(s.spec):
                parts = list(s.tensors[name].split(list(layout(s.spec)[name].parts)))
                if q:
                    parts[0] = change(parts[0], m.n_heads)
                if k and m.kv_from is None:
                    parts[-2] = change(parts[-2], m.n_kv_heads)
                new[name] = torch.cat(parts)
        return s.put(new)

    return apply


def _names(spec: Spec, layer: int) -> list[str]:
    return [s.name for s in layout(spec).values() if s.layer == layer]


def _pairs_of_layers(spec: Spec) -> list[str]:
    """Layers i whose next layer of the same shapes is j: "i j"."""
    shapes: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for s in layout(spec).values():
        if s.layer is not None:
            shapes.setdefault(s.layer, []).append((s.key, s.shape))
    out = []
    for i in shapes:
        j = next((j for j in range(i + 1, spec.n_layers) if shapes.get(j) == shapes[i]), None)
        if j is not None:
            out.append(f"{i} {j}")
    return out


def _components(s: Subject, slot: str) -> list[str]:
    base = slot.removesuffix(".weight")
    return [n for n in s.tensors if n == slot or (base in s.quant and n.rsplit(".", 1)[0] == base)]


def _layer_pair(both: bool) -> Apply:
    def apply(s: Subject, site: str) -> Subject:
        i, j = site.split()
        new: Tensors = {}
        for name in [n for slot in _names(s.spec, int(i)) for n in _components(s, slot)]:
            other = f"layers.{j}." + name.split(".", 2)[2]
            new[other] = s.tensors[name]
            if both:
                new[name] = s.tensors[other]
        return s.put(new)

    return apply


def _transposed(t: Tensor, _spec: Spec, _slot: Slot) -> Tensor:
    """The bytes of the [in, out] matrix read as [out, in]."""
    return t.transpose(-1, -2).reshape(t.shape)


def _untransposed(t: Tensor, _spec: Spec, _slot: Slot) -> Tensor:
    return t.reshape(*t.shape[:-2], t.shape[-1], t.shape[-2]).transpose(-1, -2)


def _zero_row(t: Tensor, _spec: Spec, _slot: Slot) -> Tensor:
    t = t.clone()
    t[..., t.shape[-2] // 2, :] = 0
    return t


def _one_element(t: Tensor, _spec: Spec, _slot: Slot) -> Tensor:
    t = t.clone()
    flat = t.view(-1)
    flat[int(flat.float().abs().argmax())] *= -1
    return t


def _truncate(t: Tensor, _spec: Spec, _slot: Slot) -> Tensor:
    """To bf16 by dropping bits instead of rounding, and back."""
    return (t.float().view(torch.int32) & ~0xFFFF).view(torch.float32).to(t.dtype)


def _zeros(t: Tensor, _spec: Spec, _slot: Slot) -> Tensor:
    return torch.zeros_like(t)


def _roll(t: Tensor, _spec: Spec, _slot: Slot) -> Tensor:
    return t.roll(1, 0)


def _roll_back(t: Tensor, _spec: Spec, _slot: Slot) -> Tensor:
    return t.roll(-1, 0)


def _is_dense(spec: Spec, slot: Slot) -> bool:
    return len(slot.shape) == 2


def _head_slots(spec: Spec) -> list[str]:
    return ["head.weight"] if spec.tied else []


# ---------------------------------------------------------------------------------------------------
# Mistakes in weights: attention

_QKV = "attn.qkv.weight"
_add("q_k_swapped", "q and k exchanged in the fused matrix", "weights",
     _slots(_QKV, lambda _s, t: len(t.parts) == 3 and t.parts[0] == t.parts[1]), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
_add("k_v_swapped", "k and v exchanged in the fused matrix", "weights",
     _slots(_QKV, lambda _s, t: len(t.parts) >= 3 and t.parts[-2] == t.parts[-1]), _edit(_swap_parts(-2, -1)), "again")  # fmt: skip
_add("q_gate_swapped", "query and output gate exchanged", "weights",
     _slots(_QKV, lambda s, t: bool(_mixer(s, t).gate) and t.parts[0] == t.parts[1]), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
_add("rope_rows_interleaved", "rows of q and k in interleaved RoPE order", "weights",
     _slots(_QKV, _rotated), _q_and_k(_interleave), _q_and_k(_deinterleave))  # fmt: skip
_add("rope_rows_deinterleaved", "rows of q and k put in half order although they were", "weights",
     _slots(_QKV, _rotated), _q_and_k(_deinterleave), _q_and_k(_interleave))  # fmt: skip
_add("rope_rows_of_k_only", "rows of k alone in interleaved RoPE order", "weights",
     _slots(_QKV, lambda s, t: _rotated(s, t) and _mixer(s, t).kv_from is None), _q_and_k(_interleave, q=False), _q_and_k(_deinterleave, q=False))  # fmt: skip


def _grouped(spec: Spec, slot: Slot) -> bool:
    m = _mixer(spec, slot)
    return isinstance(m, Attention) and m.n_kv_heads > 1 and m.n_heads > m.n_kv_heads


def _tile(t: Tensor, m: Any) -> Tensor:
    return t.unflatten(0, (m.n_kv_heads, m.n_heads // m.n_kv_heads, -1)).transpose(0, 1).reshape(t.shape)


def _untile(t: Tensor, m: Any) -> Tensor:
    return t.unflatten(0, (m.n_heads // m.n_kv_heads, m.n_kv_heads, -1)).transpose(0, 1).reshape(t.shape)


_add("kv_heads_tiled", "key heads tiled over query heads (0 1 0 1) instead of repeated (0 0 1 1)", "weights",
     _slots(_QKV, _grouped), _edit(_part(0, _tile)), _edit(_part(0, _untile)))  # fmt: skip


def _two_heads(t: Tensor, m: Any) -> Tensor:
    d = t.shape[0] // m.n_heads
    return torch.cat([t[-d:], t[d:-d], t[:d]])


_add("two_heads_swapped", "first and last query head exchanged", "weights",
     _slots(_QKV, lambda s, t: _mixer(s, t).n_heads > 1), _edit(_part(0, _two_heads)), "again")  # fmt: skip
_add("shards_out_of_order", "tensor-parallel shards joined in the wrong order", "weights",
     _slots("attn.out.weight", lambda _s, t: t.shape[1] % 2 == 0), _edit(lambda t, _s, _t: torch.cat(t.chunk(2, 1)[::-1], 1)), "again")  # fmt: skip
_add("sinks_zeroed", "attention sinks left at 0", "weights", _slots("attn.sinks"), _edit(_zeros))


def _norms_do_not_commute(spec: Spec, slot: Slot) -> bool:
    m = _mixer(spec, slot)
    q = f"layers.{slot.layer}.attn.q_norm.weight"
    same = q in layout(spec) and layout(spec)[q].shape == slot.shape
    return same and isinstance(m, Attention) and m.rope is not None


def _swap_qk_norm(s: Subject, site: str) -> Subject:
    q = site.replace("k_norm", "q_norm")
    return s.put({site: s.tensors[q], q: s.tensors[site]})


_add("q_norm_k_norm_swapped", "q_norm and k_norm exchanged", "weights",
     _slots("attn.k_norm.weight", _norms_do_not_commute), _swap_qk_norm, "again")  # fmt: skip

# Latent attention


def _latent(spec: Spec, slot: Slot) -> bool:
    return isinstance(_mixer(spec, slot), LatentAttention)


def _q_rope_first(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    m = _mixer(spec, slot)
    return t.unflatten(0, (m.n_heads, m.nope_dim + m.rope_dim)).roll(m.rope_dim, 1).reshape(t.shape)


def _kv_value_first(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    m = _mixer(spec, slot)
    return t.unflatten(0, (m.n_heads, m.nope_dim + m.v_head_dim)).roll(m.v_head_dim, 1).reshape(t.shape)


def _kv_not_per_head(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    m = _mixer(spec, slot)
    rows = t.unflatten(0, (m.n_heads, m.nope_dim + m.v_head_dim))
    return torch.cat([rows[:, : m.nope_dim].flatten(0, 1), rows[:, m.nope_dim :].flatten(0, 1)])


def _q_rope_last(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    m = _mixer(spec, slot)
    return t.unflatten(0, (m.n_heads, m.nope_dim + m.rope_dim)).roll(-m.rope_dim, 1).reshape(t.shape)


def _kv_value_last(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    m = _mixer(spec, slot)
    return t.unflatten(0, (m.n_heads, m.nope_dim + m.v_head_dim)).roll(-m.v_head_dim, 1).reshape(t.shape)


def _kv_per_head(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    m = _mixer(spec, slot)
    k, v = t.split([m.n_heads * m.nope_dim, m.n_heads * m.v_head_dim])
    return torch.cat([k.unflatten(0, (m.n_heads, -1)), v.unflatten(0, (m.n_heads, -1))], 1).flatten(0, 1)


def _rope_parts(order: Callable[[Tensor, int], Tensor]) -> Apply:
    """The rotary rows of q (of each head) and of the one key all heads share."""

    def apply(s: Subject, site: str) -> Subject:
        m = _mixer(s.spec, site)
        rows = s.tensors[site].unflatten(0, (m.n_heads, m.nope_dim + m.rope_dim))  # [H, nope + rope, in]
        nope, rope = rows.split([m.nope_dim, m.rope_dim], 1)
        rope = order(rope.flatten(0, 1), m.n_heads).view_as(rope)
        kv = site.rsplit("attn.", 1)[0] + "attn.kv_down.weight"
        latent, key = s.tensors[kv].split([m.kv_rank, m.rope_dim])
        return s.put({site: torch.cat([nope, rope], 1).flatten(0, 1), kv: torch.cat([latent, order(key, 1)])})

    return apply


def _latent_q(when: Callable[[Spec, Slot], bool]) -> Sites:
    def sites(spec: Spec) -> list[str]:
        names = _slots("attn.q_up.weight", when)(spec)
        return names or _slots("attn.q.weight", when)(spec)

    return sites


_add("latent_q_rope_first", "rotary channels of q before the others", "weights", _latent_q(_latent), _edit(_q_rope_first), _edit(_q_rope_last))
_add("latent_v_before_k", "values before keys in each head of kv_up", "weights",
     _slots("attn.kv_up.weight"), _edit(_kv_value_first), _edit(_kv_value_last))  # fmt: skip
_add("latent_kv_not_per_head", "kv_up read as all keys, then all values", "weights",
     _slots("attn.kv_up.weight", lambda s, t: _mixer(s, t).n_heads > 1), _edit(_kv_not_per_head), _edit(_kv_per_head))  # fmt: skip
_add("latent_rope_interleaved", "rotary channels of q and k in the other RoPE order", "weights",
     _latent_q(lambda s, t: _latent(s, t) and _mixer(s, t).rope is not None and _mixer(s, t).rope_dim > 2),
     _rope_parts(_interleave), _rope_parts(_deinterleave))  # fmt: skip
_add("indexer_weights_zeroed", "the sparse indexer's head weights lost", "weights",
     _slots("attn.indexer.head_weights.weight"), _edit(_zeros))  # fmt: skip

# Feed-forward and experts

_GATED = "gate_up.weight"
_add("gate_up_swapped", "gate and up exchanged", "weights",
     _slots("mlp." + _GATED), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
_add("expert_gate_up_swapped", "gate and up of the experts exchanged", "weights",
     _slots("moe." + _GATED), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
_add("shared_gate_up_swapped", "gate and up of the shared expert exchanged", "weights",
     _slots("moe.shared." + _GATED), _edit(_swap_parts(0, 1)), "again")  # fmt: skip


def _interleaved_gate(t: Tensor, _spec: Spec, slot: Slot) -> Tensor:
    axis = int(slot.stacked)
    return t.unflatten(axis, (2, -1)).transpose(axis, axis + 1).reshape(t.shape)


def _deinterleaved_gate(t: Tensor, _spec: Spec, slot: Slot) -> Tensor:
    axis = int(slot.stacked)
    return t.unflatten(axis, (-1, 2)).transpose(axis, axis + 1).reshape(t.shape)


_add("gate_up_interleaved", "gate and up rows alternating instead of one after the other", "weights",
     lambda spec: _slots("mlp." + _GATED)(spec) or _slots("moe." + _GATED)(spec), _edit(_interleaved_gate), _edit(_deinterleaved_gate))  # fmt: skip


def _first_and_last(s: Subject, site: str) -> Subject:
    """Two experts exchanged in both of their matrices, their router rows left."""
    base = site.rsplit(".", 2)[0]
    new: Tensors = {}
    for name, t in s.tensors.items():
        slot = layout(s.spec).get(name)
        if name.startswith(base + ".") and slot is not None and slot.stacked:
            new[name] = torch.cat([t[-1:], t[1:-1], t[:1]])
    return s.put(new)


def _roll_experts(s: Subject, site: str) -> Subject:
    return s.put({site: s.tensors[site].roll(1, 0)})


_EXPERTS = _slots("moe.down.weight", lambda _s, t: t.shape[0] > 1)
_add("expert_misplaced", "two experts exchanged", "weights", _EXPERTS, _first_and_last, "again")
_add("experts_off_by_one", "down matrices of the experts shifted by one expert", "weights", _EXPERTS, _roll_experts, _edit(_roll_back))


def _zero_expert(t: Tensor, _spec: Spec, _slot: Slot) -> Tensor:
    t = t.clone()
    t[t.shape[0] // 2] = 0
    return t


_add("expert_missing", "one expert never filled", "weights", _EXPERTS, _edit(_zero_expert))
_add("router_rows_shifted", "rows of the router shifted by one expert", "weights", _slots("moe.router.weight"), _edit(_roll), _edit(_roll_back))
_add("selection_bias_lost", "selection bias left at 0", "weights", _slots("moe.router.selection_bias"), _edit(_zeros))
_add("router_bias_lost", "router bias left at 0", "weights", _slots("moe.router.bias"), _edit(_zeros))
_add("shared_expert_lost", "shared expert left out", "weights", _slots("moe.shared.down.weight"), _edit(_zeros))
_add("shared_gate_lost", "gate of the shared expert left at 0", "weights", _slots("moe.shared_gate.weight"), _edit(_zeros))

# Anything

_add("matrix_transposed", "a matrix read as [in, out]", "weights",
     lambda spec: [s.name for s in layout(spec).values() if s.layer is not None and len(s.shape) == 2
                   and min(s.shape) > 1 and s.name.endswith((".out.weight", ".down.weight"))], _edit(_transposed), _edit(_untransposed))  # fmt: skip
_add("row_zeroed", "one row lost", "weights",
     lambda spec: [s.name for s in layout(spec).values() if s.layer is not None and _is_dense(spec, s)
                   and s.name.endswith((".out.weight", ".down.weight"))], _edit(_zero_row))  # fmt: skip
_add("element_corrupted", "one element of a file corrupted", "weights",
     lambda spec: [s.name for s in layout(spec).values() if s.layer is not None and _is_dense(spec, s)
                   and s.name.endswith((".out.weight", ".down.weight"))], _edit(_one_element))  # fmt: skip
_add("bf16_truncated", "fp32 cut to bf16 instead of rounded", "weights",
     lambda spec: [s.name for s in layout(spec).values() if s.layer is not None and _is_dense(spec, s)
                   and s.name.endswith((".out.weight", ".down.weight"))], _edit(_truncate))  # fmt: skip
_add("layer_duplicated", "a layer's weights used for the next layer too", "weights", _pairs_of_layers, _layer_pair(False))
_add("layers_swapped", "two layers exchanged", "weights", _pairs_of_layers, _layer_pair(True), "again")
_add("embedding_off_by_one", "rows of the embedding shifted by one id", "weights", _slots("embed.weight"), _edit(_roll), _edit(_roll_back))
_add("head_off_by_one", "rows of the head shifted by one id", "weights", _slots("head.weight"), _edit(_roll), _edit(_roll_back))
_add("positions_off_by_one", "rows of the position table shifted by one", "weights", _slots("positions.weight"), _edit(_roll), _edit(_roll_back))
_add("bias_lost", "a bias left at 0", "weights",
     lambda spec: [s.name for s in layout(spec).values() if s.layer is not None and not s.stacked
                   and s.name.endswith((".qkv.bias", ".out.bias", ".down.bias", ".up.bias", ".gate_up.bias"))], _edit(_zeros))  # fmt: skip
_add("expert_bias_lost", "a bias of the experts left at 0", "weights",
     lambda spec: [s.name for s in layout(spec).values() if s.stacked and s.name.endswith(".bias")], _edit(_zeros))  # fmt: skip


def _initial(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    """What a norm's weight starts from: 1, or 0 where it is stored minus one."""
    return torch.zeros_like(t) if any(n.weight == "plus_one" for n in _norms(spec)) else torch.ones_like(t)


def _norms(spec: Spec) -> list[Norm]:
    return [spec.norm, *(n for layer in spec.layers for n in (layer.attn_norm, layer.ffn_norm) if n is not None)]


def _layer_norms(spec: Spec) -> list[str]:
    return [s.name for s in layout(spec).values() if s.layer is not None and s.name.endswith("_norm.weight")]


def _swap_norms(s: Subject, site: str) -> Subject:
    other = site.replace("attn_norm", "ffn_norm")
    return s.put({site: s.tensors[other], other: s.tensors[site]})


def _swap_post_norms(s: Subject, site: str) -> Subject:
    other = site.replace("attn_post_norm", "ffn_post_norm")
    return s.put({site: s.tensors[other], other: s.tensors[site]})


def _has_pair(other: tuple[str, str]) -> Callable[[Spec, Slot], bool]:
    return lambda spec, slot: slot.name.replace(*other) in layout(spec)


_add("norm_stale", "a norm's weight left at its initial value", "weights", _layer_norms, _edit(_initial))
_add("final_norm_stale", "the final norm's weight left at its initial value", "weights",
     lambda spec: ["norm.weight"] if "norm.weight" in layout(spec) else [], _edit(_initial))  # fmt: skip
_add("norms_swapped", "the norms before attention and feed-forward exchanged", "weights",
     _slots(".attn_norm.weight", _has_pair(("attn_norm", "ffn_norm"))), _swap_norms, "again")  # fmt: skip
_add("post_norms_swapped", "the norms after attention and feed-forward exchanged", "weights",
     _slots(".attn_post_norm.weight", _has_pair(("attn_post_norm", "ffn_post_norm"))), _swap_post_norms, "again")  # fmt: skip
_add("pre_post_norms_swapped", "the norms before and after attention exchanged", "weights",
     _slots(".attn_post_norm.weight", _has_pair(("attn_post_norm", "attn_norm"))),
     lambda s, site: s.put({site: s.tensors[site.replace("post_norm", "norm")],
                            site.replace("post_norm", "norm"): s.tensors[site]}), "again")  # fmt: skip


def _stale_head(s: Subject, _site: str) -> Subject:
    """The head of a tied model kept from before: a shifted copy, now a tensor of its own."""
    head = s.tensors["embed.weight"]
    spec = replace(s.spec, tied=False)
    return replace(s, spec=spec, tensors={**s.tensors, "head.weight": head * 0.99})


_add("tied_head_stale", "a tied head loaded from a stale copy of its own", "weights", _head_slots, _stale_head)
_add("head_tied", "the embedding used as head although the head is its own", "spec",
     lambda spec: [] if spec.tied else ["head.weight"], lambda s, _: s.with_spec(replace(s.spec, tied=True)))  # fmt: skip

# Linear mixers

_add("conv_reversed", "the causal convolution's taps in reverse order", "weights",
     _slots("conv.weight", lambda _s, t: t.shape[-1] > 1), _edit(lambda t, _s, _t: t.flip(-1)), "again")  # fmt: skip
_add("conv_bias_lost", "the convolution's bias left at 0", "weights", _slots("conv.bias"), _edit(_zeros))
_add("decay_not_log", "A_log stored as A", "weights", _slots(".A_log"), _edit(lambda t, _s, _t: t.float().exp().to(t.dtype)), _edit(lambda t, _s, _t: t.float().log().to(t.dtype)))
_add("dt_bias_lost", "dt_bias left at 0", "weights", _slots(".dt_bias"), _edit(_zeros))
_add("skip_lost", "the state-space skip D left at 0", "weights", _slots("mamba.D"), _edit(_zeros))
_add("delta_v_z_swapped", "value and output gate of the delta rule exchanged", "weights",
     _slots("delta.qkvz.weight"), _edit(_swap_parts(2, 3)), "again")  # fmt: skip
_add("delta_q_k_swapped", "query and key of the delta rule exchanged", "weights",
     lambda spec: _slots("delta.qkvz.weight")(spec) + _slots("delta.qkv.weight")(spec), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
_add("delta_beta_decay_swapped", "beta and decay inputs of the delta rule exchanged", "weights",
     _slots("delta.ba.weight"), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
_add("mamba_z_x_swapped", "gate and input of the state space exchanged", "weights",
     _slots("mamba.in_proj.weight"), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
_add("mamba_b_c_swapped", "B and C of the state space exchanged", "weights",
     _slots("mamba.in_proj.weight"), _edit(_swap_parts(2, 3)), "again")  # fmt: skip

# Streams and per-layer inputs

_add("stream_coefficients_transposed", "prediction coefficients of the streams transposed", "weights",
     _slots("altup.predict.weight"),
     _edit(lambda t, _s, _t: t.unflatten(0, (t.shape[1], t.shape[1])).transpose(0, 1).reshape(t.shape)), "again")  # fmt: skip
_add("streams_swapped", "projections to the streams in another order", "weights",
     _slots("altup.expand.weight", lambda _s, t: t.shape[0] > 1), _edit(lambda t, _s, _t: t.flip(0)), "again")  # fmt: skip
_add("low_rank_residual_lost", "the low-rank residual left out", "weights", _slots("laurel.up.weight"), _edit(_zeros))
_add("per_layer_embedding_off_by_one", "per-layer embeddings shifted by one id", "weights",
     _slots("per_layer.embed.weight"), _edit(_roll), _edit(_roll_back))  # fmt: skip

# Quantised tensors: sites are found among the subject's own tensors


def _scales(s: Subject) -> list[str]:
    return sorted(n for n in s.tensors if n.endswith(".scale") and n.rsplit(".", 1)[0] in s.quant)


def _scale_block(s: Subject, _site: str) -> Subject:
    name = _scales(s)[len(_scales(s)) // 2]
    t = s.tensors[name]
    return s.put({name: t.view(-1).roll(1).view(t.shape) if t.numel() > 1 else t * 2})


def _scale_one(s: Subject, _site: str) -> Subject:
    name = _scales(s)[len(_scales(s)) // 2]
    t = s.tensors[name]
    return s.put({name: torch.full_like(t, 127) if t.dtype == torch.uint8 else torch.ones_like(t)})


def _scale_transposed(s: Subject, _site: str) -> Subject:
    name = _scales(s)[len(_scales(s)) // 2]
    t = s.tensors[name]
    return s.put({name: t.transpose(-1, -2).reshape(t.shape).contiguous() if t.ndim > 1 else t.flip(0)})


_add("scale_block_off", "scales shifted by one block", "weights", lambda _spec: ["*.scale"], _scale_block)
_add("scale_ignored", "scales ignored", "weights", lambda _spec: ["*.scale"], _scale_one)
_add("scale_transposed", "scales transposed", "weights", lambda _spec: ["*.scale"], _scale_transposed)

# ---------------------------------------------------------------------------------------------------
# Mistakes in the Spec


def _map(spec: Spec, change: Callable[[Any], Any]) -> Spec:
    """`spec` with `change` applied to every dataclass in it, from the inside out."""

    def walk(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(walk(v) for v in x)
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            new = {f.name: walk(getattr(x, f.name)) for f in dataclasses.fields(x) if f.name != "kind"}
            return change(replace(x, **new))
        return x

    done: Spec = walk(spec)
    return done


def _spec(
    name: str, what: str, kinds: type | tuple[type, ...], wrong: Callable[[Any], Any], undo: Callable[[Any], Any] | None = None
) -> None:
    """A mistake in every part of the Spec of this kind: `wrong(part)` gives the part as mistaken, or the
    same part where the mistake can't be made. Applies where it changes the Spec and fits the same layout."""

    def everywhere(spec: Spec, change: Callable[[Any], Any]) -> Spec:
        return _map(spec, lambda x: change(x) if isinstance(x, kinds) else x)

    def sites(spec: Spec) -> list[str]:
        new = everywhere(spec, wrong)
        return ["spec"] if new != spec and set(layout(new)) <= set(layout(spec)) else []

    def repair(s: Subject, _site: str) -> Subject:
        return s.with_spec(everywhere(s.spec, undo or wrong))

    _add(name, what, "spec", sites, lambda s, _site: s.with_spec(everywhere(s.spec, wrong)), repair)


def _swap_value(x: Any, field: str, a: Any, b: Any) -> Any:
    value = getattr(x, field)
    return replace(x, **{field: b if value == a else a if value == b else value})


# Norms

_spec("norm_eps", "another eps in the norms", Norm, lambda n: replace(n, eps=1e-6 if n.eps > 2e-6 else 1e-5))
_spec("norm_plus_one", "norm weights taken as w where they are 1 + w, or the other way round", Norm,
      lambda n: _swap_value(n, "weight", "plain", "plus_one"))  # fmt: skip
_spec("norm_mean", "the mean not removed in the norms", Norm,
      lambda n: replace(n, kind="rms") if n.kind == "layer" else n)  # fmt: skip
_spec("post_norms_skipped", "the norms after attention and feed-forward left out", Layer,
      lambda x: replace(x, attn_post_norm=None, ffn_post_norm=None))  # fmt: skip
_spec("qk_norm_skipped", "q and k not normalised", Attention, lambda a: replace(a, qk_norm=None))
_spec("qk_norm_other_side_of_rope", "q and k normalised on the other side of RoPE", Attention,
      lambda a: replace(a, qk_norm=replace(a.qk_norm, after_rope=not a.qk_norm.after_rope))
      if a.qk_norm and a.rope and a.qk_norm.over == "head" and a.qk_norm.norm.weight != "none" else a)  # fmt: skip
_spec("value_norm_skipped", "v not normalised", Attention, lambda a: replace(a, value_norm=None))

# RoPE

_spec("rope_theta", "another RoPE theta", Rope, lambda r: replace(r, theta=1e4 if r.theta != 1e4 else 5e5))
_spec("rope_scaling_ignored", "RoPE scaling ignored", Rope, lambda r: replace(r, scaling=None))
_spec("rope_scaling_linear", "RoPE scaling taken as linear", Rope,
      lambda r: replace(r, scaling=replace(r.scaling, kind="linear", attention_factor=1.0))
      if r.scaling and r.scaling.kind != "linear" else r)  # fmt: skip
_spec("yarn_attention_factor", "YaRN's attention factor left out", Rope,
      lambda r: replace(r, scaling=replace(r.scaling, attention_factor=1.0)) if r.scaling else r)  # fmt: skip
_spec("yarn_betas", "YaRN's ramp between other frequencies", Rope,
      lambda r: replace(r, scaling=replace(r.scaling, beta_fast=2 * r.scaling.beta_fast, beta_slow=2 * r.scaling.beta_slow))
      if r.scaling and r.scaling.kind == "yarn" else r)  # fmt: skip
_spec("rope_partial", "another share of channels rotated", Attention,
      lambda a: replace(a, rope=replace(a.rope, dim=a.head_dim if a.rope.dim < a.head_dim else a.rope.dim // 4 * 2))
      if a.rope and (a.rope.dim < a.head_dim or a.rope.dim >= 4) else a)  # fmt: skip
_spec("rope_order", "RoPE rotates the other pairs of channels", (Attention, LatentAttention),
      lambda a: replace(a, rope=replace(a.rope, interleaved=not a.rope.interleaved)) if a.rope and a.rope.dim > 2 else a)  # fmt: skip
_spec("rope_skipped", "no RoPE", (Attention, LatentAttention), lambda a: replace(a, rope=None))


def _nope_filled(spec: Spec) -> Spec:
    rope = next((m.rope for m in _attentions(spec) if m.rope), None)
    return _map(spec, lambda a: replace(a, rope=rope) if isinstance(a, Attention) and a.rope is None else a)


def _attentions(spec: Spec) -> list[Attention]:
    return [x.mixer for x in spec.layers if isinstance(x.mixer, Attention)]


def _shift(fields: tuple[str, ...]) -> Callable[[Spec], Spec]:
    """The attention layers' values of `fields` moved to the next attention layer."""

    def change(spec: Spec) -> Spec:
        at = [i for i, x in enumerate(spec.layers) if isinstance(x.mixer, Attention)]
        layers = list(spec.layers)
        for i, before in zip(at, at[-1:] + at[:-1], strict=True):
            values = {f: getattr(spec.layers[before].mixer, f) for f in fields}
            layers[i] = replace(layers[i], mixer=replace(layers[i].mixer, **values))  # type: ignore[type-var, arg-type]
        return replace(spec, layers=tuple(layers))

    return change


def _whole(name: str, what: str, change: Callable[[Spec], Spec], when: Callable[[Spec], bool] = lambda _s: True) -> None:
    """A mistake in the Spec as a whole."""

    def sites(spec: Spec) -> list[str]:
        if not when(spec):
            return []
        new = change(spec)
        return ["spec"] if new != spec and set(layout(new)) <= set(layout(spec)) else []

    _add(name, what, "spec", sites, lambda s, _site: s.with_spec(change(s.spec)))


_whole("nope_ignored", "RoPE on the layers that have none", _nope_filled,
       lambda s: any(a.rope for a in _attentions(s)) and any(a.rope is None for a in _attentions(s)))  # fmt: skip
_whole("nope_shifted", "the pattern of layers without RoPE off by one", _shift(("rope",)),
       lambda s: any(a.rope is None for a in _attentions(s)))  # fmt: skip

# Masks

_spec("window_plus_one", "the window one key wider", Attention,
      lambda a: replace(a, window=a.window + 1) if a.window else a,
      lambda a: replace(a, window=a.window - 1) if a.window else a)  # fmt: skip
_spec("window_minus_one", "the window one key narrower", Attention,
      lambda a: replace(a, window=a.window - 1) if a.window and a.window > 1 else a,
      lambda a: replace(a, window=a.window + 1) if a.window else a)  # fmt: skip
_spec("window_ignored", "no window", Attention, lambda a: replace(a, window=None))
_whole("window_shifted", "the pattern of windowed layers off by one", _shift(("window",)),
       lambda s: len({a.window for a in _attentions(s)}) > 1)  # fmt: skip
_spec("chunk_ignored", "no chunks", Attention, lambda a: replace(a, chunk=None))
_spec("chunk_plus_one", "chunks one key longer", Attention, lambda a: replace(a, chunk=a.chunk + 1) if a.chunk else a,
      lambda a: replace(a, chunk=a.chunk - 1) if a.chunk else a)  # fmt: skip
_spec("chunk_as_window", "chunks taken for a sliding window", Attention,
      lambda a: replace(a, chunk=None, window=a.chunk) if a.chunk else a)  # fmt: skip
_spec("indexer_top_k", "one key fewer chosen by the indexer", LatentAttention,
      lambda a: replace(a, indexer=replace(a.indexer, top_k=a.indexer.top_k - 1)) if a.indexer else a)  # fmt: skip
_spec("indexer_ignored", "all keys seen instead of the indexer's choice", LatentAttention,
      lambda a: replace(a, indexer=None))  # fmt: skip

# Attention scores

_spec("attention_scale", "another scale of attention scores", (Attention, LatentAttention),
      lambda a: replace(a, scale=a.scale * 1.05), lambda a: replace(a, scale=a.scale / 1.05))  # fmt: skip
_spec("sinks_dropped", "attention sinks left out", Attention, lambda a: replace(a, sinks=False))
_spec("attention_softcap_dropped", "no soft cap on attention scores", Attention, lambda a: replace(a, softcap=None))
_spec("query_scale_dropped", "queries not scaled by position", (Attention, LatentAttention),
      lambda a: replace(a, query_scale=None))  # fmt: skip
_spec("value_scale_dropped", "values not scaled", Attention, lambda a: replace(a, value_scale=1.0))
_whole("kv_shared_from_another_layer", "shared keys and values taken from another layer",
       lambda s: replace(s, layers=tuple(_other_kv(s, i) for i in range(s.n_layers))))  # fmt: skip


def _other_kv(spec: Spec, i: int) -> Layer:
    layer = spec.layers[i]
    m = layer.mixer
    if not isinstance(m, Attention) or m.kv_from is None:
        return layer
    own = [j for j, x in enumerate(spec.layers[:i]) if isinstance(x.mixer, Attention) and x.mixer.kv_from is None]
    return replace(layer, mixer=replace(m, kv_from=next((j for j in own if j != m.kv_from), m.kv_from)))


# Feed-forward

_spec("activation", "another activation", MLP, lambda m: _other_act(m))
_spec("activation_clamp_dropped", "gate and up not clamped", MLP, lambda m: replace(m, limit=1e9) if m.limit else m)
_spec("activation_sparsity_dropped", "all activations pass", MLP, lambda m: replace(m, sparsity=0.0))


def _other_act(m: MLP) -> MLP:
    other = {"silu": "gelu_tanh", "gelu": "gelu_tanh", "gelu_tanh": "gelu", "relu2": "silu", "silu_clamped": "silu"}
    return replace(m, act=other[m.act], limit=None)  # type: ignore[arg-type]


# Routing

_spec("top_k_minus_one", "one expert fewer per token", Router,
      lambda r: replace(r, top_k=r.top_k - 1) if r.top_k > 1 else r, lambda r: replace(r, top_k=r.top_k + 1))  # fmt: skip
_spec("top_k_plus_one", "one expert more per token", MoE,
      lambda m: replace(m, router=replace(m.router, top_k=m.router.top_k + 1))
      if m.router.top_k < m.n_experts // m.router.n_groups * m.router.top_groups else m,
      lambda m: replace(m, router=replace(m.router, top_k=m.router.top_k - 1)))  # fmt: skip
_spec("routing_not_normalised", "routing weights not (or wrongly) divided by their sum", Router,
      lambda r: replace(r, normalize=not r.normalize) if r.top_k > 1 and r.over == "all" else r)  # fmt: skip
_spec("routed_scale_dropped", "routed output not scaled", Router, lambda r: replace(r, scale=1.0))
_spec("router_score", "softmax taken for sigmoid, or the other way round", Router,
      lambda r: _swap_value(r, "score", "softmax", "sigmoid"))  # fmt: skip
_spec("router_over", "scores over all experts taken for scores over the chosen, or the other way round", Router,
      lambda r: _swap_value(r, "over", "all", "chosen")
      if r.score == "softmax" and not r.normalize and not r.selection_bias and r.n_groups == 1 else r)  # fmt: skip
_spec("router_groups_ignored", "experts of all groups eligible", Router, lambda r: replace(r, n_groups=1, top_groups=1))
_spec("router_softcap_dropped", "no soft cap on router logits", Router, lambda r: replace(r, softcap=None))
_spec("selection_bias_dropped", "selection bias left out", Router, lambda r: replace(r, selection_bias=False))
_spec("weight_on_output", "routing weight on the experts' output instead of their input, or the other way round", MoE,
      lambda m: replace(m, weight_input=not m.weight_input))  # fmt: skip
_spec("shared_expert_dropped", "shared expert left out of the Spec", MoE, lambda m: replace(m, shared=None, shared_gate=False))
_spec("shared_gate_dropped", "shared expert not gated", MoE, lambda m: replace(m, shared_gate=False))
_spec("moe_scale_dropped", "routed and shared output not scaled", MoE, lambda m: replace(m, scale=1.0))


def _bias_in_weights(s: Subject, _site: str) -> Subject:
    """No Spec can say this: the routers themselves are changed."""

    def patch(model: Decoder) -> None:
        for m in model.modules():
            if isinstance(m, RouterModule) and m.selection_bias is not None:
                m.forward = functools.partial(_biased, m)  # type: ignore[method-assign]

    return replace(s, patch=patch)


def _biased(m: RouterModule, x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if m.spec.fp32 else x.dtype
    logits = torch.nn.functional.linear(x.to(dtype), m.dense(dtype), m.offset(dtype))
    chosen, _ = route(logits, m.selection_bias, m.spec)
    scores = logits.float().softmax(-1) if m.spec.score == "softmax" else logits.float().sigmoid()
    weights = (scores + m.selection_bias).gather(-1, chosen)
    if m.spec.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + m.spec.normalize_eps)
    return chosen, (weights * m.spec.scale).to(dtype)


_add("selection_bias_in_weights", "selection bias used in the routing weights, not in the choice alone", "spec",
     lambda spec: [s.name for s in layout(spec).values() if s.name.endswith("router.selection_bias")], _bias_in_weights)  # fmt: skip


# Linear mixers

_spec("delta_gate", "another activation of the delta rule's output gate", DeltaNet,
      lambda m: _swap_value(m, "out_gate", "silu", "sigmoid"))  # fmt: skip
_spec("dt_clamp_dropped", "dt not clamped", Mamba, lambda m: replace(m, dt_min=0.0))

# The whole model

_whole("embed_scale_dropped", "embeddings not scaled", lambda s: replace(s, embed_scale=1.0))
_whole("logit_scale_dropped", "logits not scaled", lambda s: replace(s, logit_scale=1.0))
_whole("logit_softcap_dropped", "no soft cap on the logits", lambda s: replace(s, logit_softcap=None))
_whole("last_layer_dropped", "one layer too few", lambda s: replace(s, layers=s.layers[:-1]), lambda s: s.n_layers > 1)


def _extra_layer(s: Subject, _site: str) -> Subject:
    """A prediction (MTP) layer after the last one run as if it were part of the decoder."""
    n, last = s.spec.n_layers, s.spec.n_layers - 1
    copies = {
        f"layers.{n}." + name.split(".", 2)[2]: s.tensors[name] * 0.9 if s.tensors[name].is_floating_point() else s.tensors[name]
        for slot in _names(s.spec, last)
        for name in _components(s, slot)
    }
    quant = {**s.quant, **{f"layers.{n}." + q.split(".", 2)[2]: v for q, v in s.quant.items() if q.startswith(f"layers.{last}.")}}
    spec = replace(s.spec, layers=(*s.spec.layers, s.spec.layers[-1]))
    return Subject(spec, {**s.tensors, **copies}, quant)


_add("mtp_layer_included", "a prediction (MTP) layer run as part of the decoder", "spec",
     lambda spec: ["spec"] if spec.per_layer_embedding is None else [], _extra_layer)  # fmt: skip
