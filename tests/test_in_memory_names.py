"""A checkpoint that holds upstream's own state, under the names it has in memory, experts packed, and with the wrappers of FSDP and of
activation checkpointing in them: what trainers write of a model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo import families


def in_memory(name: str, dst: Path) -> Path:
    """The variant as its class holds it: `state_dict()` in a file, without what `save_pretrained` does to the names."""
    variant = tiny.VARIANTS[name]
    model = tiny.perturbed(variant)
    dst.mkdir()
    config = {**model.config.to_dict(), "architectures": [variant.architecture], **variant.rewrite}
    (dst / "config.json").write_text(json.dumps(config, default=str))
    seen: dict[int, str] = {}  # a tied head is one tensor with the embedding
    state = {k: t for k, t in model.state_dict().items() if seen.setdefault(t.data_ptr(), k) == k}
    save_file({wrapped(k): t.contiguous() for k, t in state.items()}, dst / "model.safetensors")
    return dst


def wrapped(name: str) -> str:
    """As a state dict of FSDP1 has it, each layer wrapped, and its checkpointed activations."""
    layer = re.sub(
        r"\b((?:layers|h|blocks)\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name
    )
    return "_fsdp_wrapped_module." + layer


def tensors(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(folder.glob(pattern)) for k, t in load_file(file).items()}


def by_transformers(name: str, dst: Path) -> Path:
    """The variant as `save_pretrained` writes it."""
    variant = tiny.VARIANTS[name]
    tiny.perturbed(variant).save_pretrained(dst)
    config = json.loads((dst / "config.json").read_text()) | variant.rewrite
    (dst / "config.json").write_text(json.dumps(config))
    return dst


MAIN = {v.family: v.name for v in reversed(tiny.VARIANTS.values()) if "text_config" not in v.settings}

OTHERWISE = {n for n, family in families.families().items() if "saved" in family.rules}
"""Families of which transformers saves names that are neither the release's nor those in memory."""


@pytest.mark.parametrize("name", MAIN.values())
def test_upstreams_own_names_convert_to_the_same_tensors_and_export_under_the_releases(
    name: str, tmp_path: Path
) -> None:
    release = tiny.make(name, tmp_path / "release")
    canon = zoo.convert(in_memory(name, tmp_path / "held"), tmp_path / "canon")
    expected = zoo.convert(release, tmp_path / "expected")
    ours, theirs = (tensors(folder, "model-*.safetensors") for folder in (canon, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)

    back = zoo.export(canon, tmp_path / "back", format="hf")
    out, released = tensors(back, "*.safetensors"), tensors(release, "*.safetensors")
    aside = set(tensors(expected, "extras-*.safetensors"))  # what the class does not hold
    assert out.keys() - aside == released.keys() - aside
    assert all(torch.equal(out[k], released[k]) for k in released.keys() - aside)


@pytest.mark.parametrize(
    "name", [pytest.param(v, marks=() if k in OTHERWISE else pytest.mark.proof) for k, v in tiny.MAIN.items()]
)
def test_what_transformers_saves_exports_under_the_releases_names(name: str, tmp_path: Path) -> None:
    released = tensors(tiny.make(name, tmp_path / "release"), "*.safetensors")
    canon = zoo.convert(by_transformers(name, tmp_path / "saved"), tmp_path / "canon")
    out = tensors(zoo.export(canon, tmp_path / "back"), "*.safetensors")
    aside = released.keys() - out.keys()
    assert not out.keys() - released.keys()
    assert all(torch.equal(out[k], released[k]) for k in out)
    again = zoo.convert(tmp_path / "release", tmp_path / "expected")
    assert aside <= set(tensors(again, "extras-*.safetensors")), "all but what the class does not hold"


@pytest.mark.parametrize("name", ["kimi_k25", "step3p5"])
def test_what_stands_beside_a_language_model_goes_along_under_names_that_upstream_opens(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Experts packed, within a class that sees images: the tower's names below its own are those in memory."""
    held = in_memory(name, tmp_path / "held")
    canon = zoo.convert(held, tmp_path / "canon")
    caplog.clear()
    back = zoo.export(canon, tmp_path / "back")
    aside = tensors(canon, "extras-*.safetensors")
    assert f"{len(aside)} tensors beside the model are written as model.m" in caplog.text
    out = tensors(back, "*.safetensors")
    for kept, t in aside.items():
        found = [n for n in (kept, kept.removeprefix("model.")) if n in out]
        assert len(found) == 1 and torch.equal(out[found[0]], t)
    assert (back / "config.json").read_bytes() == (held / "config.json").read_bytes()
    again = zoo.convert(back, tmp_path / "again")
    assert len(tensors(again, "extras-*.safetensors")) == len(aside)
    memory = zoo.state_dict(canon, names="transformers")
    model = tiny.upstream(back)
    loaded = model.load_state_dict(memory, strict=False)
    assert not loaded.unexpected_keys and not [n for n in loaded.missing_keys if "inv_freq" not in n]
    assert torch.equal(
        tiny.logits(model, tiny.tokens(name)), tiny.logits(tiny.upstream(back), tiny.tokens(name))
    )
