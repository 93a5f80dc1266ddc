"""Mistakes in weights: parts exchanged, rows in another order, tensors lost, layers and experts misplaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.layout import Slot, layout
from zoo.spec import Attention, LatentAttention, Norm, Spec
from zoo.verify.faults.base import Apply, Sites, Subject, Tensors, add


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
        t = s.tensors[site]
        new = change(raw(t), s.spec, layout(s.spec)[site])
        return s.put({site: new.contiguous().view(t.dtype)})

    return apply


def unflatten(t: Tensor, axis: int, sizes: tuple[int, ...]) -> Tensor:
    out: Tensor = t.unflatten(axis, sizes)
    return out


def raw(t: Tensor) -> Tensor:
    """fp8 codes as bytes: torch moves those about, but not fp8."""
    return t.view(torch.uint8) if t.element_size() == 1 else t


def _swap_parts(a: int, b: int) -> Callable[[Tensor, Spec, Slot], Tensor]:
    def change(t: Tensor, _spec: Spec, slot: Slot) -> Tensor:
        axis = int(slot.stacked)
        pieces = list(t.split(list(slot.parts), axis))
        pieces[a], pieces[b] = pieces[b], pieces[a]
        return torch.cat(pieces, axis)

    return change


def _part(i: int, change: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Spec, Slot], Tensor]:
    """Change one fused part only; `change` gets the part and the layer's mixer."""

    def whole(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
        axis = int(slot.stacked)
        pieces = list(t.split(list(slot.parts), axis))
        pieces[i] = change(pieces[i], _mixer(spec, slot))
        return torch.cat(pieces, axis)

    return whole


def _interleave(t: Tensor, heads: int) -> Tensor:
    """Rows of each head from half order (first members, then second) to pair order."""
    return unflatten(t, 0, (heads, 2, -1)).transpose(1, 2).reshape(t.shape)


def _deinterleave(t: Tensor, heads: int) -> Tensor:
    return unflatten(t, 0, (heads, -1, 2)).transpose(1, 2).reshape(t.shape)


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
                t = s.tensors[name]
                parts = list(raw(t).split(list(layout(s.spec)[name].parts)))
                if q:
                    parts[0] = change(parts[0], m.n_heads)
                if k and m.kv_from is None:
                    at = -1 if m.value_from_key else -2
                    parts[at] = change(parts[at], m.n_kv_heads)
                new[name] = torch.cat(parts).view(t.dtype)
        return s.put(new)

    return apply


def names_of(spec: Spec, layer: int) -> list[str]:
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


def components_of(s: Subject, slot: str) -> list[str]:
    base = slot.removesuffix(".weight")
    return [n for n in s.tensors if n == slot or (base in s.quant and n.rsplit(".", 1)[0] == base)]


def _layer_pair(both: bool) -> Apply:
    def apply(s: Subject, site: str) -> Subject:
        i, j = site.split()
        new: Tensors = {}
        for name in [n for slot in names_of(s.spec, int(i)) for n in components_of(s, slot)]:
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


def _last_rows_exchanged(t: Tensor, _spec: Spec, _slot: Slot) -> Tensor:
    return torch.cat([t[:-2], t[-2:].flip(0)])


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
add("q_k_swapped", "q and k exchanged in the fused matrix", "weights",
     _slots(_QKV, lambda _s, t: len(t.parts) == 3 and t.parts[0] == t.parts[1]), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
add("k_v_swapped", "k and v exchanged in the fused matrix", "weights",
     _slots(_QKV, lambda s, t: len(t.parts) >= 3 and t.parts[-2] == t.parts[-1] and not _mixer(s, t).value_from_key), _edit(_swap_parts(-2, -1)), "again")  # fmt: skip
add("q_gate_swapped", "query and output gate exchanged", "weights",
     _slots(_QKV, lambda s, t: bool(_mixer(s, t).gate) and t.parts[0] == t.parts[1]), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
add("rope_rows_interleaved", "rows of q and k in interleaved RoPE order", "weights",
     _slots(_QKV, _rotated), _q_and_k(_interleave), _q_and_k(_deinterleave))  # fmt: skip
add("rope_rows_deinterleaved", "rows of q and k put in half order although they were", "weights",
     _slots(_QKV, _rotated), _q_and_k(_deinterleave), _q_and_k(_interleave))  # fmt: skip
add("rope_rows_of_k_only", "rows of k alone in interleaved RoPE order", "weights",
     _slots(_QKV, lambda s, t: _rotated(s, t) and _mixer(s, t).kv_from is None), _q_and_k(_interleave, q=False), _q_and_k(_deinterleave, q=False))  # fmt: skip


def _grouped(spec: Spec, slot: Slot) -> bool:
    m = _mixer(spec, slot)
    return isinstance(m, Attention) and m.n_kv_heads > 1 and m.n_heads > m.n_kv_heads


def _tile(t: Tensor, m: Any) -> Tensor:
    return unflatten(t, 0, (m.n_kv_heads, m.n_heads // m.n_kv_heads, -1)).transpose(0, 1).reshape(t.shape)


def _untile(t: Tensor, m: Any) -> Tensor:
    return unflatten(t, 0, (m.n_heads // m.n_kv_heads, m.n_kv_heads, -1)).transpose(0, 1).reshape(t.shape)


add("kv_heads_tiled", "key heads tiled over query heads (0 1 0 1) instead of repeated (0 0 1 1)", "weights",
     _slots(_QKV, _grouped), _edit(_part(0, _tile)), _edit(_part(0, _untile)))  # fmt: skip


def _two_heads(t: Tensor, m: Any) -> Tensor:
    d = t.shape[0] // m.n_heads
    return torch.cat([t[-d:], t[d:-d], t[:d]])


add("two_heads_swapped", "first and last query head exchanged", "weights",
     _slots(_QKV, lambda s, t: _mixer(s, t).n_heads > 1), _edit(_part(0, _two_heads)), "again")  # fmt: skip
add("shards_out_of_order", "tensor-parallel shards joined in the wrong order", "weights",
     _slots("attn.out.weight", lambda _s, t: t.shape[1] % 2 == 0), _edit(lambda t, _s, _t: torch.cat(t.chunk(2, 1)[::-1], 1)), "again")  # fmt: skip
add("sinks_zeroed", "attention sinks left at 0", "weights", _slots("attn.sinks"), _edit(_zeros))


def _norms_do_not_commute(spec: Spec, slot: Slot) -> bool:
    m = _mixer(spec, slot)
    q = f"layers.{slot.layer}.attn.q_norm.weight"
    same = q in layout(spec) and layout(spec)[q].shape == slot.shape
    return same and isinstance(m, Attention) and m.rope is not None


def _swap_qk_norm(s: Subject, site: str) -> Subject:
    q = site.replace("k_norm", "q_norm")
    return s.put({site: s.tensors[q], q: s.tensors[site]})


add("q_norm_k_norm_swapped", "q_norm and k_norm exchanged", "weights",
     _slots("attn.k_norm.weight", _norms_do_not_commute), _swap_qk_norm, "again")  # fmt: skip

# Latent attention


def _latent(spec: Spec, slot: Slot) -> bool:
    return isinstance(_mixer(spec, slot), LatentAttention)


def _q_rope_first(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    m = _mixer(spec, slot)
    return unflatten(t, 0, (m.n_heads, m.nope_dim + m.rope_dim)).roll(m.rope_dim, 1).reshape(t.shape)


def _kv_value_first(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    m = _mixer(spec, slot)
    return unflatten(t, 0, (m.n_heads, m.nope_dim + m.v_head_dim)).roll(m.v_head_dim, 1).reshape(t.shape)


def _kv_not_per_head(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    m = _mixer(spec, slot)
    rows = unflatten(t, 0, (m.n_heads, m.nope_dim + m.v_head_dim))
    return torch.cat([rows[:, : m.nope_dim].flatten(0, 1), rows[:, m.nope_dim :].flatten(0, 1)])


def _q_rope_last(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    m = _mixer(spec, slot)
    return unflatten(t, 0, (m.n_heads, m.nope_dim + m.rope_dim)).roll(-m.rope_dim, 1).reshape(t.shape)


def _kv_value_last(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    m = _mixer(spec, slot)
    return unflatten(t, 0, (m.n_heads, m.nope_dim + m.v_head_dim)).roll(-m.v_head_dim, 1).reshape(t.shape)


def _kv_per_head(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    m = _mixer(spec, slot)
    k, v = t.split([m.n_heads * m.nope_dim, m.n_heads * m.v_head_dim])
    return torch.cat([unflatten(k, 0, (m.n_heads, -1)), unflatten(v, 0, (m.n_heads, -1))], 1).flatten(0, 1)


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
    def sites(spec: Spec) -> Sequence[str]:
        names = _slots("attn.q_up.weight", when)(spec)
        return names or _slots("attn.q.weight", when)(spec)

    return sites


add(
    "latent_q_rope_first",
    "rotary channels of q before the others",
    "weights",
    _latent_q(_latent),
    _edit(_q_rope_first),
    _edit(_q_rope_last),
)
add("latent_v_before_k", "values before keys in each head of kv_up", "weights",
     _slots("attn.kv_up.weight"), _edit(_kv_value_first), _edit(_kv_value_last))  # fmt: skip
add("latent_kv_not_per_head", "kv_up read as all keys, then all values", "weights",
     _slots("attn.kv_up.weight", lambda s, t: _mixer(s, t).n_heads > 1), _edit(_kv_not_per_head), _edit(_kv_per_head))  # fmt: skip
add("latent_rope_interleaved", "rotary channels of q and k in the other RoPE order", "weights",
     _latent_q(lambda s, t: _latent(s, t) and _mixer(s, t).rope is not None and _mixer(s, t).rope_dim > 2),
     _rope_parts(_interleave), _rope_parts(_deinterleave))  # fmt: skip
add("indexer_weights_zeroed", "the sparse indexer's head weights lost", "weights",
     _slots("attn.indexer.head_weights.weight"), _edit(_zeros))  # fmt: skip

# Feed-forward and experts

_GATED = "gate_up.weight"
add("gate_up_swapped", "gate and up exchanged", "weights",
     _slots("mlp." + _GATED), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
add("expert_gate_up_swapped", "gate and up of the experts exchanged", "weights",
     _slots("moe." + _GATED), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
add("shared_gate_up_swapped", "gate and up of the shared expert exchanged", "weights",
     _slots("moe.shared." + _GATED), _edit(_swap_parts(0, 1)), "again")  # fmt: skip


def _interleaved_gate(t: Tensor, _spec: Spec, slot: Slot) -> Tensor:
    axis = int(slot.stacked)
    return unflatten(t, axis, (2, -1)).transpose(axis, axis + 1).reshape(t.shape)


def _deinterleaved_gate(t: Tensor, _spec: Spec, slot: Slot) -> Tensor:
    axis = int(slot.stacked)
    return unflatten(t, axis, (-1, 2)).transpose(axis, axis + 1).reshape(t.shape)


add("gate_up_interleaved", "gate and up rows alternating instead of one after the other", "weights",
     lambda spec: _slots("mlp." + _GATED)(spec) or _slots("moe." + _GATED)(spec), _edit(_interleaved_gate), _edit(_deinterleaved_gate))  # fmt: skip


def _first_and_last(s: Subject, site: str) -> Subject:
    """Two experts exchanged in both of their matrices, their router rows left."""
    base = site.rsplit(".", 2)[0]
    new: Tensors = {}
    for name, t in s.tensors.items():
        slot = layout(s.spec).get(name)
        if name.startswith(base + ".") and slot is not None and slot.stacked:
            r = raw(t)
            new[name] = torch.cat([r[-1:], r[1:-1], r[:1]]).view(t.dtype)
    return s.put(new)


_EXPERTS = _slots("moe.down.weight", lambda _s, t: t.shape[0] > 1)
add("expert_misplaced", "two experts exchanged", "weights", _EXPERTS, _first_and_last, "again")
add(
    "experts_off_by_one",
    "down matrices of the experts shifted by one expert",
    "weights",
    _EXPERTS,
    _edit(_roll),
    _edit(_roll_back),
)


def _zero_expert(t: Tensor, _spec: Spec, _slot: Slot) -> Tensor:
    t = t.clone()
    t[t.shape[0] // 2] = 0
    return t


add("expert_missing", "one expert never filled", "weights", _EXPERTS, _edit(_zero_expert))
add(
    "router_rows_shifted",
    "rows of the router shifted by one expert",
    "weights",
    _slots("moe.router.weight"),
    _edit(_roll),
    _edit(_roll_back),
)
add(
    "selection_bias_lost",
    "selection bias left at 0",
    "weights",
    _slots("moe.router.selection_bias"),
    _edit(_zeros),
)
add("router_bias_lost", "router bias left at 0", "weights", _slots("moe.router.bias"), _edit(_zeros))
add(
    "shared_expert_lost", "shared expert left out", "weights", _slots("moe.shared.down.weight"), _edit(_zeros)
)
add(
    "shared_gate_lost",
    "gate of the shared expert left at 0",
    "weights",
    _slots("moe.shared_gate.weight"),
    _edit(_zeros),
)

# Anything

add("matrix_transposed", "a matrix read as [in, out]", "weights",
     lambda spec: [s.name for s in layout(spec).values() if s.layer is not None and len(s.shape) == 2
                   and min(s.shape) > 1 and s.name.endswith((".out.weight", ".down.weight"))], _edit(_transposed), _edit(_untransposed))  # fmt: skip
add("row_zeroed", "one row lost", "weights",
     lambda spec: [s.name for s in layout(spec).values() if s.layer is not None and _is_dense(spec, s)
                   and s.name.endswith((".out.weight", ".down.weight"))], _edit(_zero_row))  # fmt: skip
add("element_corrupted", "one element of a file corrupted", "weights",
     lambda spec: [s.name for s in layout(spec).values() if s.layer is not None and _is_dense(spec, s)
                   and s.name.endswith((".out.weight", ".down.weight"))], _edit(_one_element))  # fmt: skip
add("bf16_truncated", "fp32 cut to bf16 instead of rounded", "weights",
     lambda spec: [s.name for s in layout(spec).values() if s.layer is not None and _is_dense(spec, s)
                   and s.name.endswith((".out.weight", ".down.weight"))], _edit(_truncate))  # fmt: skip
add(
    "layer_duplicated",
    "a layer's weights used for the next layer too",
    "weights",
    _pairs_of_layers,
    _layer_pair(False),
)
add("layers_swapped", "two layers exchanged", "weights", _pairs_of_layers, _layer_pair(True), "again")
add(
    "embedding_off_by_one",
    "rows of the embedding shifted by one id",
    "weights",
    _slots("embed.weight"),
    _edit(_roll),
    _edit(_roll_back),
)
add(
    "head_off_by_one",
    "rows of the head shifted by one id",
    "weights",
    _slots("head.weight"),
    _edit(_roll),
    _edit(_roll_back),
)
add(
    "head_rows_exchanged",
    "two rows of the head, of the last ids, exchanged",
    "weights",
    lambda spec: ["embed.weight" if spec.tied else "head.weight"],
    _edit(_last_rows_exchanged),
    "again",
)
add(
    "positions_off_by_one",
    "rows of the position table shifted by one",
    "weights",
    _slots("positions.weight"),
    _edit(_roll),
    _edit(_roll_back),
)
add("bias_lost", "a bias left at 0", "weights",
     lambda spec: [s.name for s in layout(spec).values() if s.layer is not None and not s.stacked
                   and s.name.endswith((".qkv.bias", ".out.bias", ".down.bias", ".up.bias", ".gate_up.bias"))], _edit(_zeros))  # fmt: skip
add("expert_bias_lost", "a bias of the experts left at 0", "weights",
     lambda spec: [s.name for s in layout(spec).values() if s.stacked and s.name.endswith(".bias")], _edit(_zeros))  # fmt: skip


def _initial(t: Tensor, spec: Spec, slot: Slot) -> Tensor:
    """What a norm's weight starts from: 1, or 0 where it is stored minus one."""
    return torch.zeros_like(t) if any(n.weight == "plus_one" for n in _norms(spec)) else torch.ones_like(t)


def _norms(spec: Spec) -> list[Norm]:
    return [
        spec.norm,
        *(n for layer in spec.layers for n in (layer.attn_norm, layer.ffn_norm) if n is not None),
    ]


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


add("norm_stale", "a norm's weight left at its initial value", "weights", _layer_norms, _edit(_initial))
add("final_norm_stale", "the final norm's weight left at its initial value", "weights",
     lambda spec: ["norm.weight"] if "norm.weight" in layout(spec) else [], _edit(_initial))  # fmt: skip
add("norms_swapped", "the norms before attention and feed-forward exchanged", "weights",
     _slots(".attn_norm.weight", _has_pair(("attn_norm", "ffn_norm"))), _swap_norms, "again")  # fmt: skip
add("post_norms_swapped", "the norms after attention and feed-forward exchanged", "weights",
     _slots(".attn_post_norm.weight", _has_pair(("attn_post_norm", "ffn_post_norm"))), _swap_post_norms, "again")  # fmt: skip
add("pre_post_norms_swapped", "the norms before and after attention exchanged", "weights",
     _slots(".attn_post_norm.weight", _has_pair(("attn_post_norm", "attn_norm"))),
     lambda s, site: s.put({site: s.tensors[site.replace("post_norm", "norm")],
                            site.replace("post_norm", "norm"): s.tensors[site]}), "again")  # fmt: skip


def _two_norms(a: str, b: str) -> Apply:
    def swap(s: Subject, site: str) -> Subject:
        other = site.replace(f".{a}.", f".{b}.")
        return s.put({site: s.tensors[other], other: s.tensors[site]})

    return swap


# `post_attention_layernorm` is the norm before the feed-forward in Llama, and the one after attention in Gemma.
for _a, _b in (("attn_post_norm", "ffn_norm"), ("attn_norm", "ffn_post_norm"), ("ffn_norm", "ffn_post_norm")):
    add(f"{_a}_{_b}_swapped", f"{_a} and {_b} exchanged", "weights",
         _slots(f".{_a}.weight", _has_pair((f".{_a}.", f".{_b}."))), _two_norms(_a, _b))  # fmt: skip


def _stale_head(s: Subject, _site: str) -> Subject:
    """The head of a tied model kept from before: a shifted copy, now a tensor of its own."""
    head = s.tensors["embed.weight"]
    spec = replace(s.spec, tied=False)
    return replace(s, spec=spec, tensors={**s.tensors, "head.weight": head * 0.99})


add("tied_head_stale", "a tied head loaded from a stale copy of its own", "weights", _head_slots, _stale_head)
add("head_tied", "the embedding used as head although the head is its own", "spec",
     lambda spec: [] if spec.tied else ["head.weight"], lambda s, _: s.with_spec(replace(s.spec, tied=True)))  # fmt: skip

# Linear mixers

add("conv_reversed", "the causal convolution's taps in reverse order", "weights",
     _slots("conv.weight", lambda _s, t: t.shape[-1] > 1), _edit(lambda t, _s, _t: t.flip(-1)), "again")  # fmt: skip
add("conv_bias_lost", "the convolution's bias left at 0", "weights", _slots("conv.bias"), _edit(_zeros))
add(
    "decay_not_log",
    "A_log stored as A",
    "weights",
    _slots(".A_log"),
    _edit(lambda t, _s, _t: t.float().exp().to(t.dtype)),
    _edit(lambda t, _s, _t: t.float().log().to(t.dtype)),
)
add("dt_bias_lost", "dt_bias left at 0", "weights", _slots(".dt_bias"), _edit(_zeros))
add("skip_lost", "the state-space skip D left at 0", "weights", _slots("mamba.D"), _edit(_zeros))
add("delta_v_z_swapped", "value and output gate of the delta rule exchanged", "weights",
     _slots("delta.qkvz.weight"), _edit(_swap_parts(2, 3)), "again")  # fmt: skip
add("delta_q_k_swapped", "query and key of the delta rule exchanged", "weights",
     lambda spec: [*_slots("delta.qkvz.weight")(spec), *_slots("delta.qkv.weight")(spec)], _edit(_swap_parts(0, 1)), "again")  # fmt: skip
add("delta_beta_decay_swapped", "beta and decay inputs of the delta rule exchanged", "weights",
     _slots("delta.ba.weight"), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
add("mamba1_skip_lost", "Mamba's skip D left at 0", "weights", _slots("mamba1.D"), _edit(_zeros))
add("mamba1_x_z_swapped", "input and gate of Mamba exchanged", "weights",
     _slots("mamba1.in_proj.weight"), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
add("mamba1_b_c_swapped", "B and C of Mamba exchanged", "weights",
     _slots("mamba1.x_proj.weight"), _edit(_swap_parts(1, 2)), "again")  # fmt: skip
add("mamba_z_x_swapped", "gate and input of the state space exchanged", "weights",
     _slots("mamba.in_proj.weight"), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
add("mamba_b_c_swapped", "B and C of the state space exchanged", "weights",
     _slots("mamba.in_proj.weight"), _edit(_swap_parts(2, 3)), "again")  # fmt: skip

# Streams and per-layer inputs

add("stream_coefficients_transposed", "prediction coefficients of the streams transposed", "weights",
     _slots("altup.predict.weight"),
     _edit(lambda t, _s, _t: unflatten(t, 0, (t.shape[1], t.shape[1])).transpose(0, 1).reshape(t.shape)), "again")  # fmt: skip
add("streams_swapped", "projections to the streams in another order", "weights",
     _slots("altup.expand.weight", lambda _s, t: t.shape[0] > 1), _edit(lambda t, _s, _t: t.flip(0)), "again")  # fmt: skip
add(
    "low_rank_residual_lost",
    "the low-rank residual left out",
    "weights",
    _slots("laurel.up.weight"),
    _edit(_zeros),
)
add("per_layer_embedding_off_by_one", "per-layer embeddings shifted by one id", "weights",
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


add("scale_block_off", "scales shifted by one block", "weights", lambda _spec: ["*.scale"], _scale_block)
add("scale_ignored", "scales ignored", "weights", lambda _spec: ["*.scale"], _scale_one)
add("scale_transposed", "scales transposed", "weights", lambda _spec: ["*.scale"], _scale_transposed)
