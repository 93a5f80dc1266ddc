"""Qwen3.5, dense: Qwen3-Next with DeltaNet's projections apart. Its config says `rope_parameters` in releases too.

Its files hold the text model under `model.language_model.`, whichever class saved them.
"""

from __future__ import annotations

import torch

from families import qwen3_next
from zoo import families
from zoo.testing import BASE, FULL, LINEAR, FamilyCase, Gguf, Variant, names, rope
from zoo.testing.full_size import mixers, read
from zoo.testing.names import Config, Tensor
from zoo.testing.variant import Settings, Tensors

# fmt: off

TEXT = BASE | {
    "hidden_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "num_hidden_layers": 5,
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 26, "linear_value_head_dim": 21,
    "linear_conv_kernel_dim": 3, "layer_types": [LINEAR, LINEAR, FULL, LINEAR, LINEAR],
    "rope_parameters": rope(613.0, partial_rotary_factor=0.5, mrope_section=[1, 1, 1], mrope_interleaved=True),
}
_QWEN3_5 = TEXT | {"intermediate_size": 52}
VISION = {
    "depth": 1, "hidden_size": 24, "intermediate_size": 20, "num_heads": 2, "patch_size": 4, "out_hidden_size": 44,
    "num_position_embeddings": 16,
}
WRAPPER = {
    "vision_config": VISION, "image_token_id": 130, "video_token_id": 129, "vision_start_token_id": 128,
    "vision_end_token_id": 127,
}

# fmt: on


def mtp(case: FamilyCase, config: Config, count: int) -> dict[str, Tensor]:
    """Qwen3-Next's, of the text model alone."""
    return qwen3_next.mtp(case, names.text_config(config), count)


def released(config: Settings) -> Settings:
    return config | {
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "mamba_ssm_dtype": "float32",
    }


def gguf_weights(tensors: Tensors, config: Settings) -> Tensors:
    """As Qwen3NextModel and _LinearAttentionVReorderBase of llama.cpp's converter change them: 1 + w for norms, the decay for
    its logarithm, value heads in the order in which ggml repeats those of keys."""
    keys, dim = config["linear_num_key_heads"], config["linear_value_head_dim"]
    first_value = 2 * keys * config["linear_key_head_dim"]

    def tiled(x: torch.Tensor, rows: int, axis: int = 0) -> torch.Tensor:
        heads = x.unflatten(axis, (keys, -1, rows))
        return heads.transpose(axis, axis + 1).flatten(axis, axis + 2)

    out: Tensors = {}
    for name, x in tensors.items():
        name = name.replace("model.language_model.", "model.")
        match name.split("linear_attn.")[1:]:
            case ["A_log"]:
                x = -torch.exp(tiled(x, 1).double()).float()
            case ["dt_bias"]:
                name, x = name.replace("dt_bias", "dt_proj.bias"), tiled(x, 1)
            case ["in_proj_a.weight" | "in_proj_b.weight"]:
                x = tiled(x, 1)
            case ["in_proj_z.weight"]:
                x = tiled(x, dim)
            case ["out_proj.weight"]:
                x = tiled(x, dim, 1)
            case ["in_proj_qkv.weight" | "conv1d.weight"]:
                x = x.squeeze(1)
                x = torch.cat([x[:first_value], tiled(x[first_value:], dim)])
            case []:
                x = x.float() + 1 if name.endswith("norm.weight") else x
        out[name] = x
    return out


def gguf_fields(config: Settings) -> Settings:
    sections = [*config["rope_parameters"]["mrope_section"], 0]
    return qwen3_next.gguf_state(config) | {"rope.dimension_sections": sections}


GGUF_SETTINGS = {
    "linear_value_head_dim": 26, "linear_num_value_heads": 6, "attention_bias": False, "num_hidden_layers": 5,
    "layer_types": TEXT["layer_types"],
}  # fmt: skip
GGUF_REFUSED: tuple[Settings, ...] = ({"rope.dimension_sections": [3, 0, 0, 0]}, *qwen3_next.GGUF_REFUSED)


# fmt: off
CASE = FamilyCase(
    "qwen3_5",
    (
        Variant("qwen3_5", "Qwen3_5ForConditionalGeneration",
            {"text_config": _QWEN3_5, **WRAPPER},
            "the wrapper, with its vision tower and mtp.*; gated DeltaNet with 3 value heads per key head, gated attention",
            seq_len=70, mtp=1, image_token=130),
        Variant("qwen3_5_text", "Qwen3_5ForCausalLM",
            _QWEN3_5 | {
                "tie_word_embeddings": True, "linear_num_value_heads": 2, "layer_types": [LINEAR, FULL, LINEAR],
                "num_hidden_layers": 3, "attention_bias": True,
            },
            "the text model alone, tied, with attention biases; a value head per key head", seq_len=70),
    ),
    layer_kinds=frozenset({FULL, LINEAR}),
    released_text=released,
    keeps={"qwen3_5_text": ("rope_parameters",)},
    mtp=mtp,
    mtp_layers={"qwen3.5-27b": 1},
    gguf=(
        Gguf("qwen35", gguf_fields, variant="qwen3_5_text", settings=GGUF_SETTINGS, weights=gguf_weights,
             silent={"attention.recurrent_layers": [True, True, False, True, True]}, refused=GGUF_REFUSED),
    ),
    refused=(
        ("qwen3.5-27b", {"attn_output_gate": False}, "attn_output_gate is False"),
        ("qwen3.5-27b", {"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid'"),
        ("qwen3.5-27b", {"layer_types": ["mamba"] * 64}, "layer_types[0] is 'mamba'"),
    ),
)
# fmt: on


def test_every_fourth_layer_of_qwen3_5_is_attention() -> None:
    config = read("qwen3.5-27b")
    assert mixers(families.spec_of(config)) == "ddda" * 16
    del config["text_config"]["layer_types"]
    assert mixers(families.spec_of(config)) == "ddda" * 16


def test_qwen3_6_says_more_and_means_the_same() -> None:
    """Keys that the config of Qwen3.6 27B has beside those of Qwen3.5 27B."""
    config = read("qwen3.5-27b")
    more = {"output_gate_type": "swish", "partial_rotary_factor": 0.25, "tie_word_embeddings": False}
    newer = {**config, "language_model_only": False, "text_config": {**config["text_config"], **more}}
    assert families.spec_of(newer) == families.spec_of(config)
