"""What a family does not read of a config: refused where it changes numbers, noted where it is unknown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner

import zoo
from zoo import families, manifest, shipped, unread
from zoo.cli import cli
from zoo.config import Config, rope_parameters
from zoo.errors import ZooError

# Of other families, each with a value that changes numbers.
FOREIGN: dict[str, Any] = {
    "attn_logit_softcapping": 47.0, "final_logit_softcapping": 29.0, "residual_multiplier": 0.22,
    "attention_multiplier": 0.015, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "logit_scale": 0.0625,
    "query_pre_attn_scalar": 224, "clip_qkv": 8.0, "alibi": True, "parallel_attn": True, "use_parallel_residual": True,
    "rotary_pct": 0.26, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 257, "num_kv_shared_layers": 3,
    "hc_mult": 4, "index_topk": 2047, "ngram_size": 3, "laurel_rank": 63, "lm_head_bias": True,
    "moe_router_logit_softcapping": 31.0, "zero_expert_num": 256, "layer_rope_theta": [1e4], "swa_rope_theta": 12345.0,
    "lm_head_multiplier": 0.04, "key_multiplier": 0.4, "attention_k_eq_v": True, "moe_renormalize": True,
    "attn_res_block_size": 12, "compress_ratios": [0, 4], "use_parallel_block": True, "num_experts": 7,
    "sliding_window": 77, "hidden_act": "xielu", "moe_norm_min": 0.3, "head_dim": 1234,
}  # fmt: skip
CONFIGS = [m for m in manifest.load_all() if m.config is not None]


@pytest.mark.parametrize("m", CONFIGS, ids=lambda m: m.name)
def test_every_foreign_field_that_changes_numbers_is_refused_by_name(m: Any) -> None:
    family = families.get(m.family)
    spec, text = families.spec_of(m.config, family), m.config.get("text_config")
    fields = Config(m.config)
    family.spec(fields)
    left = 0
    for key, value in FOREIGN.items():
        part = text if text is not None else m.config
        changed = {**part, key: value}
        config = changed if text is None else {**m.config, "text_config": changed}
        again = Config(config)
        try:
            other = family.spec(again)
        except ZooError as e:
            assert key in str(e), key  # the family reads it, and refuses it itself
            continue
        if (key if text is None else f"text_config.{key}") not in again.unread() or other != spec:
            continue  # it reads it
        if key == "head_dim" and all(k != "attention" for k in _mixers(spec)):
            continue  # latent attention has no such size
        left += 1
        if key == "sliding_window" and changed.get("use_sliding_window") is False:
            continue
        with pytest.raises(ZooError, match=rf"\b{key} is .*the family {family.name} does not read"):
            families.spec_of(config, family)
    assert left > len(FOREIGN) / 2


@pytest.mark.parametrize("within", ["", "rope_parameters"])
def test_a_share_of_a_head_that_turns_is_read_or_refused_in_every_family_that_turns_any(within: str) -> None:
    """RoPE's settings are read for every family; not every family asks them for this."""
    first = {m.family: m for m in reversed(CONFIGS)}
    refused = set()
    for family, m in first.items():
        spec, text = families.spec_of(m.config), m.config.get("text_config")
        part = m.config if text is None else text
        said = part.get("rope_parameters") or part.get("rope_scaling") or {}
        theta = {"rope_theta": part["rope_theta"]} if part.get("rope_theta") else {}
        if within and (not theta or any(isinstance(x, dict) for x in said.values())):
            continue
        share = {"partial_rotary_factor": 0.1875}
        changed = {
            **part,
            **({"rope_scaling": None, within: {**said, **theta, **share}} if within else share),
        }
        try:
            other, notes = families.read(changed if text is None else {**m.config, "text_config": changed})
        except ZooError:
            refused.add(family)
            continue
        told = any("partial_rotary_factor is 0.1875" in note for note in notes)  # what is within counts
        turns = any(getattr(x.mixer, "rope", None) for x in spec.layers)
        assert other != spec or told or not turns, family
    assert "deepseek_v3" in refused


def _mixers(spec: Any) -> set[str]:
    return {layer.mixer.kind for layer in spec.layers if layer.mixer is not None}


def config(**more: Any) -> dict[str, Any]:
    return {**(manifest.find("qwen3-0.6b").config or {}), **more}


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_ratio", 500), ("use_dynamic_ntk", True), ("use_logn_attn", True), ("rope_base", 2e4), ("logits_softcap", 30.0), ("softmax_scale", 0.1)],
)  # fmt: skip
def test_a_field_on_no_list_is_refused_where_its_name_says_what_it_scales(key: str, value: Any) -> None:
    glm = dict(manifest.find("glm-4-9b").config or {})
    for released in (config(), glm):
        with pytest.raises(ZooError, match=rf"\b{key} is {value}; and the family"):
            families.spec_of({**released, key: value})
    assert families.read({**glm, "rope_ratio": 1.0, "use_dynamic_ntk": False, "use_rotary": True})[1] == []
    assert families.read(config(rope_base=config()["rope_theta"]))[1] == []


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_two_thetas_that_differ_are_named_both(key: str) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 4321.0}
    with pytest.raises(
        ZooError,
        match=r"rope_theta is 1000000 \(and 4321\.0 in the settings of RoPE, which was read: delete one\)",
    ):
        families.spec_of(config(**{key: rope}))


