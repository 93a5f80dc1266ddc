"""What other versions of transformers save is read for what it means. benchmarks/saved_by.py builds and saves with them; here
lie the kinds of what they write otherwise than today's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import zoo
from zoo import families, manifest
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.mapping.plan import make_plan
from zoo.testing import build
from zoo.testing.assemble import assemble, same


def config(release: str, **changes: Any) -> dict[str, Any]:
    return {**(manifest.find(release).config or {}), **changes}


def by_5(release: str, partial: float, **beside: Any) -> dict[str, Any]:
    """RoPE as transformers 5 saves it, and what it leaves beside."""
    old = config(release)
    theta = old.pop("rope_theta", 10000.0)
    for key in ("rope_scaling", "partial_rotary_factor"):
        old.pop(key, None)
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": partial}
    return {**old, "rope_parameters": rope, **beside}


@pytest.mark.parametrize(
    ("release", "default"),
    [("glm-4.5", 0.5), ("glm-4-32b-0414", 0.5), ("phi-2", 0.5), ("stablelm-3b-4e1t", 0.25), ("qwen3-next-80b-a3b-instruct", 0.25)],
)  # fmt: skip
def test_a_class_default_beside_rope_parameters_does_not_count_and_is_noted(
    release: str, default: float
) -> None:
    spec, notes = families.read(by_5(release, 0.75, partial_rotary_factor=default))
    alone, none = families.read(by_5(release, 0.75))
    assert spec == alone != families.spec_of(by_5(release, default))
    [note] = set(notes) - set(none)
    assert (
        f"partial_rotary_factor is {default}" in note and "rope_parameters has [0.75], which counts" in note
    )


def test_a_part_that_is_no_whole_number_of_channels_is_the_same_beside_rope_parameters() -> None:
    """0.67 of 12 channels are 8.04, of which 8 turn: 8 of 12 is not 0.67."""
    said = by_5("glm-4.5", 0.67, head_dim=12, partial_rotary_factor=0.67)
    spec, notes = families.read(said)
    assert spec.layers[0].mixer.rope.dim == 8 and not [n for n in notes if "partial" in n]  # type: ignore[union-attr]


def test_a_part_of_a_head_that_no_rope_parameters_overrule_is_still_refused() -> None:
    with pytest.raises(ZooError, match="partial_rotary_factor is 0.5"):
        families.spec_of(config("llama-3.1-8b", partial_rotary_factor=0.5))


def test_a_theta_beside_those_of_each_kind_of_layer_is_refused() -> None:
    """transformers 5.0 to 5.10 saves OLMo 3 so, and then computes with the one beside."""
    old = config("olmo-3-7b")
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        old.pop(key, None)
    one = {"rope_type": "default", "rope_theta": 500000.0}
    kinds = {"full_attention": one, "sliding_attention": one}
    families.spec_of({**old, "rope_parameters": kinds})
    with pytest.raises(ZooError, match="rope_parameters.rope_theta is 10000.0"):
        families.spec_of({**old, "rope_parameters": kinds | {"rope_theta": 10000.0, "rope_type": "default"}})


def test_sparse_layers_have_two_names() -> None:
    of = config("deepseek-v3.2")
    for name in ("indexed_attention", "deepseek_sparse_attention"):
        said = {**of, "layer_types": [name] * of["num_hidden_layers"]}
        assert families.spec_of(said) == families.spec_of(of)


def test_deepseek_v4s_rope_beside_that_of_each_kind_is_that_of_layers_without_entries() -> None:
    """Transformers 5.10 says it both ways."""
    of = config("deepseek-v4-flash")
    share = of["qk_rope_head_dim"] / of["head_dim"]
    main = {"rope_type": "default", "rope_theta": of["rope_theta"], "partial_rotary_factor": share}
    compress = {
        **of["rope_scaling"],
        "rope_type": "yarn",
        "rope_theta": of["compress_rope_theta"],
        "attention_factor": 1.0,
    }
    said = {**of, "rope_parameters": {"main": main, "compress": compress, **main}}
    said.pop("rope_scaling")
    assert families.spec_of(said) == families.spec_of(of)
    said["rope_parameters"] |= {"rope_theta": 7.0}
    with pytest.raises(ZooError, match=r"its RoPE \(main\) is said twice, by 7.0 and by"):
        families.spec_of(said)


def test_coheres_switch_of_layers_goes_with_a_list_of_them() -> None:
    """transformers 5 makes a list of the pattern, and leaves `layer_switch` where it was."""
    of = config("tiny-aya-3b")
    of.pop("sliding_window_pattern", None)
    kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(of["num_hidden_layers"])]
    listed = {**of, "layer_types": kinds}
    listed.pop("layer_switch", None)
    assert families.spec_of({**listed, "layer_switch": 3}) == families.spec_of(listed)
    with pytest.raises(ZooError, match="layer_switch is 4, which is not the pattern"):
        families.spec_of({**listed, "layer_switch": 4})


def test_kimi_linears_lists_stay_beside_what_is_made_of_them() -> None:
    of = config("kimi-linear-48b-a3b")
    linear = of["linear_attn_config"]
    n = of["num_hidden_layers"]
    kinds = [
        "full_attention" if i + 1 in linear["full_attn_layers"] else "linear_attention" for i in range(n)
    ]
    flat = {
        "layer_types": kinds, "linear_num_heads": linear["num_heads"], "linear_head_dim": linear["head_dim"],
        "linear_conv_kernel_dim": linear["short_conv_kernel_size"],
    }  # fmt: skip
    assert families.read(of | flat) == families.read(of)
    with pytest.raises(ZooError, match="layer_types and linear_attn_config differ"):
        families.spec_of(of | flat | {"layer_types": kinds[1:] + kinds[:1]})
    with pytest.raises(ZooError, match="linear_head_dim is 64"):
        families.spec_of(of | flat | {"linear_head_dim": 64})


def test_granites_experts_have_rope_whether_it_is_said_or_not() -> None:
    """transformers 4 says it."""
    said = config("granite-3.1-1b-a400m")
    assert families.spec_of(said | {"position_embedding_type": "rope"}) == families.spec_of(said)
    with pytest.raises(ZooError, match="position_embedding_type is 'nope'"):
        families.spec_of(said | {"position_embedding_type": "nope"})


def rewritten(name: str, at: Path, change: Any) -> Path:
    """A tiny checkpoint with other tensors."""
    tiny.make(name, at)
    tensors = build.read_tensors(at)
    change(tensors, json.loads((at / "config.json").read_text()))
    build.write_tensors(at, tensors)
    return at


def tensors_of(folder: Path) -> dict[str, list[Any]]:
    return {name: t.tolist() for name, t in build.read_tensors(folder).items()}


def came_back(saved: Path, tmp_path: Path) -> dict[str, list[Any]]:
    """What is exported of a folder that was saved so; its own file is given back to the byte where that is asked for."""
    canon = zoo.convert(saved, tmp_path / "canon")
    own = zoo.export(canon, tmp_path / "source", format="source") / "model.safetensors"
    assert own.read_bytes() == (saved / "model.safetensors").read_bytes()
    return tensors_of(zoo.export(canon, tmp_path / "out"))


def thirds(tensors: dict[str, torch.Tensor], _: Any) -> None:
    """transformers holds the convolutions of q, k and v as one, and since 5.15 saves it in equal pieces."""
    for i in {name.split(".")[2] for name in tensors if "q_conv1d" in name}:
        names = [f"model.layers.{i}.linear_attn.{x}_conv1d.weight" for x in "qkv"]
        cut = torch.cat([tensors[n] for n in names]).chunk(3)
        assert [t.shape for t in cut] != [tensors[n].shape for n in names]
        tensors |= {n: t.clone() for n, t in zip(names, cut, strict=True)}


@pytest.mark.parametrize("name", ["olmo_hybrid", "olmo_hybrid_rope"])
def test_olmo_hybrids_convolutions_in_thirds_are_the_same_and_come_back_whole(
    name: str, tmp_path: Path
) -> None:
    whole = tiny.make(name, tmp_path / "whole")
    cut = rewritten(name, tmp_path / "cut", thirds)
    assert same(assemble(cut), assemble(whole))
    assert came_back(cut, tmp_path) == tensors_of(whole)


def test_gemma_3ns_projection_of_embeddings_by_transformers_4_is_the_same(tmp_path: Path) -> None:
    """`model` in names became `model.language_model` wherever it stood."""

    def change(tensors: dict[str, torch.Tensor], _: Any) -> None:
        build.rename(tensors, lambda n: n.replace("model.", "model.language_model."))
        odd = "model.language_model.per_layer_model.language_model_projection.weight"
        tensors[odd] = tensors.pop("model.language_model.per_layer_model_projection.weight")

    odd = rewritten("gemma3n", tmp_path / "odd", change)
    assert same(assemble(odd), assemble(tiny.make("gemma3n", tmp_path / "plain")))
    assert not make_plan(open_checkpoint(odd)).extras
    back = came_back(odd, tmp_path)
    assert (
        "model.language_model.per_layer_model_projection.weight" in back and "model.norm.weight" not in back
    )


def test_nemotron_hs_embedding_is_called_otherwise_by_transformers_up_to_5_15(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], _: Any) -> None:
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")

    odd = rewritten("nemotron_h", tmp_path / "odd", change)
    plain = tiny.make("nemotron_h", tmp_path / "plain")
    assert same(assemble(odd), assemble(plain))
    assert came_back(odd, tmp_path) == tensors_of(plain)


@pytest.mark.parametrize("name", ["deepseek_v4", "deepseek_v4_pro"])
def test_deepseek_v4_by_transformers_up_to_5_14_has_names_of_memory_but_for_the_head_and_experts(
    name: str, tmp_path: Path
) -> None:
    """Its conversion was anchored at names without `model.`, and those of experts at their end."""
    plain = tiny.make(name, tmp_path / "plain")
    held, own = tiny.perturbed(tiny.VARIANTS[name]).state_dict(), tmp_path / "mixed"
    mixed = dict(held)
    for key in [k for k in held if k.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        stem, _, which = key.rpartition(".")
        for e, t in enumerate(mixed.pop(key)):
            parts = dict(zip(("w1", "w3"), t.chunk(2), strict=True)) if which == "gate_up_proj" else {"w2": t}
            mixed |= {f"{stem}.{e}.{w}.weight": x for w, x in parts.items()}
    mixed["head.weight"] = mixed.pop("lm_head.weight")
    own.mkdir()
    (own / "config.json").write_bytes((plain / "config.json").read_bytes())
    build.write_tensors(own, {k: t.clone() for k, t in mixed.items()})
    assert same(assemble(own), assemble(plain))
    back = came_back(own, tmp_path)
    assert back == {k: v for k, v in tensors_of(plain).items() if not k.startswith("mtp.")}


def test_kimi_k25s_layers_are_called_blocks_by_transformers(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], _: Any) -> None:
        build.rename(
            tensors, lambda n: n.replace("language_model.model.layers.", "language_model.model.blocks.")
        )

    odd = rewritten("kimi_k25", tmp_path / "odd", change)
    plain = tiny.make("kimi_k25", tmp_path / "plain")
    assert same(assemble(odd), assemble(plain))
    assert make_plan(open_checkpoint(odd)).extras.keys() == make_plan(open_checkpoint(plain)).extras.keys()
    assert came_back(odd, tmp_path) == tensors_of(plain)


def test_modules_that_a_quantised_config_names_are_called_as_what_is_exported(tmp_path: Path) -> None:
    """Kimi K2.5 in fp8, its layers called blocks: the release's names come back in lists too, and patterns mean what they meant."""
    from test_quant_models import fp8_blocks, linear

    odd, at, stem = tmp_path / "odd", "language_model.model.blocks", "language_model.model.layers"
    tiny.make("kimi_k25", odd)
    tensors = build.read_tensors(odd)
    plain = {name: t for name, t in tensors.items() if not linear(name, t)}
    made, settings = fp8_blocks({name: t for name, t in tensors.items() if name not in plain})
    build.rename(made := plain | made, lambda n: n.replace(stem, at))
    build.write_tensors(odd, made)
    same_still = [
        "lm_head",
        "gate",
        "Linear",
        "vision_tower",
        r"re:.*mlp\.gate$",
        "re:(",
        3,
        "model.embed_tokens",
    ]
    settings["modules_to_not_convert"] = [
        *same_still, at, f"{at}.0", f"{at}.1.mlp.gate", r"re:.*\.blocks\.0\.self_attn$", f"{at}.*.mlp.gate",
    ]  # fmt: skip
    settings["config_groups"] = {"group_0": {"targets": ["Linear", f"{at}.0.mlp.down_proj"]}}
    settings["quantized_layers"] = {f"{at}.0.self_attn.o_proj": {"quant_algo": "FP8"}}
    config = build.read_config(odd)
    config["text_config"]["quantization_config"] = settings
    build.write_config(odd, config)

    canon = zoo.convert(odd, tmp_path / "canon")
    out = zoo.export(canon, tmp_path / "out")
    names = build.read_tensors(out).keys()
    assert f"{stem}.0.self_attn.o_proj.weight_scale_inv" in names and not [n for n in names if at in n]
    found = build.read_config(out)["text_config"].pop("quantization_config")
    sparse = sorted({n.removesuffix(".weight") for n in names if n.endswith("mlp.gate.weight")})
    assert found["modules_to_not_convert"] == list(
        dict.fromkeys([*same_still, stem, f"{stem}.0", f"{stem}.1.mlp.gate", f"{stem}.0.self_attn", *sparse])
    )
    assert found["config_groups"] == {"group_0": {"targets": ["Linear", f"{stem}.0.mlp.down_proj"]}}
    assert found["quantized_layers"] == {f"{stem}.0.self_attn.o_proj": {"quant_algo": "FP8"}}
    source = zoo.export(canon, tmp_path / "source", format="source")
    assert (source / "config.json").read_bytes() == (odd / "config.json").read_bytes()
    tensors_out = zoo.export(zoo.convert(out, tmp_path / "again"), tmp_path / "same")
    assert (tensors_out / "config.json").read_bytes() == (out / "config.json").read_bytes()


def test_rope_in_the_words_of_transformers_5_is_told_of_when_it_is_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of = tiny.make("llama", tmp_path / "5")
    config = build.read_config(of)
    assert "rope_parameters" in config and "rope_theta" not in config
    zoo.export(zoo.convert(of, tmp_path / "canon-5"), tmp_path / "out-5")
    assert "4.x opens it without a word" in caplog.text
    caplog.clear()
    old = tiny.make("llama", tmp_path / "4", released_config=True)
    assert "rope_parameters" not in build.read_config(old)
    zoo.export(zoo.convert(old, tmp_path / "canon-4"), tmp_path / "out-4")
    assert "4.x" not in caplog.text
