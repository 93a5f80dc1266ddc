"""Tencent Hy3 (295B-A21B) and its preview.

What is unusual:
- QK-norm per head, before RoPE; no biases.
- DeepSeek's router under other keys and without groups; a shared expert; the first layer dense.
- The config also says what other engines compute in fp32 (`enable_*_fp32*`): the sum of routed and shared experts is the
  same in any case, softmax is fp32 here always, and the head is in the model's dtype, as upstream has it.
- A multi-token-prediction layer follows the last one.
"""

from __future__ import annotations

from zoo.family import Attention, Config, Family, Norm, QKNorm, Router, RuleLine, Spec, hf, read, rules

from . import deepseek_v3


def spec(c: Config) -> Spec:
    c = c.with_defaults({"first_k_dense_replace": 1})
    c.refuse(
        qk_norm=True, route_norm=True, moe_router_use_sigmoid=True, moe_router_enable_expert_bias=True,
        mlp_bias=False, expert_hidden_dim=c["moe_intermediate_size"],
    )  # fmt: skip
    for precision in ("enable_attention_fp32_softmax", "enable_lm_head_fp32", "enable_moe_fp32_combine"):
        c.choice(precision, (True, False), False)
    head_dim, bias = read.head_dim(c), c.get("attention_bias", False)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c), head_dim),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=QKNorm(Norm(c["rms_norm_eps"])),
    )
    router = Router(
        top_k=c["num_experts_per_tok"],
        score="sigmoid",
        selection_bias=True,
        normalize=True,
        normalize_eps=1e-20,
        scale=float(c["router_scaling_factor"]),
        rounding="last",
        weights_rounding="last",
    )
    return deepseek_v3.decoder("hy_v3", c, attention, router)


_M = "model.layers.{i}.mlp."
HF: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    *hf.QK_NORM,
    *hf.MLP,
    ("layers.{i}.moe.router.weight", _M + "router.gate.weight"),
    ("layers.{i}.moe.router.selection_bias", _M + "expert_bias"),
    *hf.NUMBERED,
    *hf.gated_mlp("layers.{i}.moe.shared", _M + "shared_mlp"),
    hf.MTP_LAYERS,
)
_HELD: tuple[RuleLine, ...] = (
    ("layers.{i}.moe.router.weight", _M + "gate.weight"),
    ("layers.{i}.moe.router.selection_bias", _M + "e_score_correction_bias"),
    *hf.STACKED,
    *hf.gated_mlp("layers.{i}.moe.shared", _M + "shared_experts"),
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *_HELD))}

FAMILY = Family("hy_v3", ("hy_v3",), ("HYV3ForCausalLM",), spec, RULES)
