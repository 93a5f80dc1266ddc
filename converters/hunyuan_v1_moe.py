"""Hunyuan with experts: A13B (80B-A13B).

The attention of Hunyuan, dense: QK-norm per head after RoPE, theta raised once by `alpha`, a tied head. In every layer
- experts of `intermediate_size` and one shared expert as wide beside them, all without biases;
- a softmax router, in fp32 throughout; the chosen weights are renormalised. `moe_topk` is a number, or lists one for each
  layer.
What the vendor's config can say beside that (experts of another width, several shared ones, keys and values shared between
layers, tokens left out) no release has: it is refused.
"""

from __future__ import annotations

from typing import Any

from zoo.family import (
    MLP,
    Config,
    Family,
    Layer,
    MoE,
    Norm,
    Router,
    RuleLine,
    Spec,
    ZooError,
    hf,
    read,
    rules,
)

from . import hunyuan_v1_dense


def spec(c: Config) -> Spec:
    c.refuse(
        use_qk_norm=True, use_cla=False, use_mla=False, mlp_bias=False, use_mixed_mlp_moe=True, norm_topk_prob=True,
        group_limited_greedy=False, moe_drop_tokens=False, moe_layer_num_skipped=0, position_embedding_xdrope=False, norm_type="rms",
        use_rotary_pos_emb=True,
    )  # fmt: skip
    n, width, act = c["num_hidden_layers"], c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS)
    for key, only in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
        if key in c and set(each(c, key, n)) != {only}:
            raise ZooError(f"{c.where}: {key} is {c[key]!r:.100}, which zoo does not support (only {only})")
    norm, mlp = Norm(c["rms_norm_eps"]), MLP(width, act)
    attention = hunyuan_v1_dense.attention(c)
    experts = [
        MoE(n_experts, mlp, router(k), shared=mlp)
        for n_experts, k in zip(each(c, "num_experts", n), each(c, "moe_topk", n), strict=True)
    ]
    return Spec(
        family="hunyuan_v1_moe",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(Layer(attention, moe, attn_norm=norm, ffn_norm=norm) for moe in experts),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


def router(top_k: int) -> Router:
    return Router(top_k, "softmax", normalize=True, rounding="last", weights_rounding="last")


def each(c: Config, key: str, n: int) -> list[Any]:
    """A field that is a list with an entry for each of `n` layers, or one value for all."""
    return c.each_layer(key, n) if isinstance(c[key], list) else [c[key]] * n


_M = "model.layers.{i}.mlp."
HF: tuple[RuleLine, ...] = (
    *hunyuan_v1_dense.ATTENTION,
    ("layers.{i}.moe.router.weight", _M + "gate.wg.weight"),
    *hf.NUMBERED,
    *hf.gated_mlp("layers.{i}.moe.shared", _M + "shared_mlp"),
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *hf.STACKED))}

FAMILY = Family("hunyuan_v1_moe", ("hunyuan_v1_moe",), ("HunYuanMoEV1ForCausalLM",), spec, RULES)
