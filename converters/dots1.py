"""rednote's dots.llm1 (142B-A14B).

What is unusual:
- QK-norm per head, before RoPE.
- DeepSeek's router, without groups where the config has none; shared experts; the first layer dense.
- Windows on layers from `max_window_layers` on where `sliding_window` is a number (no release has any).
"""

from __future__ import annotations

from zoo.family import Attention, Config, Family, Mixer, Norm, QKNorm, Spec, hf, read, rules

from . import deepseek_v3


def spec(c: Config) -> Spec:
    c = c.with_defaults({"n_group": 1, "topk_group": 1})
    c.refuse(moe_layer_freq=1)
    head_dim, bias = read.head_dim(c), c.get("attention_bias", False)

    def attention(kind: str) -> Attention:
        return Attention(
            n_heads=c["num_attention_heads"],
            n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=read.whole_rope(c, read.rope_parameters(c), head_dim),
            window=c["sliding_window"] if kind == read.SLIDING else None,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=QKNorm(Norm(c["rms_norm_eps"])),
        )

    mixers: list[Mixer] = [attention(kind) for kind in layer_types(c)]
    return deepseek_v3.decoder("dots1", c, mixers, deepseek_v3.router(c))


def layer_types(c: Config) -> list[str]:
    windowed = "sliding_window" in c
    kinds = read.layer_types(
        c, lambda i: read.SLIDING if windowed and i >= c.get("max_window_layers", 62) else read.FULL
    )
    if read.SLIDING in kinds:
        c.refuse(use_sliding_window=True)  # upstream has the window all the same, the vendor's code has not
    return kinds


HF = (*hf.ENDS, *hf.PRE_NORMS, *hf.ATTENTION, *hf.QK_NORM, *hf.MLP, *deepseek_v3.MOE)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *hf.STACKED))}

FAMILY = Family("dots1", ("dots1",), ("Dots1ForCausalLM",), spec, RULES)
