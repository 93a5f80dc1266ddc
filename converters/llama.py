"""Llama 2, 3.x, and what shares their architecture (SmolLM2, and Llama-shaped fine-tunes).

The plain decoder that the others differ from: RMS pre-norms, grouped-query attention, SwiGLU, RoPE.
- 3.1 and later stretch RoPE in three bands ("llama3"); 3.2 1B and 3B tie the head.
- "dynamic" RoPE is of what others made of it: longer contexts of the first two, InternLM3 under Llama's names.
- `head_dim` may be independent of d_model / n_heads; biases exist behind two flags that no release sets.
- Llama 2's configs leave `rope_theta` out: it is 10000.
- Meta's own files (`consolidated.NN.pth`) and llama.cpp's GGUF hold q and k rows in interleaved RoPE order.
- Meta's files of N ranks are slices: q, k, v, gate, up and head by output rows, out and down by input
  columns, the embedding by columns in Llama 2 and by rows in Llama 3 (whose vocabulary is 4 times as large).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from zoo.family import (
    MLP,
    Attention,
    Config,
    Disagreement,
    Expr,
    Family,
    Layer,
    Norm,
    Rope,
    Spec,
    ZooError,
    consolidated,
    extra,
    gguf,
    hf,
    ranks,
    read,
    rules,
)


def spec(c: Config) -> Spec:
    c.refuse(rope_interleaved=False)
    p = read.rope_parameters(c, default_theta=10000.0)
    rope = read.whole_rope(c, p, read.head_dim(c))
    bias = c.get("attention_bias", False)
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS), bias=c.get("mlp_bias", False))
    return decoder("llama", c, rope, mlp, qkv_bias=bias, out_bias=bias)


def decoder(
    family: str, c: Config, rope: Rope, mlp: MLP, *, qkv_bias: bool, out_bias: bool, tied: bool = False
) -> Spec:
    """The plain decoder: pre-norms, and the same attention and MLP in every layer. `tied`: where the config says nothing."""
    n_heads, head_dim = c["num_attention_heads"], read.head_dim(c)
    norm = Norm(c["rms_norm_eps"])
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=c.get("num_key_value_heads", n_heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
    )
    return Spec(
        family=family,
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, ffn_norm=norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", tied),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


def _at(name: str, axis: int | None) -> Expr:
    return ranks("rank{r}." + name, axis)


RULES = {
    "hf": rules(*hf.ENDS, *hf.PRE_NORMS, *hf.ATTENTION, *hf.MLP, hf.INV_FREQ),
    "meta": rules(
        ("embed.weight", _at("tok_embeddings.weight", 0), lambda _, s: s.vocab_size > 100_000),
        ("embed.weight", _at("tok_embeddings.weight", 1), lambda _, s: s.vocab_size <= 100_000),
        *consolidated.decoder(_at),
        extra("rank*.rope.freqs", "rotary frequencies; computed from the config"),
    ),
    "gguf": rules(
        *gguf.ENDS,
        *gguf.PRE_NORMS,
        *gguf.attention(interleaved=True),
        *gguf.MLP,
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any] | None:
    """What a GGUF of `llama` says. Scaled RoPE is not a field but a tensor of factors, `rope_freqs.weight`."""
    if f.get("expert_count"):
        return None  # Mixtral's GGUFs call themselves llama too
    own: dict[str, Any] = {"head_dim": gguf.head_dim(f, out), "mlp_bias": f.has("ffn_gate.bias")}
    if (factors := f.table("rope_freqs.weight")) is not None:
        own["rope_scaling"] = gguf_scaling(f, factors)
    return own


def meta_config(p: Config, tensors: Collection[str]) -> dict[str, Any] | None:
    """Meta's params.json of Llama 2 and 3.x."""
    if "moe_args" in p or "nope_layer_interval" in p:
        return None  # Llama 4
    out = consolidated.meta_fields(p, tensors)
    p.refuse(
        high_freq_factor=4.0, rope_high_freq_factor=4.0, use_qk_norm=False, attention_chunk_size=None,
        attn_temperature_tuning=False,
    )  # fmt: skip
    if scaled := p.choice("use_scaled_rope", (True, False), False):
        # Not in params.json. Meta's code has 8 for all; the Hugging Face configs, and its maintainers, 32 for the small 3.2.
        factor = p.get("rope_scaling_factor", 32.0 if p["dim"] < 4096 else 8.0)
        out["rope_scaling"] = consolidated.llama3_rope(factor, 4.0)
    context = 131072 if scaled else 8192 if out["vocab_size"] > 100_000 else 4096
    return out | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": context,
    }


def gguf_scaling(f: gguf.Fields, factors: tuple[float, ...]) -> dict[str, Any]:
    """The settings behind `rope_freqs`: convert_hf_to_gguf.py of llama.cpp makes the factors from them. Here they are
    compared with those that the usual constants give."""
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


def _scaled_by_32(spec: Spec) -> bool:
    mixer = spec.layers[0].mixer
    scaling = mixer.rope.scaling if isinstance(mixer, Attention) and mixer.rope else None
    return scaling is not None and scaling.factor == 32.0


DISAGREEMENTS = (
    Disagreement(
        about="the RoPE factor of Llama 3.2 1B and 3B",
        upstream="has 32, from config.json",
        vendor="hard-codes 8 for every scaled model in its own code, which params.json leaves open",
        follows="upstream",
        why="a maintainer confirmed 32 for these two",
        source="https://github.com/meta-llama/llama-models/issues/166",
        since="2024-10",
        applies=lambda spec: (
            (spec.n_layers, spec.d_model) in ((16, 2048), (28, 3072)) and _scaled_by_32(spec)
        ),
    ),
)
FAMILY = Family(
    "llama",
    ("llama",),
    (
        "LlamaForCausalLM",
        "LLaMAForCausalLM",
    ),  # the latter: NVIDIA's ChatQA, early conversions of the first Llama
    spec,
    RULES,
    {"meta": meta_config},
    {"llama": gguf_config},
    disagreements=DISAGREEMENTS,
)
