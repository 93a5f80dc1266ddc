"""GLM-4.7-Flash (30B-A3B).

DeepSeek-V3's architecture (latent attention, router, shared expert, fixed eps in the norms of the latents) in GLM's sizes.
- No groups of experts; the first layer is dense where the config does not say which are.
- A multi-token-prediction layer follows the last one.
"""

from __future__ import annotations

from zoo.family import Config, Family, Spec, read, rules

from . import deepseek_v3


def spec(c: Config) -> Spec:
    c = c.with_defaults({"first_k_dense_replace": 1})
    c.refuse(moe_layer_freq=1)
    Config(read.rope_parameters(c), f"{c.where}: rope_parameters").refuse(partial_rotary_factor=1.0)
    mixer = deepseek_v3.latent_attention(c, bool(c.said("rope_interleave", True)))
    return deepseek_v3.decoder("glm4_moe_lite", c, mixer, deepseek_v3.router(c))


RULES = {"hf": rules(*deepseek_v3.HF), "transformers": deepseek_v3.RULES["transformers"]}

FAMILY = Family("glm4_moe_lite", ("glm4_moe_lite",), ("Glm4MoeLiteForCausalLM",), spec, RULES)
