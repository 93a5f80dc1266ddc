"""GLM-4.5, GLM-4.5-Air and GLM-4.6.

What is unusual:
- RoPE on the first half of each head (`partial_rotary_factor`, 0.5 where it is missing).
- Biases on q, k and v but not on the output. QK-norm per head in the 355B models, none in Air.
- DeepSeek's router and shared expert; 3 dense layers first (Air: 1).
- A multi-token-prediction layer follows the last one. The fp8 releases have one scale per output row.
"""

from __future__ import annotations

from zoo.family import Attention, Config, Family, Norm, QKNorm, Spec, hf, read, rules

from . import deepseek_v3


def spec(c: Config) -> Spec:
    head_dim = read.head_dim(c)
    p = read.rope_parameters(c)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.rope(c, p, read.turned(c, p, head_dim, 0.5)),
        qkv_bias=c.get("attention_bias", False),
        qk_norm=QKNorm(Norm(c["rms_norm_eps"])) if c.get("use_qk_norm", False) else None,
    )
    return deepseek_v3.decoder("glm4_moe", c, attention, deepseek_v3.router(c))


HF = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    *hf.QK_NORM,
    *hf.MLP,
    *deepseek_v3.MOE,
    hf.MTP_LAYERS,
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *hf.STACKED))}

FAMILY = Family("glm4_moe", ("glm4_moe",), ("Glm4MoeForCausalLM",), spec, RULES)
