"""Nemotron 3 Nano (30B-A3B) and Super (120B-A12B), Nemotron-H.

What is unusual:
- A layer is one thing with one norm: Mamba-2 (M), attention without positions (*), experts (E) or an MLP (-), in
  the order that `hybrid_override_pattern` spells.
- MLPs and experts have no gate: down(relu(up x)^2). The shared expert has a width of its own.
- Super's routed experts work in a latent space (`moe_latent_size`); router and shared expert see the full width.
- Norm weights are applied in fp32, then cast; the Mamba output norm has n_groups groups and comes after its gate.
- dt is clamped to `time_step_limit`, which is (0, inf) in every release: not at all. transformers clamps it to
  `time_step_min` when it reads a prompt, which only initialises dt_bias: see DISAGREEMENTS.
- `mtp.*` are multi-token-prediction layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from zoo.family import (
    MLP,
    Attention,
    Config,
    Disagreement,
    Family,
    Layer,
    Mamba,
    MoE,
    Norm,
    Spec,
    ZooError,
    cat,
    extra,
    hf,
    read,
    rules,
    stack,
)

from . import deepseek_v3

LETTERS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
# As transformers spells them; 5.x calls the first two by the kind of their attention.
TYPES = {kind: kind for kind in LETTERS.values()} | {read.LINEAR: "mamba", read.FULL: "attention"}


def spec(c: Config) -> Spec:
    c.choice("mlp_hidden_act", ("relu2",), "relu2")
    c.choice("mamba_hidden_act", ("silu",), "silu")
    c.refuse(attention_bias=False, mlp_bias=False, use_bias=False, mamba_proj_bias=False, sliding_window=None)
    c.refuse(tie_word_embeddings=False)
    norm = Norm(c.first("layer_norm_epsilon", "norm_eps"), rounding="last")
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        scale=c["head_dim"] ** -0.5,
    )
    mamba = Mamba(
        n_heads=c["mamba_num_heads"],
        head_dim=c["mamba_head_dim"],
        n_groups=c.first("mamba_n_groups", "n_groups"),
        state=c["ssm_state_size"],
        conv=c.first("mamba_d_conv", "conv_kernel"),
        out_norm=norm,
        conv_bias=c.first("mamba_conv_bias", "use_conv_bias", default=True),
        dt_min=dt_floor(c),
    )
    layers = {
        "mamba": Layer(mamba, None, attn_norm=norm),
        "attention": Layer(attention, None, attn_norm=norm),
        "mlp": Layer(None, MLP(c["intermediate_size"], "relu2", gated=False), ffn_norm=norm),
    }
    kinds = layer_kinds(c)
    if "moe" in kinds:
        moe = MoE(
            read.n_experts(c),
            MLP(c["moe_intermediate_size"], "relu2", gated=False),
            deepseek_v3.router(c),
            shared=MLP(c["moe_shared_expert_intermediate_size"], "relu2", gated=False),
            latent=c.get("moe_latent_size"),
        )
        layers["moe"] = Layer(None, moe, ffn_norm=norm)
    return Spec(
        family="nemotron_h",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(layers[kind] for kind in kinds),
        norm=norm,
        tied=False,
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


def dt_floor(c: Config) -> float:
    """The lower end of the limits of dt; the upper one must be none (infinity, or 1e308, which JSON can hold)."""
    low, high = c.first("mamba_dt_limit", "time_step_limit", default=(0.0, math.inf))
    if (top := float(high["__float__"] if isinstance(high, Mapping) else high)) < 1e308:
        raise ZooError(f"{c.where}: time_step_limit ends at {top}; only an open end is supported")
    return float(low)


def layer_kinds(c: Config) -> list[str]:
    """The release's pattern of letters, or a list of names as transformers writes it."""
    if "hybrid_override_pattern" not in c:
        names = c.first("layers_block_type", "layer_types")
        if unknown := sorted(set(names) - set(TYPES)):
            raise ZooError(
                f"{c.where}: unknown layer type(s) {', '.join(unknown)}; known: {', '.join(TYPES)}"
            )
        return [TYPES[name] for name in names]
    pattern = c["hybrid_override_pattern"]
    if unknown := sorted(set(pattern) - set(LETTERS)):
        raise ZooError(
            f"{c.where}: hybrid_override_pattern has unknown layer type(s) {', '.join(unknown)}; "
            f"known: {', '.join(LETTERS)}"
        )
    if len(pattern) != c.get("num_hidden_layers", len(pattern)):
        raise ZooError(
            f"{c.where}: hybrid_override_pattern has {len(pattern)} layers, num_hidden_layers says otherwise"
        )
    return [LETTERS[letter] for letter in pattern]


