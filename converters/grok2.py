"""Grok 2 (released as Grok 2.5).

- Four RMS norms: before and after both branches. Embeddings are multiplied by a constant (sqrt(8192)),
  logits by 0.5 before their softcap of 50.
- Attention scores: 30 tanh(s / 30), then times log2(position) / log2(1024) for positions above 1024.
- The FFN is (dense GEGLU + experts) / sqrt(2): in the Spec, the dense one is the shared expert and 1/sqrt(2)
  the scale of the sum. Router in fp32: 30 tanh(logits / 30), softmax over all 8 experts, best two kept and
  not renormalised.
- `rope_type` "original" means unscaled, whatever the scaling fields beside it say.
- Files are made for 8 tensor-parallel ranks: experts lie once per rank (`-TP-00r`), w1 and w3 cut by rows,
  w2 by columns; all else is whole (`-TP-common`).

transformers has no such model. Source: sglang python/sglang/srt/models/grok.py at 031ad4c (read, not run).
What engines disagree on: vLLM and llama.cpp leave the position-dependent factor out; the experts' GELU is
tanh or erf (here tanh, as in the dense path and in xAI's Grok 1 code).
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
    QueryScale,
    Rope,
    Router,
    Spec,
    cat,
    hf,
    ranks,
    read,
    rules,
    stack,
)


def spec(c: Config) -> Spec:
    c.choice("rope_type", ("original",), "original")
    c.choice("residual_moe", (True,))
    c.refuse(sliding_window_size=-1, global_attn_every_n=1, rope_rotate_half_dims=False)
    c.refuse(attn_logit_softcapping_method="tanh", rope_scaling=None)
    d, head_dim = c["hidden_size"], c["head_dim"]
    norm = Norm(c["rms_norm_eps"])
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=Rope(float(c["rope_theta"]), head_dim),
        query_scale=QueryScale("log", float(c["attn_temperature_len"])),
        softcap=float(c["attn_logit_softcapping"]),
    )
    moe = MoE(
        n_experts=c["num_local_experts"],
        expert=MLP(c["moe_intermediate_size"], "gelu_tanh"),
        router=Router(
            top_k=c["num_experts_per_tok"],
            score="softmax",
            rounding="last",
            weights_rounding="last",
            softcap=float(c["router_logit_softcapping"]),
        ),
        shared=MLP(c["intermediate_size"], "gelu_tanh"),
        scale=2**-0.5,
    )
    return Spec(
        family="grok2",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, moe, norm, norm, norm, norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        embed_scale=float(c["embedding_multiplier_scale"]),
        logit_scale=float(c["output_multiplier_scale"]),
        logit_softcap=float(c["final_logit_softcapping"]),
        dtype=read.dtype(c),
    )


_L = "model.layers.{i}."
_E = _L + "block_sparse_moe.experts.{e}."
RULES = {
    "hf": rules(
        *hf.ENDS,
        *hf.ATTENTION,
        ("layers.{i}.attn_norm.weight", _L + "pre_attn_norm.weight"),
        ("layers.{i}.attn_post_norm.weight", _L + "post_attn_norm.weight"),
        ("layers.{i}.ffn_norm.weight", _L + "pre_moe_norm.weight"),
        ("layers.{i}.ffn_post_norm.weight", _L + "post_moe_norm.weight"),
        ("layers.{i}.moe.router.weight", _L + "block_sparse_moe.gate.weight"),
        ("layers.{i}.moe.gate_up.weight", stack(cat(_E + "w1.weight", _E + "w3.weight"))),
        ("layers.{i}.moe.down.weight", stack(_E + "w2.weight")),
        (
            "layers.{i}.moe.gate_up.weight",
            stack(cat(ranks("rank{r}." + _E + "w1.weight", 0), ranks("rank{r}." + _E + "w3.weight", 0))),
        ),
        ("layers.{i}.moe.down.weight", stack(ranks("rank{r}." + _E + "w2.weight", 1))),
        ("layers.{i}.moe.shared.gate_up.weight", cat(_L + "mlp.gate_proj.weight", _L + "mlp.up_proj.weight")),
        ("layers.{i}.moe.shared.down.weight", _L + "mlp.down_proj.weight"),
        hf.INV_FREQ,
    ),
}

FAMILY = Family("grok2", ("grok2", "git"), ("Grok1ForCausalLM", "Grok2ForCausalLM"), spec, RULES)
