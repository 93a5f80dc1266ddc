"""A plan accounts for every tensor of a checkpoint before a byte is read, or says everything that does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.formats.base import Checkpoint
from zoo.mapping.fold import fold
from zoo.mapping.plan import make_plan
from zoo.mapping.unmatched import PlanError
from zoo.testing.assemble import assemble
from zoo.testing.names import holes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("llama"), dtype="bfloat16")


def changed(source: Path, dst: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with some tensors added, replaced or (None) removed."""
    dst.mkdir()
    (dst / "config.json").write_text((source / "config.json").read_text())
    have = load_file(source / "model.safetensors")
    for name, t in tensors.items():
        have.pop(name, None)
        if t is not None:
            have[name] = t
    save_file(have, dst / "model.safetensors")
    return dst


def test_every_source_tensor_is_used_once_or_is_an_extra(llama: Path) -> None:
    plan = make_plan(open_checkpoint(llama))
    used = [s for o in plan.outputs.values() for s in o.sources]
    assert sorted([*used, *plan.extras]) == sorted(plan.checkpoint.tensors)


def test_its_summary_and_json_say_what_will_happen(llama: Path) -> None:
    plan = make_plan(open_checkpoint(llama))
    assert "family     llama" in plan.summary()
    j = json.loads(json.dumps(plan.to_json()))
    assert j["bytes"] == plan.nbytes == sum(o.nbytes for o in plan.outputs.values())
    qkv = next(t for t in j["tensors"] if t["name"] == "layers.0.attn.qkv.weight")
    assert qkv["sources"] == [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]


def test_all_missing_unexpected_and_misshapen_tensors_are_listed_with_the_nearest_names(
    llama: Path, tmp_path: Path
) -> None:
    bad = changed(
        llama,
        tmp_path / "bad",
        **{
            "model.layers.0.self_attn.q_proj.weight": None,
            "model.layers.0.self_attn.q_prj.weight": torch.zeros(3, 5),
            "model.layers.1.mlp.up_proj.weight": torch.zeros(7, 36, dtype=torch.bfloat16),
            "model.norm.weight": None,
            "surplus": torch.zeros(2),
        },
    )
    with pytest.raises(PlanError) as e:
        make_plan(open_checkpoint(bad))
    text = str(e.value)
    assert "missing (2)" in text and "model.norm.weight" in text
    assert "model.layers.0.self_attn.q_proj.weight   nearest: model.layers.0.self_attn.q_prj.weight" in text
    assert "unexpected (2)" in text and "surplus [2] in model.safetensors" in text
    assert "model.layers.1.mlp.up_proj.weight in model.safetensors: shape [7, 36], expected [52, 36]" in text


