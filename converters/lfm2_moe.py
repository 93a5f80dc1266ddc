"""Liquid's LFM2-8B-A1B and LFM2.5-8B-A1B: LFM2 with experts after the first layers.

What is unusual, beyond lfm2:
- The feed-forward is as wide as the config says; the first `num_dense_layers` are dense.
- Sigmoid router in the model's dtype; a bias in fp32 takes part in the choice only (`use_expert_bias`). The chosen weights
  are divided by their sum + 1e-6. No shared expert.
"""

from __future__ import annotations

from zoo.family import FFN, MLP, Config, Family, MoE, Router, RuleLine, Spec, hf, read, rules

from . import lfm2


def spec(c: Config) -> Spec:
    n = c["num_hidden_layers"]
    kinds = c.each_layer("layer_types", n, (read.FULL, lfm2.CONV))
    router = Router(
        top_k=c["num_experts_per_tok"],
        score="sigmoid",
        selection_bias=c.get("use_expert_bias", True),
        normalize=c.get("norm_topk_prob", True),
        normalize_eps=1e-6,
        scale=float(c.get("routed_scaling_factor", 1.0)),
        score_rounding="first",
    )
    dense = MLP(c["intermediate_size"])
    moe = MoE(read.n_experts(c), MLP(c["moe_intermediate_size"]), router)
    ffns: list[FFN] = [dense if i < c["num_dense_layers"] else moe for i in range(n)]
    return lfm2.decoder("lfm2_moe", c, kinds, ffns)


_F = "model.layers.{i}.feed_forward."
HF: tuple[RuleLine, ...] = (
    *lfm2.MIXERS,
    *lfm2.MLP_LINES,
    ("layers.{i}.moe.router.weight", _F + "gate.weight"),
    ("layers.{i}.moe.router.selection_bias", _F + "expert_bias"),
    *hf.numbered(_F + "experts.{e}", "w1", "w3", "w2"),
)
_HELD: tuple[RuleLine, ...] = (
    ("layers.{i}.moe.gate_up.weight", _F + "experts.gate_up_proj"),
    ("layers.{i}.moe.down.weight", _F + "experts.down_proj"),
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *_HELD))}

FAMILY = Family("lfm2_moe", ("lfm2_moe",), ("Lfm2MoeForCausalLM",), spec, RULES)
