"""Phi-3.5-MoE.

A Mixtral with
- LayerNorms, with biases, whose eps is called `rms_norm_eps`; biases in attention (`attention_bias`, the output's too)
  and of the head (`lm_head_bias`);
- LongRoPE, with a factor on cos and sin for either table (`short_mscale`, `long_mscale`). transformers never takes the
  long one: see DISAGREEMENTS;
- SparseMixer: two experts, whatever `num_experts_per_tok` says. An expert's weight is a softmax over those that are
  left when it is chosen and whose logits are near its own, within twice `router_jitter_noise`. In the model's dtype.
"""

from __future__ import annotations

from typing import Any

from zoo.family import (
    MLP,
    Attention,
    Config,
    Disagreement,
    Family,
    Layer,
    MoE,
    Norm,
    Router,
    Spec,
    hf,
    read,
    rules,
)


def spec(c: Config) -> Spec:
    norm, head_dim = Norm(c["rms_norm_eps"], kind="layer", rounding="last"), read.head_dim(c)
    p = read.rope_parameters(c, default_theta=1e6)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.partial_rope(c, p, head_dim, longrope=("longrope",)),
        window=c.get("sliding_window"),
        qkv_bias=c.get("attention_bias", False),
        out_bias=c.get("attention_bias", False),
    )
    router = Router(
        c.choice("num_experts_per_tok", (2,), 2),
        "softmax",
        over="near",
        near=2 * c.get("router_jitter_noise", 0.01),
    )
    expert = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    layer = Layer(attention, MoE(c["num_local_experts"], expert, router), attn_norm=norm, ffn_norm=norm)
    return Spec(
        family="phimoe",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(layer,) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
        head_bias=c.get("lm_head_bias", False),
    )


_MOE = "model.layers.{i}.block_sparse_moe."
HF = (
    *hf.ENDS,
    ("head.bias", "lm_head.bias"),
    *hf.LAYER_NORMS,
    *hf.ATTENTION,
    ("layers.{i}.moe.router.weight", _MOE + "gate.weight"),
    *hf.numbered(_MOE + "experts.{e}", "w1", "w3", "w2"),
)
_HELD = (*hf.STACKED, ("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.router.weight"))
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *_HELD))}


def _both_tables(model: Any) -> None:
    """What upstream updates for the length of the text, and then computes anew without it."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            module.rope_init_fn = lambda _, rotary=module: (rotary.inv_freq, rotary.attention_scaling)


def _has_longrope(s: Spec) -> bool:
    return any(
        isinstance(a := layer.mixer, Attention)
        and a.rope is not None
        and a.rope.scaling is not None
        and a.rope.scaling.kind == "longrope"
        for layer in s.layers
    )


DISAGREEMENTS = (
    Disagreement(
        about="LongRoPE beyond the original context",
        upstream="takes the divisors of short texts for every text (only cos' and sin's factor changes)",
        vendor="takes the long divisors as soon as a text is longer than original_max_position_embeddings",
        follows="vendor",
        why="the release's config has both tables; transformers' own Phi-3 takes either, and so do engines that serve it",
        source="https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/layers/rotary_embedding/"
        "phi3_long_rope_scaled_rope.py",
        since="2026-11",
        applies=_has_longrope,
        correct=_both_tables,
    ),
)
FAMILY = Family(
    "phimoe",
    ("phimoe",),
    ("PhiMoEForCausalLM", "PhimoeForCausalLM"),
    spec,
    RULES,
    disagreements=DISAGREEMENTS,
)
