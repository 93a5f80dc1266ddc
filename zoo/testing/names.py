"""What a release of a given config holds on disk: every tensor's name, dtype and shape, without any weight.

The list comes from upstream itself: the class is built on the meta device and its own save-time conversion
(experts fused in memory, one by one on disk) is run on the meta tensors. What upstream does not know is added
here (the scales of quantised releases) or by the family's case: multi-token-prediction layers, and the places where
a release and `save_pretrained` differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .case import FamilyCase
from .variant import Config as Config
from .variant import Shape
from .variant import Tensor as Tensor

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def released_names(
    case: FamilyCase, config: Config, *, mtp: int = 0, quantised: bool = False
) -> dict[str, Shape]:
    """Names and shapes of all tensors of a release with this config; see `released_tensors`."""
    return {name: t.shape for name, t in released_tensors(case, config, mtp=mtp, quantised=quantised).items()}


def released_tensors(
    case: FamilyCase, config: Config, *, mtp: int = 0, quantised: bool = False
) -> dict[str, Tensor]:
    """All tensors of a release with this config.

    config: a config.json in released or re-saved keys, wrappers (vision + text) included.
    mtp: how many multi-token-prediction layers to add under the family's own names.
    quantised: replace weights as `quantization_config` says: fp8 128x128 blocks (`weight_scale_inv`), mxfp4
      (`_blocks`, `_scales`) or packed int4 (`weight_packed`, `weight_scale`, `weight_shape`).
    """
    tensors = saved_tensors(case, text_config(config) if case.alone else config)
    if case.released is not None:
        tensors = case.released(case, tensors, config)
    if mtp:
        tensors |= mtp_tensors(case, config, mtp)
    if quantised:
        tensors = _quantise(case, tensors, config)
    return tensors


def saved_tensors(case: FamilyCase, config: Config) -> dict[str, Tensor]:
    """What `save_pretrained` of upstream's class would write for this config (nothing is allocated)."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    model = meta_model(case, config)
    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    saved = revert_weight_conversion(model, state)
    dtypes = {f"torch.{name}": code for name, code in (DTYPES | {"int64": "I64"}).items()}
    kept = re.compile("|".join(model._keep_in_fp32_modules_strict or ["(?!)"]))
    return {
        name: Tensor(
            "F32" if t.is_floating_point() and kept.search(name) else dtypes[str(t.dtype)], tuple(t.shape)
        )
        for name, t in saved.items()
    }


def mtp_tensors(case: FamilyCase, config: Config, count: int) -> dict[str, Tensor]:
    """Multi-token-prediction layers under the names of the family's releases.

    Raises KeyError where the case does not know a release with them.
    """
    if case.mtp is None:
        raise KeyError(f"no release of {case.name!r} with multi-token-prediction layers is known")
    return case.mtp(case, config, count)


def parameter_count(case: FamilyCase, config: Config) -> int:
    """Parameters of upstream's class for this config, tied weights once, buffers not counted."""
    return sum(p.numel() for p in meta_model(case, config).parameters())


# --- upstream's class on the meta device --------------------------------------------------------------------


def text_config(config: Config) -> Config:
    """The language model's part of a config, wrapper or not."""
    text: Config = config.get("text_config", config)
    return text


