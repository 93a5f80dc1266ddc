"""North Mini Code and Command A+ (Cohere 2 with experts).

Cohere 2's block (see cohere2.py) with
- RMS norms where the config has `rms_norm_eps`, norms that remove the mean where it has not;
- experts: the top k of the logits, then a softmax over those, or the sigmoid of each (divided by their sum if
  `norm_topk_prob`); shared experts as one MLP, averaged with the routed sum or added to it;
- dense layers first, `first_k_dense_replace` of them or by `mlp_layer_types`, with a width and a pattern of windows of
  their own. Where that pattern is 1 they see everything, and yet have RoPE.
Released Command A+ is quantised to 4 bits in a form that zoo does not read.
"""

from __future__ import annotations

from zoo.family import FFN, MLP, Config, Family, Layer, MoE, Norm, Router, Spec, hf, read, rules
from zoo.spec import Activation

from . import cohere2


def spec(c: Config) -> Spec:
    cohere2.refuse_other_layouts(c)
    norm = Norm(c["rms_norm_eps"]) if "rms_norm_eps" in c else read.centred_norm(c)
    c.get("layer_norm_eps")  # releases with RMS norms have both: this one is idle then
    act = c.table("hidden_act", read.ACTIVATIONS, "silu")
    dense = dense_layers(c)
    forced = c.get("prefix_dense_sliding_window_pattern", 1) == 1
    width = c.get("prefix_dense_intermediate_size", c["intermediate_size"])
    wide = MLP(width, act) if any(dense) else None
    experts = moe(c, act) if not all(dense) else None

    def layer(kind: str, is_dense: bool) -> Layer:
        attention = cohere2.attention(
            c, c.get("head_dim", 128), kind == read.SLIDING, turned=is_dense and forced
        )
        ffn: FFN | None = wide if is_dense else experts
        return Layer(attention, ffn, norm, parallel=True, adds="in_turn")

    return Spec(
        family="cohere2_moe",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(map(layer, layer_kinds(c), dense)),
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c["max_position_embeddings"],
        logit_scale=c.get("logit_scale", 0.0625),
        dtype=read.dtype(c),
    )


def dense_layers(c: Config) -> list[bool]:
    """Which layers have no experts."""
    n, first = c["num_hidden_layers"], c.get("first_k_dense_replace", 0)
    if "mlp_layer_types" not in c:
        return [i < first for i in range(n)]
    return [kind == "dense" for kind in c.each_layer("mlp_layer_types", n, ("dense", "sparse"))]


def layer_kinds(c: Config) -> list[str]:
    """The kind of each layer; without `layer_types`, the first dense ones and the others each start a pattern."""
    n_dense = c.get("first_k_dense_replace", 0)
    first = read.every(c.get("prefix_dense_sliding_window_pattern", 1))
    then = read.every(c.get("sliding_window_pattern", 4))
    return read.layer_types(c, lambda i: first(i) if i < n_dense else then(i - n_dense))


def moe(c: Config, act: Activation) -> MoE:
    score = c.choice("expert_selection_fn", ("softmax", "sigmoid"), "softmax")
    router = Router(
        c["num_experts_per_tok"],
        score,
        "chosen",
        normalize=c.get("norm_topk_prob", True) and score == "sigmoid",
    )
    d_ff, n_shared = c["intermediate_size"], c.get("num_shared_experts", 0)
    scale = c.table("shared_expert_combination_strategy", {"average": 0.5, "sum": 1.0}, "average")
    return MoE(
        c["num_experts"],
        MLP(d_ff, act),
        router,
        shared=MLP(d_ff * n_shared, act) if n_shared else None,
        scale=scale if n_shared else 1.0,
    )


HF = (
    *hf.ENDS,
    *hf.PARALLEL_NORM,
    *hf.ATTENTION,
    *hf.MLP,
    ("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.gate.weight"),
    *hf.NUMBERED,
    *hf.gated_mlp("layers.{i}.moe.shared", "model.layers.{i}.mlp.shared_experts"),
    hf.INV_FREQ,
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *hf.STACKED))}

FAMILY = Family("cohere2_moe", ("cohere2_moe",), ("Cohere2MoeForCausalLM",), spec, RULES)
