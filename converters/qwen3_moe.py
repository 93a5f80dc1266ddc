"""Qwen3 with experts: 30B-A3B, 235B-A22B, Coder-480B-A35B.

What is unusual:
- QK-norm per head, before RoPE; head_dim (128) is its own field, not d_model / n_heads.
- Softmax router whose logits are in the model's dtype; the chosen weights are renormalised only if
  `norm_topk_prob` (every release says true; where the field is missing it means false). No shared expert.
- A layer is dense if it is in `mlp_only_layers` or not on the grid of `decoder_sparse_step`.
- The number of experts is `num_experts` in releases, `num_local_experts` as transformers 5 saves it.
"""

from __future__ import annotations

from typing import Any

from zoo.family import (
    MLP,
    Attention,
    Config,
    Family,
    Layer,
    MoE,
    Norm,
    QKNorm,
    Router,
    Spec,
    gguf,
    hf,
    read,
    rules,
)


def spec(c: Config) -> Spec:
    c.choice("hidden_act", ("silu",))
    c.refuse(use_sliding_window=False)
    norm = Norm(c["rms_norm_eps"])
    head_dim = read.head_dim(c)
    attention = Attention(
        n_heads=c["num_attention_heads"], n_kv_heads=c["num_key_value_heads"], head_dim=head_dim,
        scale=head_dim**-0.5, rope=read.whole_rope(c, read.rope_parameters(c), head_dim),
        qkv_bias=c.get("attention_bias", False), out_bias=c.get("attention_bias", False), qk_norm=QKNorm(norm),
    )  # fmt: skip
    dense = MLP(c["intermediate_size"])
    moe = MoE(read.n_experts(c), MLP(c["moe_intermediate_size"]), router(c))
    return Spec(
        family="qwen3_moe",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(Layer(attention, moe if s else dense, norm, ffn_norm=norm) for s in sparse(c)),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


def sparse(c: Config) -> list[bool]:
    """Which layers have experts."""
    dense, step = c.get("mlp_only_layers", []), c.get("decoder_sparse_step", 1)
    return [i not in dense and (i + 1) % step == 0 for i in range(c["num_hidden_layers"])]


def router(c: Config, normalize: bool = False) -> Router:
    """`normalize` is what a missing `norm_topk_prob` means."""
    return Router(c["num_experts_per_tok"], "softmax", normalize=c.get("norm_topk_prob", normalize))


HF = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    *hf.QK_NORM,
    *hf.MLP,
    ("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.gate.weight"),
    *hf.NUMBERED,
)
RULES = {
    "hf": rules(*HF, *hf.SWITCHED),
    "transformers": rules(*hf.in_memory(HF, *hf.STACKED)),
    "gguf": rules(
        *gguf.ENDS,
        *gguf.PRE_NORMS,
        *gguf.attention(interleaved=False),
        *gguf.QK_NORM,
        *gguf.MLP,
        *gguf.MOE,
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """What a GGUF of `qwen3moe` says, and what llama.cpp's graph of it fixes."""
    return {
        "head_dim": gguf.head_dim(f, out),
        "num_experts": f["expert_count"],
        "num_experts_per_tok": f["expert_used_count"],
        "moe_intermediate_size": f["expert_feed_forward_length"],
        "norm_topk_prob": True,  # fixed in llama.cpp's graph of this architecture
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


FAMILY = Family(
    "qwen3_moe", ("qwen3_moe",), ("Qwen3MoeForCausalLM",), spec, RULES, gguf={"qwen3moe": gguf_config}
)
