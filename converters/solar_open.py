"""Upstage's Solar Open (100B-A12B).

GLM-4.5's design with less in it:
- RoPE over the whole head, stretched by YaRN. No QK-norm.
- DeepSeek's router and shared expert in every layer. A config may name the width of dense layers: there is none.
- Biases on q, k and v only where `attention_bias` says so.
"""

from __future__ import annotations

from zoo.family import Attention, Config, Family, Spec, hf, read, rules

from . import deepseek_v3

DEFAULTS = {
    "hidden_act": "silu",
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}
"""What the release leaves out."""


def spec(c: Config) -> Spec:
    c = c.with_defaults(DEFAULTS | {"intermediate_size": c["moe_intermediate_size"]})
    c.refuse(use_qk_norm=False, first_k_dense_replace=0)
    head_dim = read.head_dim(c)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c), head_dim),
        qkv_bias=c.get("attention_bias", False),
    )
    return deepseek_v3.decoder("solar_open", c, attention, deepseek_v3.router(c))


HF = (*hf.ENDS, *hf.PRE_NORMS, *hf.ATTENTION, *deepseek_v3.MOE)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *hf.STACKED))}

FAMILY = Family("solar_open", ("solar_open",), ("SolarOpenForCausalLM",), spec, RULES)
