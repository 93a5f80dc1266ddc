"""A family at the size of its releases: their configs, every tensor of them, and upstream's count. No weight is made."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo import families
from zoo.errors import ZooError
from zoo.formats.base import TensorRef
from zoo.layout import layout
from zoo.mapping.match import Match, match
from zoo.shipped import RELEASES
from zoo.spec import Attention, CompressedAttention, DeltaNet, LatentAttention, Mamba, Mamba1, MoE, Spec

from . import names
from .case import FamilyCase

CONFIGS = Path(RELEASES) / "configs"

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype as safetensors says it, shape


def read(stem: str) -> dict[str, Any]:
    """`manifests/configs/<stem>.config.json`."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{stem}.config.json").read_text(encoding="utf-8"))
    return config


def edited(stem: str, **changes: Any) -> dict[str, Any]:
    """A release's config with some fields changed, in its text model if it is a wrapper."""
    config = read(stem)
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], **changes}}
    return {**config, **changes}


@functools.cache
def stems() -> Mapping[str, tuple[str, ...]]:
    """Family -> stems of the configs it claims; under "" those that no family does."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(CONFIGS.glob("*.config.json")):
        stem = path.name.removesuffix(".config.json")
        try:
            name = families.find(read(stem)).name
        except ZooError:
            name = ""
        found[name] = (*found.get(name, ()), stem)
    return found


def refs(tensors: Tensors) -> dict[str, TensorRef]:
    """Tensors as a reader would list them."""
    return {name: TensorRef(name, dtype, shape, "f", 0, 0) for name, (dtype, shape) in tensors.items()}


def released(case: FamilyCase, config: Mapping[str, Any], **how: Any) -> dict[str, TensorRef]:
    """Every tensor of a release with this config; see `names.released_tensors`."""
    listed = names.released_tensors(case, config, **how)
    return refs({name: (t.dtype, t.shape) for name, t in listed.items()})


def account(
    config: dict[str, Any], tensors: dict[str, TensorRef], naming: str = "hf", n_ranks: int = 1
) -> Match:
    """The rules' account of `tensors`: nothing may be left over or missing."""
    family = families.find(config)
    spec = family.spec(families.Config(config))
    m = match(spec, family.rules[naming], tensors, n_ranks, naming, None, config)
    assert not m.missing
    assert not m.unexpected
    assert not m.problems
    return m


def expand(name: str) -> Iterator[str]:
    """`a.{0-2,5}.b` stands for a.0.b, a.1.b, a.2.b, a.5.b."""
    found = re.search(r"\{([^}]*)\}", name)
    if found is None:
        yield name
        return
    for part in found[1].split(","):
        first, _, last = part.partition("-")
        for i in range(int(first), int(last or first) + 1):
            yield from expand(name[: found.start()] + str(i) + name[found.end() :])


def rounds_to(counted: int, published: int, within: float) -> bool:
    """Whether a count, rounded or cut at the figure's own precision, is the published figure, or near it."""
    unit: int = 10 ** (len(str(published)) - len(str(published).rstrip("0")))
    return -max(unit / 2, published * within) <= counted - published <= max(unit, published * within)


def attention(spec: Spec, layer: int) -> Attention:
    """The mixer of a layer that has attention."""
    mixer = spec.layers[layer].mixer
    assert isinstance(mixer, Attention)
    return mixer


def mixers(spec: Spec) -> str:
    """A letter per layer: attention, latent attention, delta net, Mamba, none."""
    letters = {
        Attention: "a", LatentAttention: "l", CompressedAttention: "c", DeltaNet: "d", Mamba: "m", Mamba1: "m", type(None): "-",
    }  # fmt: skip
    return "".join(letters[type(layer.mixer)] for layer in spec.layers)


def buffers(spec: Spec) -> int:
    """Elements that are buffers upstream and are stored like parameters: selection biases, tables of experts, the scalars of
    layers, xIELU's constants."""
    kinds = (".selection_bias", ".router.table", ".scalar", ".act.beta", ".act.near")
    return sum(slot.size for name, slot in layout(spec).items() if name.endswith(kinds))


def has_experts(spec: Spec) -> bool:
    return any(isinstance(layer.ffn, MoE) for layer in spec.layers)


def upstream_count(case: FamilyCase, config: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the language model that upstream's class builds from a config, on the meta device.

    total: tied weights once; buffers left out, and selection biases, which are buffers in most classes and parameters in
    some (AFMoE, ERNIE 4.5, Laguna). active: without the experts that a token does not visit. embed: the input embedding. tied: the
    head is the embedding. cls: the class.
    """
    text = dict(names.text_config(config))
    whole = names.meta_model(case, text if case.alone else config)
    model = whole
    cfg = whole.config.get_text_config()
    n_experts = next((n for k in _EXPERTS if isinstance(n := getattr(cfg, k, None), int) and n > 0), 0)
    chosen = next((n for k in _CHOSEN if (n := getattr(cfg, k, None))), 0)
    total = idle = 0
    seen: set[int] = set()
    for name, p in model.named_parameters():
        if id(p) in seen or _BESIDE.search(name) or name.endswith(_SELECTION):
            continue
        seen.add(id(p))
        total += p.numel()
        if at := re.search(r"\.(\d+)\..*\bexperts\.", name):
            visited = chosen[int(at[1])] if isinstance(chosen, list) else chosen  # a list: each layer's own
            idle += p.numel() * (n_experts - visited) // n_experts
    embedding, head = whole.get_input_embeddings().weight, whole.get_output_embeddings()
    return {
        "total": total,
        "active": total - idle,
        "embed": embedding.numel(),
        "tied": head is None or head.weight is embedding,
        "cls": type(whole).__name__,
    }


_CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts")
_SELECTION = (".expert_bias", ".e_score_correction_bias")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_BESIDE = re.compile(r"vision|visual|audio|multi_modal|projector|embed_vision|embed_audio")
