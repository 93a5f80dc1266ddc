"""Qwen3.5 with experts (35B-A3B, 122B-A10B, 397B-A17B) and Qwen3.6 35B-A3B.

Qwen3.5 with, in every layer, Qwen3-Next's experts and gated shared expert. The chosen weights are always renormalised:
the config has no `norm_topk_prob`. Experts lie stacked or, in quantised releases, one by one.
"""

from __future__ import annotations

from typing import Any

from zoo.family import MLP, Config, Family, MoE, Router, RuleLine, Spec, gguf, hf, read, rules

from . import qwen3_5, qwen3_next


def spec(config: Config) -> Spec:
    c = read.text_config(config)
    moe = MoE(
        read.n_experts(c),
        MLP(c["moe_intermediate_size"]),
        Router(c["num_experts_per_tok"], "softmax", normalize=True),
        shared=MLP(c["shared_expert_intermediate_size"]),
        shared_gate=True,
    )
    return qwen3_5.decoder("qwen3_5_moe", config, c, moe)


TEXT: tuple[RuleLine, ...] = (
    *qwen3_5.TEXT,
    ("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.gate.weight"),
    *hf.SHARED_EXPERT,
)
RULES = {
    "hf": rules(*TEXT, *hf.STACKED, *hf.NUMBERED, *qwen3_5.BESIDE, prefixes=hf.WRAPPERS),
    "gguf": rules(*qwen3_5.GGUF, *gguf.MOE, gguf.SHARED_EXPERT_GATE),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    named = {"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text"}
    return qwen3_5.gguf_config(f, out) | named | qwen3_next.gguf_experts(f)


FAMILY = Family(
    "qwen3_5_moe",
    ("qwen3_5_moe", "qwen3_5_moe_text"),
    ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    spec,
    RULES,
    gguf={"qwen35moe": gguf_config},
)
