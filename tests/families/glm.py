"""GLM-4-9B. RoPE on half of a head, in neighbouring pairs; gate and up in one matrix."""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Gguf, Variant, rope
from zoo.testing.released import flat_rope
from zoo.testing.variant import Config, Settings, Tensors

# fmt: off

def gguf_fused(tensors: Tensors, c: Config) -> Tensors:
    """q, k and v in one matrix, as THUDM's own files have them."""
    import torch

    out = {name: t for name, t in tensors.items() if ".q_proj" not in name and ".k_proj" not in name}
    for name in [name for name in out if ".v_proj" in name]:
        qkv = [tensors[name.replace("v_proj", f"{x}_proj")] for x in "qkv"]
        out[name.replace("v_proj", "qkv_proj")] = torch.cat(qkv)
        del out[name]
    return out


def gguf_fields(c: Config) -> Settings:
    return {"rope.dimension_count": 6}


GLM = BASE | {
    "hidden_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 52,
    "num_hidden_layers": 3, "rope_parameters": rope(613.0, partial_rotary_factor=0.5),
}

CASE = FamilyCase(
    "glm",
    (
        Variant("glm", "GlmForCausalLM", GLM, "half of each head turns, in neighbouring pairs; biases on q, k, v"),
        Variant("glm_third", "GlmForCausalLM",
            GLM | {
                "rope_parameters": rope(97.0, partial_rotary_factor=0.34), "attention_bias": False,
                "num_key_value_heads": 3, "tie_word_embeddings": True,
            },
            "a third turns, no biases, tied: what no release has"),
    ),
    main="glm_third",
    refused=(
        ("glm-4-9b", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("glm-4-9b", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type is 'ntk'"),
        ("glm-4-9b", {"sliding_window": 512}, "sliding_window"),
    ),
    released_text=flat_rope,
    gguf=(
        Gguf("chatglm", gguf_fields, settings={"hidden_size": 72}, refused=({"attention.value_length": 8},)),
        Gguf("chatglm", gguf_fields, settings={"hidden_size": 72}, weights=gguf_fused, written=False),
    ),
)
# fmt: on
