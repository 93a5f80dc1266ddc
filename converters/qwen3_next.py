"""Qwen3-Next 80B-A3B.

What is unusual:
- Three layers of gated DeltaNet to one of attention (`full_attention_interval`).
- DeltaNet's projections are fused on disk and grouped by key head: q, k, v, z of a head lie together, and b, a.
  The convolution's channels are not grouped. Two value heads share a key head.
- Norms multiply by 1 + w in fp32, QK-norms and the final norm too; DeltaNet's gated output norm by plain w.
- Attention's output is gated: q_proj gives each head's query and then its gate. RoPE on the first quarter.
- Every layer has experts, with a shared one that is itself gated.
- `mtp.*` is a multi-token-prediction layer.
"""

from __future__ import annotations

from typing import Any

from zoo.family import (
    MLP,
    Attention,
    Config,
    DeltaNet,
    Family,
    Layer,
    Mixer,
    MoE,
    Norm,
    QKNorm,
    RuleLine,
    Spec,
    cat,
    extra,
    gguf,
    hf,
    read,
    rules,
    squeeze,
    ungroup,
)

from . import qwen3_moe


def spec(c: Config) -> Spec:
    c.choice("hidden_act", ("silu",))
    c.refuse(use_sliding_window=False)
    norm = plus_one(c)
    dense = MLP(c["intermediate_size"])
    moe = MoE(
        read.n_experts(c),
        MLP(c["moe_intermediate_size"]),
        qwen3_moe.router(c, normalize=True),
        shared=MLP(c["shared_expert_intermediate_size"]),
        shared_gate=True,
    )
    return Spec(
        family="qwen3_next",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(mixer, moe if s else dense, attn_norm=norm, ffn_norm=norm)
            for mixer, s in zip(mixers(c), qwen3_moe.sparse(c), strict=True)
        ),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


def plus_one(c: Config) -> Norm:
    """Every norm but DeltaNet's own."""
    return Norm(c["rms_norm_eps"], weight="plus_one", rounding="last")


def mixers(c: Config) -> list[Mixer]:
    """Of each layer: gated attention, or gated DeltaNet."""
    head_dim, p, norm = c["head_dim"], read.rope_parameters(c), plus_one(c)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.rope(c, p, read.turned(c, p, head_dim, 0.25)),
        qkv_bias=c.get("attention_bias", False),
        out_bias=c.get("attention_bias", False),
        qk_norm=QKNorm(norm),
        gate=True,
    )
    delta = DeltaNet(
        n_k_heads=c["linear_num_key_heads"],
        n_v_heads=c["linear_num_value_heads"],
        k_head_dim=c["linear_key_head_dim"],
        v_head_dim=c["linear_value_head_dim"],
        conv=c["linear_conv_kernel_dim"],
        decay="head",
        out_gate="silu",
        out_norm=Norm(norm.eps),
    )
    kinds: dict[str, Mixer] = {read.FULL: attention, read.LINEAR: delta}
    types = read.layer_types(c, read.every(c.get("full_attention_interval", 4), read.LINEAR), kinds)
    return [kinds[t] for t in types]


_A, _D, _M = "model.layers.{i}.self_attn.", "model.layers.{i}.linear_attn.", "model.layers.{i}.mlp."
GATED_ATTENTION: tuple[RuleLine, ...] = (
    *(
        (
            f"layers.{{i}}.attn.qkv.{w}",
            cat(ungroup(f"{_A}q_proj.{w}", "n_heads", 2), f"{_A}k_proj.{w}", f"{_A}v_proj.{w}"),
        )
        for w in ("weight", "bias")
    ),
    ("layers.{i}.attn.out.weight", _A + "o_proj.weight"),
    ("layers.{i}.attn.out.bias", _A + "o_proj.bias"),
    *hf.QK_NORM,
)
DELTA: tuple[RuleLine, ...] = (  # all but its projections of x
    ("layers.{i}.delta.conv.weight", squeeze(_D + "conv1d.weight", 1)),
    ("layers.{i}.delta.A_log", _D + "A_log"),
    ("layers.{i}.delta.dt_bias", _D + "dt_bias"),
    ("layers.{i}.delta.norm.weight", _D + "norm.weight"),
    ("layers.{i}.delta.out.weight", _D + "out_proj.weight"),
)
HF = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *GATED_ATTENTION,
    ("layers.{i}.delta.qkvz.weight", ungroup(_D + "in_proj_qkvz.weight", "n_k_heads", 4)),
    ("layers.{i}.delta.ba.weight", ungroup(_D + "in_proj_ba.weight", "n_k_heads", 2)),
    *DELTA,
    *hf.MLP,
    ("layers.{i}.moe.router.weight", _M + "gate.weight"),
    *hf.NUMBERED,
    *hf.SHARED_EXPERT,
    extra("mtp.*", hf.MTP),
)
GGUF: tuple[RuleLine, ...] = (  # all but DeltaNet and the feed-forward
    *gguf.norms_plus_one(
        *gguf.ENDS,
        ("layers.{i}.attn_norm.weight", "blk.{i}.attn_norm.weight"),
        ("layers.{i}.ffn_norm.weight", "blk.{i}.post_attention_norm.weight"),
        *gguf.QK_NORM,
    ),
    *gguf.GATED_ATTENTION,
)
RULES = {
    "hf": rules(*HF),
    "transformers": rules(*hf.in_memory(HF, *hf.STACKED)),
    "gguf": rules(*GGUF, *gguf.DELTA_BY_KEY_HEAD, *gguf.MOE, gguf.SHARED_EXPERT_GATE),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """What a GGUF of `qwen3next` says, and what llama.cpp's graph of it fixes: every layer has experts."""
    return (
        gguf_mixers(f, out)
        | gguf_experts(f)
        | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    )


def gguf_mixers(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """Heads of keys and values are equally wide in llama.cpp's graph of DeltaNet."""
    head_dim, part = gguf.rotary(f, out)
    n, state, values = out["num_hidden_layers"], f["ssm.state_size"], f["ssm.time_step_rank"]
    f.expect("ssm.inner_size", state * values)
    every = f.get("full_attention_interval", 4)
    linear = f.raw("attention.recurrent_layers", [(i + 1) % every != 0 for i in range(n)])
    return {
        "head_dim": head_dim,
        "partial_rotary_factor": part,
        "layer_types": [read.LINEAR if linear[i] else read.FULL for i in range(n)],
        "linear_num_key_heads": f["ssm.group_count"],
        "linear_num_value_heads": values,
        "linear_key_head_dim": state,
        "linear_value_head_dim": state,
        "linear_conv_kernel_dim": f["ssm.conv_kernel"],
    }


def gguf_experts(f: gguf.Fields) -> dict[str, Any]:
    return {
        "num_experts": f["expert_count"],
        "num_experts_per_tok": f["expert_used_count"],
        "moe_intermediate_size": f["expert_feed_forward_length"],
        "shared_expert_intermediate_size": f["expert_shared_feed_forward_length"],
    }


FAMILY = Family(
    "qwen3_next",
    ("qwen3_next",),
    ("Qwen3NextForCausalLM",),
    spec,
    RULES,
    gguf={"qwen3next": gguf_config},
)
