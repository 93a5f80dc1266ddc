"""Seed-OSS 36B.

A Llama with biases on q, k and v but not on attention's output, behind two flags of their own; head_dim (128) is its own
field, not d_model / n_heads.
"""

from __future__ import annotations

from zoo.family import MLP, Config, Family, Spec, hf, read, rules

from . import llama


def spec(c: Config) -> Spec:
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS), bias=c.get("mlp_bias", False))
    return llama.decoder(
        "seed_oss",
        c,
        read.whole_rope(c, read.rope_parameters(c), c["head_dim"]),
        mlp,
        qkv_bias=c.get("attention_bias", True),
        out_bias=c.get("attention_out_bias", False),
    )


RULES = {"hf": rules(*hf.ENDS, *hf.PRE_NORMS, *hf.ATTENTION, *hf.MLP)}

FAMILY = Family("seed_oss", ("seed_oss",), ("SeedOssForCausalLM",), spec, RULES)
