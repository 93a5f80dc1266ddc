"""Reading a config: what is there under any spelling, what is missing, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from zoo import families, manifest
from zoo.config import ACTIVATIONS, Config, rope, rope_parameters, yarn_attention_factor, yarn_mscale
from zoo.errors import ZooError
from zoo.spec import Attention, RopeScaling


def c(**data: Any) -> Config:
    return Config(data, "some/config.json")


# ----------------------------------------------------------------------------------------- single fields


def test_a_needed_field_that_is_absent_or_null_is_named_with_its_file() -> None:
    for config in (c(), c(hidden_size=None)):
        with pytest.raises(ZooError, match=r"some/config\.json: field 'hidden_size' is missing"):
            config["hidden_size"]


def test_null_counts_as_absent() -> None:
    config = c(a=None, b=0)
    assert "a" not in config and "b" in config
    assert config.get("a", 3) == 3 and config.get("b", 3) == 0
    assert config.first("a", "b") == 0


def test_the_first_spelling_that_is_there_counts() -> None:
    assert c(num_experts=4, num_local_experts=5).first("num_experts", "num_local_experts") == 4
    assert c(num_local_experts=5).first("num_experts", "num_local_experts") == 5
    assert c().first("num_experts", default=None) is None
    with pytest.raises(ZooError, match="none of the fields 'num_experts', 'num_local_experts'"):
        c().first("num_experts", "num_local_experts")


def test_a_choice_is_one_of_those_allowed() -> None:
    assert c(kind="b").choice("kind", ("a", "b")) == "b"
    assert c().choice("kind", ("a", "b"), "a") == "a"
    with pytest.raises(
        ZooError, match=r"kind is 'z', which this family does not support \(supported: 'a', 'b'\)"
    ):
        c(kind="z").choice("kind", ("a", "b"))
    with pytest.raises(ZooError, match="'kind' is missing"):
        c().choice("kind", ("a", "b"))


def test_a_table_gives_what_the_choice_stands_for() -> None:
    assert c(hidden_act="gelu_new").table("hidden_act", ACTIVATIONS) == "gelu_tanh"
    with pytest.raises(ZooError, match="hidden_act is 'mish'"):
        c(hidden_act="mish").table("hidden_act", ACTIVATIONS)


def test_what_is_not_supported_may_be_absent_or_neutral_only() -> None:
    c().refuse(clip=None)
    c(clip=None, bias=False).refuse(clip=None, bias=False)
    with pytest.raises(ZooError, match=r"clip is 8\.0, which zoo does not support"):
        c(clip=8.0).refuse(clip=None)


def test_a_nested_object_says_where_it_came_from() -> None:
    with pytest.raises(ZooError, match=r"some/config\.json: text_config: field 'n' is missing"):
        c(text_config={"m": 1}).sub("text_config")["n"]
    with pytest.raises(ZooError, match="text_config should be an object, found str"):
        c(text_config="x").sub("text_config")


def test_a_list_has_an_entry_for_each_layer() -> None:
    config = c(layer_types=["full", "sliding", "odd"])
    assert config.each_layer("layer_types", 2, ("full", "sliding")) == ["full", "sliding"]
    with pytest.raises(ZooError, match=r"layer_types\[2\] is 'odd'; known: 'full', 'sliding'"):
        config.each_layer("layer_types", 3, ("full", "sliding"))
    with pytest.raises(ZooError, match="layer_types should list 4 layers"):
        config.each_layer("layer_types", 4)
    with pytest.raises(ZooError, match="layer_types should list 4 layers, found 'full'"):
        c(layer_types="full").each_layer("layer_types", 4)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("hidden_size", "4096", "hidden_size is .4096., a text; expected a number: write 4096"),
        ("num_attention_heads", 0, "num_attention_heads is 0; expected a whole number above 0"),
        ("num_attention_heads", [32], r"num_attention_heads is \[32\]; expected a whole number above 0"),
        ("attention_bias", [], r"attention_bias is \[\]; expected true or false$"),
        ("mlp_bias", 2, "mlp_bias is 2; expected true or false$"),
        ("num_hidden_layers", [32], r"num_hidden_layers is \[32\]; expected a whole number above 0"),
        (
            "num_hidden_layers",
            "32",
            "num_hidden_layers is '32', a text; expected a number: write 32, without quotes",
        ),
        ("num_hidden_layers", 32.0, r"num_hidden_layers is 32\.0; expected a whole number: write 32$"),
        ("num_hidden_layers", True, "num_hidden_layers is True; expected a whole number$"),
        ("num_key_value_heads", [8, 8.0], r"num_key_value_heads is 8\.0; expected a whole number"),
        ("rope_scaling", 8, "rope_scaling is 8; expected an object of settings, or null$"),
        ("rope_theta", True, "rope_theta is true; expected a finite number$"),
        ("rope_theta", [1e4], r"rope_theta is \[10000\.0\]; expected a whole number above 0"),
        (
            "rms_norm_eps",
            "1e-5",
            "rms_norm_eps is '1e-5', a text; expected a number: write 1e-5, without quotes",
        ),
        ("intermediate_size", 0.5, r"intermediate_size is 0\.5; expected a whole number$"),
        ("rope_scaling", {"rope_type": "linear", "factor": "8"}, "rope_parameters: factor is '8', a text"),
        (
            "tie_word_embeddings",
            "False",
            "tie_word_embeddings is 'False', a text; write false, without quotes",
        ),
        ("tie_word_embeddings", "no", 'tie_word_embeddings is "no"; expected true or false$'),
        ("rms_norm_eps", -1e-5, "rms_norm_eps is -1e-05; expected .* .the eps of a norm is -1e-05"),
        ("rms_norm_eps", math.nan, "rms_norm_eps is NaN; expected a finite number$"),
        ("rope_theta", math.inf, "rope_theta is Infinity; expected a finite number$"),
        ("rope_theta", 0, "rope_theta is 0"),
        ("rope_scaling", {"rope_type": "linear", "factor": 0}, r"the factor of scaled RoPE is 0\.0"),
        (
            "rope_scaling",
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1},
            r"high_freq_factor 1\.0 should not be below low_freq_factor 4\.0",
        ),
        ("num_key_value_heads", 5, "32 query heads cannot share 5 key/value heads"),
        ("head_dim", 7, "RoPE needs pairs of channels, and would rotate 7"),
        ("vocab_size", 10**50, r"its sizes give embed\.weight the shape \[10000"),
        (
            "max_position_embeddings",
            -1,
            "max_position_embeddings is -1; expected a whole number above 0 .its context is -1 positions",
        ),
        ("num_hidden_layers", 0, "num_hidden_layers is 0; expected 1 to 1024"),
        ("num_hidden_layers", 10**12, "num_hidden_layers is 1000000000000; expected 1 to 1024"),
        (
            "vocab_size",
            -1,
            r"vocab_size is -1; expected a whole number above 0 \(its sizes give embed\.weight the shape \[-1, 4096\]",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_an_error_of_the_config(key: str, value: Any, says: str) -> None:
    llama = manifest.find("llama-3.1-8b").config
    assert llama is not None
    with pytest.raises(ZooError, match=rf"^some/config\.json: .*{says}"):
        families.spec_of({**llama, key: value}, where="some/config.json")


def test_zero_and_one_stand_for_false_and_true() -> None:
    llama = manifest.find("llama-3.1-8b").config
    assert llama is not None
    tied = families.spec_of({**llama, "tie_word_embeddings": 1, "attention_bias": 0})
    assert tied == families.spec_of({**llama, "tie_word_embeddings": True})


def test_a_config_that_no_family_claims_says_which_there_are() -> None:
    for config in ({}, {"architectures": ["NoSuchModel"]}, {"architectures": 5, "model_type": "nothing"}):
        with pytest.raises(ZooError, match=r"no family for .* Known architectures: .*LlamaForCausalLM"):
            families.find(config)


def test_a_config_that_is_a_llamas_but_for_its_name_is_refused_with_the_nearest_family() -> None:
    for release, near in (
        ("llama-3.1-8b", r"llama, \w+"),
        ("internlm3-8b-instruct", "internlm3; .* --family internlm3"),
    ):
        config = {
            **(manifest.find(release).config or {}),
            "model_type": "nova",
            "architectures": ["NovaForCausalLM"],
        }
        with pytest.raises(families.NoFamily, match=rf"model_type 'nova'\. Nearest by its fields: {near}"):
            families.find(config)
    with pytest.raises(families.NoFamily, match=r"model_type 'nova'\. Known"):
        families.find({"model_type": "nova", "n_state": 3})


# --------------------------------------------------------------------------------------------------- RoPE

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        c(rope_theta=5e5, rope_scaling=LLAMA3),
        c(
            rope_theta=5e5,
            rope_scaling={"type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_type"}},
        ),
        c(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3}),
        c(rope_parameters={"rope_theta": 5e5, **LLAMA3}),
        c(rope_parameters={"rope_theta": 5e5, **LLAMA3}, rope_theta=1.0),
        c(rope_parameters={"rope_theta": 5e5, **LLAMA3}, rope_scaling={"type": "llama3", "factor": 8.0}),
    ],
    ids=["rope_type", "type", "both", "rope_parameters", "rope_parameters first", "twice the same"],
)
def test_all_spellings_of_rope_scaling_say_the_same(config: Config) -> None:
    assert rope_parameters(config) == {"rope_theta": 5e5, **LLAMA3}


def test_settings_may_differ_by_layer_type() -> None:
    nested = c(
        rope_parameters={"full": {"rope_theta": 1e6, "rope_type": "default"}, "sliding": {"rope_theta": 1e4}}
    )
    assert rope_parameters(nested, "full")["rope_theta"] == 1e6
    assert rope_parameters(nested, "sliding") == {"rope_type": "default", "rope_theta": 1e4}
    released = c(rope_theta=1e6, local=1e4, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert rope_parameters(released, "full")["factor"] == 8.0
    assert rope_parameters(released, "sliding", theta="local", scaling=None) == {
        "rope_type": "default",
        "rope_theta": 1e4,
    }


def test_two_spellings_that_differ_are_refused() -> None:
    both = c(rope_parameters={"rope_theta": 5e5, **LLAMA3}, rope_scaling={"type": "linear", "factor": 8.0})
    with pytest.raises(ZooError, match="rope_parameters and rope_scaling differ in rope_type: delete one"):
        rope_parameters(both)


def test_a_layer_type_without_settings_of_its_own_is_refused() -> None:
    """Upstream would put its class's defaults there."""
    for p in ({"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}, {"full": {"rope_theta": 1e6}}):
        with pytest.raises(ZooError, match="rope_parameters says nothing about sliding layers"):
            rope_parameters(c(rope_parameters=p), "sliding")


def test_truncate_is_read_beside_the_layer_types_as_upstream_does() -> None:
    yarn = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "truncate": False}
    assert "truncate" not in rope_parameters(c(rope_parameters={"full": yarn}), "full")
    assert "truncate" not in rope_parameters(c(rope_theta=1e4, rope_scaling=yarn), "full")
    assert rope_parameters(c(rope_parameters={"full": yarn, "truncate": False}), "full")["truncate"] is False
    assert rope_parameters(c(rope_parameters=yarn))["truncate"] is False


ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize("inside", [{}, {ORIGINAL: 64}])
def test_an_original_context_beside_the_settings_is_none_of_theirs_but_in_phi_3(
    inside: dict[str, int],
) -> None:
    """transformers 5.23 reads it there for the classes that have such a field."""
    yarn = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, **inside}
    llama = {
        **(manifest.find("llama-3.1-8b").config or {}),
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": yarn,
    }
    assert isinstance(
        mixer := families.spec_of({**llama, ORIGINAL: inside.get(ORIGINAL, 131072)}).layers[0].mixer,
        Attention,
    )
    assert (
        mixer.rope
        and mixer.rope.scaling
        and mixer.rope.scaling.original_context == inside.get(ORIGINAL, 131072)
    )
    with pytest.raises(ZooError, match=f"{ORIGINAL} is 77.*the family llama does not read it"):
        families.spec_of({**llama, ORIGINAL: 77})
    plain = {**llama, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert families.spec_of({**plain, ORIGINAL: 77}) == families.spec_of(plain)
    phi = {**(manifest.find("phi-4-mini").config or {})}
    scaling = {**phi["rope_scaling"], **inside}
    for original in (64, None):
        config = {**phi, "rope_scaling": scaling, ORIGINAL: original}
        if inside.get(ORIGINAL, original or 4096) == (original or 4096):
            families.spec_of(config)
        else:
            with pytest.raises(
                ZooError, match=f"{ORIGINAL} is 64 in the settings of RoPE, and upstream would take 4096"
            ):
                families.spec_of(config)


def test_a_null_share_of_a_head_that_turns_is_no_default() -> None:
    """transformers 5 turns whole heads then, and its default counts only where the field is absent."""
    glm = dict(manifest.find("glm-4-9b").config or {})
    for part, dim in ((0.5, 64), (0.25, 32)):
        mixer = families.spec_of({**glm, "partial_rotary_factor": part}).layers[0].mixer
        assert isinstance(mixer, Attention) and mixer.rope and mixer.rope.dim == dim
    with pytest.raises(ZooError, match=r"partial_rotary_factor is null.* releases of this family turn 0\.5"):
        families.spec_of({**glm, "partial_rotary_factor": None})
    llama = dict(manifest.find("llama-3.1-8b").config or {})
    assert families.spec_of({**llama, "partial_rotary_factor": None}) == families.spec_of(llama)


def test_theta_is_never_guessed_unless_the_family_knows_it() -> None:
    with pytest.raises(ZooError, match="'rope_theta' is missing"):
        rope_parameters(c())
    assert rope_parameters(c(), default_theta=1e4)["rope_theta"] == 1e4
    assert rope_parameters(c(rope_theta=7.0), default_theta=1e4)["rope_theta"] == 7.0


def test_a_partial_rotary_factor_beside_the_settings_joins_them() -> None:
    assert rope_parameters(c(rope_theta=1.0, partial_rotary_factor=0.5))["partial_rotary_factor"] == 0.5
    inner = c(rope_parameters={"rope_theta": 1.0, "partial_rotary_factor": 0.25}, partial_rotary_factor=0.5)
    assert rope_parameters(inner)["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize("kind", ["longrope", "ntk", "mrope", "proportional"])
def test_an_unknown_kind_of_rope_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ZooError, match=f"rope_parameters: rope_type is '{kind}'"):
        rope(c(), {"rope_type": kind, "rope_theta": 1e4}, 8)


@pytest.mark.parametrize(
    "name", ["qwen2.5-7b", "mistral-7b-v0.1", "pythia-1.4b", "gemma-3-1b", "deepseek-v3", "glm-4.5-air"]
)
def test_dynamic_rope_that_a_trainer_wrote_is_plain_up_to_the_context_in_every_family(name: str) -> None:
    config = dict(manifest.find(name).config or {})
    config.pop("rope_parameters", None)
    plain, changed = (
        families.spec_of({**config, "rope_scaling": s}) for s in (None, {"type": "dynamic", "factor": 2.0})
    )
    ropes = {layer.mixer.rope for layer in changed.layers} - {layer.mixer.rope for layer in plain.layers}
    (scaled,) = ropes
    assert scaled.scaling == RopeScaling("dynamic", 2.0, config["max_position_embeddings"])


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8}, "low_freq_factor"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 8}, "factor"),
    ],
)
def test_a_setting_that_a_kind_of_rope_needs_is_not_made_up(settings: dict[str, Any], missing: str) -> None:
    with pytest.raises(ZooError, match=f"rope_parameters: field '{missing}' is missing"):
        rope(c(), {"rope_theta": 1e4, **settings}, 8)