def model_class(case: FamilyCase, config: Config) -> Any:
    """Upstream's class for a released config: the case's, one of `architectures`, or what transformers calls it."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = config["model_type"]
    candidates = [
        case.classes.get(kind),
        *(config.get("architectures") or ()),
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind) if "text_config" in config else None,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind),
    ]
    for name in candidates:
        if name and hasattr(transformers, name):
            return getattr(transformers, name)
    raise KeyError(f"transformers has no class for model_type {kind!r} ({config.get('architectures')})")


def upstream_config(case: FamilyCase, config: Config) -> Any:
    """The config object upstream's class wants: other vendors' model_type mapped, quantisation left out."""
    config_class: Any = model_class(case, config).config_class
    keys = {k: _plain(v) for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    keys["model_type"] = config_class.model_type
    return config_class.from_dict(case.upstream_keys(keys))


def _plain(value: Any) -> Any:
    """A copy (config classes change what they are given) with JSON's stand-ins for infinity resolved."""
    if isinstance(value, dict):
        return float(value["__float__"]) if "__float__" in value else {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def meta_model(case: FamilyCase, config: Config) -> Any:
    """Upstream's class for this config on the meta device, in the release's dtype."""
    import torch

    cls = model_class(case, config)
    with torch.device("meta"):
        return cls._from_config(upstream_config(case, config), dtype=getattr(torch, dtype_of(config)))


def dtype_of(config: Config) -> str:
    """The dtype a config names, as torch calls it; bfloat16 where it names none."""
    given = (c.get(key) for c in (config, text_config(config)) for key in ("dtype", "torch_dtype"))
    return next((str(d) for d in given if d), "bfloat16")


def one_layer(text: Config, changes: Config) -> dict[str, Any]:
    """The same architecture with a single decoder layer (per-layer lists cut to their first entry)."""
    per_layer = {
        k: v[:1]
        for k, v in text.items()
        if isinstance(v, list) and len(v) == text["num_hidden_layers"] and k not in changes
    }
    return {**text, **per_layer, "num_hidden_layers": 1, **changes}


def first_layer(case: FamilyCase, config: Config) -> dict[str, Tensor]:
    """The tensors of layer 0 of a release with this config, without their prefix."""
    prefix = "model.layers.0."
    saved = saved_tensors(case, config)
    return {k.removeprefix(prefix): t for k, t in saved.items() if k.startswith(prefix)}


# --- quantised releases -------------------------------------------------------------------------------------

# Never quantised, whatever the scheme: routers, norms, embeddings and heads, convolutions, the MTP
# projection, DSA's per-head weights.
_PLAIN = re.compile(
    r"(^|\.)(gate|router|lm_head|head|embed_tokens|eh_proj|weights_proj|e_score_correction_bias"
    r"|\w*norm\w*|\w*conv1d|mlp1|vision_\w+|multi_modal_projector)(\.|$)"
)


def _quantise(case: FamilyCase, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    scheme = config.get("quantization_config") or text_config(config).get("quantization_config")
    if scheme is None:
        raise KeyError("this config has no quantization_config")
    method = scheme["quant_method"]
    if method == "modelopt":
        return _modelopt(tensors, scheme["quantized_layers"])
    skip = [
        m for key in ("modules_to_not_convert", "ignore", "ignored_layers") for m in scheme.get(key) or ()
    ]
    skip += case.never_quantised
    listed = _listed(skip)
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        module = name.removesuffix(".weight")
        if case.stored is not None:
            out |= case.stored(name, t)
        elif method == "mxfp4":
            out |= _mxfp4(name, t)
        elif not name.endswith(".weight") or len(t.shape) != 2 or _PLAIN.search(module) or listed(module):
            out[name] = t
        elif method == "fp8":
            rows, columns = scheme.get("weight_block_size") or (128, 128)
            out[name] = Tensor("F8_E4M3", t.shape)
            blocks = (-(-t.shape[0] // rows), -(-t.shape[1] // columns))
            out[f"{module}.weight_scale_inv"] = Tensor("F32", blocks)
        elif method == "compressed-tensors" and scheme.get("format") == "pack-quantized":
            weights = scheme["config_groups"]["group_0"]["weights"]
            rows, columns = t.shape
            per_word, group = 32 // weights["num_bits"], weights["group_size"]
            out[f"{module}.weight_packed"] = Tensor("I32", (rows, columns // per_word))
            out[f"{module}.weight_scale"] = Tensor("BF16", (rows, columns // group))
            out[f"{module}.weight_shape"] = Tensor("I32", (2,))
        else:
            raise KeyError(f"unknown quantisation {method!r} ({scheme.get('format')})")
    return out


def _modelopt(tensors: Mapping[str, Tensor], layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """ModelOpt's MIXED_PRECISION: each module as `layers` says; it quantises experts that were one tensor as matrices of their own."""
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        module = name.removesuffix(".weight")
        stack, experts, part = module.rpartition(".experts.")
        if experts and f"{stack}.experts" in layers and len(t.shape) == 3:
            algo = layers[f"{stack}.experts"]["quant_algo"]
            for e in range(t.shape[0]):
                for matrix, shape in _matrices(part, (t.shape[1], t.shape[2])):
                    out |= _by_modelopt(f"{stack}.experts.{e}.{matrix}", shape, algo)
        elif module in layers:
            out |= _by_modelopt(module, (t.shape[0], t.shape[1]), layers[module]["quant_algo"])
        else:
            out[name] = t
    return out


def _matrices(part: str, shape: tuple[int, int]) -> list[tuple[str, tuple[int, int]]]:
    if part != "gate_up_proj":
        return [(part, shape)]
    half = (shape[0] // 2, shape[1])
    return [("gate_proj", half), ("up_proj", half)]


def _by_modelopt(module: str, shape: tuple[int, int], algo: str) -> dict[str, Tensor]:
    rows, columns = shape
    one = {f"{module}.weight_scale_2": Tensor("F32", ())} if algo.endswith("NVFP4") else {}
    one |= {f"{module}.input_scale": Tensor("F32", ())} if not algo.startswith("W4A16") else {}
    if algo == "FP8":
        codes, scale = Tensor("F8_E4M3", shape), Tensor("F32", ())
    elif algo in ("NVFP4", "W4A16_NVFP4"):
        codes, scale = Tensor("U8", (rows, columns // 2)), Tensor("F8_E4M3", (rows, columns // 16))
    else:
        raise KeyError(f"unknown quantisation {algo!r} of {module}")
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale, **one}


def _listed(patterns: Iterable[str]) -> Callable[[str], bool]:
    """As the configs list modules: a whole path, one component of it, or a regular expression after `re:`."""
    expressions = [re.compile(p.removeprefix("re:")) for p in patterns if p.startswith("re:")]
    names = {p for p in patterns if not p.startswith("re:")}

    def listed(module: str) -> bool:
        return (
            module in names
            or not names.isdisjoint(module.split("."))
            or any(e.match(module) for e in expressions)
        )

    return listed


def _mxfp4(name: str, t: Tensor) -> dict[str, Tensor]:
    """gpt-oss: [E, in, out] -> [E, out, in/32, 16] pairs of nibbles and [E, out, in/32] exponents on disk."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: t}
    experts, columns, rows = t.shape
    return {
        f"{name}_blocks": Tensor("U8", (experts, rows, columns // 32, 16)),
        f"{name}_scales": Tensor("U8", (experts, rows, columns // 32)),
    }


def holes(dst: Path, config: dict[str, Any], tensors: dict[str, Any], shard: float = 4.3e9) -> Path:
    """A checkpoint folder of these tensors: real headers and an index over holes that take no room."""
    (dst / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, Any]] = [{}]
    sizes = [0]
    for name, t in tensors.items():
        if sizes[-1] > shard:
            shards.append({})
            sizes.append(0)
        offsets = [sizes[-1], sizes[-1] + t.nbytes]
        shards[-1][name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": offsets}
        sizes[-1] += t.nbytes
    weight_map: dict[str, str] = {}
    for k, (header, size) in enumerate(zip(shards, sizes, strict=True)):
        file = f"model-{k + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(header, file)
        raw = json.dumps(header).encode()
        with (dst / file).open("wb") as f:
            f.write(len(raw).to_bytes(8, "little") + raw)
            f.truncate(8 + len(raw) + size)
    (dst / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return dst
