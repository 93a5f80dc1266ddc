"""MiniMax-M2.

What is unusual:
- QK-norm over all heads at once (weight as wide as the projection), before the heads are split.
- RoPE on the first half of each head: `rotary_dim` in the release, `partial_rotary_factor` as re-saved.
- Every layer has experts, none is shared. Sigmoid router with a selection bias, its logits in the model's dtype;
  the chosen weights are divided by their sum, with no epsilon and no scale.
- The selection bias lies beside the router (`block_sparse_moe.e_score_correction_bias`), experts are w1 (gate),
  w3 (up), w2 (down). The release says `use_mtp` but holds no such layers.
"""

from __future__ import annotations

from zoo.family import (
    MLP,
    Attention,
    Config,
    Disagreement,
    Family,
    Layer,
    MoE,
    Norm,
    QKNorm,
    Router,
    Spec,
    ZooError,
    hf,
    read,
    rules,
)


def spec(c: Config) -> Spec:
    c.choice("hidden_act", ("silu",))
    c.choice("scoring_func", ("sigmoid",), "sigmoid")
    c.choice("qk_norm_type", ("per_layer",), "per_layer")
    c.refuse(use_qk_norm=True, use_routing_bias=True, shared_intermediate_size=0)
    n = c["num_hidden_layers"]
    if "attn_type_list" in c:
        c.each_layer("attn_type_list", n, (1,))
    norm, head_dim, p = Norm(c["rms_norm_eps"]), c["head_dim"], read.rope_parameters(c)
    rotary_dim = c.get("rotary_dim", read.turned(c, p, head_dim))
    if p.get("partial_rotary_factor", rotary_dim / head_dim) != rotary_dim / head_dim and "rotary_dim" in c:
        raise ZooError(f"{c.where}: rotary_dim and partial_rotary_factor differ: delete one of them")
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.rope(c, p, rotary_dim),
        qk_norm=QKNorm(norm, over="all_heads"),
    )
    router = Router(
        c["num_experts_per_tok"], "sigmoid", selection_bias=True, normalize=True, weights_rounding="last"
    )
    moe = MoE(read.n_experts(c), MLP(c["intermediate_size"]), router)
    return Spec(
        family="minimax_m2",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, moe, attn_norm=norm, ffn_norm=norm),) * n,
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


_B = "model.layers.{i}.block_sparse_moe."
HF = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    *hf.QK_NORM,
    ("layers.{i}.moe.router.weight", _B + "gate.weight"),
    ("layers.{i}.moe.router.selection_bias", _B + "e_score_correction_bias"),
    *hf.numbered(_B + "experts.{e}", "w1", "w3", "w2"),
)
_HELD = (
    *hf.STACKED,
    ("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.gate.weight"),
    ("layers.{i}.moe.router.selection_bias", "model.layers.{i}.mlp.e_score_correction_bias"),
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *_HELD))}

DISAGREEMENTS = (
    Disagreement(
        about="how much of a head turns",
        upstream="rotary_dim channels since 5.18; before, it read no such field and turned whole heads",
        vendor="rotary_dim channels, half of a head",
        follows="vendor",
        why="it is how the release was trained; what transformers before 5.18 trained has both in its weights",
        source="https://huggingface.co/MiniMaxAI/MiniMax-M2/blob/main/config.json",
        since="2025-11",
    ),
)
FAMILY = Family(
    "minimax_m2",
    ("minimax_m2",),
    ("MiniMaxM2ForCausalLM",),
    spec,
    RULES,
    disagreements=DISAGREEMENTS,
)
