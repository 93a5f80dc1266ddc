"""gpt-oss 20B and 120B.

What is unusual:
- Sinks: one learned logit per head joins the softmax and is dropped. Biases on q, k, v, o, the router and
  every expert. Sliding (128) and full layers alternate.
- YaRN without rounding of its band (`truncate: false`), magnitude 0.1 ln(32) + 1 on cos and sin.
- Router: top-k of the logits, then a softmax over the chosen ones, in the model's dtype.
- Experts: (up + 1) * gate * sigmoid(1.702 gate), gate clamped above, up on both sides. Gate and up rows
  alternate on disk (gate is even).
- Norm weights are applied in fp32, then cast.
- Releases hold the experts in mxfp4, [out, in] in blocks of 32; transformers saves them unquantised as
  [in, out]. OpenAI's own files (`original/`) fuse q, k, v and have names of their own. MLX's have gate and up apart.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from zoo.family import (
    MLP,
    Attention,
    Config,
    Disagreement,
    Family,
    Layer,
    MoE,
    Norm,
    Router,
    Spec,
    cat,
    deinterleave,
    gguf,
    hf,
    read,
    rules,
    transpose,
)


def spec(c: Config) -> Spec:
    c.choice("hidden_act", ("silu",))
    norm = Norm(c["rms_norm_eps"], rounding="last")
    bias = c.get("attention_bias", True)
    rotary = read.whole_rope(c, read.rope_parameters(c, needed=True), c["head_dim"])

    def attention(window: int | None) -> Attention:
        return Attention(
            n_heads=c["num_attention_heads"],
            n_kv_heads=c["num_key_value_heads"],
            head_dim=c["head_dim"],
            scale=c["head_dim"] ** -0.5,
            rope=rotary,
            window=window,
            qkv_bias=bias,
            out_bias=bias,
            sinks=True,
        )

    expert = MLP(
        c["intermediate_size"],
        "silu_clamped",
        bias=True,
        limit=float(c.get("swiglu_limit", 7.0)),
        alpha=float(c.get("swiglu_alpha", 1.702)),
    )
    router = Router(c.first("num_experts_per_tok", "experts_per_token"), "softmax", over="chosen", bias=True)
    moe = MoE(read.n_experts(c), expert, router)
    kinds = {read.SLIDING: attention(c["sliding_window"]), read.FULL: attention(None)}
    types = read.layer_types(c, read.every(2))
    return Spec(
        family="gpt_oss",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(Layer(kinds[t], moe, attn_norm=norm, ffn_norm=norm) for t in types),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


_E = "model.layers.{i}.mlp.experts."
RULES = {
    "hf": rules(
        *hf.ENDS,
        *hf.PRE_NORMS,
        *hf.ATTENTION,
        ("layers.{i}.attn.sinks", "model.layers.{i}.self_attn.sinks"),
        ("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.router.weight"),
        ("layers.{i}.moe.router.bias", "model.layers.{i}.mlp.router.bias"),
        ("layers.{i}.moe.gate_up.weight", transpose(deinterleave(_E + "gate_up_proj"))),
        ("layers.{i}.moe.gate_up.weight", deinterleave(_E + "gate_up_proj_blocks")),
        ("layers.{i}.moe.gate_up.bias", deinterleave(_E + "gate_up_proj_bias")),
        ("layers.{i}.moe.down.weight", transpose(_E + "down_proj")),
        ("layers.{i}.moe.down.weight", _E + "down_proj_blocks"),
        ("layers.{i}.moe.down.bias", _E + "down_proj_bias"),
        ("layers.{i}.moe.gate_up.weight", cat(_E + "gate_proj.weight", _E + "up_proj.weight")),  # MLX's
        ("layers.{i}.moe.gate_up.bias", cat(_E + "gate_proj.bias", _E + "up_proj.bias")),
        ("layers.{i}.moe.down.weight", _E + "down_proj.weight"),
        ("layers.{i}.moe.down.bias", _E + "down_proj.bias"),
    ),
    "openai": rules(
        ("embed.weight", "embedding.weight"),
        ("norm.weight", "norm.scale"),
        ("head.weight", "unembedding.weight"),
        ("layers.{i}.attn_norm.weight", "block.{i}.attn.norm.scale"),
        ("layers.{i}.attn.qkv.weight", "block.{i}.attn.qkv.weight"),
        ("layers.{i}.attn.qkv.bias", "block.{i}.attn.qkv.bias"),
        ("layers.{i}.attn.out.weight", "block.{i}.attn.out.weight"),
        ("layers.{i}.attn.out.bias", "block.{i}.attn.out.bias"),
        ("layers.{i}.attn.sinks", "block.{i}.attn.sinks"),
        ("layers.{i}.ffn_norm.weight", "block.{i}.mlp.norm.scale"),
        ("layers.{i}.moe.router.weight", "block.{i}.mlp.gate.weight"),
        ("layers.{i}.moe.router.bias", "block.{i}.mlp.gate.bias"),
        ("layers.{i}.moe.gate_up.weight", deinterleave("block.{i}.mlp.mlp1_weight")),
        ("layers.{i}.moe.gate_up.weight", deinterleave("block.{i}.mlp.mlp1_weight.blocks")),
        ("layers.{i}.moe.gate_up.bias", deinterleave("block.{i}.mlp.mlp1_bias")),
        ("layers.{i}.moe.down.weight", "block.{i}.mlp.mlp2_weight"),
        ("layers.{i}.moe.down.weight", "block.{i}.mlp.mlp2_weight.blocks"),
        ("layers.{i}.moe.down.bias", "block.{i}.mlp.mlp2_bias"),
    ),
    "gguf": rules(
        *gguf.ENDS,
        ("layers.{i}.attn_norm.weight", "blk.{i}.attn_norm.weight"),
        ("layers.{i}.ffn_norm.weight", "blk.{i}.post_attention_norm.weight"),
        *gguf.attention(interleaved=False),
        ("layers.{i}.attn.sinks", "blk.{i}.attn_sinks.weight"),
        *gguf.MOE,
        ("layers.{i}.moe.router.bias", "blk.{i}.ffn_gate_inp.bias"),
        ("layers.{i}.moe.gate_up.bias", cat("blk.{i}.ffn_gate_exps.bias", "blk.{i}.ffn_up_exps.bias")),
        ("layers.{i}.moe.down.bias", "blk.{i}.ffn_down_exps.bias"),
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """What a GGUF of `gpt-oss` says, and what llama.cpp's graph of it fixes."""
    scaling = out["rope_scaling"]
    f.expect("expert_gating_func", 0, 3)  # a softmax over the chosen ones
    f.expect("swiglu_clamp_exp", 7.0)
    f.expect("rope.freq_base_swa", out["rope_theta"])
    return {
        "head_dim": gguf.head_dim(f, out),
        "attention_bias": f.has("attn_q.bias"),
        "intermediate_size": f["expert_feed_forward_length"],
        "num_local_experts": f["expert_count"],
        "num_experts_per_tok": f["expert_used_count"],
        "sliding_window": f["attention.sliding_window"],
        "layer_types": gguf.layer_types(f, out["num_hidden_layers"], 2),
        "rope_scaling": {**scaling, "truncate": False} if scaling else {"rope_type": "default"},
        "swiglu_limit": 7.0,
    }


