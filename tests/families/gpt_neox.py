"""GPT-NeoX and Pythia. Releases carry masks and frequencies that were buffers."""

from __future__ import annotations

from zoo.testing import EPS, VOCAB, FamilyCase, Gguf, Variant, rope
from zoo.testing.released import flat_rope
from zoo.testing.variant import Config, Draw, Settings, Shapes, Tensors

# fmt: off

_NEOX = VOCAB | {
    "hidden_size": 60, "num_attention_heads": 5, "intermediate_size": 52, "num_hidden_layers": 3,
    "max_position_embeddings": 480, "layer_norm_eps": EPS, "rope_parameters": rope(613.0, partial_rotary_factor=0.34),
}

# fmt: on


def pythia(tensors: Tensors, config: Settings, draw: Draw) -> None:
    """What used to be buffers."""
    import torch

    for i in range(config["num_hidden_layers"]):
        at = f"gpt_neox.layers.{i}.attention."
        tensors[at + "bias"] = torch.ones(1, 1, 480, 480).tril()
        tensors[at + "masked_bias"] = torch.tensor(-1e9, dtype=tensors["embed_out.weight"].dtype)
        tensors[at + "rotary_emb.inv_freq"] = draw(at + "rotary_emb.inv_freq", (2,))


def as_released(listed: Shapes) -> Shapes:
    """Older than the naming that is listed."""
    for i in range(3):
        at = f"gpt_neox.layers.{i}.attention."
        listed |= {at + "bias": (1, 1, 480, 480), at + "masked_bias": (), at + "rotary_emb.inv_freq": (2,)}
    return listed


def gguf_weights(tensors: Tensors, c: Config) -> Tensors:
    """q, k and v one after the other: GPTNeoXModel of llama.cpp's converter."""
    out = dict(tensors)
    for name, t in tensors.items():
        if "query_key_value" in name:
            heads = t.unflatten(0, (c["num_attention_heads"], 3, -1))  # [H, 3, K] and columns
            out[name] = heads.transpose(0, 1).flatten(0, 2).contiguous()
    return out


def released(config: Settings) -> Settings:
    config = flat_rope(config)
    config["rotary_emb_base"] = config.pop("rope_theta")
    config["rotary_pct"] = config.pop("partial_rotary_factor")
    return config


# fmt: off
CASE = FamilyCase(
    "gpt_neox",
    (
        Variant("gpt_neox", "GPTNeoXForCausalLM", _NEOX | {"hidden_act": "gelu"},
            "parallel branches with two norms; RoPE on 4 of 12 dims; qkv fused head by head"),
        Variant("gpt_neox_serial", "GPTNeoXForCausalLM",
            _NEOX | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_fast", "tie_word_embeddings": True},
            "one branch after the other, no attention biases, tanh GELU, tied",
            rounds_otherwise="upstream's gelu_fast is written out, and rounds after each of its steps"),
        Variant("gpt_neox_release", "GPTNeoXForCausalLM", _NEOX, "as Pythia's files, with saved buffers",
            release=pythia, listed=as_released),
    ),
    grouped=False,
    refused=(
        ("pythia-1.4b", {"hidden_act": "gelu_10"}, "hidden_act is 'gelu_10'"),
        ("pythia-1.4b", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type is 'ntk'"),
        ("pythia-1.4b", {"rotary_pct": 1.5}, "RoPE would rotate 192 of 128 channels"),
    ),
    released_text=released,
    gguf=(
        Gguf(
            "gptneox",
            lambda c: {
                "rope.freq_base": None, "rope.dimension_count": 4, "attention.head_count_kv": None,
                "use_parallel_residual": c["use_parallel_residual"],
                "attention.layer_norm_epsilon": c["layer_norm_eps"],
            },
            settings={"rope_parameters": rope(10000.0, partial_rotary_factor=0.34)},  # the theta is not written
            weights=gguf_weights, refused=({"attention.value_length": 8},),
        ),
    ),
)
# fmt: on
