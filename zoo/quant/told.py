"""What a config says of quantised weights, in words: the ways, how many modules have each, and what stays as it is. Imports no
tensor library; nothing is looked up in the weights, which `zoo.quant.schemes` does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from zoo.quant.base import SAID, quantization

MOST = 6
"""Patterns of names that are told before the rest are counted."""
_LEFT_OUT = ("modules_to_not_convert", "ignore", "exclude_modules", "llm_int8_skip_modules", "ignored_layers")
_ALGORITHMS = {
    "FP8": "fp8, one scale a tensor", "NVFP4": "NVFP4", "W4A16_NVFP4": "NVFP4, activations as they are", "MXFP8": "MXFP8",
    "MIXED_PRECISION": "mixed",
}  # fmt: skip


def told(config: Mapping[str, Any]) -> str | None:
    """One line; None: the config says nothing of it. Raises ZooError for a `quantization_config` that is no object."""
    q = quantization(config, *SAID)
    if not q:
        return None
    ways = _ways(q)
    kept = _folded(_left_out(q))
    return f"{'; '.join(ways)}{f'; as they are: {kept}' if kept else ''}"


def _ways(q: Mapping[str, Any]) -> list[str]:
    """Each way of storing weights, with what has it."""
    method = str(
        q.get("quant_method") or ("mlx" if "group_size" in q else q.get("quant_algo") or "not named")
    )
    layers, groups = q.get("quantized_layers"), q.get("config_groups")
    if isinstance(layers, Mapping):
        of = Counter(str(x.get("quant_algo") if isinstance(x, Mapping) else x) for x in layers.values())
        return [f"{method}: " + ", ".join(f"{_ALGORITHMS.get(k, k)} in {n:,} modules" for k, n in of.items())]
    if method == "modelopt" and "quant_algo" in q:
        return [f"modelopt: {_ALGORITHMS.get(str(q['quant_algo']), q['quant_algo'])}"]
    if isinstance(groups, Mapping) and groups:
        return [f"{method}: " + ", ".join(_group(k, g) for k, g in groups.items())]
    if method == "mlx":
        own = Counter(_mlx({"bits": 4, "group_size": 64, **v}) for v in q.values() if isinstance(v, Mapping))
        return [f"MLX: {_mlx(q)}", *(f"{way} in {n:,} modules" for way, n in own.items())]
    if method == "bitsandbytes":
        if q.get("load_in_8bit"):
            return ["bitsandbytes: 8 bits, a scale per row"]
        nested = ", scales in 8 bits" if q.get("bnb_4bit_use_double_quant") else ""
        return [f"bitsandbytes: {q.get('bnb_4bit_quant_type', 'fp4')}, a scale per 64{nested}"]
    if block := q.get("weight_block_size"):
        return [f"{method}: e4m3, {_blocked(block)}"]
    facts = [f"{q['bits']} bits" if "bits" in q else "", _grouped(q.get("group_size"))]
    facts += ["act-order"] if q.get("desc_act") is True else []
    facts += [f"version {q['version']}"] if "version" in q else []
    return [", ".join([f"{method}: {facts[0]}" if facts[0] else method, *(f for f in facts[1:] if f)])]


def _group(name: str, group: Any) -> str:
    """One of compressed-tensors' (or ModelOpt's) groups."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return f"{name} in {_targets(group)}"
    kind = {"int": "integers", "float": "floats"}.get(str(weights.get("type", "int")), "codes")
    size = weights.get("group_size")
    scale = _grouped(size) or {"channel": "a scale per row", "tensor": "one scale a tensor", "block": "a scale per block"}.get(
        str(weights.get("strategy")), ""
    )  # fmt: skip
    if block := weights.get("block_structure"):
        scale = _blocked(block)
    zeros = "" if weights.get("symmetric", True) is not False else " with zero points"
    facts = [f"{kind} of {weights.get('num_bits', '?')} bits{zeros}", *([scale] if scale else [])]
    return f"{', '.join(facts)} in {_targets(group.get('targets'))}"


def _blocked(block: Any) -> str:
    return f"a scale per {'x'.join(map(str, block)) if isinstance(block, list) else block}"


def _targets(targets: Any) -> str:
    names = [str(t) for t in targets] if isinstance(targets, list) else [str(targets)]
    return (
        "all linear layers"
        if names == ["Linear"]
        else f"{len(names):,} modules"
        if len(names) > 2
        else " and ".join(names)
    )


def _mlx(q: Mapping[str, Any]) -> str:
    mode = q.get("mode", "affine")
    return f"{q.get('bits')} bits, {_grouped(q.get('group_size'))}{'' if mode == 'affine' else f', {mode}'}"


def _grouped(size: Any) -> str:
    return (
        f"a scale per {size}" if type(size) is int and size > 0 else "a scale per row" if size == -1 else ""
    )


def _left_out(q: Mapping[str, Any]) -> list[str]:
    lists = [q[key] for key in _LEFT_OUT if isinstance(q.get(key), list)]
    return [str(name) for names in lists for name in names]


def _folded(names: Iterable[str]) -> str:
    """Names with the numbers of layers left out, and how many there are of each."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    shown = [f"{name} ({n})" if n > 1 else name for name, n in counts.most_common(MOST)]
    return ", ".join(shown) + (f" and {len(counts) - MOST} more" if len(counts) > MOST else "")