def own_config(c: Config, tensors: Collection[str]) -> dict[str, Any]:
    """OpenAI's config.json. It leaves eps, the pattern of windows and YaRN's form to the code: gpt_oss/torch/model.py of
    openai/gpt-oss."""
    n = read.layer_count(c["num_hidden_layers"], "num_hidden_layers", c.where)
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
        "tie_word_embeddings": "unembedding.weight" not in tensors,
        "torch_dtype": "bfloat16",
    }
    if (
        "block.0.mlp.mlp1_weight.blocks" in tensors
    ):  # as the release's own config.json for transformers says it
        plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        out["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": plain}
    return out


def _activates_otherwise(spec: Spec) -> bool:
    experts = (layer.ffn.expert for layer in spec.layers if isinstance(layer.ffn, MoE))
    return any((e.limit, e.alpha) != (7.0, 1.702) for e in experts)


DISAGREEMENTS = (
    Disagreement(
        about="an activation of the experts with other constants than the releases'",
        upstream="reads swiglu_limit and swiglu_alpha since 5.19; before, it computed with 7.0 and 1.702 whatever they said",
        vendor="reads swiglu_limit; 1.702 is in its code",
        follows="vendor",
        why="who writes another limit means it; if transformers before 5.19 trained the model, write 7.0 and 1.702",
        source="https://github.com/openai/gpt-oss/blob/main/gpt_oss/torch/model.py",
        since="2025-08",
        applies=_activates_otherwise,
    ),
)
FAMILY = Family(
    "gpt_oss",
    ("gpt_oss",),
    ("GptOssForCausalLM",),
    spec,
    RULES,
    {"openai": own_config},
    {"gpt-oss": gguf_config},
    DISAGREEMENTS,
)
