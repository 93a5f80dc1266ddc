"""What llama.cpp writes into a GGUF, in Hugging Face terms: architecture names and hyperparameters.

`config(metadata, tensors, tables, where)` gives the config.json that the release had, as far as it
matters. What llama.cpp does not write because its code knows it (a norm's form, a pattern of layers) is
filled in here, with its source. Key names: gguf-py's constants.py.

- Scaling of rotary frequencies as Llama 3.1 does it is not a field but a tensor, `rope_freqs.weight`:
  its factors are compared with those that the usual constants give.
- Gemma's norm weights are stored as 1 + w: `norm_weight_plus_one` says so to the family.
- Every field of the architecture is read, or must say what the family does anyway: nothing is ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import TensorRef

from ._params import layer_count, sound

CONSTANTS = ("rope_freqs.weight",)
"""Tensors whose values belong to the config."""

Tables = Mapping[str, tuple[float, ...]]

# Fields that say nothing about the numbers, or what other fields make irrelevant: YaRN's beside another scaling, a
# pattern of windows where there is no window, the eps of norms that subtract a mean, experts' where there are none.
_SILENT = (
    "vocab_size", "tensor_data_layout", "pooling_type", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "attention.sliding_window_pattern", "attention.layer_norm_epsilon", "attention.temperature_length",
    "expert_used_count", "expert_feed_forward_length",
)  # fmt: skip
_VISION = ("vision.", "mm.")  # Ollama's, of the tensors that see images: the plan accounts for those

# What other fields may say, because it changes nothing; any other value, and any other field, is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((
        "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.temperature_scale",
        "attention.shared_kv_layers", "attn_logit_softcapping", "router_logit_softcapping",
        "final_logit_softcapping", "swiglu_clamp_exp", "swiglu_clamp_shexp", "rope.scaling.yarn_log_multiplier",
        "n_deepstack_layers", "leading_dense_block_count", "expert_count", "expert_shared_count",
        "expert_shared_feed_forward_length",
    ), (0,)),
    **dict.fromkeys((
        "logit_scale", "residual_scale", "embedding_scale", "rope.scaling.alpha", "rope.scale_linear",
        "moe_every_n_layers", "interleave_moe_layer_step", "expert_group_count", "expert_group_used_count",
        "expert_weights_scale", "expert_gating_func",
    ), (0, 1)),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "expert_weights_norm": (True,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.local.freq_base": (1e4,),  # Ollama's names for Gemma's
    "rope.global.freq_base": (1e6,),
}  # fmt: skip


class _Fields:
    """The metadata of one architecture. It remembers what was read, so that the rest can be judged."""

    def __init__(
        self, metadata: Mapping[str, Any], tensors: Mapping[str, TensorRef], tables: Tables, where: str
    ):
        self.metadata, self.tensors, self.tables, self.where = metadata, tensors, tables, where
        self.arch = metadata.get("general.architecture")
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise ZooError(
                f"{self.where}: field '{self.arch}.{key}' is missing, and this architecture needs it"
            )
        return value

    def get(self, key: str, default: Any = None) -> Any:
        value = self.raw(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise ZooError(
                f"{self.where}: field '{self.arch}.{key}' is {str(value)[:80]}; only one value for all layers is supported"
            )
        return value[0]  # one number per layer, all the same

    def raw(self, key: str, default: Any = None) -> Any:
        """The field as it is, a list if there is one."""
        self.read.add(key)
        return self.metadata.get(f"{self.arch}.{key}", default)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse the field if it is there and says something else than these."""
        if (value := self.get(key)) is not None and value not in allowed:
            only = f"supported: {', '.join(map(str, allowed))}" if allowed else "zoo does not know this field"
            raise ZooError(f"{self.where}: field '{self.arch}.{key}' is {str(value)[:80]}; {only}")

    def judge_the_rest(self, out: Mapping[str, Any]) -> None:
        """Refuse what was not read and says what this config does not."""
        neutral = _NEUTRAL | {
            "attention.sliding_window": (0, out["max_position_embeddings"]),
            "rope.freq_base_swa": (out["rope_theta"],),
            "embedding_length_out": (out["hidden_size"],),
        }
        prefix = f"{self.arch}."
        keys = [k.removeprefix(prefix) for k in self.metadata if k.startswith(prefix)]
        for key in keys:
            if key not in self.read and key not in _SILENT and not key.startswith(_VISION):
                self.expect(key, *neutral.get(key, ()))

    def layers_with(self, tensor: str) -> set[int]:
        """The layers that have a tensor of this name."""
        found = (re.fullmatch(rf"blk\.(\d+)\.{re.escape(tensor)}", name) for name in self.tensors)
        return {int(m[1]) for m in found if m}

    def has(self, tensor: str) -> bool:
        return bool(self.layers_with(tensor))


