"""Gemma 3. Its released vision tower has one more level in its names than a freshly built one saves.

Norms are (1 + w); embeddings are scaled; sliding layers have a theta of their own (`rope_local_base_freq`).
"""

from __future__ import annotations

import re
from dataclasses import replace

from zoo import families
from zoo.mapping.plan import match
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Listed, Variant, names, rope
from zoo.testing.build import rename
from zoo.testing.full_size import attention, read, refs
from zoo.testing.names import Config, Tensor
from zoo.testing.released import drop, two_thetas
from zoo.testing.variant import Draw, Settings, Tensors

# fmt: off

_GEMMA3 = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 5,
    "query_pre_attn_scalar": 17, "sliding_window": 6, "sliding_window_pattern": 3,
    "rope_parameters": {
        FULL: {"rope_type": "linear", "rope_theta": 613.0, "factor": 5.0}, SLIDING: rope(71.0),
    },
}
_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1,
    "intermediate_size": 20, "image_size": 28, "patch_size": 7, "vision_use_head": False,
}

# fmt: on


def vision_prefix(name: str) -> str:
    """The released vision tower is `vision_tower.vision_model.*`; upstream saves `vision_tower.*`."""
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def vision_renamed(case: FamilyCase, tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    return {vision_prefix(name): t for name, t in tensors.items()}


def gemma3_release(tensors: Tensors, config: Settings, draw: Draw) -> None:
    rename(tensors, vision_prefix)


def released(config: Settings) -> Settings:
    """The small ones give a pattern, the larger ones the list (and the pattern under a private name)."""
    pattern = config.pop("_sliding_window_pattern", None) or config.pop("sliding_window_pattern")
    config.pop("sliding_window_pattern", None)
    if config["num_hidden_layers"] < 5:
        config["sliding_window_pattern"] = pattern
        del config["layer_types"]
    else:
        config["_sliding_window_pattern"] = pattern
    return two_thetas(drop(config, "tie_word_embeddings", "use_bidirectional_attention"))


# fmt: off
CASE = FamilyCase(
    "gemma3",
    (
        Variant("gemma3", "Gemma3ForCausalLM", _GEMMA3 | {"final_logit_softcapping": 11.0},
            "four (1 + w) norms, two thetas, linear scaling on full layers, embeddings times 6, final softcap"),
        Variant("gemma3_plain", "Gemma3ForCausalLM",
            _GEMMA3 | {
                "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window_pattern": 2,
                "num_hidden_layers": 3, "rope_parameters": {FULL: rope(613.0), SLIDING: rope(71.0)},
            },
            "no scaling, one K/V head (as 270M and 1B)"),
        Variant("gemma3_vision", "Gemma3ForConditionalGeneration",
            {
                "text_config": _GEMMA3 | {"num_key_value_heads": 3, "rms_norm_eps": 0.03, "hidden_size": 42},
                "vision_config": _SIGLIP,
                "mm_tokens_per_image": 4,
                "image_token_index": 130, "boi_token_index": 129, "eoi_token_index": 128,
            },
            "the wrapper of 4B and larger, names as released", release=gemma3_release, image_token=130),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    released_wrapper=lambda config: drop(config, "tie_word_embeddings"),
    released=vision_renamed,
    listed={"gemma3-27b-wrapper": Listed("gemma3-27b-it")},
    refused=(
        ("gemma3-27b-it", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("gemma3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3-27b-it", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ),
    released_text=released,
)
# fmt: on


def test_gemma_3_as_released_in_march_2025_leaves_out_the_class_defaults() -> None:
    text = {
        "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32, "num_hidden_layers": 62,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "model_type": "gemma3_text",
    }  # fmt: skip
    first = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    now = families.spec_of(read("gemma3-27b-it"))
    assert replace(families.spec_of(first), dtype=None) == replace(now, dtype=None)


def test_gemma_3s_pattern_is_read_under_its_public_and_its_private_name() -> None:
    config = read("gemma3-1b-it")
    assert config.pop("sliding_window_pattern") == 6
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        spec = families.spec_of({**config, key: 4})
        assert [attention(spec, i).window is None for i in range(8)] == [False, False, False, True] * 2


def test_gemmas_norms_are_plain_where_the_file_holds_one_plus_w() -> None:
    config = read("gemma3-1b-it")
    assert families.spec_of(config).norm.weight == "plus_one"
    stored = families.spec_of({**config, "norm_weight_plus_one": True})
    assert {n.weight for la in stored.layers for n in (la.attn_norm, la.ffn_post_norm) if n} == {"plain"}
    assert stored.norm.weight == "plain"


def test_norms_that_came_as_one_plus_w_have_no_form_in_hugging_faces_files() -> None:
    """Writing them out as w would be wrong, and 1 + w - 1 is not w to the bit."""
    config = read("gemma3-1b-it")
    tensors = refs({n: (t.dtype, t.shape) for n, t in names.released_tensors(CASE, config).items()})
    spec = families.spec_of({**config, "norm_weight_plus_one": True})
    m = match(spec, families.get("gemma3").rules["hf"], tensors)
    assert any("norm.weight: no rule of this family fills it" in problem for problem in m.problems)


def test_full_layers_alone_are_scaled() -> None:
    spec = families.spec_of(read("gemma3-4b-it"))
    sliding, full = attention(spec, 0).rope, attention(spec, 5).rope
    assert sliding is not None and full is not None
    assert (sliding.theta, sliding.scaling) == (1e4, None)
    assert full.theta == 1e6 and full.scaling is not None and full.scaling.factor == 8.0
