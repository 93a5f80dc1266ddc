"""Jamba (AI21): v0.1 52B-A12B, 1.5, 1.6, 1.7, Jamba2, and Reasoning 3B without experts.

What is unusual:
- Mamba (the first) in all layers but each `attn_layer_period`-th, whose attention has no positions; norms on its dt, B and C.
- Experts in each `expert_layer_period`-th layer, as wide as the dense MLP of the others; softmax over all, the weights of
  the chosen as they are. One expert is a dense MLP.
- The first releases say their context as `n_ctx`.
"""

from __future__ import annotations

import math

from zoo.family import (
    FFN,
    MLP,
    Attention,
    Config,
    Family,
    Layer,
    Mamba1,
    Mixer,
    MoE,
    Norm,
    Router,
    RuleLine,
    Spec,
    ZooError,
    hf,
    read,
    rules,
    squeeze,
)

from . import falcon_h1


def spec(c: Config) -> Spec:
    norm, n = Norm(c["rms_norm_eps"]), c["num_hidden_layers"]
    dense = MLP(c["intermediate_size"], c.choice("hidden_act", ("silu",)))  # it is the convolution's too
    experts, top_k = read.n_experts(c), c["num_experts_per_tok"]
    sparse: FFN = MoE(experts, dense, Router(top_k, "softmax")) if experts > 1 else dense
    attention, mamba = attention_of(c), mamba_of(c)
    attends, chooses = every(c, "attn_layer"), every(c, "expert_layer")

    def mixer(i: int) -> Mixer:
        return attention if attends[i] else mamba

    return Spec(
        family="jamba",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(mixer(i), sparse if chooses[i] else dense, attn_norm=norm, ffn_norm=norm) for i in range(n)
        ),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c.first("max_position_embeddings", "n_ctx"),
        dtype=read.dtype(c),
    )


def every(c: Config, what: str) -> list[bool]:
    """Of each layer: whether it is one of every `period`, from `offset` on."""
    period, offset = c[f"{what}_period"], c[f"{what}_offset"]
    if not 0 <= offset < period:
        raise ZooError(
            f"{c.where}: {what}_offset is {offset}; expected at least 0, below {what}_period, {period}"
        )
    return [i % period == offset for i in range(c["num_hidden_layers"])]


def attention_of(c: Config) -> Attention:
    """Grouped heads, without positions or biases."""
    c.refuse(sliding_window=None)
    head_dim = read.head_dim(c)
    return Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
        head_dim=head_dim,
        scale=head_dim**-0.5,
    )


def mamba_of(c: Config) -> Mamba1:
    c.refuse(mamba_proj_bias=False, mamba_inner_layernorms=True)
    rank = c.get("mamba_dt_rank", "auto")
    return Mamba1(
        inner=c.get("mamba_expand", 2) * c["hidden_size"],
        state=c["mamba_d_state"],
        conv=c["mamba_d_conv"],
        dt_rank=math.ceil(c["hidden_size"] / 16) if rank == "auto" else rank,
        norm=Norm(c["rms_norm_eps"]),
        conv_bias=c.get("mamba_conv_bias", True),
    )


_M, _F = "model.layers.{i}.mamba.", "model.layers.{i}.feed_forward."
HF: tuple[RuleLine, ...] = (
    *falcon_h1.ENDS,
    *hf.ATTENTION,
    ("layers.{i}.mamba1.in_proj.weight", _M + "in_proj.weight"),
    ("layers.{i}.mamba1.conv.weight", squeeze(_M + "conv1d.weight", 1)),
    ("layers.{i}.mamba1.conv.bias", _M + "conv1d.bias"),
    ("layers.{i}.mamba1.x_proj.weight", _M + "x_proj.weight"),
    *((f"layers.{{i}}.mamba1.{x}_norm.weight", f"{_M}{x}_layernorm.weight") for x in ("dt", "b", "c")),
    ("layers.{i}.mamba1.dt_proj.weight", _M + "dt_proj.weight"),
    ("layers.{i}.mamba1.dt_bias", _M + "dt_proj.bias"),
    ("layers.{i}.mamba1.A_log", _M + "A_log"),
    ("layers.{i}.mamba1.D", _M + "D"),
    ("layers.{i}.mamba1.out.weight", _M + "out_proj.weight"),
    *hf.gated_mlp("layers.{i}.mlp", _F.rstrip(".")),
    ("layers.{i}.moe.router.weight", _F + "router.weight"),
    *hf.numbered(_F + "experts.{e}", "gate_proj", "up_proj", "down_proj"),
)
_HELD: tuple[RuleLine, ...] = (
    ("layers.{i}.moe.gate_up.weight", _F + "experts.gate_up_proj"),
    ("layers.{i}.moe.down.weight", _F + "experts.down_proj"),
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *_HELD))}
FAMILY = Family("jamba", ("jamba",), ("JambaForCausalLM",), spec, RULES)
