"""BLOOM. Upstream has no sdpa; the files of many sizes have no `transformer.` prefix."""

from __future__ import annotations

from zoo.testing import EPS, VOCAB, FamilyCase, Variant
from zoo.testing.released import drop
from zoo.testing.variant import Draw, Settings, Shapes, Tensors

# fmt: off

_BLOOM = VOCAB | {"hidden_size": 60, "n_head": 6, "n_layer": 3, "layer_norm_epsilon": EPS}

# fmt: on


def bare(tensors: Tensors, config: Settings, draw: Draw) -> None:
    """Without the prefix `transformer.`."""
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


def as_bare(listed: Shapes) -> Shapes:
    """Older than the naming that is listed."""
    return {k.removeprefix("transformer."): s for k, s in listed.items()}


def released(config: Settings) -> Settings:
    """As BLOOM 560M's: GPT-2's name for the heads is not used, and the length of training is."""
    config["num_attention_heads"] = config.pop("n_head")
    config["n_embed"] = config.pop("hidden_size")
    config |= {"seq_length": 2048, "attention_softmax_in_fp32": True, "n_inner": None}
    return drop(config, "tie_word_embeddings")


# fmt: off
_ROUNDS = "upstream's GELU is written out, and rounds after each of its steps"
CASE = FamilyCase(
    "bloom",
    (
        Variant("bloom", "BloomForCausalLM", _BLOOM, "ALiBi of 6 heads (no power of 2), embedding norm, tied", eager_only=True, rounds_otherwise=_ROUNDS),
        Variant("bloom_bare", "BloomForCausalLM", _BLOOM | {"n_head": 4}, "as released: no transformer. prefix; 4 heads",
            release=bare, listed=as_bare, eager_only=True, rounds_otherwise=_ROUNDS),
    ),
    grouped=False,
    refused=(
        ("bloom-176b", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
        ("bloom-176b", {"n_inner": 512}, "n_inner is 512"),
    ),
    released_text=released,
)
# fmt: on
