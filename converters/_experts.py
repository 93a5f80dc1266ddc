"""What families with experts share: parts of a Spec that are read from the same config fields, and rule lines
for names that most of Hugging Face's mixture-of-experts decoders give the same parts.

As in `_dense.py`, a family file lists what it has; a line that only one family needs stays there.
"""

from __future__ import annotations

from zoo.config import Config
from zoo.mapping.rules import RuleLine, cat, extra, stack
from zoo.spec import MLP, Router

from ._dense import FULL as FULL
from ._dense import SLIDING as SLIDING
from ._dense import dtype as dtype

LINEAR = "linear_attention"


def n_experts(c: Config) -> int:
    return int(c.first("n_routed_experts", "num_local_experts", "num_experts"))


def sparse_layers(c: Config) -> list[bool]:
    """Which layers have experts: a list as transformers 5 writes it, or all but the first k."""
    n = c["num_hidden_layers"]
    if "mlp_layer_types" in c:
        return [kind == "sparse" for kind in c.each_layer("mlp_layer_types", n, ("dense", "sparse"))]
    return [i >= c["first_k_dense_replace"] for i in range(n)]


def sigmoid_router(c: Config, scale: float | None = None) -> Router:
    """DeepSeek-V3's router (arXiv 2412.19437, section 2.1.2): sigmoid scores in fp32, a selection bias instead
    of an auxiliary loss, groups of experts ranked by their two best. No field has a default: families with this
    router differ in theirs. `scale`: instead of `routed_scaling_factor`."""
    c.choice("scoring_func", ("sigmoid",), "sigmoid")
    c.choice("topk_method", ("noaux_tc",), "noaux_tc")
    return Router(
        top_k=c["num_experts_per_tok"],
        score="sigmoid",
        selection_bias=True,
        n_groups=c["n_group"],
        top_groups=c["topk_group"],
        normalize=c["norm_topk_prob"],
        normalize_eps=1e-20,
        scale=float(c["routed_scaling_factor"] if scale is None else scale),
        rounding="last",
        weights_rounding="last",
    )


def shared_experts(c: Config) -> MLP | None:
    """The experts that every token visits are one MLP of their widths together."""
    n = c.get("n_shared_experts", 0)
    return MLP(n * c["moe_intermediate_size"]) if n else None


# --- rules ------------------------------------------------------------------------------------------


def gated_mlp(key: str, source: str) -> tuple[RuleLine, ...]:
    """A gated MLP whose tensors lie under `source`."""
    return (
        (f"{key}.gate_up.weight", cat(f"{source}.gate_proj.weight", f"{source}.up_proj.weight")),
        (f"{key}.down.weight", f"{source}.down_proj.weight"),
    )


def numbered(source: str, gate: str, up: str, down: str) -> tuple[RuleLine, ...]:
    """Gated experts that are stored one by one under `source`, which holds `{e}`."""
    return (
        ("layers.{i}.moe.gate_up.weight", stack(cat(f"{source}.{gate}.weight", f"{source}.{up}.weight"))),
        ("layers.{i}.moe.down.weight", stack(f"{source}.{down}.weight")),
    )


NUMBERED = numbered("model.layers.{i}.mlp.experts.{e}", "gate_proj", "up_proj", "down_proj")

DEEPSEEK_MOE: tuple[RuleLine, ...] = (
    ("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.gate.weight"),
    ("layers.{i}.moe.router.selection_bias", "model.layers.{i}.mlp.gate.e_score_correction_bias"),
    *NUMBERED,
    *gated_mlp("layers.{i}.moe.shared", "model.layers.{i}.mlp.shared_experts"),
)

MTP = "multi-token prediction: no part in the next token's logits"
# Layers after the last one, each with the projection that joins the next token's embedding to the state.
MTP_LAYERS = extra("model.layers.{i}.*", MTP, beside="eh_proj.weight")
GGUF_MTP_LAYERS = extra("blk.{i}.*", MTP, beside="nextn.eh_proj.weight")

# llama.cpp's GGUF: experts are stacked, gate and up apart.
GGUF_MOE: tuple[RuleLine, ...] = (
    ("layers.{i}.moe.router.weight", "blk.{i}.ffn_gate_inp.weight"),
    ("layers.{i}.moe.router.selection_bias", "blk.{i}.exp_probs_b.bias"),
    ("layers.{i}.moe.gate_up.weight", cat("blk.{i}.ffn_gate_exps.weight", "blk.{i}.ffn_up_exps.weight")),
    ("layers.{i}.moe.down.weight", "blk.{i}.ffn_down_exps.weight"),
    (
        "layers.{i}.moe.shared.gate_up.weight",
        cat("blk.{i}.ffn_gate_shexp.weight", "blk.{i}.ffn_up_shexp.weight"),
    ),
    ("layers.{i}.moe.shared.down.weight", "blk.{i}.ffn_down_shexp.weight"),
)
