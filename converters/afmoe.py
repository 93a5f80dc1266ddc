"""Arcee's Trinity: Nano, Mini and Large.

What is unusual:
- Four norms a layer, QK-norm per head. RoPE only on layers with a window; each fourth layer is full and has none.
- Attention's output times sigmoid of a gate for each channel, from a matrix of its own, before the output projection.
- With `mup_enabled` embeddings times sqrt(d_model), a factor that is not rounded first.
- Sigmoid router with a selection bias; its logits are in the model's dtype, all after them in fp32. The first layers dense.
- Upstream reads neither `score_func`, `route_norm` nor the groups of the config: other values than it computes are refused.
"""

from __future__ import annotations

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
    RuleLine,
    Spec,
    cat,
    hf,
    read,
    rules,
)

from . import deepseek_v3


def spec(c: Config) -> Spec:
    c.refuse(attention_bias=False, score_func="sigmoid", route_norm=True, n_group=1, topk_group=1)
    c.refuse(num_expert_groups=1, num_limited_groups=1)
    norm, head_dim = Norm(c["rms_norm_eps"], rounding="last"), c["head_dim"]
    rope = read.whole_rope(c, read.rope_parameters(c), head_dim)

    def attention(kind: str) -> Attention:
        sliding = kind == read.SLIDING
        return Attention(
            n_heads=c["num_attention_heads"],
            n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=rope if sliding else None,
            window=c["sliding_window"] if sliding else None,
            qk_norm=QKNorm(norm),
            gate=True,
        )

    router = Router(
        top_k=c["num_experts_per_tok"],
        score="sigmoid",
        selection_bias=True,
        normalize=True,
        normalize_eps=1e-20,
        scale=float(c.get("route_scale", 1.0)),
        weights_rounding="last",
    )
    c.choice("hidden_act", ("silu",))
    dense, shared = MLP(c["intermediate_size"]), deepseek_v3.shared_experts(c)
    moe = MoE(read.n_experts(c), MLP(c["moe_intermediate_size"]), router, shared)
    kinds = read.layer_types(c, read.every(c.get("global_attn_every_n_layers", 4)))
    return Spec(
        family="afmoe",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(attention(kind), dense if i < c["num_dense_layers"] else moe, norm, norm, norm, norm)
            for i, kind in enumerate(kinds)
        ),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        embed_scale=c["hidden_size"] ** 0.5 if c.get("mup_enabled", False) else 1.0,
        embed_rounding="last",
        dtype=read.dtype(c),
    )


_L = "model.layers.{i}."
_A, _M = _L + "self_attn.", _L + "mlp."
HF: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.FOUR_NORMS[:2],
    ("layers.{i}.ffn_norm.weight", _L + "pre_mlp_layernorm.weight"),
    ("layers.{i}.ffn_post_norm.weight", _L + "post_mlp_layernorm.weight"),
    ("layers.{i}.attn.qkv.weight", cat(*(f"{_A}{x}_proj.weight" for x in ("q", "gate", "k", "v")))),
    ("layers.{i}.attn.out.weight", _A + "o_proj.weight"),
    *hf.QK_NORM,
    *hf.MLP,
    ("layers.{i}.moe.router.weight", _M + "router.gate.weight"),
    ("layers.{i}.moe.router.selection_bias", _M + "expert_bias"),
    *hf.NUMBERED,
    *hf.gated_mlp("layers.{i}.moe.shared", _M + "shared_experts"),
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *hf.STACKED))}

FAMILY = Family("afmoe", ("afmoe",), ("AfmoeForCausalLM",), spec, RULES)
