"""Mistral, Ministral and their wrapper Mistral 3, which says nothing of the head.

Upstream's wrapper is tied by default; releases that leave the key out mean their text model's value, or have a head
in their files. `ministral3` was released after transformers 5: rope_parameters is its own key.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zoo import families
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.mapping.plan import make_plan
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Listed, Variant, build, rope, yarn
from zoo.testing.full_size import attention, read
from zoo.testing.released import plain_rope
from zoo.testing.variant import Settings

# fmt: off

_MISTRAL = BASE | {
    "hidden_size": 38, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3,
    "sliding_window": None, "rope_parameters": rope(613.0),
}
# q is scaled by 1 + beta ln(1 + floor(pos / original)): with original 16 and 41 tokens in three steps.
_MINISTRAL3 = _MISTRAL | {
    "head_dim": 12,
    "rope_parameters": yarn(
        97.0, 4.0, 16, 0.9, 0.09, mscale=0.8, mscale_all_dim=0.6, llama_4_scaling_beta=0.37,
    ),
}
_PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1,
    "intermediate_size": 20, "image_size": 28, "patch_size": 7,
}

# fmt: on


def tied_as_its_text(keys: Settings) -> Settings:
    """The wrapper's default is tied, but releases that leave the key out mean their text model's value."""
    if keys["model_type"] == "mistral3":
        keys.setdefault("tie_word_embeddings", keys["text_config"].get("tie_word_embeddings", False))
    return keys


def wrapper(config: Settings) -> Settings:
    """The wrapper does not say; the files have a head or they do not."""
    del config["tie_word_embeddings"]
    if not config["text_config"]["tie_word_embeddings"]:
        del config["text_config"]["tie_word_embeddings"]
    return config


def released(config: Settings) -> Settings:
    if config["model_type"] != "ministral3":
        return plain_rope(config)
    config["rope_parameters"] = {"type": "yarn", **config["rope_parameters"]}
    return config


def upstream_has_theta_from_its_config() -> None:
    from transformers import MistralConfig
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

    config = MistralConfig(rope_parameters=rope(731.0))
    assert MistralRotaryEmbedding(config).inv_freq[1].item() == pytest.approx(731.0 ** (-2 / config.head_dim))


# fmt: off
CASE = FamilyCase(
    "mistral",
    (
        Variant("mistral", "MistralForCausalLM", _MISTRAL, "no window; head_dim 10 is not 38/6"),
        Variant("mistral_window", "MistralForCausalLM",
            _MISTRAL | {"hidden_size": 60, "head_dim": None, "sliding_window": 7},
            "window of 7 on all layers (as v0.1)"),
        Variant("ministral", "MinistralForCausalLM",
            _MISTRAL | {
                "num_hidden_layers": 4, "sliding_window": 5, "layer_types": [FULL, SLIDING, SLIDING, FULL],
            },
            "windows of 5 on some layers (8B-2410)"),
        Variant("ministral3", "Ministral3ForCausalLM", _MINISTRAL3,
            "YaRN (attention factor from mscale / mscale_all_dim) and a query scale that grows with position",
            seq_len=41),
        Variant("mistral3", "Mistral3ForConditionalGeneration",
            {
                "text_config": _MISTRAL | {"model_type": "mistral"}, "vision_config": _PIXTRAL,
                "image_token_index": 130, "tie_word_embeddings": False,
            },
            "wrapper around mistral, untied (the wrapper's class default is tied)", image_token=130),
        Variant("mistral3_ministral3", "Mistral3ForConditionalGeneration",
            {
                "text_config": _MINISTRAL3 | {"model_type": "ministral3", "tie_word_embeddings": True},
                "vision_config": _PIXTRAL, "image_token_index": 130, "tie_word_embeddings": True,
            },
            "wrapper around ministral3, tied (Ministral 3 3B)", seq_len=41, image_token=130),
    ),
    main="ministral3",
    upstream_keys=tied_as_its_text,
    released_text=released,
    released_wrapper=wrapper,
    keeps={"ministral3": ("rope_parameters",)},
    layer_kinds=frozenset({FULL, SLIDING}),
    listed={"devstral-small-2507": Listed("mistral-small-3.1-24b-instruct")},
    refused=(
        ("mistral-7b-v0.3", {"attention_bias": True}, "attention_bias is True"),
        ("mistral-7b-v0.3", {"layer_types": ["chunked_attention"] * 32}, "layer_types[0] is 'chunked_attention'"),
        ("mistral-7b-v0.3", {"layer_types": ["sliding_attention"] * 32}, "sliding_window is null"),
        ("mistral-small-3.1-24b-instruct", {"model_type": "mixtral"}, "model_type is 'mixtral'"),
        (
            "mistral-7b-v0.3",
            {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"] * 16},
            "is the model_type ministral?",
        ),
    ),
    disputes={"theta where params.json names none": upstream_has_theta_from_its_config},
)
# fmt: on


def test_a_wrapper_decides_on_the_head_before_its_text_model() -> None:
    config = read("ministral3-3b")
    assert families.spec_of(config).tied
    assert not families.spec_of({**config, "tie_word_embeddings": False}).tied


@pytest.mark.parametrize(("name", "tied"), [("mistral3", False), ("mistral3_ministral3", True)])
def test_where_a_wrapper_says_nothing_the_files_decide_on_the_head(
    name: str, tied: bool, tmp_path: Path
) -> None:
    build.make(CASE, CASE.variant(name), tmp_path / name)
    path = tmp_path / name / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("tie_word_embeddings", None)
    config["text_config"].pop("tie_word_embeddings", None)
    path.write_text(json.dumps(config), encoding="utf-8")
    assert make_plan(open_checkpoint(tmp_path / name)).spec.tied is tied


def test_the_text_model_decides_which_family_a_shared_wrapper_is_of() -> None:
    names = {
        stem: families.find(read(stem)).name
        for stem in ("mistral-small-3.1-24b-instruct", "ministral3-8b", "mistral-small-4-119b")
    }
    assert list(names.values())[:2] == ["mistral", "mistral"]
    assert names["mistral-small-4-119b"] != "mistral"


def test_mistrals_window_must_be_written() -> None:
    config = read("mistral-7b-v0.3")
    del config["sliding_window"]
    with pytest.raises(ZooError, match="sliding_window"):
        families.spec_of(config)
    windows = {
        a.window
        for i in range(32)
        if (a := attention(families.spec_of({**config, "sliding_window": 4096}), i))
    }
    assert windows == {4096}


def test_a_head_in_the_file_is_used_though_the_wrapper_defaults_to_tied(tmp_path: Path) -> None:
    """Mistral Small 3.1 does not say: the class default is tied, but the release has a head."""
    path = build.make(CASE, CASE.variant("mistral3"), tmp_path, released_config=True)
    assert "tie_word_embeddings" not in build.read_config(path)
    model = build.upstream(CASE, path)
    assert model.config.tie_word_embeddings is True
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
