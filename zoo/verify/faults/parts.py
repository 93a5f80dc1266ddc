"""Mistakes in choices that few families make: where branches stand, what gates, clamps, biases and shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from zoo.layout import Slot
from zoo.spec import (
    MLP,
    Attention,
    CompressedAttention,
    HyperConnections,
    LatentAttention,
    Layer,
    Mamba,
    MoE,
    Norm,
    Rope,
    Router,
    Spec,
)
from zoo.verify.faults.base import CATALOGUE, add
from zoo.verify.faults.spec import _spec, _whole
from zoo.verify.faults.weights import _edit, _roll, _roll_back, _slots, _swap_parts, _zeros

_BEFORE = frozenset(CATALOGUE)

# RoPE and ALiBi


def _scaling(r: Rope, **change: Any) -> Rope:
    assert r.scaling is not None
    return replace(r, scaling=replace(r.scaling, **change))


_spec("longrope_tables_swapped", "LongRoPE's short and long divisors exchanged", Rope,
      lambda r: _scaling(r, short=r.scaling.long, long=r.scaling.short) if r.scaling and r.scaling.short else r)  # fmt: skip
_spec("longrope_short_only", "LongRoPE's short divisors for long texts too", Rope,
      lambda r: _scaling(r, long=r.scaling.short) if r.scaling and r.scaling.short else r)  # fmt: skip
_spec("rope_turning_ignored", "all pairs of proportional RoPE turn", Rope, lambda r: replace(r, turning=None))
_spec("rope_turning_as_partial", "proportional RoPE taken for one over fewer channels", Rope,
      lambda r: replace(r, dim=2 * r.turning, turning=None) if r.turning else r)  # fmt: skip
_spec("rope_direction", "RoPE turns the usual way", Rope, lambda r: replace(r, backwards=False))
_spec("alibi_dropped", "no bias by distance", Attention, lambda a: replace(a, alibi=None))
_spec("alibi_scale", "ALiBi added before scores are scaled, or after, the other way round", Attention,
      lambda a: replace(a, alibi=replace(a.alibi, scale=a.scale if a.alibi.scale == 1.0 else 1.0)) if a.alibi else a)  # fmt: skip

_spec("clip_dropped", "queries, keys and values not clipped", Attention, lambda a: replace(a, clip=None))

# The layer

_spec("branches_one_by_one", "attention and feed-forward one after the other where they stand side by side", Layer,
      lambda x: replace(x, parallel=False) if x.mixer and x.ffn else x)  # fmt: skip
_spec("residual_scale_dropped", "branches not multiplied before they are added", Layer,
      lambda x: replace(x, residual_scale=1.0))  # fmt: skip
_spec(
    "layer_scalar_dropped",
    "layers not multiplied by their learned number",
    Layer,
    lambda x: replace(x, scalar=False),
)
_spec(
    "state_space_beside_dropped",
    "attention without the state space beside it",
    Layer,
    lambda x: replace(x, beside=None),
)
_spec("norm_bias_dropped", "LayerNorms without their bias", Norm,
      lambda n: replace(n, bias=False) if n.kind == "layer" else n)  # fmt: skip
_whole("embed_norm_dropped", "embeddings not normalised", lambda s: replace(s, embed_norm=None))
_whole("head_bias_dropped", "the head's bias left out", lambda s: replace(s, head_bias=False))
add("head_bias_off_by_one", "the head's bias shifted by one id", "weights", _slots("head.bias"),
    _edit(_roll), _edit(_roll_back))  # fmt: skip


def _rows_without_offset(t: Tensor, spec: Spec, _slot: Slot) -> Tensor:
    return t.roll(-spec.positions_offset, 0)


def _rows_with_offset(t: Tensor, spec: Spec, _slot: Slot) -> Tensor:
    return t.roll(spec.positions_offset, 0)


add("positions_offset_twice", "the offset of learned positions taken twice", "weights",
    _slots("positions.weight", lambda s, _t: s.positions_offset > 0),
    _edit(_rows_without_offset), _edit(_rows_with_offset))  # fmt: skip

# Attention

_spec("attention_gate_act", "another activation of the output gate", Attention,
      lambda a: replace(a, gate_act="sigmoid" if a.gate_act == "softplus" else "softplus") if a.gate else a)  # fmt: skip
_spec("values_from_rotated_keys_norm", "values that are keys not normalised", Attention,
      lambda a: replace(a, value_norm=None) if a.value_from_key else a)  # fmt: skip
_spec("shared_index_ignored", "all keys seen where an earlier layer's indexer chose", LatentAttention,
      lambda a: replace(a, indexer_from=None))  # fmt: skip

_spec("entries_ignored", "no compressed entries seen", CompressedAttention,
      lambda a: replace(a, compressor=None, indexer=None))  # fmt: skip
_spec("entry_window_shifted", "a window one token longer beside compressed entries", CompressedAttention,
      lambda a: replace(a, window=a.window + 1), lambda a: replace(a, window=a.window - 1))  # fmt: skip
_spec("streams_mixed_once", "one round of Sinkhorn's iterations", HyperConnections,
      lambda h: replace(h, rounds=1))  # fmt: skip
add("experts_of_another_token", "the table of experts shifted by one id", "weights", _slots("moe.router.table"),
    _edit(_roll), _edit(_roll_back))  # fmt: skip

# State space

_spec(
    "state_space_input_unscaled",
    "what a state space reads not scaled",
    Mamba,
    lambda m: replace(m, in_scale=1.0),
)
_spec("state_space_parts_unscaled", "a state space's gate, input, B, C and dt not scaled", Mamba,
      lambda m: replace(m, parts_scales=()))  # fmt: skip
_spec("state_space_scales_in_another_order", "the scales of a state space's B and C exchanged with those of its gate and input",
      Mamba, lambda m: replace(m, parts_scales=(*m.parts_scales[2:4], *m.parts_scales[:2], *m.parts_scales[4:])))  # fmt: skip
_spec(
    "state_space_output_unscaled",
    "what a state space gives not scaled",
    Mamba,
    lambda m: replace(m, out_scale=1.0),
)
_spec(
    "state_space_norm_after_gate",
    "a state space's norm after its gate",
    Mamba,
    lambda m: replace(m, norm_first=False),
)

# Feed-forward and experts

_spec("gate_unscaled", "the gate of an MLP not scaled", MLP, lambda m: replace(m, gate_scale=1.0))
_spec("mlp_output_unscaled", "the output of an MLP not scaled", MLP, lambda m: replace(m, out_scale=1.0))

_spec("clamp_other_side_of_activation", "the gate clamped before its activation, or after it, the other way round", MLP,
      lambda m: replace(m, limit_after=not m.limit_after) if m.limit and m.act == "silu" else m)  # fmt: skip
_spec("group_score", "groups of experts judged by another number of their best", MoE,
      lambda m: replace(m, router=replace(m.router, group_top=2 if m.router.group_top == 1 else 1))
      if m.router.n_groups > 1 and m.n_experts >= 2 * m.router.n_groups else m)  # fmt: skip
_spec("router_floor_dropped", "routing weights divided by their sum however small", Router,
      lambda r: replace(r, normalize_floor=0.0) if r.normalize else r)  # fmt: skip
_spec("expert_scale_dropped", "weights not multiplied by their expert's scale", Router,
      lambda r: replace(r, expert_scale=False))  # fmt: skip
_spec(
    "router_norm_dropped", "the router reads what the experts read", Router, lambda r: replace(r, norm=None)
)
_spec(
    "router_input_scale_dropped",
    "the router's input not scaled",
    Router,
    lambda r: replace(r, input_scale=1.0),
)
_spec(
    "experts_norm_dropped",
    "experts read what the MLP beside them reads",
    MoE,
    lambda m: replace(m, norm=None),
)
_spec(
    "experts_post_norm_dropped", "the experts' sum not normalised", MoE, lambda m: replace(m, post_norm=None)
)
_spec("experts_sum_unscaled", "the experts' sum not scaled", MoE, lambda m: replace(m, routed_scale=1.0))
_spec("shared_post_norm_dropped", "the output of the MLP beside the experts not normalised", MoE,
      lambda m: replace(m, shared_post_norm=None))  # fmt: skip
add("xielu_sides_exchanged", "xIELU's learned numbers exchanged", "weights", _slots("mlp.act.positive"),
    lambda s, site: s.put({site: s.tensors[site.replace("positive", "negative")],
                           site.replace("positive", "negative"): s.tensors[site]}), "again")  # fmt: skip
add("short_conv_b_c_swapped", "the gates before and after a short convolution exchanged", "weights",
    _slots("short_conv.in_proj.weight"), _edit(_swap_parts(0, 1)), "again")  # fmt: skip
add("short_conv_c_x_swapped", "gate and input of a short convolution exchanged", "weights",
    _slots("short_conv.in_proj.weight"), _edit(_swap_parts(1, 2)), "again")  # fmt: skip
add("expert_scale_shifted", "scales of the experts shifted by one", "weights", _slots("moe.router.expert_scale"),
    _edit(_roll), _edit(_roll_back))  # fmt: skip
add("layer_scalar_lost", "a layer's learned number left at 0", "weights", _slots(".scalar"), _edit(_zeros))

PARTS = frozenset(CATALOGUE) - _BEFORE
"""The names of the faults in this file."""
