"""GLM-4-0414 (9B, 32B) and GLM-Z1.

GLM-4-9B (see glm.py), with a norm on what either branch gives, before it is added. 32B has no biases.
"""

from __future__ import annotations

from zoo.family import Config, Family, Layer, Norm, Spec, rules

from . import glm


def spec(c: Config) -> Spec:
    norm = Norm(c["rms_norm_eps"])
    layer = Layer(
        glm.attention(c),
        glm.mlp(c),
        attn_norm=norm,
        attn_post_norm=norm,
        ffn_norm=norm,
        ffn_post_norm=norm,
    )
    return glm.decoder("glm4", c, layer)


RULES = {
    "hf": rules(
        *glm.HF,
        ("layers.{i}.attn_post_norm.weight", "model.layers.{i}.post_self_attn_layernorm.weight"),
        ("layers.{i}.ffn_post_norm.weight", "model.layers.{i}.post_mlp_layernorm.weight"),
    )
}

FAMILY = Family("glm4", ("glm4",), ("Glm4ForCausalLM",), spec, RULES)
