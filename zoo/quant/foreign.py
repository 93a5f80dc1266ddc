"""Quantisations that zoo does not read: what they are called, so that a refusal names the thing and not its tensors.

Sources: the quantization_config of transformers 5 (`quant_method`), ModelOpt's hf_quant_config.json, compressed-tensors'
formats, and mlx-lm's `quantization`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

READ = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors")
"""What `quant_method` says where zoo may read the weights; of compressed-tensors `FORMATS`."""
FORMATS = ("dense", "float-quantized", "naive-quantized", "pack-quantized")

SIGNS = {  # endings of names that only such weights have
    ".quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    ".SCB": "bitsandbytes int8",
    ".weight_scale_2": "NVFP4",
    ".weight_global_scale": "NVFP4",
    ".g_idx": "GPTQ",
    ".qzeros": "AWQ or GPTQ",
}


def said(config: Mapping[str, Any]) -> str | None:
    """What the config says of quantised weights, in its own words: `quant_method` and what it goes with; None: nothing."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "quantization", "compression_config"):
            if isinstance(q := part.get(key), Mapping) and q:
                words = [f"{k} {v!r:.40}" for k, v in _words(q)]
                return f"{key} has {', '.join(words)}" if words else f"it has a {key}"
    return None


def _words(q: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What tells one method from another."""
    for key in ("quant_method", "quant_algo", "format", "mode", "bits", "bnb_4bit_quant_type"):
        if isinstance(q.get(key), str | int):
            yield key, q[key]
    for key in ("load_in_4bit", "load_in_8bit"):
        if q.get(key) is True:
            yield key, True


def name_of(config: Mapping[str, Any], tensors: Collection[str]) -> str | None:
    """What the weights are quantised as, in one phrase, if zoo does not read that; None if it does, or may."""
    sign = next((what for end, what in SIGNS.items() if any(n.endswith(end) for n in tensors)), None)
    mlx = any(n.endswith(".scales") for n in tensors) and any(n.endswith(".biases") for n in tensors)
    phrase, what = said(config), sign or ("MLX's groups of integers" if mlx else None)
    if what is not None:
        return f"{what} ({phrase or 'by the names of its tensors; its config does not say'})"
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(q := part.get("quantization_config"), Mapping):
            method, form = q.get("quant_method"), q.get("format", "dense")
            if method not in READ or (method == "compressed-tensors" and form not in FORMATS):
                return phrase
    return None
