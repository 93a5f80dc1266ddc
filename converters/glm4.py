"""GLM-4-0414 (9B, 32B) and GLM-Z1.

GLM-4-9B (see glm.py), with a norm on what either branch gives, before it is added. 32B has no biases.
llama.cpp rotates neighbouring pairs too: q and k rows of its files are in the release's order.
"""

from __future__ import annotations

from typing import Any

from zoo.family import Config, Family, Layer, Norm, Spec, gguf, rules

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
    ),
    "gguf": rules(
        *gguf.ENDS,
        *gguf.PRE_NORMS,
        *gguf.POST_NORMS,
        *gguf.attention(interleaved=False),
        *gguf.FUSED_MLP,
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    head_dim, part = gguf.rotary(f, out)
    return {"head_dim": head_dim, "partial_rotary_factor": part}


FAMILY = Family("glm4", ("glm4",), ("Glm4ForCausalLM",), spec, RULES, gguf={"glm4": gguf_config})
