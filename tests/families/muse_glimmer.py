"""Muse Glimmer. Its config, younger than transformers 5, is what transformers saves; upstream has the wrapper alone."""

from __future__ import annotations

import pytest

from zoo import families
from zoo.errors import ZooError
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Variant, rope
from zoo.testing.full_size import attention, edited, read

# fmt: off

_TEXT = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 44,
    "num_hidden_layers": 5, "sliding_window": 7, "rope_parameters": rope(71.0), "post_norm_eps": 0.03,
    "qk_scale_factor": 1.9, "output_multiplier": 0.6, "final_logit_softcapping": 11.0,
}
_VISION = {
    "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 20, "patch_size": 4,
    "pos_emb_height": 3, "pos_emb_width": 3,
}
_WRAPPER = {"vision_config": _VISION, "out_hidden_size": 96, "projector_hidden_size": 22}
_Q = "upstream rounds queries times qk_scale_factor; here it is part of the scores' scale"
CASE = FamilyCase(
    "muse_glimmer",
    (
        Variant("muse_glimmer", "MuseGlimmerForConditionalGeneration", _WRAPPER | {"text_config": _TEXT},
            "normed embedding, four norms with two eps, weightless QK norm, gate per channel, each fourth layer from the "
            "last full and without RoPE, scaled and capped logits; with vision", rounds_otherwise=_Q),
        Variant("muse_glimmer_tied", "MuseGlimmerForConditionalGeneration",
            _WRAPPER | {
                "tie_word_embeddings": True,
                "text_config": _TEXT | {
                    "layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING], "tie_word_embeddings": True,
                    "layer_rope_theta": [71.0, 0, 71.0, 0, 71.0],
                },
            },
            "tied; a full layer with RoPE, one with a window and without", rounds_otherwise=_Q),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    keeps={"muse_glimmer_text": ("rope_parameters",)},
    refused=(
        ("muse-glimmer-30b", {"attention_bias": True}, "attention_bias is True"),
        ("muse-glimmer-30b", {"layer_rope_theta": [20000.0] * 52}, "layer_rope_theta[0] is 20000.0"),
        ("muse-glimmer-30b", {"model_type": "muse_glimmer"}, "model_type is 'muse_glimmer'"),
    ),
)
# fmt: on


def test_the_last_layer_is_full_and_each_fourth_before_it() -> None:
    spec = families.spec_of(read("muse-glimmer-30b"))
    mixers = [attention(spec, i) for i in range(spec.n_layers)]
    assert [i for i, a in enumerate(mixers) if a.window is None] == list(range(3, 52, 4))
    assert [a.rope is None for a in mixers] == [a.window is None for a in mixers]


def test_without_lists_layers_are_counted_from_the_last() -> None:
    said = edited("muse-glimmer-30b", layer_types=None, layer_rope_theta=None, num_hidden_layers=6)
    mixers = [layer.mixer for layer in families.spec_of(said).layers]
    assert [a.window is None and a.rope is None for a in mixers] == [False, True, False, False, False, True]  # type: ignore[union-attr]


def test_a_flat_config_is_refused_for_what_it_means_by_its_scale() -> None:
    flat = read("muse-glimmer-30b")["text_config"] | {"model_type": "muse_glimmer", "qk_scale_factor": 43.78}
    with pytest.raises(ZooError, match="model_type is 'muse_glimmer'"):
        families.spec_of(flat)
