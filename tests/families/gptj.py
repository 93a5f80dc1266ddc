"""GPT-J. Upstream has no sdpa; released files carry each layer's causal mask."""

from __future__ import annotations

from zoo.testing import EPS, FamilyCase, Variant
from zoo.testing.released import drop_default
from zoo.testing.variant import Draw, Settings, Shapes, Tensors

# fmt: off

_GPTJ = {
    "vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2,
    "n_embd": 60, "n_head": 5, "n_layer": 3, "n_positions": 480, "rotary_dim": 8, "layer_norm_epsilon": EPS,
}
_ROUNDS = "upstream computes scores in fp32"

# fmt: on


def with_masks(tensors: Tensors, config: Settings, draw: Draw) -> None:
    """Each layer's causal mask, and what masked scores were set to."""
    import torch

    for i in range(config["n_layer"]):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 480, 480).tril()
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(
            -1e9, dtype=tensors["lm_head.weight"].dtype
        )


def as_released(listed: Shapes) -> Shapes:
    """Older than the naming that is listed."""
    for i in range(3):
        listed[f"transformer.h.{i}.attn.bias"] = (1, 1, 480, 480)
        listed[f"transformer.h.{i}.attn.masked_bias"] = ()
    return listed


def released(config: Settings) -> Settings:
    return drop_default(config, n_inner=None) | {"rotary": True, "scale_attn_weights": True}


# fmt: off
CASE = FamilyCase(
    "gptj",
    (
        Variant("gptj", "GPTJForCausalLM", _GPTJ, "parallel branches behind one norm, RoPE in pairs on 8 of 12 dims, head with bias",
            eager_only=True, rounds_otherwise=_ROUNDS),
        Variant("gptj_release", "GPTJForCausalLM", _GPTJ | {"n_inner": 52, "rotary_dim": 12},
            "as released: causal masks; n_inner given; RoPE on the whole head",
            release=with_masks, listed=as_released, eager_only=True, rounds_otherwise=_ROUNDS),
    ),
    grouped=False,
    refused=(
        ("gpt-j-6b", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("gpt-j-6b", {"rotary": False}, "rotary is False"),
        ("gpt-j-6b", {"activation_function": "tanh"}, "activation_function is 'tanh'"),
    ),
    released_text=released,
)
# fmt: on
