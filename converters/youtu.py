"""Youtu-LLM 2B (Tencent): a dense decoder with DeepSeek's latent attention.

DeepSeek V3 (see deepseek_v3.py) without experts:
- the norms of both latents have a fixed eps of 1e-6, and RoPE pairs neighbouring channels;
- a tied head in both releases. They say `mlp_bias` too, which upstream doesn't read;
- the first release called itself `youtu_llm`, with RoPE in the old keys.
"""

from __future__ import annotations

from zoo.family import MLP, Config, Family, Layer, Norm, Spec, hf, read, rules

from .deepseek_v3 import MLA, latent_attention


def spec(c: Config) -> Spec:
    c.refuse(num_key_value_heads=c["num_attention_heads"], mlp_bias=False)
    norm = Norm(c["rms_norm_eps"])
    mixer = latent_attention(c, interleaved=bool(c.said("rope_interleave", True)))
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    return Spec(
        family="youtu",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(Layer(mixer, mlp, attn_norm=norm, ffn_norm=norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


RULES = {"hf": rules(*hf.ENDS, *hf.PRE_NORMS, *MLA, *hf.MLP, hf.INV_FREQ)}
FAMILY = Family("youtu", ("youtu", "youtu_llm"), ("YoutuForCausalLM",), spec, RULES)
