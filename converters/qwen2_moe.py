"""Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B.

What is unusual:
- Biases on q, k and v, not on the output. No QK-norm.
- Softmax router; the chosen weights are renormalised only if `norm_topk_prob` (no release, and not where it is missing).
- A shared expert beside the others that is itself gated.
- A layer is dense if it is in `mlp_only_layers` or not on the grid of `decoder_sparse_step`.
- Windows (`use_sliding_window`) are refused: no release has them.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, MoE, Norm, Spec, hf, read, rules

from . import qwen3_moe


def spec(c: Config) -> Spec:
    c.choice("hidden_act", ("silu",))
    c.refuse(use_sliding_window=False)
    norm, head_dim = Norm(c["rms_norm_eps"]), read.head_dim(c)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c), head_dim),
        qkv_bias=c.get("qkv_bias", True),
    )
    dense = MLP(c["intermediate_size"])
    moe = MoE(
        read.n_experts(c),
        MLP(c["moe_intermediate_size"]),
        qwen3_moe.router(c),
        shared=MLP(c["shared_expert_intermediate_size"]),
        shared_gate=True,
    )
    return Spec(
        family="qwen2_moe",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(Layer(attention, moe if s else dense, norm, ffn_norm=norm) for s in qwen3_moe.sparse(c)),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


HF = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    *hf.MLP,
    ("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.gate.weight"),
    *hf.NUMBERED,
    *hf.SHARED_EXPERT,
    hf.INV_FREQ,
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *hf.STACKED))}

FAMILY = Family("qwen2_moe", ("qwen2_moe",), ("Qwen2MoeForCausalLM",), spec, RULES)
