"""Qwen3-Next: gated DeltaNet and gated attention. Prediction layers are `mtp.*`, which its config does not count."""

from __future__ import annotations

import torch

from zoo import families
from zoo.testing import BASE, FULL, LINEAR, FamilyCase, Gguf, Listed, Variant, names, rope
from zoo.testing.full_size import mixers, read
from zoo.testing.names import Config, Tensor
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings, Tensors

# fmt: off

_QWEN3_NEXT = BASE | {
    "hidden_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
    "intermediate_size": 52, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 20,
    "num_experts": 6, "num_experts_per_tok": 3, "num_hidden_layers": 5, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 26, "linear_value_head_dim": 21, "linear_conv_kernel_dim": 3,
    "layer_types": [LINEAR, LINEAR, FULL, LINEAR, LINEAR],
    "rope_parameters": rope(613.0, partial_rotary_factor=0.5),
}

# fmt: on


def mtp(case: FamilyCase, config: Config, count: int) -> dict[str, Tensor]:
    """`mtp.layers.N` with full attention, and one projection for all."""
    text = dict(names.text_config(config))
    d, dtype = text["hidden_size"], names.DTYPES[names.dtype_of(config)]
    vector, matrix = Tensor(dtype, (d,)), Tensor(dtype, (d, 2 * d))
    out: dict[str, Tensor] = {}
    block = names.first_layer(case, names.one_layer(text, {"layer_types": ["full_attention"]}))
    for i in range(count):
        out |= {f"mtp.layers.{i}.{name}": t for name, t in block.items()}
    out |= {f"mtp.{name}.weight": vector for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    out["mtp.fc.weight"] = matrix
    return out


def released(config: Settings) -> Settings:
    config["full_attention_interval"] = config["layer_types"].index("full_attention") + 1
    return flat_rope(drop(config, "layer_types"))


def gguf_state(config: Settings) -> Settings:
    """The fields of Qwen3NextModel of llama.cpp's converter, but for experts."""
    return {
        "attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"],
        "rope.dimension_count": int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"]),
        "full_attention_interval": 3, "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"], "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": config["linear_num_value_heads"],
        "ssm.inner_size": config["linear_num_value_heads"] * config["linear_value_head_dim"],
    }  # fmt: skip


def gguf_experts(config: Settings) -> Settings:
    return {
        "expert_count": config["num_experts"], "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
    }  # fmt: skip


def gguf_weights_of_2025(tensors: Tensors, config: Settings) -> Tensors:
    """1 + w for norms, the decay for its logarithm."""
    out: Tensors = {}
    for name, x in tensors.items():
        if name.endswith("A_log"):
            x = -torch.exp(x.double()).float()
        elif name.endswith("conv1d.weight"):
            x = x.squeeze(1)
        elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            x = x.float() + 1
        out[name.replace("dt_bias", "dt_proj.bias")] = x
    return out


def gguf_weights(tensors: Tensors, config: Settings) -> Tensors:
    """And, of each key head's q, k, v and z, all q, k and v in one tensor and z in another."""
    heads, k, v = (config[f"linear_{x}"] for x in ("num_key_heads", "key_head_dim", "value_head_dim"))
    v *= config["linear_num_value_heads"] // heads
    out: Tensors = {}
    for name, x in gguf_weights_of_2025(tensors, config).items():
        if name.endswith("in_proj_qkvz.weight"):
            *qkv, z = (part.flatten(0, 1) for part in x.unflatten(0, (heads, -1)).split((k, k, v, v), 1))
            out[name.replace("qkvz", "qkv")], out[name.replace("qkvz", "z")] = torch.cat(qkv), z
        else:
            out[name] = x
    return out


GGUF_REFUSED: tuple[Settings, ...] = ({"ssm.inner_size": 5}, {"attention.scale": 0.5})


# fmt: off
CASE = FamilyCase(
    "qwen3_next",
    (
        Variant("qwen3_next", "Qwen3NextForCausalLM", _QWEN3_NEXT,
            "gated DeltaNet with 2 value heads per key head, gated attention, gated shared expert; 70 tokens "
            "cross a chunk of 64", seq_len=70),
        Variant("qwen3_next_mtp", "Qwen3NextForCausalLM",
            _QWEN3_NEXT | {
                "linear_num_value_heads": 6, "norm_topk_prob": False, "layer_types": [LINEAR, FULL, LINEAR],
                "num_hidden_layers": 3,
            },
            "3 value heads per key head, router not renormalised; with mtp.* beside the model",
            seq_len=70, mtp=1),
    ),
    layer_kinds=frozenset({FULL, LINEAR}),
    mtp=mtp,
    mtp_layers={"qwen3-next-80b-a3b": 1},
    listed={
        "qwen3-next-80b-a3b": Listed("qwen3-next-80b-a3b", frozenset({"mtp"})),
        "qwen3-next-80b-a3b-fp8": Listed("qwen3-next-80b-a3b", frozenset({"mtp"})),
    },
    gguf=tuple(
        Gguf("qwen3next", lambda c: gguf_state(c) | gguf_experts(c), settings={"linear_value_head_dim": 26},
             weights=weights, written=written, idle=("feed_forward_length",),
             refused=(*GGUF_REFUSED, {"expert_weights_norm": False}, {"expert_gating_func": 2}))
        for weights, written in ((gguf_weights, True), (gguf_weights_of_2025, False))
    ),
    refused=(
        ("qwen3-next-80b-a3b", {"layer_types": ["mamba"] * 48}, "layer_types[0] is 'mamba'"),
        ("qwen3-next-80b-a3b", {"layer_types": ["full_attention"]}, "should list 48 layers"),
    ),
    released_text=released,
    optional_rules={
        "layers.{i}.mlp.down.weight": "Qwen3's dense layers",
        "layers.{i}.mlp.gate_up.weight": "Qwen3's dense layers",
    },
)
# fmt: on


def test_every_fourth_layer_of_qwen3_next_is_attention() -> None:
    assert mixers(families.spec_of(read("qwen3-next-80b-a3b"))) == "ddda" * 12