def test_all_that_is_refused_is_named_at_once() -> None:
    with pytest.raises(
        ZooError, match=r"softcapping is 50\.0; residual_multiplier is 0\.22; .* does not read them"
    ):
        families.spec_of(config(attn_logit_softcapping=50.0, residual_multiplier=0.22))


# What configs of releases leave unread beyond the silent list, by file. Every field of every other config that public
# sources show is read by its family or known to say nothing. A field of a new release that is neither is looked
# into, then read, or put into SILENT or NUMBERS; here stands what nobody could explain.
NOTED: dict[str, list[str]] = {}


def test_what_the_configs_of_releases_leave_unread_is_listed_here() -> None:
    configs = sorted((Path(shipped.RELEASES) / "configs").glob("*.config.json"))
    noted = {path.name: families.read(json.loads(path.read_text(encoding="utf-8")))[1] for path in configs}
    assert len(noted) >= 100
    assert {name: notes for name, notes in noted.items() if notes} == NOTED


def test_an_unknown_field_is_seen_in_plan_inspect_and_certificate(tmp_path: Path) -> None:
    source, canon = tiny.make("llama", tmp_path / "source"), tmp_path / "canonical"
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "my_trainers_key": 3}))
    said = "nobody reads my_trainers_key (unknown to zoo)"
    for words in (
        ["plan", source], ["inspect", source], ["convert", source, canon], ["inspect", canon],
        ["verify", canon, "--level", "bytes"],
    ):  # fmt: skip
        result = CliRunner().invoke(cli, [str(word) for word in words])
        assert result.exit_code == 0 and said in result.output, words
    certificate = json.loads((canon / "parity.json").read_text())
    assert certificate["levels"]["plan"]["notes"] == [f"config: {said}"]
    shutil.rmtree(source)
    alone = zoo.verify(canon, level="plan", write=False).level("plan")
    assert alone is not None and f"config: {said}" in alone.notes  # as zoo.json has it


def test_an_unknown_field_is_a_note_with_the_path_to_it() -> None:
    spec, notes = families.read(config(my_trainers_key=3, unsloth_fixed=True))
    assert spec == families.spec_of(config())
    assert notes == ["config: nobody reads my_trainers_key (unknown to zoo)"]
    wrapped = dict(manifest.find("gemma-3-4b").config or {})
    wrapped["text_config"] = {**wrapped["text_config"], "my_key": 1}
    assert "text_config.my_key" in families.read(wrapped)[1][0]


def test_a_field_of_a_nested_object_is_refused_with_the_path_to_it() -> None:
    wrapped = dict(manifest.find("gemma-3-4b").config or {})
    wrapped["text_config"] = {**wrapped["text_config"], "residual_multiplier": 0.22}
    with pytest.raises(ZooError, match=r"text_config\.residual_multiplier is 0\.22"):
        families.spec_of(wrapped)
    with pytest.raises(ZooError, match=r"rope_scaling\.long_factor is \[2\.0\]"):
        families.spec_of(config(rope_scaling={"rope_type": "linear", "factor": 2.0, "long_factor": [2.0]}))


@pytest.mark.parametrize(
    "more",
    [
        {"attn_logit_softcapping": None}, {"attn_logit_softcapping": 0.0}, {"residual_multiplier": 1}, {"alibi": False},
        {"n_group": 1, "topk_group": 1}, {"max_window_layers": 28}, {"num_experts": 0}, {"qkv_bias": False},
        {"sliding_window": 4096, "use_sliding_window": False}, {"clip_qkv": None}, {"n_embd": None},
        {"use_qk_norm": True}, {"text_config": {}}, {"num_local_experts": []},
    ],
)  # fmt: skip
def test_a_value_that_changes_nothing_or_says_what_the_model_is_passes(more: dict[str, Any]) -> None:
    assert families.read(config(**more)) == (families.spec_of(config()), [])


def test_a_field_is_neutral_or_silent_but_never_both() -> None:
    assert not [key for key in unread.NUMBERS if unread.SILENT.fullmatch(key)]


def test_reading_is_recorded_in_nested_objects_and_asking_is_not_reading() -> None:
    c = Config({"a": 1, "b": 2, "in": {"x": 1, "y": 2}, "p": 5, "q": 5, "r": 6})
    assert "b" in c
    assert c["a"] == 1 and c.sub("in")["x"] == 1 and c.first("p", "q", "r") == 5
    assert c.unread() == {"b": 2, "in.y": 2, "r": 6}  # another spelling that says the same is read, too
    assert c.with_defaults({"b": 3, "z": 4})["b"] == 2
    assert c.unread() == {"in.y": 2, "r": 6}


def test_settings_of_rope_count_as_read_in_each_object_that_says_them() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    c = Config({"rope_theta": 1e4, "rope_scaling": yarn, "rope_parameters": {**yarn, "rope_theta": 1e4}})
    p = rope_parameters(c)
    assert p["factor"] == 4.0 and p["rope_theta"] == 1e4
    assert c.unread() == {"rope_theta": 1e4}
