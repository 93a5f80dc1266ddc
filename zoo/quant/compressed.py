"""What the config of a compressed-tensors release says. Source: its quant_scheme.py and quant_config.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.errors import ZooError
from zoo.quant.base import quantization

PRESETS: dict[str, Mapping[str, Any]] = {
    "FP8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "FP8_DYNAMIC": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "FP8_BLOCK": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    "W4A16": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
    "W4A16_ASYM": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128},
    "W8A16": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
    "INT8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "W8A8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "NVFP4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "NVFP4A16": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "MXFP4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    "MXFP8": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32},
    "MXFP8A16": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32},
    "MXFP4A16": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
}
"""Groups that a config may name instead of writing them out."""
MAX_GROUPS = 64
"""Of a config: each is looked at for each weight, and releases have a few."""


def settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config's quantization_config. Raises ZooError where weights do not stand for themselves."""
    q = quantization(config)
    if q.get("transform_config"):
        raise ZooError(
            "config.json: quantization_config has a transform_config: activations are rotated before they meet these "
            "weights, which zoo does not do; expected weights that stand for themselves"
        )
    sparsity = q.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise ZooError(
            f"config.json: quantization_config has weights stored as {sparsity['format']!r}; zoo reads dense ones"
        )
    return q


def weights(config: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    """How the config's groups store weights, those of this `kind` ("float" or "int")."""
    groups = settings(config).get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise ZooError(f"config.json: config_groups is {str(groups)[:80]}; expected an object")
    if len(groups) > MAX_GROUPS:
        raise ZooError(
            f"config.json: config_groups has {len(groups)} groups (limit {MAX_GROUPS}): no release has as many"
        )
    found = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else PRESETS.get(name)
        if weights is not None and not isinstance(weights, Mapping) or not isinstance(group, Mapping | list):
            raise ZooError(
                f"config.json: config_groups has {name!r} as {str(group)[:80]}; expected an object"
            )
        if isinstance(group, list) and weights is None:
            raise ZooError(
                f"config.json: config_groups names the preset {name!r}; known: {', '.join(PRESETS)}"
            )
        if weights and weights.get("type", kind) == kind:
            found.append(weights)
    return found
