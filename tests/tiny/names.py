"""What a release of a given config holds on disk: every tensor's name, dtype and shape, without any weight.

The list comes from upstream itself: the class is built on the meta device and its own save-time conversion
(experts fused in memory, one by one on disk) is run on the meta tensors. What upstream does not know is added
here and marked: multi-token-prediction layers, the scales of quantised releases, and the places where a
release and `save_pretrained` differ.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]
Config = Mapping[str, Any]
T = TypeVar("T")

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

# Classes by model_type where `architectures` is missing or is not what transformers 5.23 calls the class.
MODEL_CLASSES = {
    "kimi_k2": "DeepseekV3ForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a release: safetensors' dtype name, and the shape."""

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        size = {"F32": 4, "I32": 4, "I64": 8, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1}[self.dtype]
        return size * math.prod(self.shape)


def released_names(config: Config, *, mtp: int = 0, quantised: bool = False) -> dict[str, Shape]:
    """Names and shapes of all tensors of a release with this config; see `released_tensors`."""
    return {name: t.shape for name, t in released_tensors(config, mtp=mtp, quantised=quantised).items()}


def released_tensors(config: Config, *, mtp: int = 0, quantised: bool = False) -> dict[str, Tensor]:
    """All tensors of a release with this config.

    config: a config.json in released or re-saved keys, wrappers (vision + text) included; or Mistral's
      params.json.
    mtp: how many multi-token-prediction layers to add under the family's own names.
    quantised: replace weights as `quantization_config` says: fp8 128x128 blocks (`weight_scale_inv`), mxfp4
      (`_blocks`, `_scales`) or packed int4 (`weight_packed`, `weight_scale`, `weight_shape`).
    """
    if "dim" in config:
        return _mistral_format(config, quantised)
    text = text_config(config)
    family = text["model_type"]
    # The wrapper of Gemma 3n needs timm for its vision tower, so its language model is built alone.
    tensors = saved_tensors(text if family == "gemma3n_text" else config)
    if family == "kimi_linear":
        tensors = undo_kimi_dense_rename(tensors)
    elif family == "gemma3_text":
        tensors = {gemma3_vision_prefix(name): t for name, t in tensors.items()}
    elif family == "gemma3n_text":
        tensors = {gemma3n_prefix(name): t for name, t in tensors.items()} | gemma3n_shared_kv(text)
        if "audio_config" in config:
            tensors |= gemma3n_modalities(config)
    if mtp:
        tensors |= mtp_tensors(config, mtp)
    if quantised:
        tensors = _quantise(tensors, config)
    return tensors


def saved_tensors(config: Config) -> dict[str, Tensor]:
    """What `save_pretrained` of upstream's class would write for this config (nothing is allocated)."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    model = meta_model(config)
    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    saved = revert_weight_conversion(model, state)
    dtypes = {f"torch.{name}": code for name, code in DTYPES.items()}
    kept = re.compile("|".join(model._keep_in_fp32_modules_strict or ["(?!)"]))
    return {
        name: Tensor("F32" if kept.search(name) else dtypes[str(t.dtype)], tuple(t.shape))
        for name, t in saved.items()
    }


def parameter_count(config: Config) -> int:
    """Parameters of upstream's class for this config, tied weights once, buffers not counted."""
    return sum(p.numel() for p in meta_model(config).parameters())


@dataclass(frozen=True)
class ClassDefaults:
    """A family as upstream's config class makes it when told nothing: the real size, on the meta device."""

    config: dict[str, Any]
    parameters: int
    names: dict[str, Shape]


def config_of_class_defaults(family: str) -> ClassDefaults:
    """`family` is a model_type of transformers ("llama", "gemma3_text", "deepseek_v3", ...)."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family).to_dict()
    return ClassDefaults(config, parameter_count(config), released_names(config))


# --- upstream's class on the meta device --------------------------------------------------------------------


def text_config(config: Config) -> Config:
    """The language model's part of a config, wrapper or not."""
    return config.get("text_config", config)


