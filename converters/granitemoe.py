"""Granite 3.x with experts (1B-A400M, 3B-A800M), PowerMoE; and `granitemoeshared`, of which IBM has a test model.

Granite's four factors (see granite.py), and in every layer experts in place of the MLP:
- logits in the model's dtype; the top k of them, then a softmax over those in fp32.
- `granitemoeshared` has an MLP that every token visits beside them, of `shared_intermediate_size`; where that is 0, none.
- Experts are released stacked: gate and up in one `input_linear` [E, 2 F, D], down in `output_linear` [E, D, F]. So is the shared MLP.
"""

from __future__ import annotations

from zoo.family import MLP, Config, Family, MoE, Router, Spec, hf, read, rules

from . import granite


def spec(c: Config) -> Spec:
    c.choice("position_embedding_type", ("rope",), "rope")  # as transformers 4 saved it
    rope = read.whole_rope(c, read.rope_parameters(c), read.head_dim(c))
    has_shared = c["model_type"] == "granitemoeshared" and c.get("shared_intermediate_size", 0) > 0
    experts = moe(c, shared_mlp(c) if has_shared else None)
    return granite.decoder("granitemoe", c, [(granite.attention(c, rope), experts)] * c["num_hidden_layers"])


def shared_mlp(c: Config) -> MLP:
    return MLP(c["shared_intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))


def moe(c: Config, shared: MLP | None = None) -> MoE:
    expert = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    return MoE(
        c["num_local_experts"], expert, Router(c["num_experts_per_tok"], "softmax", "chosen"), shared=shared
    )


_SHARED = "model.layers.{i}.shared_mlp."
_MOE = "model.layers.{i}.block_sparse_moe."
HF = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    hf.INV_FREQ,
    ("layers.{i}.moe.router.weight", _MOE + "router.layer.weight"),
    ("layers.{i}.moe.gate_up.weight", _MOE + "input_linear.weight"),
    ("layers.{i}.moe.down.weight", _MOE + "output_linear.weight"),
    ("layers.{i}.moe.shared.gate_up.weight", _SHARED + "input_linear.weight"),
    ("layers.{i}.moe.shared.down.weight", _SHARED + "output_linear.weight"),
)
HELD = (
    ("layers.{i}.moe.router.weight", _MOE + "router.weight"),
    ("layers.{i}.moe.gate_up.weight", _MOE + "experts.gate_up_proj"),
    ("layers.{i}.moe.down.weight", _MOE + "experts.down_proj"),
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *HELD))}

FAMILY = Family(
    "granitemoe",
    ("granitemoe", "granitemoeshared"),
    ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    spec,
    RULES,
)
