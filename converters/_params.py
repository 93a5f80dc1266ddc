"""The vendors' own configs in Hugging Face terms: params.json of Meta and Mistral, OpenAI's config.json.

What these files leave out because the vendor's code knows it is filled in here, with its source:
- Meta: the width of the FFN is computed, the vocabulary may be -1, scaled RoPE is one flag.
- Mistral: context length; whether YaRN scales cos and sin is `apply_scale`.
- OpenAI: eps, the pattern of windows, YaRN's form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from zoo.config import Config
from zoo.errors import ZooError
from zoo.families import MAX_LAYERS

Make = TypeVar("Make", bound=Callable[..., dict[str, Any]])


def sound(make: Make) -> Make:
    """`make(..., where)`, whose crash over a value of the wrong kind is an error that names the file."""

    @functools.wraps(make)
    def guarded(*args: Any) -> dict[str, Any]:
        try:
            return make(*args)
        except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as e:
            raise ZooError(
                f"{args[-1]}: a field has a value that makes no model ({type(e).__name__}: {e})"
            ) from e

    return guarded  # type: ignore[return-value]


def layer_count(n: Any, key: str, where: str) -> int:
    """`n`, checked before anything is as long as it says."""
    if not isinstance(n, int) or not 0 < n <= MAX_LAYERS:
        raise ZooError(f"{where}: {key} is {str(n)[:40]}; expected 1 to {MAX_LAYERS}")
    return n


@sound
def meta(params: Mapping[str, Any], vocab_size: int, tied: bool, where: str) -> dict[str, Any]:
    """Llama 2, 3.x and 4. `vocab_size` is that of the embedding, for files that say -1."""
    p = Config(params.get("model", params), where)
    d, n_heads, n_layers = p["dim"], p["n_heads"], layer_count(p["n_layers"], "n_layers", where)
    p.refuse(
        rope_scaling=None, rope_scale_factor=None, low_freq_factor=1.0, norm_type="rmsnorm", qk_norm=False,
        quantization=None,
    )  # fmt: skip
    for other in ("vision_chunk_size", "vision_num_cross_attention_layers"):
        if p.get(other, -1) not in (-1, 0):
            raise ZooError(f"{where}: {other} is set: the vision models of Llama 3.2 are not supported")
    if "quantization_args" in p or "lora_args" in p:
        raise ZooError(
            f"{where}: the quantised mobile releases (quantization_args, lora_args) are not supported"
        )
    out = {
        "vocab_size": vocab_size if p.get("vocab_size", -1) <= 0 else p["vocab_size"],
        "hidden_size": d,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": p.get("n_kv_heads", n_heads),
        "head_dim": d // n_heads,
        "intermediate_size": _meta_ffn(p, 4 * d),
        "hidden_act": "silu",
        "rms_norm_eps": p["norm_eps"],
        "rope_theta": float(p.get("rope_theta", 10000.0)),
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    if "moe_args" in p or "nope_layer_interval" in p:
        return _llama4(p, out)
    p.refuse(
        high_freq_factor=4.0, rope_high_freq_factor=4.0, use_qk_norm=False, attention_chunk_size=None,
        attn_temperature_tuning=False,
    )  # fmt: skip
    if scaled := p.choice("use_scaled_rope", (True, False), False):
        # Not in params.json. Meta's code and the Hugging Face configs: 8 for 3.1 and 3.3, 32 for the small 3.2.
        out["rope_scaling"] = _llama3_rope(p.get("rope_scaling_factor", 32.0 if d < 4096 else 8.0), 4.0)
    context = 131072 if scaled else 8192 if out["vocab_size"] > 100_000 else 4096
    return out | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": context,
    }


def _meta_ffn(p: Config, width: int, shrink: float = 1.0) -> int:
    """2/3 of 4 d, times a multiplier, rounded up: llama_models' TransformerBlock."""
    width = int(2 * width / 3)
    if "ffn_dim_multiplier" in p:
        width = int(p["ffn_dim_multiplier"] * width)
    width = int(width / shrink)
    multiple = int(p["multiple_of"])
    return -(-width // multiple) * multiple


def _llama3_rope(factor: float, high: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(high),
        "original_max_position_embeddings": 8192,
    }


def _llama4(p: Config, out: dict[str, Any]) -> dict[str, Any]:
    """Source: ModelArgs, MoE and TransformerBlock of llama_models/llama4."""
    moe = p.sub("moe_args")
    shrink = moe.get("capacity_factor", 1.0) + 1 if moe.get("auto_scale_F", True) else 1.0
    if p.choice("use_scaled_rope", (True, False), False):
        scaling = _llama3_rope(p.get("rope_scaling_factor", 16.0), p.get("rope_high_freq_factor", 1.0))
        out["rope_scaling"] = scaling
    step = moe.get("interleave_moe_layer_step", 1)
    return out | {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "intermediate_size": _meta_ffn(p, int(p.get("ffn_exp", 4.0) * p["dim"]), shrink),
        "intermediate_size_mlp": _meta_ffn(p, 4 * p["dim"]),
        "num_local_experts": moe["num_experts"],
        "num_experts_per_tok": moe.get("top_k", 1),
        "interleave_moe_layer_step": step,
        "no_rope_layers": [],
        "no_rope_layer_interval": p.get("nope_layer_interval") or p["n_layers"] + 1,
        "attention_chunk_size": p["attention_chunk_size"],
        "use_qk_norm": p.get("use_qk_norm", False),
        "attn_temperature_tuning": p.get("attn_temperature_tuning", False),
        "floor_scale": p.get("floor_scale", 8192.0),
        "attn_scale": p.get("attn_scale", 0.1),
        # By release: 10M for 16 experts, 1M for 128 (model cards).
        "max_position_embeddings": 10485760 if moe["num_experts"] == 16 else 1048576,
    }


@sound
def mistral(params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Mistral 7B to Mistral Large 3; the text model of those that see images."""
    p = Config(params, where)
    p.refuse(
        model_type="transformer", activation="silu", norm_type="rmsnorm", causal=True, biases=False, use_biases=False,
        qk_norm=False, use_qk_norm=False, ada_rms_norm_t_cond=False, rope_type="default", rope_scaling=None,
        partial_rotary_factor=1.0, attention_chunk_size=None, logit_softcap=None, attn_logit_softcapping=None,
        final_logit_softcapping=None, embedding_scale=1.0, residual_scale=1.0,
    )  # fmt: skip
    out = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": p["vocab_size"],
        "hidden_size": p["dim"],
        "num_hidden_layers": layer_count(p["n_layers"], "n_layers", where),
        "num_attention_heads": p["n_heads"],
        "num_key_value_heads": p.get("n_kv_heads", p["n_heads"]),
        "head_dim": p.get("head_dim", p["dim"] // p["n_heads"]),
        "intermediate_size": p["hidden_dim"],
        "hidden_act": "silu",
        "rms_norm_eps": p["norm_eps"],
        "rope_theta": float(p.get("rope_theta", 10000.0)),
        "max_position_embeddings": p.first("max_position_embeddings", "max_seq_len", default=131072),
        "tie_word_embeddings": p.get("tied_embeddings", False),
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    }
    if (stored := p.first("quantization_config", "quantization", default=None)) is not None:
        out["quantization_config"] = _quantised(stored, where)
    if "sliding_window" in p or "_sliding_window" in p:
        out |= _windows(p, out)
    if "kv_lora_rank" in p:
        return out | _large3(p)
    if "moe" in p:
        raise ZooError(f"{where}: experts without latent attention (Mixtral) are not supported")
    if "yarn" in p or "llama_4_scaling" in p:
        out |= {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3"}
        out["rope_parameters"] = _mistral_rope(p)
    return out


def _quantised(stored: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """In Hugging Face's terms. Source: transformers' convert_mistral3_weights_to_hf.py and vLLM's mistral config."""
    if "qformat_weight" not in stored:
        return stored  # those terms already
    if (kind := stored["qformat_weight"]) != "fp8_e4m3":
        raise ZooError(
            f"{where}: weights quantised as {str(kind)[:40]!r} are not supported; supported: fp8_e4m3"
        )
    dynamic = stored.get("qscheme_act") == "NO_SCALES"
    scheme = "dynamic" if dynamic else "static"
    return {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": None}


def _windows(p: Config, out: dict[str, Any]) -> dict[str, Any]:
    """One window for all layers, or a pattern of them; a window as long as the context is none."""
    pattern = p.first(
        "sliding_window", "_sliding_window"
    )  # the second is Ministral 8B's: see transformers' convert_ministral_weights_to_hf.py
    pattern = [
        None if w in (None, "null") else int(w) for w in (pattern if isinstance(pattern, list) else [pattern])
    ]
    pattern = [None if w is None or w >= out["max_position_embeddings"] else w for w in pattern]
    widths = sorted({w for w in pattern if w is not None})
    if len(widths) > 1:
        raise ZooError(f"{p.where}: sliding_window has {len(widths)} widths {widths}; one is supported")
    if not widths or len(pattern) == 1:
        return {"sliding_window": pattern[0]}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in pattern]
    n = out["num_hidden_layers"]
    return {
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        "sliding_window": widths[0],
        "layer_types": [kinds[i % len(kinds)] for i in range(n)],
    }


def _mistral_rope(p: Config) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(p.get("rope_theta", 10000.0))}
    if "yarn" in p:
        yarn = p.sub("yarn")
        rope |= {
            "rope_type": "yarn",
            "factor": float(yarn["factor"]),
            "original_max_position_embeddings": yarn["original_max_position_embeddings"],
            "beta_fast": float(yarn["beta"]),
            "beta_slow": float(yarn["alpha"]),
        }
        if not yarn.get("apply_scale", True):
            rope["attention_factor"] = 1.0
    if "llama_4_scaling" in p:
        growth = p.sub("llama_4_scaling")
        original = growth["original_max_position_embeddings"]
        if rope.setdefault("original_max_position_embeddings", original) != original:
            raise ZooError(
                f"{p.where}: llama_4_scaling and yarn have different original contexts ({original} and "
                f"{rope['original_max_position_embeddings']}): not supported"
            )
        rope["llama_4_scaling_beta"] = float(growth["beta"])
    return rope


def _large3(p: Config) -> dict[str, Any]:
    moe = p.sub("moe")
    moe.choice("route_every_n", (1,), 1)
    return {
        "architectures": ["Mistral4ForCausalLM"],
        "model_type": "mistral4",
        "num_key_value_heads": p["n_heads"],
        "q_lora_rank": p.get("q_lora_rank"),
        "kv_lora_rank": p["kv_lora_rank"],
        "qk_nope_head_dim": p["qk_nope_head_dim"],
        "qk_rope_head_dim": p["qk_rope_head_dim"],
        "v_head_dim": p["v_head_dim"],
        "n_routed_experts": moe["num_experts"],
        "num_experts_per_tok": moe["num_experts_per_tok"],
        "n_shared_experts": moe.get("num_shared_experts", 0),
        "moe_intermediate_size": moe["expert_hidden_dim"],
        "first_k_dense_replace": moe.get("first_k_dense_replace", 0),
        "n_group": moe.get("num_expert_groups", 1),
        "topk_group": moe.get("num_expert_groups_per_tok", 1),
        "routed_scaling_factor": moe.get("routed_scale", 1.0),
        "norm_topk_prob": True,  # vLLM's MistralLarge3: renormalised
        "rope_parameters": _mistral_rope(p),
    }


@sound
def openai(own: Mapping[str, Any], tied: bool, mxfp4: bool, where: str) -> dict[str, Any]:
    """gpt-oss; with experts in `mxfp4`. Source: gpt_oss/torch/model.py of openai/gpt-oss."""
    c = Config(own, where)
    n = layer_count(c["num_hidden_layers"], "num_hidden_layers", where)
    factor = float(c.get("rope_scaling_factor", 32.0))  # ModelConfig's default
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": c["initial_context_length"],
        "beta_fast": float(c["rope_ntk_beta"]),
        "beta_slow": float(c["rope_ntk_alpha"]),
        "truncate": False,
    }
    out = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "num_hidden_layers": n,
        "num_attention_heads": c["num_attention_heads"],
        "num_key_value_heads": c["num_key_value_heads"],
        "head_dim": c["head_dim"],
        "intermediate_size": c["intermediate_size"],
        "num_local_experts": c["num_experts"],
        "num_experts_per_tok": c["experts_per_token"],
        "swiglu_limit": float(c.get("swiglu_limit", 7.0)),
        "sliding_window": c["sliding_window"],
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(n)],
        "attention_bias": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": float(c["rope_theta"]),
        "rope_scaling": scaling if factor > 1 else {"rope_type": "default"},
        "max_position_embeddings": int(c["initial_context_length"] * factor),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    if mxfp4:  # as the release's own config.json for transformers says it
        plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        out["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": plain}
    return out
