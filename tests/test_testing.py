"""What `zoo.testing` says of releases is what is in them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny


@pytest.mark.parametrize(
    ("model_type", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("deepseek_v3", 671_026_404_352),
        ("gpt_oss", 116_829_156_672),
        ("minimax_m2", 228_689_748_992),
        ("mimo_v2_flash", 308_778_768_832),
        ("qwen3_next", 79_674_391_296),
    ],
)
def test_class_defaults_have_upstreams_parameter_count(model_type: str, parameters: int) -> None:
    assert tiny.parameter_count(tiny.class_defaults(model_type)) == parameters


def test_gpt_oss_and_kimi_k2_list_their_packed_experts() -> None:
    scheme: dict[str, Any] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    config = tiny.class_defaults("gpt_oss") | {"num_hidden_layers": 1, "layer_types": None}
    shapes = tiny.released_names(config | {"quantization_config": scheme}, quantised=True)
    assert shapes["model.layers.0.mlp.experts.gate_up_proj_blocks"] == (128, 5760, 90, 16)
    assert shapes["model.layers.0.mlp.experts.gate_up_proj_scales"] == (128, 5760, 90)
    assert "model.layers.0.mlp.experts.gate_up_proj" not in shapes
    scheme = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|down)_proj.*",
        ],
    }
    config = tiny.class_defaults("deepseek_v3")
    config |= {
        "model_type": "kimi_k2",
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": 3,
    }
    shapes = tiny.released_names(config | {"n_group": 1, "quantization_config": scheme}, quantised=True)
    packed = {k.rsplit(".", 1)[-1]: s for k, s in shapes.items() if "experts.2.up_proj" in k}
    assert packed == {"weight_packed": (2048, 896), "weight_scale": (2048, 224), "weight_shape": (2,)}
    assert "model.layers.0.mlp.up_proj.weight" in shapes
    assert "model.layers.1.mlp.gate.weight" in shapes
