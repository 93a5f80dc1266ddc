"""A decoder that several ranks share: the same modules, each with this rank's part of their parameters (`zoo.split`).

What is added up, and where: a token's embedding, where the vocabulary is cut; what each mixer's `out` and each MLP's `down`
give, before the residual; what the experts and the shared MLP of a mixture give, together. Logits are put side by side.
Norms over all heads, and of a Mamba-2 group that several ranks have, take their mean square over these ranks.
"""

from __future__ import annotations

import torch
from torch import nn

from zoo.layout import layout
from zoo.model.across import Across, Spread
from zoo.model.attention import Attention
from zoo.model.decoder import Decoder
from zoo.model.decoder import Layer as DecoderLayer
from zoo.model.linear import Linear, Table
from zoo.model.mamba import Mamba
from zoo.model.moe import MoE
from zoo.model.norm import Norm
from zoo.spec import MLP, Mixer, Spec
from zoo.spec import Attention as AttentionSpec
from zoo.spec import Mamba as MambaSpec
from zoo.split import Split


def share_out(model: Decoder, split: Split, across: Across) -> None:
    """Cut a decoder that has no storage yet down to what this rank has of it."""
    model.local, model.across, model.by_rows = split.local, across, _by_rows(split.spec)
    slots = layout(split.spec)
    for name, cut in split.cuts.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if not cut.ranges:
            module.register_parameter(leaf, None)
            continue
        shape = cut.shape(slots[name].shape)
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
        if leaf == "weight" and isinstance(module, Linear):
            if cut.axis == 0:
                module.parts = cut.sizes
                module.reads = across if model.by_rows and name.startswith("layers.") else None
            else:
                module.across = across
        if isinstance(module, Table):
            module.across, module.parts = across, tuple(shape[:1])
    for layer, whole, own in zip(model.layers, split.spec.layers, split.local.layers, strict=True):
        assert isinstance(layer, DecoderLayer)
        layer.across = across
        if whole.mixer is not None:
            _mixer(layer.mixer, whole.mixer, own.mixer, across)
        if whole.beside is not None:
            _mixer(layer.mamba, whole.beside, own.beside, across)
        if whole.ffn is not None:
            _is(layer.ffn, own.ffn)
            if isinstance(layer.ffn, MoE):
                _experts(layer.ffn, across)
    if model.by_rows:
        _norms_with_sums(model, across)


def _norms_with_sums(model: Decoder, across: Across) -> None:
    """Tell each matrix whose sum over ranks is the residual, and the norm that reads it, of each other."""
    layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        s = layer.spec
        last = None if after is None else after.attn_norm if after.spec.mixer is not None else after.ffn_norm
        if s.residual_scale != 1.0:
            continue
        if isinstance(s.mixer, AttentionSpec) and s.attn_post_norm is None and not s.parallel:
            _tell(layer.attn.out, layer.ffn_norm if s.ffn is not None else None if s.scalar else last, across)
        plain = s.ffn_post_norm is None and (s.adds == "in_turn" or not s.parallel) and not s.scalar
        if isinstance(s.ffn, MLP) and s.ffn.out_scale == 1.0 and plain:
            _tell(layer.mlp.down, last, across)


def _tell(matrix: object, norm: nn.Module | None, across: Across) -> None:
    if isinstance(matrix, Linear) and isinstance(norm, Norm) and norm.spec.kind == "rms":
        matrix.__dict__["norm"], norm.across = norm, across  # whose parameters stay its own


def _by_rows(spec: Spec) -> bool:
    """Whether all that layers do with a token and the others happens between a matrix that is cut and the next."""
    plain = spec.altup is None and spec.per_layer_embedding is None
    return plain and all(
        isinstance(x.mixer, AttentionSpec | None) and x.beside is None and isinstance(x.ffn, MLP | None)
        for x in spec.layers
    )


def _is(module: nn.Module, spec: object) -> None:
    module.__dict__["spec"] = spec


def _mixer(mixer: nn.Module, whole: Mixer, own: Mixer | None, across: Across) -> None:
    _is(mixer, own)
    if isinstance(mixer, Attention) and isinstance(whole, AttentionSpec):
        n = mixer.spec.n_heads
        mixer.heads = slice(across.rank * n, (across.rank + 1) * n), whole.n_heads
        if whole.qk_norm is not None and whole.qk_norm.over == "all_heads":
            # A key head that several ranks have counts on each, and as often as any other.
            mixer.q_norm.spread = Spread(across)
            if whole.kv_from is None:
                mixer.k_norm.spread = Spread(across)
    if isinstance(mixer, Mamba) and isinstance(whole, MambaSpec) and whole.out_norm is not None:
        groups = whole.n_groups
        if groups < across.size:
            mixer.norm.spread = Spread(across, across.rank * groups // across.size, groups)


def _experts(moe: MoE, across: Across) -> None:
    moe.across = across
    moe.first = across.rank * (moe.spec.n_experts // across.size)
    if moe.spec.shared is None:
        return
    _is(moe.shared, moe.spec.shared)
    if moe.spec.post_norm is None and moe.spec.shared_post_norm is None:
        moe.shared.down.across = None  # added up with the routed sum
