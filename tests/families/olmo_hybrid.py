"""Olmo Hybrid. transformers saves the convolutions of DeltaNet in thirds, and one norm of attention under another's name."""

from __future__ import annotations

import torch

from zoo import families
from zoo.spec import DeltaNet
from zoo.testing import BASE, FULL, LINEAR, FamilyCase, Variant, rope
from zoo.testing.full_size import mixers, read
from zoo.testing.names import Config, Tensor
from zoo.testing.released import drop
from zoo.testing.variant import Draw, Settings, Tensors

# fmt: off

_HYBRID = BASE | {
    "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 52, "num_hidden_layers": 4,
    "layer_types": [LINEAR, FULL, LINEAR, FULL], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 26, "linear_value_head_dim": 37, "linear_conv_kernel_dim": 3, "rms_norm_eps": 0.05,
    "rope_parameters": {"rope_type": "default", "rope_theta": None},
}

# fmt: on


def as_released(tensors: Tensors, config: Settings, draw: Draw) -> None:
    """Convolutions of q, k and v where these end, and attention's norms under their own names."""
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    for i, kind in enumerate(config["layer_types"]):
        layer = f"model.layers.{i}"
        if kind == FULL:
            norm = tensors.pop(f"{layer}.feedforward_layer_norm.weight")
            tensors[f"{layer}.post_attention_layernorm.weight"] = norm
        else:
            names = [f"{layer}.linear_attn.{x}_conv1d.weight" for x in "qkv"]
            whole = torch.cat([tensors[name] for name in names])
            for name, part in zip(names, whole.split((keys, keys, values)), strict=True):
                tensors[name] = part.clone()


def shapes_as_released(case: FamilyCase, tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The same of names and shapes alone."""
    heads = config.get("linear_num_key_heads") or config["num_attention_heads"]
    width = {"q": heads * config["linear_key_head_dim"], "k": heads * config["linear_key_head_dim"]}
    width["v"] = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    out = {}
    for name, t in tensors.items():
        layer, _, last = name.rpartition(".feedforward_layer_norm")
        if last and f"{layer}.self_attn.q_proj.weight" in tensors:
            name = f"{layer}.post_attention_layernorm{last}"
        if name.endswith("_conv1d.weight"):
            t = Tensor(t.dtype, (width[name[-len("q_conv1d.weight")]], *t.shape[1:]))
        out[name] = t
    return out


def released(config: Settings) -> Settings:
    """Without positions: null under both names."""
    if (config["rope_parameters"] or {}).get("rope_theta") is None:
        config |= {"rope_parameters": None, "rope_theta": None}
    return drop(config, *(key for key in config if key.startswith(("linear_a_log", "linear_dt"))))


# fmt: off
CASE = FamilyCase(
    "olmo_hybrid",
    (
        Variant("olmo_hybrid", "OlmoHybridForCausalLM", _HYBRID,
            "gated DeltaNet with 2 value heads per key head, beta doubled, and OLMo 2's attention without positions; 70 "
            "tokens cross a chunk of 64", seq_len=70, release=as_released),
        Variant("olmo_hybrid_rope", "OlmoHybridForCausalLM",
            _HYBRID | {
                "num_hidden_layers": 3, "layer_types": [FULL, LINEAR, LINEAR], "rope_parameters": rope(613.0),
                "linear_allow_neg_eigval": False, "linear_num_value_heads": 2, "attention_bias": True,
                "tie_word_embeddings": True,
            },
            "RoPE in fp32, beta as it is, biases in attention, tied", seq_len=70, release=as_released),
    ),
    layer_kinds=frozenset({FULL, LINEAR}),
    released=shapes_as_released,
    released_text=released,
    keeps={"olmo_hybrid": ("rope_parameters",)},
    refused=(
        ("olmo-hybrid-7b", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("olmo-hybrid-7b", {"layer_types": ["mamba"] * 32}, "layer_types[0] is 'mamba'"),
        ("olmo-hybrid-7b", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
    ),
)
# fmt: on


def test_every_fourth_layer_attends_and_none_has_positions() -> None:
    config = read("olmo-hybrid-7b")
    spec = families.spec_of(config)
    assert mixers(spec) == "ddda" * 8
    assert all(getattr(layer.mixer, "rope", None) is None for layer in spec.layers)
    disabled = {"rope_parameters": {"rope_type": "default", "rope_theta": None}}  # as its DPO says it
    assert families.spec_of(config | disabled) == spec


def test_sizes_of_the_heads_follow_from_the_width_where_they_are_left_out() -> None:
    config = read("olmo-hybrid-7b")
    said = [key for key in config if key.startswith("linear_") and key != "linear_conv_kernel_dim"]
    spec = families.spec_of({k: v for k, v in config.items() if k not in said})
    assert spec == families.spec_of(config)
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, DeltaNet) and (mixer.k_head_dim, mixer.v_head_dim) == (96, 192)
