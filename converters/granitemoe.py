"""Granite 3.x with experts (1B-A400M, 3B-A800M), PowerMoE.

Granite's four factors (see granite.py), and in every layer experts in place of the MLP:
- logits in the model's dtype; the top k of them, then a softmax over those in fp32. No shared expert.
- Experts are released stacked: gate and up in one `input_linear` [E, 2 F, D], down in `output_linear` [E, D, F].
"""

from __future__ import annotations

from zoo.family import MLP, Config, Family, MoE, Router, Spec, hf, read, rules

from . import granite


def spec(c: Config) -> Spec:
    rope = read.whole_rope(c, read.rope_parameters(c), read.head_dim(c))
    return granite.decoder("granitemoe", c, [(granite.attention(c, rope), moe(c))] * c["num_hidden_layers"])


def moe(c: Config, shared: MLP | None = None) -> MoE:
    expert = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    return MoE(
        c["num_local_experts"], expert, Router(c["num_experts_per_tok"], "softmax", "chosen"), shared=shared
    )


_MOE = "model.layers.{i}.block_sparse_moe."
HF = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    hf.INV_FREQ,
    ("layers.{i}.moe.router.weight", _MOE + "router.layer.weight"),
    ("layers.{i}.moe.gate_up.weight", _MOE + "input_linear.weight"),
    ("layers.{i}.moe.down.weight", _MOE + "output_linear.weight"),
)
HELD = (
    ("layers.{i}.moe.router.weight", _MOE + "router.weight"),
    ("layers.{i}.moe.gate_up.weight", _MOE + "experts.gate_up_proj"),
    ("layers.{i}.moe.down.weight", _MOE + "experts.down_proj"),
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *HELD))}

FAMILY = Family("granitemoe", ("granitemoe",), ("GraniteMoeForCausalLM",), spec, RULES)
