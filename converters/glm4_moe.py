"""GLM-4.5, GLM-4.5-Air and GLM-4.6.

What is unusual:
- RoPE on the first half of each head (`partial_rotary_factor`, 0.5 where it is missing).
- Biases on q, k and v but not on the output. QK-norm per head in the 355B models, none in Air.
- DeepSeek's router and shared expert; 3 dense layers first (Air: 1).
- A multi-token-prediction layer follows the last one. The fp8 releases have one scale per output row.
"""

from __future__ import annotations

from zoo.config import Config, rope, rope_parameters
from zoo.families import Family
from zoo.mapping.rules import rules
from zoo.spec import Attention, Norm, QKNorm, Spec

from . import _dense as names
from . import _experts as experts
from . import deepseek_v3


def spec(c: Config) -> Spec:
    head_dim = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    p = rope_parameters(c)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        v_head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope(c, p, int(head_dim * p.get("partial_rotary_factor", 0.5))),
        qkv_bias=c.get("attention_bias", False),
        qk_norm=QKNorm(Norm(c["rms_norm_eps"])) if c.get("use_qk_norm", False) else None,
    )
    return deepseek_v3.decoder("glm4_moe", c, attention, experts.sigmoid_router(c))


RULES = {
    "hf": rules(
        *names.ENDS,
        *names.PRE_NORMS,
        *names.ATTENTION,
        *names.QK_NORM,
        *names.MLP,
        *experts.DEEPSEEK_MOE,
        experts.MTP_LAYERS,
    ),
}

FAMILY = Family("glm4_moe", ("glm4_moe",), ("Glm4MoeForCausalLM",), spec, RULES)
