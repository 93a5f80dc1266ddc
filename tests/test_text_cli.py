"""`zoo generate` on folders with a tokenizer: what reaches the model, and what reaches the terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from verified import canonical

import zoo
from zoo.cli import cli
from zoo.cli._common import run


def main(args: list[str]) -> int:
    return run(cli, args)


def folder(tmp_path: Path, word: str = "w{}", **files: Any) -> Path:
    """A tiny model with a word for each of its ids."""
    root = tmp_path / "canon"
    shutil.copytree(canonical("llama"), root)
    n = zoo.load(root).spec.vocab_size
    tokenizer = Tokenizer(models.WordLevel({word.format(i): i for i in range(n)}, unk_token=word.format(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(root / "tokenizer.json"))
    for name, data in files.items():
        (root / f"{name}.json").write_text(json.dumps(data))
    return root


def generated(root: Path, *args: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["generate", str(root), *args, "-n", "4", "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


def test_control_characters_of_a_vocabulary_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path, "\x1b]0;{}\x07\x9b\r")
    assert main(["generate", str(root), "a", "--raw", "-n", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("\\x1b]0;") == 3 and out.count("\\x07\\x9b\\x0d") == 3
    assert not set(out) & {*map(chr, range(10)), "\r", "\x1b", *map(chr, range(127, 160))}
    assert main(["generate", str(root), "a", "--raw", "-n", "3", "--json"]) == 0
    said = capsys.readouterr().out
    assert not set(said) & {*map(chr, range(10)), "\x1b", *map(chr, range(127, 160))}
    assert json.loads(said)["text"].count("\x1b]0;") == 3


def test_a_prompt_without_a_template_is_given_raw_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path)
    assert main(["generate", str(root), "w5 w6", "-n", "1"]) == 0
    assert "no chat template (chat_template.jinja, additional_chat_templates/, chat_template.json" in (
        capsys.readouterr().err
    )
    assert main(["generate", str(root), "w5 w6", "-n", "1", "--raw"]) == 0
    assert "chat template" not in capsys.readouterr().err


def test_a_template_of_a_processor_reaches_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path, chat_template={"chat_template": "w1 {{ messages[0].content }} w2"})
    assert generated(root, "w5", capsys=capsys)["prompt_tokens"] == [1, 5, 2]


def test_a_stop_id_of_the_text_config_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path)
    free = generated(root, "w5", "--raw", capsys=capsys)["tokens"]
    config = json.loads((root / "config.released.json").read_text())
    config = {**config, "eos_token_id": 10**15, "text_config": {"eos_token_id": [free[1]]}}
    (root / "config.released.json").write_text(json.dumps(config))
    (root / "generation_config.json").write_text("{}")
    assert main(["generate", str(root), "w5", "--raw", "-n", "4", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["tokens"] == free[: free.index(free[1]) + 1]
    assert "is no token's number; ignored" in said.err


def test_sampling_follows_the_releases_settings_and_the_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"temperature": 2, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.1, "do_sample": True}
    root = folder(tmp_path, generation_config=settings)
    command = ["generate", str(root), "5 6", "--ids", "-n", "20", "--json"]

    def tokens(*more: str) -> list[int]:
        assert main([*command, *more]) == 0
        drawn: list[int] = json.loads(capsys.readouterr().out)["tokens"]
        return drawn

    assert main([*command, "--sample"]) == 0
    said = capsys.readouterr().err
    assert "sampled: temperature 2, top_k 3, top_p 0.9, seed 0" in said
    assert "generation_config.json: repetition_penalty (1.1) not followed" in said
    assert tokens() == tokens("--seed", "1")  # greedy
    assert tokens("--sample") == tokens("--sample", "--seed", "0") != tokens("--sample", "--seed", "1")
    # One step of each seed: never anything but the three likeliest.
    logits = zoo.load(root)(torch.tensor([[5, 6]]))[0, -1]
    drawn = {tokens("--sample", "--seed", str(i), "-n", "1")[0] for i in range(8)}
    assert 1 < len(drawn) and drawn <= set(logits.topk(3).indices.tolist())
    assert main([*command, "--sample", "--temperature", "1"]) == 2
    (root / "generation_config.json").write_text(json.dumps({"top_p": 7}))
    assert main([*command, "--sample"]) == 1
    assert "top_p is '7'; expected a number above 0, up to 1" in capsys.readouterr().err
    (root / "generation_config.json").write_text('{"top_k": Infinity}')  # found by fuzzing
    assert main([*command, "--sample"]) == 1
    assert "top_k is 'inf'; expected a whole number" in capsys.readouterr().err


SMALL = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "tokenizer.model.v3", "tekken.json", "tiktoken.model", "o200k_base.tiktoken", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja", "processor_config.json", "generation_config.json",
)  # fmt: skip


def test_conversion_carries_every_file_of_a_tokenizer_and_its_templates(tmp_path: Path) -> None:
    import tiny

    source = tiny.make("llama", tmp_path / "source")
    for name in SMALL:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"{}" + name.encode())
    canon = Path(zoo.convert(source, tmp_path / "canon"))
    assert all((canon / name).read_bytes() == b"{}" + name.encode() for name in SMALL)
    back = Path(zoo.export(canon, tmp_path / "back"))
    assert all((back / name).read_bytes() == b"{}" + name.encode() for name in SMALL)


def test_a_pull_fetches_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny
    from hub_client import pointed_at
    from hub_server import HubServer

    source = tiny.make("llama", tmp_path / "source")
    for name in SMALL:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"{}" + name.encode())
    with HubServer() as server, pointed_at(server, tmp_path / "home", monkeypatch, timeout=2):
        server.repo("org/tiny").commit(source)
        canon = zoo.pull("org/tiny", tmp_path / "canon")
    assert all((canon / name).read_bytes() == b"{}" + name.encode() for name in SMALL)
