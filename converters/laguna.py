"""Poolside's Laguna: XS.2, XS 2.1, S 2.1.

What is unusual:
- Layers differ in more than the window: full ones have fewer query heads (`num_attention_heads_per_layer`) and a RoPE of
  their own, YaRN over half of a head; those with a window turn the whole head. Key/value heads are the same everywhere.
- Attention's output times softplus of a gate for each head (or each channel), from a matrix of its own.
- QK-norm per head, before RoPE.
- Sigmoid router with a selection bias, its logits in the model's dtype; what the experts give, times a factor, beside a
  shared expert. The first layer is dense.
- A config says some things twice: `gating_types` repeats `gating` for each layer, and `rope_parameters` has the original
  context beside the kinds of layers too. They must agree.
"""

from __future__ import annotations

from zoo.family import (
    FFN,
    MLP,
    Attention,
    Config,
    Family,
    Layer,
    MoE,
    Norm,
    QKNorm,
    Rope,
    Router,
    RuleLine,
    Spec,
    ZooError,
    cat,
    hf,
    read,
    rules,
)


def spec(c: Config) -> Spec:
    c.refuse(attention_bias=False, norm_topk_prob=True, moe_apply_router_weight_on_input=False)
    c.choice("hidden_act", ("silu",), "silu")
    n, norm, head_dim = c["num_hidden_layers"], Norm(c["rms_norm_eps"]), c["head_dim"]
    kinds, ropes = read.layer_types(c, lambda _: read.FULL), {}
    for kind in set(kinds):
        ropes[kind] = rope(c, kind)
    heads = [c["num_attention_heads"]] * n
    if "num_attention_heads_per_layer" in c:
        heads = c.each_layer("num_attention_heads_per_layer", n)

    def attention(kind: str, n_heads: int) -> Attention:
        return Attention(
            n_heads=n_heads,
            n_kv_heads=c["num_key_value_heads"],
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=ropes[kind],
            window=c["sliding_window"] if kind == read.SLIDING else None,
            qk_norm=QKNorm(norm),
            gate=True,
            gate_act="softplus",
            gate_over="channel" if gate == "per-element" else "head",
        )

    gate = c.choice("gating", (True, "per-head", "per-element"), True)
    if "gating_types" in c:
        c.each_layer("gating_types", n, ["per_element" if gate == "per-element" else "per_head"])
    router = Router(
        top_k=c["num_experts_per_tok"],
        score="sigmoid",
        selection_bias=True,
        normalize=True,
        softcap=c.get("moe_router_logit_softcapping", 0.0) or None,
    )
    moe = MoE(
        read.n_experts(c),
        MLP(c["moe_intermediate_size"]),
        router,
        shared=MLP(c["shared_expert_intermediate_size"]),
        routed_scale=float(c.get("moe_routed_scaling_factor", 1.0)),
    )
    ffn: dict[str, FFN] = {"dense": MLP(c["intermediate_size"]), "sparse": moe}
    ffns = ["dense"] + ["sparse"] * (n - 1)
    if "mlp_layer_types" in c:
        ffns = c.each_layer("mlp_layer_types", n, ffn)
    return Spec(
        family="laguna",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(attention(kind, h), ffn[f], attn_norm=norm, ffn_norm=norm)
            for kind, h, f in zip(kinds, heads, ffns, strict=True)
        ),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


def rope(c: Config, kind: str) -> Rope:
    """RoPE of a kind of layer."""
    p, every = read.rope_parameters(c, kind), c.sub("rope_parameters")
    made = read.partial_rope(c, p, c["head_dim"])
    original = every.get("original_max_position_embeddings")
    if made.scaling is not None and original not in (None, made.scaling.original_context):
        raise ZooError(
            f"{c.where}: rope_parameters has original_max_position_embeddings {original} beside the layers' kinds, but "
            f"{made.scaling.original_context} for {kind}: correct one of them"
        )
    return made


_A, _M = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
HF: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    ("layers.{i}.attn.qkv.weight", cat(*(f"{_A}{x}_proj.weight" for x in "qgkv"))),
    ("layers.{i}.attn.out.weight", _A + "o_proj.weight"),
    *hf.QK_NORM,
    *hf.MLP,
    ("layers.{i}.moe.router.weight", _M + "gate.weight"),
    ("layers.{i}.moe.router.selection_bias", _M + "experts.e_score_correction_bias"),
    *hf.NUMBERED,
    *hf.gated_mlp("layers.{i}.moe.shared", _M + "shared_expert"),
)
_HELD: tuple[RuleLine, ...] = (
    ("layers.{i}.moe.router.selection_bias", _M + "gate.e_score_correction_bias"),
    *hf.STACKED,
    *hf.gated_mlp("layers.{i}.moe.shared", _M + "shared_experts"),
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *_HELD))}

FAMILY = Family("laguna", ("laguna",), ("LagunaForCausalLM",), spec, RULES)