def model_class(config: Config) -> type[PreTrainedModel]:
    """Upstream's class for a released config: `architectures`, or what transformers calls it."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = config["model_type"]
    candidates = [
        MODEL_CLASSES.get(kind),
        *(config.get("architectures") or ()),
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind) if "text_config" in config else None,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind),
    ]
    for name in candidates:
        if name and hasattr(transformers, name):
            return getattr(transformers, name)
    raise KeyError(f"transformers has no class for model_type {kind!r} ({config.get('architectures')})")


def upstream_config(config: Config) -> Any:
    """The config object upstream's class wants: other vendors' model_type mapped, quantisation left out."""
    config_class: Any = model_class(config).config_class
    keys = {k: _plain(v) for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    keys["model_type"] = config_class.model_type
    if keys["model_type"] == "mistral3":
        # The wrapper's default is tied, but releases that leave the key out mean their text model's value.
        keys.setdefault("tie_word_embeddings", text_config(config).get("tie_word_embeddings", False))
    return config_class.from_dict(keys)


def _plain(value: Any) -> Any:
    """A copy (config classes change what they are given) with JSON's stand-ins for infinity resolved."""
    if isinstance(value, dict):
        return float(value["__float__"]) if "__float__" in value else {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def meta_model(config: Config) -> PreTrainedModel:
    """Upstream's class for this config on the meta device, in the release's dtype."""
    import torch

    cls = model_class(config)
    with torch.device("meta"):
        return cls._from_config(upstream_config(config), dtype=getattr(torch, _dtype(config)))


def _dtype(config: Config) -> str:
    given = (c.get(key) for c in (config, text_config(config)) for key in ("dtype", "torch_dtype"))
    return next((d for d in given if d), "bfloat16")


# --- where a release and save_pretrained differ -------------------------------------------------------------


def undo_kimi_dense_rename(tensors: Mapping[str, T]) -> dict[str, T]:
    """Kimi Linear's dense layers are released as `mlp.*`; `save_pretrained` writes `block_sparse_moe.*`."""
    dense = re.compile(r"(layers\.\d+)\.block_sparse_moe\.((?:gate|up|down)_proj)\.")
    return {dense.sub(r"\1.mlp.\2.", name): value for name, value in tensors.items()}


def gemma3_vision_prefix(name: str) -> str:
    """Gemma 3's released vision tower is `vision_tower.vision_model.*`; upstream saves `vision_tower.*`."""
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def gemma3n_prefix(name: str) -> str:
    """Gemma 3n's language model is released inside a wrapper."""
    return re.sub(r"^model\.(?!language_model\.)", "model.language_model.", name)


def gemma3n_shared_kv(text: Config) -> dict[str, Tensor]:
    """k_proj, v_proj, k_norm of the layers that reuse another layer's K and V: released, never read."""
    cfg = upstream_config(text)
    n, kv, d = cfg.num_hidden_layers, cfg.num_key_value_heads * cfg.head_dim, cfg.head_dim
    out = {}
    for i in range(n - cfg.num_kv_shared_layers, n):
        base = f"model.language_model.layers.{i}.self_attn."
        for name, shape in (
            ("k_proj", (kv, cfg.hidden_size)),
            ("v_proj", (kv, cfg.hidden_size)),
            ("k_norm", (d,)),
        ):
            out[f"{base}{name}.weight"] = Tensor("BF16", shape)
    return out


def gemma3n_modalities(config: Config) -> dict[str, Tensor]:
    """Audio tower and the two embedders of the wrapper; the vision tower is timm's and is left out."""
    import torch
    from transformers import AutoModel, Gemma3nAudioConfig, Gemma3nVisionConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nMultimodalEmbedder

    text = upstream_config(text_config(config))
    audio = Gemma3nAudioConfig(**{k: v for k, v in config["audio_config"].items() if k != "model_type"})
    vision = Gemma3nVisionConfig(**{k: v for k, v in config["vision_config"].items() if k != "model_type"})
    with torch.device("meta"):
        parts = {
            "audio_tower": AutoModel.from_config(audio),
            "embed_audio": Gemma3nMultimodalEmbedder(audio, text),
            "embed_vision": Gemma3nMultimodalEmbedder(vision, text),
        }
    return {
        f"model.{part}.{name}": Tensor("BF16", tuple(t.shape))
        for part, module in parts.items()
        for name, t in module.state_dict().items()
    }


def mtp_tensors(config: Config, count: int) -> dict[str, Tensor]:
    """Multi-token-prediction layers under the names of the family's releases (as sglang and vLLM load them).

    Each is a decoder layer with two input norms, a projection of [embedding, hidden] and an output norm.
    """
    text = dict(text_config(config))
    family, d, v = text["model_type"], text["hidden_size"], text["vocab_size"]
    dtype = DTYPES[_dtype(config)]
    vector, matrix = Tensor(dtype, (d,)), Tensor(dtype, (d, 2 * d))
    out: dict[str, Tensor] = {}

    if family in ("deepseek_v3", "kimi_k2", "deepseek_v32", "glm4_moe"):
        block = _layer(_one_layer(text, {"first_k_dense_replace": 0, "mlp_layer_types": None}))
        for i in range(text["num_hidden_layers"], text["num_hidden_layers"] + count):
            base = f"model.layers.{i}."
            out |= {base + name: t for name, t in block.items()}
            out |= {f"{base}{name}.weight": vector for name in ("enorm", "hnorm", "shared_head.norm")}
            out |= {
                f"{base}{name}.weight": Tensor(dtype, (v, d)) for name in ("embed_tokens", "shared_head.head")
            }
            out[f"{base}eh_proj.weight"] = matrix
    elif family == "qwen3_next":
        block = _layer(_one_layer(text, {"layer_types": ["full_attention"]}))
        for i in range(count):
            out |= {f"mtp.layers.{i}.{name}": t for name, t in block.items()}
        out |= {
            f"mtp.{name}.weight": vector for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
        }
        out["mtp.fc.weight"] = matrix
    elif family == "mimo_v2_flash":
        block = _layer(_one_layer(text, {"layer_types": ["sliding_attention"], "mlp_layer_types": ["dense"]}))
        for i in range(count):
            base = f"model.mtp.layers.{i}."
            for name, t in block.items():
                out[base + name.replace("post_attention_layernorm", "pre_mlp_layernorm")] = t
            out |= {f"{base}{name}.weight": vector for name in ("enorm", "hnorm", "final_layernorm")}
            out[f"{base}eh_proj.weight"] = matrix
    elif family == "nemotron_h":
        kinds = upstream_config(config).mtp_layers_block_type
        drop = {"hybrid_override_pattern", "layers_block_type", "num_hidden_layers"}
        small = {k: x for k, x in text.items() if k not in drop} | {"layers_block_type": list(kinds)}
        blocks = saved_tensors(small)
        for i in range(count * len(kinds)):
            source = f"backbone.layers.{i % len(kinds)}."
            base = f"mtp.layers.{i}."
            out |= {base + k.removeprefix(source): t for k, t in blocks.items() if k.startswith(source)}
            if i % len(kinds) == 0:
                out |= {
                    f"{base}enorm.weight": vector,
                    f"{base}hnorm.weight": vector,
                    f"{base}eh_proj.weight": matrix,
                }
            if i % len(kinds) == len(kinds) - 1:
                out[f"{base}final_layernorm.weight"] = vector
    else:
        raise KeyError(f"no release of {family!r} with multi-token-prediction layers is known")
    return out


def _one_layer(text: Config, changes: Config) -> dict[str, Any]:
    """The same architecture with a single decoder layer (per-layer lists cut to their first entry)."""
    per_layer = {
        k: v[:1]
        for k, v in text.items()
        if isinstance(v, list) and len(v) == text["num_hidden_layers"] and k not in changes
    }
    return {**text, **per_layer, "num_hidden_layers": 1, **changes}


def _layer(config: Config) -> dict[str, Tensor]:
    prefix = "model.layers.0."
    return {k.removeprefix(prefix): t for k, t in saved_tensors(config).items() if k.startswith(prefix)}


def _mistral_format(params: Config, quantised: bool) -> dict[str, Tensor]:
    """Mistral Large 3 from its params.json: Mistral's names, experts one by one.

    Its fp8 release scales blocks of 128x128 by `weight_scale`; wq_a, wkv_a_with_mqa and gate stay bf16.
    """
    from . import extras

    out: dict[str, Tensor] = {}
    for name, t in saved_tensors(extras.from_params_json(dict(params))).items():
        if fused := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)", name):
            experts, rows, columns = t.shape
            parts = (
                {"w2": (rows, columns)}
                if fused[2] == "down_proj"
                else dict.fromkeys(("w1", "w3"), (rows // 2, columns))
            )
            for e in range(experts):
                for part, shape in parts.items():
                    out[f"layers.{fused[1]}.experts.{e}.{part}.weight"] = Tensor(t.dtype, shape)
        else:
            out[extras.mistral_name(name)] = t
    if quantised:
        for name in [n for n in out if re.search(r"\.(w[123]|wq_b|wkv_b|wo)\.weight$", n)]:
            rows, columns = out[name].shape
            out[name] = Tensor("F8_E4M3", (rows, columns))
            out[f"{name}_scale"] = Tensor("F32", (-(-rows // 128), -(-columns // 128)))
    return out


# --- quantised releases -------------------------------------------------------------------------------------

# Never quantised, whatever the scheme: routers, norms, embeddings and heads, convolutions, the MTP
# projection, DSA's per-head weights.
_PLAIN = re.compile(
    r"(^|\.)(gate|router|lm_head|head|embed_tokens|eh_proj|weights_proj|e_score_correction_bias"
    r"|\w*norm\w*|\w*conv1d|mlp1|vision_\w+|multi_modal_projector)(\.|$)"
)


def _quantise(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    scheme = config.get("quantization_config") or text_config(config).get("quantization_config")
    if scheme is None:
        raise KeyError("this config has no quantization_config")
    method = scheme["quant_method"]
    skip = [
        m for key in ("modules_to_not_convert", "ignore", "ignored_layers") for m in scheme.get(key) or ()
    ]
    if config["model_type"] == "mimo_v2_flash":
        skip.append("o_proj")  # kept in bf16 by the release, though its config does not say so
    listed = _listed(skip)
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        module = name.removesuffix(".weight")
        if method == "mxfp4":
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
    weight_map = {}
    for k, (header, size) in enumerate(zip(shards, sizes, strict=True)):
        file = f"model-{k + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(header, file)
        raw = json.dumps(header).encode()
        with (dst / file).open("wb") as f:
            f.write(len(raw).to_bytes(8, "little") + raw)
            f.truncate(8 + len(raw) + size)
    (dst / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return dst