_M = "backbone.layers.{i}.mixer."
HF = (
    ("embed.weight", "backbone.embeddings.weight"),
    ("norm.weight", "backbone.norm_f.weight"),
    ("head.weight", "lm_head.weight"),
    ("layers.{i}.attn_norm.weight", "backbone.layers.{i}.norm.weight"),
    ("layers.{i}.ffn_norm.weight", "backbone.layers.{i}.norm.weight"),
    ("layers.{i}.attn.qkv.weight", cat(*(f"{_M}{x}_proj.weight" for x in "qkv"))),
    ("layers.{i}.attn.out.weight", _M + "o_proj.weight"),
    *hf.mamba("backbone.layers.{i}.mixer"),
    ("layers.{i}.mlp.up.weight", _M + "up_proj.weight"),
    ("layers.{i}.mlp.down.weight", _M + "down_proj.weight"),
    ("layers.{i}.moe.router.weight", _M + "gate.weight"),
    ("layers.{i}.moe.router.selection_bias", _M + "gate.e_score_correction_bias"),
    ("layers.{i}.moe.latent_down.weight", _M + "fc1_latent_proj.weight"),
    ("layers.{i}.moe.latent_up.weight", _M + "fc2_latent_proj.weight"),
    ("layers.{i}.moe.up.weight", stack(_M + "experts.{e}.up_proj.weight")),
    ("layers.{i}.moe.down.weight", stack(_M + "experts.{e}.down_proj.weight")),
    ("layers.{i}.moe.shared.up.weight", _M + "shared_experts.up_proj.weight"),
    ("layers.{i}.moe.shared.down.weight", _M + "shared_experts.down_proj.weight"),
    extra("mtp.*", hf.MTP),
)
_HELD = (
    ("layers.{i}.moe.up.weight", _M + "experts.up_proj"),
    ("layers.{i}.moe.down.weight", _M + "experts.down_proj"),
)
RULES = {
    "hf": rules(*HF),
    "transformers": rules(*hf.in_memory(HF, *_HELD), prefixes=({"backbone.": "model."},)),
    "saved": rules(*HF, ("embed.weight", "backbone.embedding.weight")),  # by transformers up to 5.15
}


def _no_floor(model: Any) -> None:
    """Every mixer's limits as the config states them, in place of (time_step_min, inf)."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = tuple(model.config.time_step_limit)


def _has_mamba(spec: Spec) -> bool:
    return any(isinstance(layer.mixer, Mamba) for layer in spec.layers)


DISAGREEMENTS = (
    Disagreement(
        about="a floor under dt in Mamba-2",
        upstream="raises dt to time_step_min (0.001) when it reads a prompt",
        vendor="clamps dt to time_step_limit, (0, inf): not at all",
        follows="vendor",
        why="released weights lose with the floor: mean KL 0.034 against 0.003 on Nano 30B, perplexity 5.56 against "
        "5.20 on Super 120B (mlx-lm 1026)",
        source="https://github.com/huggingface/transformers/pull/48989",
        since="2026-11",
        applies=_has_mamba,
        correct=_no_floor,
    ),
    Disagreement(
        about="what a chunk of a long text hands on to the next in Mamba-2",
        upstream="its state, but from 5.3 to 5.14, where without CUDA kernels each state was weighed by the decays of others",
        vendor="its state",
        follows="vendor",
        why="a sum went over the wrong axis, which upstream has mended; texts of one chunk (128 tokens) were right",
        source="https://github.com/huggingface/transformers/issues/47246",
        since="2026-07",
        applies=_has_mamba,
    ),
)
FAMILY = Family(
    "nemotron_h", ("nemotron_h",), ("NemotronHForCausalLM",), spec, RULES, disagreements=DISAGREEMENTS
)
