"""What Meta and Mistral write themselves, `consolidated.*` and `params.json`: rule lines for their names, and the fields
that all their models have, in Hugging Face terms (a family's reading, `Family.own`, adds its own).

What these files leave out because the vendor's code knows it is filled in here, with its source:
- Meta: the width of the FFN is computed, scaled RoPE is one flag.
- Mistral: context length; whether YaRN scales cos and sin is `apply_scale`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from zoo.config import Config
from zoo.errors import ZooError
from zoo.mapping.rules import RuleLine, Source, cat, rope_halves
from zoo.soundness import layer_count


def decoder(at: Callable[[str, int | None], Source]) -> tuple[RuleLine, ...]:
    """Attention, MLP, norms and head. Rows of q and k are in interleaved RoPE order.

    `at(name, axis)` is a source tensor that tensor-parallel ranks cut along `axis` (None: each has it whole).
    """
    layer = "layers.{i}."
    return (
        ("norm.weight", at("norm.weight", None)),
        ("head.weight", at("output.weight", 0)),
        ("layers.{i}.attn_norm.weight", at(layer + "attention_norm.weight", None)),
        ("layers.{i}.ffn_norm.weight", at(layer + "ffn_norm.weight", None)),
        (
            "layers.{i}.attn.qkv.weight",
            cat(
                rope_halves(at(layer + "attention.wq.weight", 0), "n_heads"),
                rope_halves(at(layer + "attention.wk.weight", 0), "n_kv_heads"),
                at(layer + "attention.wv.weight", 0),
            ),
        ),
        ("layers.{i}.attn.out.weight", at(layer + "attention.wo.weight", 1)),
        (
            "layers.{i}.mlp.gate_up.weight",
            cat(at(layer + "feed_forward.w1.weight", 0), at(layer + "feed_forward.w3.weight", 0)),
        ),
        ("layers.{i}.mlp.down.weight", at(layer + "feed_forward.w2.weight", 1)),
    )


def meta_fields(p: Config, tensors: Collection[str]) -> dict[str, Any]:
    """Of Meta's params.json. The head is the embedding where `tensors` (names) hold none."""
    where = p.where
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
    return {
        "vocab_size": operator.index(p["vocab_size"]),  # a text or a fraction is refused here
        "hidden_size": d,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": p.get("n_kv_heads", n_heads),
        "head_dim": d // n_heads,
        "intermediate_size": meta_ffn(p, 4 * d),
        "hidden_act": "silu",
        "rms_norm_eps": p["norm_eps"],
        "rope_theta": float(p.get("rope_theta", 10000.0)),
        "rope_scaling": None,
        "tie_word_embeddings": "rank0.output.weight" not in tensors,
        "torch_dtype": "bfloat16",
    }


def meta_ffn(p: Config, width: int, shrink: float = 1.0) -> int:
    """2/3 of 4 d, times a multiplier, rounded up: llama_models' TransformerBlock."""
    width = int(2 * width / 3)
    if "ffn_dim_multiplier" in p:
        width = int(p["ffn_dim_multiplier"] * width)
    width = int(width / shrink)
    multiple = int(p["multiple_of"])
    return -(-width // multiple) * multiple


def llama3_rope(factor: float, high: float) -> dict[str, Any]:
    """Scaled RoPE as Meta's code has it: what the flag `use_scaled_rope` stands for."""
    return {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(high),
        "original_max_position_embeddings": 8192,
    }


def mistral_fields(p: Config) -> dict[str, Any]:
    """Of Mistral's params.json: those of a dense model, which others add to; the text model of those that see images."""
    where = p.where
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
        "rope_theta": mistral_theta(p),
        "max_position_embeddings": p.first("max_position_embeddings", "max_seq_len", default=131072),
        "tie_word_embeddings": p.get("tied_embeddings", False),
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    }
    if (stored := p.first("quantization_config", "quantization", default=None)) is not None:
        out["quantization_config"] = _quantised(stored, where)
    if "sliding_window" in p or "_sliding_window" in p:
        out |= _windows(p, out)
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


def mistral_theta(p: Config) -> float:
    """theta. Files without the field are of before May 2024, when Mistral's code took 1e4 with a window, else 1e6."""
    window = p.first("sliding_window", "_sliding_window", default=None)
    return float(p.get("rope_theta", 1e6 if window is None else 1e4))


def mistral_rope(p: Config) -> dict[str, Any]:
    """`rope_parameters`: theta, YaRN, and the growth of queries with position."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": mistral_theta(p)}
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