def test_shapes_that_are_wrong_alike_are_listed_together(llama: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    bad = changed(llama, tmp_path / "bad", **{n: torch.zeros(7, 36) for n in names})
    with pytest.raises(PlanError) as e:
        make_plan(open_checkpoint(bad))
    assert [line for line in str(e.value).splitlines() if "expected" in line] == [
        "model.layers.{0-2}.mlp.up_proj.weight (3 tensors): shape [7, 36], expected [52, 36] "
        "(for layers.*.mlp.gate_up.weight [104, 36])"
    ]
    assert e.value.match.n_problems == 3


def test_names_that_differ_in_numbers_are_listed_together() -> None:
    names = [f"model.layers.{i}.experts.{e}.w" for i in range(3) for e in (0, 2)] + ["head"]
    assert [text for text, _ in fold(names)] == ["model.layers.{0-2}.experts.{0,2}.w (6 tensors)", "head"]


def test_a_config_of_no_known_family_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    bad = changed(llama, tmp_path / "bad")
    (bad / "config.json").write_text('{"architectures": ["FooForCausalLM"], "model_type": "foo"}')
    with pytest.raises(ZooError, match="FooForCausalLM"):
        make_plan(open_checkpoint(bad))


def test_a_config_without_a_needed_field_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    bad = changed(llama, tmp_path / "bad")
    config = json.loads((llama / "config.json").read_text())
    del config["hidden_size"]
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(ZooError, match="'hidden_size' is missing"):
        make_plan(open_checkpoint(bad))


def test_parts_of_different_dtypes_are_held_by_one_that_is_exact(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    mixed = changed(llama, tmp_path / "mixed", **{name: load_file(llama / "model.safetensors")[name].float()})
    assert make_plan(open_checkpoint(mixed)).outputs["layers.0.attn.qkv.weight"].dtype == "F32"


def test_codes_without_scales_are_no_weights(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    odd = changed(llama, tmp_path / "odd", **{name: torch.zeros(36, 52, dtype=torch.int8)})
    with pytest.raises(PlanError, match=rf"{name} in model\.safetensors: I8 without scales is no weight"):
        make_plan(open_checkpoint(odd))


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "gpt2"])
def test_a_decoder_saved_without_its_head_is_the_same_model(name: str, tmp_path: Path) -> None:
    """As AutoModel.save_pretrained writes it: no head, and nothing in front of the decoder's own names."""
    tiny.perturbed(tiny.VARIANTS[name]).base_model.save_pretrained(tmp_path / "bare")
    whole = assemble(tiny.make(name, tmp_path / "whole"))
    bare = assemble(tmp_path / "bare")
    assert bare.keys() == whole.keys() and all(torch.equal(bare[k], whole[k]) for k in whole)


def test_a_decoder_saved_without_a_head_it_needs_is_refused(tmp_path: Path) -> None:
    tiny.perturbed(tiny.VARIANTS["llama"]).base_model.save_pretrained(tmp_path / "bare")
    with pytest.raises(PlanError, match=r"missing \(1\):\n  lm_head\.weight"):
        make_plan(open_checkpoint(tmp_path / "bare"))


def test_fp32_tensors_beside_narrower_weights_stay_fp32_when_bf16_is_asked_for(tmp_path: Path) -> None:
    plan = make_plan(
        open_checkpoint(tiny.make("deepseek_v3", tmp_path / "ds", dtype="bfloat16")), dtype="fp16"
    )
    kept = {o.dtype for n, o in plan.outputs.items() if n.endswith("selection_bias")}
    assert kept == {"F32"}
    assert plan.outputs["embed.weight"].dtype == "F16"


def test_a_plan_of_some_layers_keeps_the_ends_and_no_extras(tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(tiny.make("deepseek_v3_mtp", tmp_path / "ds")))
    part = plan.restrict([1])
    assert {o.layer for o in part.outputs.values()} == {None, 1}
    assert part.extras == {} and part.layers == (1,) and part.spec == plan.spec
    with pytest.raises(ZooError, match="layer 99 does not exist"):
        plan.restrict([99])


def test_equal_rules_make_equal_digests_and_other_moves_others(llama: Path, tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(llama))
    assert plan.digest == make_plan(open_checkpoint(llama)).digest
    assert plan.digest != make_plan(open_checkpoint(llama), dtype="fp32").digest
    outputs = dict(plan.outputs)
    o = outputs["layers.0.attn.qkv.weight"]
    outputs[o.name] = replace(o, sources=(o.sources[1], o.sources[0], o.sources[2]))
    assert plan.digest != replace(plan, outputs=outputs).digest


# --- heads that are stored although they are tied ----------------------------------------------------------------


def with_head(source: Path, dst: Path, equal: bool) -> Path:
    embed = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    return changed(source, dst, **{"lm_head.weight": embed.clone() if equal else embed + 1})


def test_a_stored_copy_of_a_tied_head_is_an_extra(tmp_path: Path) -> None:
    tied = tiny.make("llama_tied", tmp_path / "tied")
    plan = make_plan(open_checkpoint(with_head(tied, tmp_path / "copy", equal=True)))
    assert plan.spec.tied and "copy of the embedding" in plan.extras["lm_head.weight"]


def test_a_stored_head_that_differs_from_the_embedding_is_the_head(tmp_path: Path) -> None:
    tied = tiny.make("llama_tied", tmp_path / "tied")
    untied = with_head(tied, tmp_path / "own", equal=False)
    plan = make_plan(open_checkpoint(untied))
    assert not plan.spec.tied and plan.outputs["head.weight"].sources == ("lm_head.weight",)
    assert any("differs from the embedding" in n for n in plan.notes)
    assert torch.equal(
        assemble(untied)["head.weight"], load_file(untied / "model.safetensors")["lm_head.weight"]
    )


# --- size -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All headers of DeepSeek-V3 over holes: 92,000 tensors, 689 GB that take no room."""
    (found,) = (p for p in (ROOT / "manifests" / "configs").glob("deepseek-v3.config.json"))
    config = json.loads(found.read_text())
    return holes(
        tmp_path_factory.mktemp("deepseek"), config, tiny.released_tensors(config, mtp=1, quantised=True)
    )


SCRIPT = """
import sys, time
began = time.process_time()
from zoo.formats import open_checkpoint
from zoo.mapping.plan import make_plan
plan = make_plan(open_checkpoint(sys.argv[1]), dtype=sys.argv[2] or None)
seconds = time.process_time() - began
assert not {"torch", "numpy", "huggingface_hub"} & set(sys.modules)
import json
began = time.process_time()
for file in plan.checkpoint.files:
    with plan.checkpoint.path(file).open("rb") as f:
        json.loads(f.read(int.from_bytes(f.read(8), "little")))
print(len(plan.checkpoint.tensors), len(plan.extras), seconds, time.process_time() - began)
"""


@pytest.mark.parametrize("dtype", ["", "bf16"])
def test_a_plan_of_92_000_tensors_takes_a_moment_and_no_tensor_library(deepseek: Path, dtype: str) -> None:
    best, limit = 99.0, 3.0
    # CPU time, so that a busy machine does not matter; json's for the same bytes, so that a slow one does not.
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(deepseek), dtype],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        tensors, extras, seconds, parsed = done.stdout.split()
        assert int(tensors) > 90_000 and int(extras) > 1_000
        best, limit = (
            min(best, float(seconds)),
            max(limit, 20 * float(parsed)),
        )  # on a quiet machine 1.4 s, and 10 times
        if best <= limit:
            return
    pytest.fail(f"{best:.1f} s of CPU time; {limit:.1f} s is the limit")


def test_compiling_does_not_grow_with_the_layers(deepseek: Path) -> None:
    ckpt: Checkpoint = open_checkpoint(deepseek)
    began = time.process_time()
    plan = make_plan(ckpt)
    assert len({id(o.fits) for o in plan.outputs.values()}) < 60  # two kinds of layers, and the ends
    assert time.process_time() - began < 10
