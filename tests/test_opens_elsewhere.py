"""Every exported folder opens with transformers' Auto classes: all of its weights, in the dtype that its config says, its tokenizer,
template and generation settings; and what else a release has lies beside them. Of the families, three here, the others in `make proofs`.

What comes back to the byte opens as the release did: here are the folders that are new.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_gguf_out import byte_level

import zoo
from zoo.formats import gguf_tokenizer
from zoo.mapping.export import export
from zoo.testing import gguf as testing_gguf

HERE = (
    "llama",
    "qwen3_5_moe",
    "gpt_oss",
)  # a plain one; a wrapper with packed experts; experts beside biases
TEXT = "the<think> error in\n the"
CHAT = [{"role": "user", "content": "in the end"}]
FIELDS = byte_level(272)
BESIDE = {
    **gguf_tokenizer.files(FIELDS, "x.gguf")[0],
    "LICENSE": b"as is\n",
    "generation_config.json": b'{"temperature": 0.3, "do_sample": true}',
}


def families_but(here: tuple[str, ...], names: Any) -> Iterator[Any]:
    """Those `here` for `make test`, the others for `make proofs`."""
    for name in names:
        yield pytest.param(name, marks=() if name in here else pytest.mark.proof)


def opened(folder: Path) -> tuple[Any, set[str]]:
    """By the Auto class that has the config's architecture, and the names of tensors that it left over; none is missing. By the
    class of the case where the release's config is none of transformers' own."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    config = json.loads((folder / "config.json").read_text())
    case = tiny.case_of(config)
    if config["model_type"] in case.classes or case.alone:
        return tiny.upstream(folder), set()
    causal = config["architectures"][0] in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    cls = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
    model, info = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"], info
    return model, info["unexpected_keys"]


def same(a: Any, b: Any) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert torch.equal(t.float(), theirs[name].float()), name


def complete(folder: Path) -> None:
    """The files of a release: an index that counts right, and all that lay beside the weights."""
    config = json.loads((folder / "config.json").read_text())
    assert (config.get("dtype") or config.get("torch_dtype")) == "float32"
    tensors = [t for f in folder.glob("*.safetensors") for t in load_file(f).values()]
    if (index := folder / "model.safetensors.index.json").exists():
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(t.nbytes for t in tensors)
    assert {n for n in BESIDE if not (folder / n).exists()} <= {"LICENSE"}


def speaks(folder: Path, like: dict[str, bytes], at: Path) -> None:
    """AutoTokenizer gives the ids and the template that the files give without any model."""
    from transformers import AutoTokenizer, GenerationConfig

    at.mkdir()
    for name, data in like.items():
        (at / name).write_bytes(data)
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(at)
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert ours.decode(ours(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
    said = ours.apply_chat_template(CHAT, tokenize=False)
    assert said == theirs.apply_chat_template(CHAT, tokenize=False) == "<think>in the end"
    GenerationConfig.from_pretrained(folder)


@pytest.mark.parametrize("family", families_but(HERE, tiny.MAIN))
def test_a_new_checkpoint_opens_with_auto_classes_and_has_all_that_the_release_had(
    family: str, tmp_path: Path
) -> None:
    source = tiny.make(tiny.MAIN[family], tmp_path / "source", dtype="bfloat16")
    for name, data in BESIDE.items():
        (source / name).write_bytes(data)
    zoo.convert(source, tmp_path / "canon")
    back = export(tmp_path / "canon", tmp_path / "back", dtype="fp32", shard_size=60_000)
    complete(back)
    assert (back / "LICENSE").read_bytes() == BESIDE["LICENSE"]
    assert (back / "generation_config.json").read_bytes() == BESIDE["generation_config.json"]
    speaks(back, BESIDE, tmp_path / "tokenizer")
    (model, left), (theirs, unused) = opened(back), opened(source)
    assert left == unused, "of the release transformers leaves out the same"
    assert model.generation_config.temperature == 0.3
    assert model.dtype == torch.float32
    same(model, theirs)


@pytest.mark.parametrize("family", families_but(HERE, [n for n, c in tiny.CASES.items() if c.gguf]))
def test_what_came_of_a_gguf_opens_with_auto_classes(family: str, tmp_path: Path) -> None:
    case = tiny.CASES[family]
    hf, _ = testing_gguf.make(case, case.gguf[0], tmp_path, vocab_size=272)
    file = testing_gguf.write(hf, tmp_path / "spoken.gguf", case.gguf[0], **FIELDS)
    zoo.convert(file, tmp_path / "canon")
    back = zoo.export(tmp_path / "canon", tmp_path / "back")
    complete(back)
    speaks(back, BESIDE, tmp_path / "tokenizer")
    model, left = opened(back)
    assert not left
    same(model, opened(hf)[0])