def test_yarn_takes_its_original_context_from_the_config_where_it_names_none() -> None:
    settings = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    scaling = rope(c(max_position_embeddings=512), settings, 8).scaling
    assert scaling is not None and scaling.original_context == 512


def test_yarns_attention_factor_is_the_given_one_a_ratio_or_the_papers() -> None:
    assert yarn_attention_factor({"attention_factor": 1.2, "mscale": 9.0, "mscale_all_dim": 1.0}, 40.0) == 1.2
    ratio = yarn_attention_factor({"mscale": 0.7, "mscale_all_dim": 1.0}, 40.0)
    assert math.isclose(ratio, (0.07 * math.log(40) + 1) / (0.1 * math.log(40) + 1))
    assert yarn_attention_factor({"mscale": 1.0, "mscale_all_dim": 1.0}, 40.0) == 1.0
    # With one of the two alone, upstream falls back to the paper's.
    for p in ({}, {"mscale": 2.0}, {"mscale_all_dim": 2.0}):
        assert math.isclose(yarn_attention_factor(p, 40.0), 0.1 * math.log(40) + 1)
    assert yarn_mscale(1.0) == yarn_mscale(0.5) == 1.0


def test_openais_config_has_the_defaults_of_its_code_and_is_checked_before_it_is_expanded() -> None:
    own = {
        "num_hidden_layers": 4, "initial_context_length": 4096, "rope_ntk_beta": 32.0, "rope_ntk_alpha": 1.0,
        "vocab_size": 50, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
        "intermediate_size": 8, "num_experts": 2, "experts_per_token": 1, "sliding_window": 4, "rope_theta": 150000.0,
    }  # fmt: skip

    def ours(config: dict[str, Any]) -> dict[str, Any]:
        return families.own_config("openai", config, ("unembedding.weight",), "config.json")

    config = ours(own)
    assert config == ours(own | {"rope_scaling_factor": 32.0})
    assert config["rope_scaling"]["factor"] == 32.0
    with pytest.raises(ZooError, match="num_hidden_layers is 4000000000; expected 1 to 1024"):
        ours(own | {"num_hidden_layers": 4_000_000_000})
    with pytest.raises(ZooError, match=r"^config\.json: rope_theta is .abc.; expected a finite number$"):
        ours(own | {"rope_theta": "abc"})


def test_a_field_whose_other_values_are_refused_themselves_is_not_blamed() -> None:
    config = {**(manifest.find("minimax-m2").config or {}), "rotary_dim": 9}
    with pytest.raises(ZooError, match="would rotate 9") as e:
        families.spec_of(config)
    assert "attn_type_list" not in str(e.value) and "shared_intermediate_size" not in str(e.value)
