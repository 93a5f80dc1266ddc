"""OLMoE 1B-7B.

What is unusual:
- QK-norm over the full width of all heads, before the split into heads and before RoPE.
- Every layer has experts, of width `intermediate_size`; softmax router, not renormalised unless `norm_topk_prob`.
- Queries, keys and values clipped to `clip_qkv` are refused: no release sets it.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, MoE, Norm, QKNorm, Spec, hf, read, rules

from . import qwen3_moe


def spec(c: Config) -> Spec:
    c.choice("hidden_act", ("silu",))
    c.refuse(clip_qkv=None)
    norm, head_dim, bias = Norm(c.get("rms_norm_eps", 1e-5)), read.head_dim(c), c.get("attention_bias", False)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c), head_dim),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=QKNorm(norm, over="all_heads"),
    )
    moe = MoE(read.n_experts(c), MLP(c["intermediate_size"]), qwen3_moe.router(c))
    return Spec(
        family="olmoe",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, moe, attn_norm=norm, ffn_norm=norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


HF = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    *hf.QK_NORM,
    ("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.gate.weight"),
    *hf.NUMBERED,
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *hf.STACKED))}

FAMILY = Family("olmoe", ("olmoe",), ("OlmoeForCausalLM",), spec, RULES)