@sound
def config(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorRef], tables: Tables, where: str
) -> dict[str, Any]:
    """config.json of a GGUF. Raises ZooError for an architecture that is not known here, and for a field that is not."""
    f = _Fields(metadata, tensors, tables, where)
    if not isinstance(f.arch, str) or f.arch not in _ARCHITECTURES:
        raise ZooError(
            f"{where}: GGUF architecture {str(f.arch)[:80]!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    model_type, architecture, more = _ARCHITECTURES[f.arch]
    embedding = tensors.get("token_embd.weight")
    if embedding is None or not embedding.shape:
        raise ZooError(f"{where}: there is no tensor 'token_embd.weight': not a language model?")
    out = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": f["embedding_length"],
        "num_hidden_layers": _n_layers(f),
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
    out |= more(f, out)
    f.judge_the_rest(out)
    return out


def _n_layers(f: _Fields) -> int:
    """Layers of the decoder: `block_count` also counts those that predict further tokens, where the file has them."""
    n = layer_count(f["block_count"], f"{f.arch}.block_count", f.where)
    further = f.layers_with("nextn.eh_proj.weight")
    f.expect("nextn_predict_layers", 0, len(further))
    return n - sum(i < n for i in further)


def _rope_scaling(f: _Fields) -> dict[str, Any] | None:
    """Source: load_hparams of llama.cpp's llama-model.cpp (what is absent there), set_gguf_parameters of its
    conversion/base.py and mistral.py (what is written)."""
    kind = f.get("rope.scaling.type", "linear")
    factor = f.get("rope.scaling.factor") or f.get("rope.scale_linear") or 1.0  # the second is an old name
    if kind in ("none", "") or (kind == "linear" and factor == 1.0):
        factors = f.tables.get("rope_freqs.weight")
        return None if factors is None else _llama3_scaling(f, factors)
    if kind not in ("linear", "yarn"):
        raise ZooError(f"{f.where}: rope.scaling.type is {kind!r}; supported: linear, yarn")
    if "rope_freqs.weight" in f.tables:
        raise ZooError(
            f"{f.where}: scales RoPE twice, by rope_freqs.weight and by {f.arch}.rope.scaling ({kind}): not supported"
        )
    out = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        # Kimi K2 Instruct says 1, and its GGUFs of 2025 do not say it; K2 Thinking (factor 64) has the usual 32.
        fast = 1.0 if (f.arch, f.get("expert_count"), factor) == ("deepseek2", 384, 32.0) else 32.0
        out["factor"] = f["rope.scaling.factor"]
        out["original_max_position_embeddings"] = f["rope.scaling.original_context_length"]
        out["beta_fast"] = f.get("rope.scaling.yarn_beta_fast", fast)
        out["beta_slow"] = f.get("rope.scaling.yarn_beta_slow", 1.0)
        if (magnitude := f.get("rope.scaling.yarn_attn_factor")) is not None:
            out["attention_factor"] = magnitude
        if all_dim := f.get("rope.scaling.yarn_log_multiplier"):
            out |= {"mscale": 1.0, "mscale_all_dim": all_dim}
    return out


def _llama3_scaling(f: _Fields, factors: tuple[float, ...]) -> dict[str, Any]:
    """The settings behind `rope_freqs`: convert_hf_to_gguf.py of llama.cpp makes the factors from them."""
    if f.arch != "llama":
        raise ZooError(
            f"{f.where}: has rope_freqs.weight, which llama.cpp's graph of {f.arch} does not use: not supported"
        )
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
    """Channels of a head, of keys and values alike, all of them rotated: whatever says it must say the same."""
    wide = out["hidden_size"] // out["num_attention_heads"]
    dim = int(f.get("attention.key_length") or f.get("rope.dimension_count") or wide)
    for what in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        f.expect(what, dim)
        f.expect(f"{what}_swa", dim)
    if (factors := f.tables.get("rope_freqs.weight")) is not None and 2 * len(factors) != dim:
        raise ZooError(
            f"{f.where}: rope_freqs.weight has {len(factors)} factors; a head of {dim} channels needs {dim // 2}"
        )
    return dim


def _layer_types(f: _Fields, n: int, every: int) -> list[str]:
    """Which layers have the window: all but each `every`-th, unless the file says otherwise (a list: true, it has)."""
    pattern = f.raw("attention.sliding_window_pattern", every)
    if not isinstance(pattern, list):
        pattern = [(i + 1) % pattern != 0 for i in range(n)]
    if len(pattern) < n:
        raise ZooError(f"{f.where}: attention.sliding_window_pattern lists {len(pattern)} layers of {n}")
    return ["sliding_attention" if sliding else "full_attention" for sliding in pattern[:n]]


def _llama(f: _Fields, out: dict[str, Any]) -> dict[str, Any]:
    if f.get("expert_count"):
        raise ZooError(f"{f.where}: a llama GGUF with {f['expert_count']} experts (Mixtral) is not supported")
    return {"head_dim": _head_dim(f, out), "mlp_bias": f.has("ffn_gate.bias")}


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
    window = f.get("attention.sliding_window") or None  # not written where no layer has one
    return {
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": window,
        "layer_types": _layer_types(f, out["num_hidden_layers"], 6 if window else 1),
        "rope_theta": f.get("rope.freq_base", 1e6),
        "rope_local_base_freq": f.get("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": f.get("final_logit_softcapping") or None,
        "norm_weight_plus_one": True,
    }


def _gpt_oss(f: _Fields, out: dict[str, Any]) -> dict[str, Any]:
    scaling = out["rope_scaling"]
    f.expect("expert_gating_func", 0, 3)  # a softmax over the chosen ones
    f.expect("swiglu_clamp_exp", 7.0)
    f.expect("rope.freq_base_swa", out["rope_theta"])
    return {
        "head_dim": _head_dim(f, out),
        "attention_bias": f.has("attn_q.bias"),
        "intermediate_size": f["expert_feed_forward_length"],
        "num_local_experts": f["expert_count"],
        "num_experts_per_tok": f["expert_used_count"],
        "sliding_window": f["attention.sliding_window"],
        "layer_types": _layer_types(f, out["num_hidden_layers"], 2),
        "rope_scaling": {**scaling, "truncate": False} if scaling else {"rope_type": "default"},
        "swiglu_limit": 7.0,
    }


def _deepseek2(f: _Fields, out: dict[str, Any]) -> dict[str, Any]:
    # Sigmoid scores with a selection bias. Softmax scores, which are also what an absent field means, are other models.
    if (gating := f.get("expert_gating_func", 1)) != 2:
        raise ZooError(
            f"{f.where}: {f.arch}.expert_gating_func is {gating} (1, or absent: softmax, as in DeepSeek V2); "
            "supported: 2 (sigmoid, as in V3)"
        )
    rank, rope_dim, scaling = f["attention.kv_lora_rank"], f["rope.dimension_count"], out["rope_scaling"]
    if scaling and "mscale" in scaling:
        # Here yarn_log_multiplier is 0.1 * mscale_all_dim; the released mscale is the same number.
        mscale = round(scaling["mscale_all_dim"] * 10, 6)
        scaling = {**scaling, "mscale": mscale, "mscale_all_dim": mscale}
    key_length = f.get("attention.key_length_mla") or f["attention.key_length"]
    value_length = f.get("attention.value_length_mla") or f["attention.value_length"]
    f.expect("attention.key_length", rank + rope_dim, key_length)  # the latent head's
    f.expect("attention.value_length", rank, value_length)
    f.expect(
        "expert_shared_feed_forward_length", 0, f["expert_feed_forward_length"] * f["expert_shared_count"]
    )
    return {
        "num_key_value_heads": out["num_attention_heads"],  # one latent head in the file's terms
        "q_lora_rank": f.get("attention.q_lora_rank"),
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_length - rope_dim,
        "v_head_dim": value_length,
        "first_k_dense_replace": f.get("leading_dense_block_count", 0),
        "moe_intermediate_size": f["expert_feed_forward_length"],
        "n_routed_experts": f["expert_count"],
        "n_shared_experts": f["expert_shared_count"],
        "num_experts_per_tok": f["expert_used_count"],
        "n_group": f.get("expert_group_count", 8 if f["expert_count"] == 256 else 1),
        "topk_group": f.get("expert_group_used_count", 4 if f["expert_count"] == 256 else 1),
        "norm_topk_prob": f.get("expert_weights_norm", False),
        "routed_scaling_factor": f.get("expert_weights_scale") or 1.0,  # 0: none
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
