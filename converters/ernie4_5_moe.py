"""ERNIE 4.5 with experts: 21B-A3B and 300B-A47B.

The attention of ERNIE 4.5, dense: RoPE pairs neighbouring channels and is computed in fp32. Around it
- a softmax router over all experts, in fp32 from its weights on. A selection bias takes part in the choice alone; the chosen
  weights are divided by their sum, or by `moe_norm_min` where that is larger;
- shared experts beside the others (21B; the 300B has none);
- experts in layers `moe_layer_start_index` to `moe_layer_end_index` (-1: the last) on the grid of `moe_layer_interval`.
- The 21B has a tied head, the 300B has not. Biases (`use_bias`) are refused: no release has them.
- Releases hold a prediction layer of their own, as `mtp_*`.
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
    Router,
    RuleLine,
    Spec,
    extra,
    hf,
    read,
    rules,
    squeeze,
)


def spec(c: Config) -> Spec:
    c.refuse(use_bias=False, moe_use_aux_free=True, moe_gate_act="softmax", moe_norm_gate_logits=True)
    norm, head_dim = Norm(c["rms_norm_eps"]), read.head_dim(c)
    act = c.table("hidden_act", read.ACTIVATIONS)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c), head_dim, interleaved=True, rounding="last"),
    )
    dense, width = MLP(c["intermediate_size"], act), c["moe_intermediate_size"]
    n_shared = c.get("moe_num_shared_experts", 0)
    shared = MLP(n_shared * width, act) if n_shared else None
    moe = MoE(c.first("moe_num_experts", "num_experts"), MLP(width, act), router(c), shared)
    return Spec(
        family="ernie4_5_moe",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(Layer(attention, moe if s else dense, norm, ffn_norm=norm) for s in sparse(c)),
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


def sparse(c: Config) -> list[bool]:
    """Which layers have experts."""
    n, step = c["num_hidden_layers"], c.get("moe_layer_interval", 1)
    start, end = c["moe_layer_start_index"], c.get("moe_layer_end_index", -1)
    return [start <= i <= (n - 1 if end == -1 else end) and (i + 1) % step == 0 for i in range(n)]


def router(c: Config) -> Router:
    return Router(
        top_k=c.first("moe_k", "num_experts_per_tok"),
        score="softmax",
        selection_bias=True,
        normalize=True,
        normalize_floor=float(c.get("moe_norm_min", 1e-12)),
        rounding="last",
    )


_M = "model.layers.{i}.mlp."
_BIAS = "moe_statics.e_score_correction_bias"
HF: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    *hf.MLP,
    ("layers.{i}.moe.router.weight", _M + "gate.weight"),
    ("layers.{i}.moe.router.selection_bias", squeeze(_M + _BIAS, 0)),
    *hf.NUMBERED,
    *hf.gated_mlp("layers.{i}.moe.shared", _M + "shared_experts"),
    extra("model.mtp_*", hf.MTP),
)
_HELD = (*hf.STACKED, ("layers.{i}.moe.router.selection_bias", squeeze(_M + "gate." + _BIAS, 0)))
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *_HELD))}

FAMILY = Family("ernie4_5_moe", ("ernie4_5_moe",), ("Ernie4_5_MoeForCausalLM",), spec, RULES)
