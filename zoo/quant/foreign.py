"""Quantisations that zoo does not read: what they are called, so that a refusal names the thing and not its tensors.

Sources: the quantization_config of transformers 5 (`quant_method`), ModelOpt's hf_quant_config.json, compressed-tensors'
formats, and mlx-lm's `quantization`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.formats.base import FLOATS, TensorRef, read_json
from zoo.quant.base import SAID, quantization

READ = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "gptq", "awq", "bitsandbytes", "modelopt")
"""What `quant_method` says where zoo may read the weights; of compressed-tensors `FORMATS`."""
FORMATS = (
    "dense", "float-quantized", "int-quantized", "mixed-precision", "mxfp4-pack-quantized", "mxfp8-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "pack-quantized",
)  # fmt: skip

SIGNS = {  # endings of names that only such weights have; the first that any tensor has
    ".pre_quant_scale": "ModelOpt's AWQ, which scales activations first",
    ".B": "GPTQ in Marlin's layout",
    ".g_idx": "GPTQ",
    ".qzeros": "AWQ or GPTQ",
    ".wscales": "SVDQuant",
    ".qweight": "AWQ, GPTQ or a kin of theirs",
    ".q_invperm": "EXL2",
    ".trellis": "EXL3",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".Qidxs": "QuIP#",
    ".centroids.weight": "VPTQ",
    ".weight._data": "quanto",
    "weight_qdata": "torchao",
    "weight:_data:qdata": "torchao",
}
CALLED = {".g_idx": ("gptq",), ".qzeros": ("gptq", "awq"), ".qweight": ("gptq", "awq")}
"""Signs of what zoo reads where the config calls it one of these."""
FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where ModelOpt, GPTQ's and AWQ's tools say it beside config.json, which may not repeat it."""


def said(config: Mapping[str, Any]) -> str | None:
    """What the config says of quantised weights, in its own words: `quant_method` and what it goes with; None: nothing."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in SAID:
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


def beside(root: Path) -> str | None:
    """What a tool's own file in the folder says of quantised weights; None: there is none, or it says nothing."""
    for name in FILES:
        if (root / name).is_file():
            told = read_json(root / name, "it says how the weights are quantised")
            inner = told.get("quantization")
            if words := [f"{k} {v!r:.40}" for k, v in _words(inner if isinstance(inner, dict) else told)]:
                return f"{name} has {', '.join(words)}"
    return None


def name_of(config: Mapping[str, Any], tensors: Collection[str]) -> str | None:
    """What the weights are quantised as, in one phrase, if zoo does not read that; None if it does, or may."""
    method = quantization(config).get("quant_method")
    names = "\n".join(
        (*tensors, "")
    )  # searched as one text: there may be 100,000 of them, and signs are many
    signs = ((end, what) for end, what in SIGNS.items() if method not in CALLED.get(end, ()))
    sign = next((what for end, what in signs if f"{end}\n" in names), None)
    ends = {end for end in (".qweight", ".qzeros") if f"{end}\n" in names}
    if ends == {".qweight"} and method in CALLED[".qweight"]:
        sign = f"{str(method).upper()} without zero points, as engines lay it out for Marlin's kernels"
    phrase = said(config)
    if isinstance(method, str) and method not in READ and method.lower() not in (sign or "").lower():
        sign = None  # a kin of it: the config knows better
    if sign is not None:
        return f"{sign} ({phrase or LOST})"
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(q := part.get("quantization_config"), Mapping):
            method, form = q.get("quant_method"), q.get("format", "dense")
            if method is None and "group_size" in q:  # MLX's
                continue
            if method not in READ or (method == "compressed-tensors" and form not in FORMATS):
                return f"its config says ({phrase})"
    return None


LOST = "by the names of its tensors; its config does not say"


def codes_of(
    config: Mapping[str, Any], tensors: Mapping[str, TensorRef], wanted: Collection[str]
) -> str | None:
    """What stands in the place of the weights `wanted`, in one phrase, where each has codes there whose quantisation nothing
    names; None where one has not, there is but one, or the config says a way that zoo reads."""
    if said(config) is not None:
        return None
    codes = {n: t.dtype for n, t in tensors.items() if t.dtype not in FLOATS and len(t.shape) > 1}
    longest = max(map(len, wanted), default=0)  # what begins a name may be as many texts as it has dots
    at = {n[:i] for n in codes for i, c in enumerate(n[: longest + 1]) if c == "."} | codes.keys()
    if len(wanted) < 2 or not all(name in at or name.removesuffix(".weight") in at for name in wanted):
        return None
    one = min(codes, key=lambda n: "scale" in n)
    return f"{' and '.join(sorted(set(codes.values())))} codes, as {one} (the config does not say of what method)"
