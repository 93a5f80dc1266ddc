"""DeepSeek-V2, V2.5, V2-Lite and Coder-V2.

What V3 has otherwise:
- Softmax router without a selection bias, its weights never renormalised. "greedy" chooses among all experts (Lite),
  "group_limited_greedy" in the groups whose best expert is best; experts of other groups score 0.
- RoPE is computed in fp32.
- Lite does not compress queries. No multi-token prediction.
"""

from __future__ import annotations

from zoo.family import Config, Disagreement, Family, LatentAttention, Router, RuleLine, Spec, hf, rules

from . import deepseek_v3


def spec(c: Config) -> Spec:
    c = c.with_defaults({"first_k_dense_replace": 0})
    c.refuse(moe_layer_freq=1, mlp_bias=False, norm_topk_prob=False)
    mixer = deepseek_v3.latent_attention(c, rounding="last")
    return deepseek_v3.decoder("deepseek_v2", c, mixer, router(c))


def router(c: Config) -> Router:
    c.choice("scoring_func", ("softmax",), "softmax")
    grouped = c.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy") != "greedy"
    return Router(
        top_k=c["num_experts_per_tok"],
        score="softmax",
        n_groups=c["n_group"] if grouped else 1,
        top_groups=c["topk_group"] if grouped else 1,
        group_top=1 if grouped else 2,
        masked_groups="zero" if grouped else "-inf",
        scale=float(c["routed_scaling_factor"]),
        rounding="last",
        weights_rounding="last",
    )


HF: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *deepseek_v3.MLA,
    *hf.MLP,
    ("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.gate.weight"),
    *hf.NUMBERED,
    *hf.gated_mlp("layers.{i}.moe.shared", "model.layers.{i}.mlp.shared_experts"),
    hf.INV_FREQ,
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *hf.STACKED))}


def _scores_scaled(spec: Spec) -> bool:
    mixers = (layer.mixer for layer in spec.layers)
    return any(
        isinstance(m, LatentAttention) and m.scale != (m.nope_dim + m.rope_dim) ** -0.5 for m in mixers
    )


DISAGREEMENTS = (
    Disagreement(
        about="YaRN's factor on the scores",
        upstream="scales scores by the square of mscale_all_dim's factor since 5.15, and did not before",
        vendor="scales them so",
        follows="vendor",
        why="it is how the releases were trained",
        source="https://github.com/huggingface/transformers/pull/47435",
        since="2026-07",
        applies=_scores_scaled,
    ),
)
FAMILY = Family(
    "deepseek_v2",
    ("deepseek_v2",),
    ("DeepseekV2ForCausalLM",),
    spec,
    RULES,
    disagreements=DISAGREEMENTS,
)
