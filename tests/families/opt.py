"""OPT. The files of 2022 have no `model.` prefix."""

from __future__ import annotations

from zoo.testing import VOCAB, FamilyCase, Variant
from zoo.testing.released import drop, drop_default
from zoo.testing.variant import Draw, Settings, Shapes, Tensors

# fmt: off

_OPT = VOCAB | {
    "hidden_size": 40, "num_attention_heads": 5, "ffn_dim": 52, "num_hidden_layers": 3, "max_position_embeddings": 37,
}

# fmt: on


def bare(tensors: Tensors, config: Settings, draw: Draw) -> None:
    """Without the prefix `model.`."""
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def as_bare(listed: Shapes) -> Shapes:
    """Older than the naming that is listed."""
    return {k.removeprefix("model."): s for k, s in listed.items()}


def released(config: Settings) -> Settings:
    drop(config, "tie_word_embeddings")
    return drop_default(config, enable_bias=True, layer_norm_elementwise_affine=True)


# fmt: off
_ROUNDS = "upstream scales queries, and rounds them, before the product with the keys"
CASE = FamilyCase(
    "opt",
    (
        Variant("opt", "OPTForCausalLM", _OPT, "learned positions from row 2 on, ReLU, biases, tied", rounds_otherwise=_ROUNDS),
        Variant("opt_no_bias", "OPTForCausalLM", _OPT | {"enable_bias": False, "activation_function": "gelu"},
            "no biases in linear layers; GELU", rounds_otherwise=_ROUNDS),
        Variant("opt_bare", "OPTForCausalLM", _OPT | {"num_attention_heads": 4}, "as the files of 2022: no model. prefix",
            release=bare, listed=as_bare, rounds_otherwise=_ROUNDS),
    ),
    grouped=False,
    without_effect={"k_proj.bias": "adds the same to all scores of a query, where keys are not rotated: softmax takes it away"},
    refused=(
        ("opt-6.7b", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
        ("opt-6.7b", {"word_embed_proj_dim": 512}, "word_embed_proj_dim is 512"),
        ("opt-6.7b", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True"),
        ("opt-6.7b", {"activation_function": "tanh"}, "activation_function is 'tanh'"),
    ),
    released_text=released,
)
# fmt: on
