"""What llama.cpp writes into a GGUF, in Hugging Face terms: architecture names and hyperparameters.

`config(metadata, tensors, tables, where)` gives the config.json that the release had, as far as it
matters. What llama.cpp does not write because its code knows it (a norm's form, a pattern of layers) is
filled in here, with its source. Key names: gguf-py's constants.py.

- Scaling of rotary frequencies as Llama 3.1 does it is not a field but a tensor, `rope_freqs.weight`:
  its factors are compared with those that the usual constants give.
- Gemma's norm weights are stored as 1 + w: `norm_weight_plus_one` says so to the family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import TensorRef

CONSTANTS = ("rope_freqs.weight",)
"""Tensors whose values belong to the config."""

Tables = Mapping[str, tuple[float, ...]]


class _Fields:
    """The metadata of one architecture."""

    def __init__(
        self, metadata: Mapping[str, Any], tensors: Mapping[str, TensorRef], tables: Tables, where: str
    ):
        self.metadata, self.tensors, self.tables, self.where = metadata, tensors, tables, where
        self.arch = metadata.get("general.architecture")

    def __getitem__(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise ZooError(
                f"{self.where}: field '{self.arch}.{key}' is missing, and this architecture needs it"
            )
        return value

    def get(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            return value[0]  # one number per layer, all the same
        return value

    def has(self, tensor: str) -> bool:
        return any(name.startswith("blk.") and name.split(".", 2)[2] == tensor for name in self.tensors)


def config(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorRef], tables: Tables, where: str
) -> dict[str, Any]:
    """config.json of a GGUF. Raises ZooError for an architecture that is not known here."""
    f = _Fields(metadata, tensors, tables, where)
    if f.arch not in _ARCHITECTURES:
        raise ZooError(
            f"{where}: GGUF architecture {f.arch!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    model_type, architecture, more = _ARCHITECTURES[f.arch]
    if (embedding := tensors.get("token_embd.weight")) is None:
        raise ZooError(f"{where}: there is no tensor 'token_embd.weight': not a language model?")
    out = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": f["embedding_length"],
        "num_hidden_layers": f["block_count"],
        "num_attention_heads": f["attention.head_count"],
        "num_key_value_heads": f.get("attention.head_count_kv", f["attention.head_count"]),
        "rms_norm_eps": f["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": f["context_length"],
        "rope_theta": f.get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
        "attention_bias": f.has("attn_q.bias"),
    }
    if f.get("feed_forward_length"):
        out["intermediate_size"] = f["feed_forward_length"]
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        if (number := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            out[name] = number
    out["rope_scaling"] = _rope_scaling(f)
    return out | more(f, out)


def _rope_scaling(f: _Fields) -> dict[str, Any] | None:
    if (factors := f.tables.get("rope_freqs.weight")) is not None:
        return _llama3_scaling(f, factors)
    kind = f.get("rope.scaling.type", "none")
    if kind in ("none", ""):
        return None
    if kind not in ("linear", "yarn"):
        raise ZooError(f"{f.where}: rope.scaling.type is {kind!r}; supported: linear, yarn")
    out = {"rope_type": kind, "factor": f["rope.scaling.factor"]}
    if kind == "yarn":
        out["original_max_position_embeddings"] = f["rope.scaling.original_context_length"]
        out["beta_fast"] = f.get("rope.scaling.yarn_beta_fast", 32.0)
        out["beta_slow"] = f.get("rope.scaling.yarn_beta_slow", 1.0)
    return out


def _llama3_scaling(f: _Fields, factors: tuple[float, ...]) -> dict[str, Any]:
    """The settings behind `rope_freqs`: convert_hf_to_gguf.py of llama.cpp makes the factors from them."""
    theta, dim = float(f.get("rope.freq_base", 10000.0)), 2 * len(factors)
    factor, low_factor, high_factor, original = round(max(factors), 4), 1.0, 4.0, 8192
    low, high = original / low_factor, original / high_factor  # wavelengths
    for k, found in enumerate(factors):
        wavelength = 2 * math.pi * theta ** (2 * k / dim)
        if wavelength < high:
            want = 1.0
        elif wavelength > low:
            want = factor
        else:
            smooth = (original / wavelength - low_factor) / (high_factor - low_factor)
            want = 1 / ((1 - smooth) / factor + smooth)
        if not math.isclose(found, want, rel_tol=1e-4):
            raise ZooError(
                f"{f.where}: rope_freqs.weight[{k}] is {found:.6g}; the factors of the usual scaling (factor "
                f"{factor:g}, low 1, high 4, original context 8192) would have {want:.6g} there: not supported"
            )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low_factor,
        "high_freq_factor": high_factor,
        "original_max_position_embeddings": original,
    }


def _head_dim(f: _Fields, out: dict[str, Any]) -> int:
    return int(f.get("attention.key_length") or out["hidden_size"] // out["num_attention_heads"])


def _llama(f: _Fields, out: dict[str, Any]) -> dict[str, Any]:
    if f.get("expert_count"):
        raise ZooError(f"{f.where}: a llama GGUF with {f['expert_count']} experts (Mixtral) is not supported")
    head_dim = f.get("attention.key_length") or f.get("rope.dimension_count") or _head_dim(f, out)
    return {"head_dim": head_dim, "mlp_bias": f.has("ffn_gate.bias")}


def _qwen3(f: _Fields, out: dict[str, Any]) -> dict[str, Any]:
    return {"head_dim": _head_dim(f, out), "use_sliding_window": False}


def _qwen3_moe(f: _Fields, out: dict[str, Any]) -> dict[str, Any]:
    return _qwen3(f, out) | {
        "num_experts": f["expert_count"],
        "num_experts_per_tok": f["expert_used_count"],
        "moe_intermediate_size": f["expert_feed_forward_length"],
        "norm_topk_prob": True,  # fixed in llama.cpp's graph of this architecture
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma3(f: _Fields, out: dict[str, Any]) -> dict[str, Any]:
    head_dim = _head_dim(f, out)
    # llama.cpp knows the 27B by its 62 layers: there the scale is (hidden / heads)^-0.5.
    scalar = out["hidden_size"] // out["num_attention_heads"] if out["num_hidden_layers"] == 62 else head_dim
    return {
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": f["attention.sliding_window"],
        "sliding_window_pattern": f.get("attention.sliding_window_pattern", 6),
        "rope_theta": f.get("rope.freq_base", 1e6),
        "rope_local_base_freq": f.get("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": f.get("final_logit_softcapping"),
        "attn_logit_softcapping": f.get("attn_logit_softcapping"),
        "norm_weight_plus_one": True,
    }


def _gpt_oss(f: _Fields, out: dict[str, Any]) -> dict[str, Any]:
    n = out["num_hidden_layers"]
    scaling = out["rope_scaling"]
    return {
        "head_dim": _head_dim(f, out),
        "attention_bias": f.has("attn_q.bias"),
        "intermediate_size": f["expert_feed_forward_length"],
        "num_local_experts": f["expert_count"],
        "num_experts_per_tok": f["expert_used_count"],
        "sliding_window": f["attention.sliding_window"],
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(n)],
        "rope_scaling": scaling and {**scaling, "truncate": False},
        "swiglu_limit": 7.0,
    }


def _deepseek2(f: _Fields, out: dict[str, Any]) -> dict[str, Any]:
    # 2: sigmoid scores with a selection bias. Older architecture (V2) has softmax scores and is another model.
    if f.get("expert_gating_func", 1) != 2:
        raise ZooError(f"{f.where}: a {f.arch} GGUF with softmax routing (DeepSeek V2) is not supported")
    rope_dim, scaling = f["rope.dimension_count"], out["rope_scaling"]
    if scaling:
        # yarn_log_multiplier is 0.1 * mscale_all_dim; the released mscale is the same number.
        mscale = round(f.get("rope.scaling.yarn_log_multiplier", 0.0) * 10, 6)
        scaling = {**scaling, "type": "yarn"} | (
            {"mscale": mscale, "mscale_all_dim": mscale} if mscale else {}
        )
    return {
        "num_key_value_heads": out["num_attention_heads"],  # one latent head in the file's terms
        "q_lora_rank": f.get("attention.q_lora_rank"),
        "kv_lora_rank": f["attention.kv_lora_rank"],
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": (f.get("attention.key_length_mla") or f["attention.key_length"]) - rope_dim,
        "v_head_dim": f.get("attention.value_length_mla") or f["attention.value_length"],
        "first_k_dense_replace": f.get("leading_dense_block_count", 0),
        "moe_intermediate_size": f["expert_feed_forward_length"],
        "n_routed_experts": f["expert_count"],
        "n_shared_experts": f["expert_shared_count"],
        "num_experts_per_tok": f["expert_used_count"],
        "n_group": f.get("expert_group_count", 8 if f["expert_count"] == 256 else 1),
        "topk_group": f.get("expert_group_used_count", 4 if f["expert_count"] == 256 else 1),
        "norm_topk_prob": f.get("expert_weights_norm", False),
        "routed_scaling_factor": f.get("expert_weights_scale", 1.0),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "rope_scaling": scaling,
    }


_More = Callable[[_Fields, dict[str, Any]], dict[str, Any]]
_ARCHITECTURES: dict[Any, tuple[str, str, _More]] = {
    "llama": ("llama", "LlamaForCausalLM", _llama),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", _qwen3),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", _gemma3),
    "gpt-oss": ("gpt_oss", "GptOssForCausalLM", _gpt_oss),
    "deepseek2": ("deepseek_v3", "DeepseekV3ForCausalLM", _deepseek2),
}
