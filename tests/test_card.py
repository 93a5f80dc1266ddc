"""Model cards: what an exported folder says of itself, in the Hub's terms; nothing that nobody said, and no word of others' as ours."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import verified
from click.testing import CliRunner
from huggingface_hub import ModelCard
from test_export import hashes
from test_save import trained

import zoo
from zoo import card
from zoo.cli import cli
from zoo.formats.canonical import read

COMMIT = "0123456789abcdef0123456789abcdef01234567"
AUTHORS = """---
license: apache-2.0
license_link: LICENSE
language: [en, zh, "<b>"]
extra_gated_prompt: Give me your address
---
# Theirs <script>alert(1)</script>
"""


def folder(dst: Path, readme: str | None = None, *, repo: str | None = None, **files: str) -> Path:
    """A canonical folder, as if it came from a repository that had these files."""
    canon = verified.copy(verified.canonical("llama", "bfloat16"), dst)
    described = json.loads((canon / "zoo.json").read_text())
    for name, text in {**files, **({"README.md": readme} if readme is not None else {})}.items():
        (canon / name).write_text(text)
        described["carried"].append(name)
    if repo:
        listed = {"model.safetensors": {"size": 1, "sha256": "5" * 64}}
        described["source"]["origin"] = {
            "kind": "hub", "repo": repo, "revision": "main", "commit": COMMIT, "files": listed,
        }  # fmt: skip
    (canon / "zoo.json").write_text(json.dumps(described))
    return canon


def read_card(exported: Path) -> tuple[dict[str, Any], str]:
    found = ModelCard((exported / "README.md").read_text())
    return found.data.to_dict(), found.text


def test_a_card_says_where_the_weights_came_from_and_keeps_the_authors_own_beside_it(tmp_path: Path) -> None:
    canon = folder(tmp_path / "canon", AUTHORS, repo="org/a_model", LICENSE="theirs")
    data, text = read_card(zoo.export(canon, tmp_path / "out", dtype="fp32"))
    assert data == {
        "base_model": "org/a_model", "language": ["en", "zh"], "library_name": "transformers", "license": "apache-2.0",
        "license_link": "LICENSE", "pipeline_tag": "text-generation", "tags": ["zoo"],
    }  # fmt: skip
    assert (tmp_path / "out" / "README.source.md").read_text() == AUTHORS
    assert "# a\\_model" in text and COMMIT in text and "5" * 64 in text and "`F32` (converted)" in text
    assert "script" not in text and "address" not in text and "nobody has compared" in text
    assert str(tmp_path) not in text and str(verified.ROOT) not in text, "a path of this machine"


def test_a_release_comes_back_to_the_byte_and_gets_a_card_where_one_is_asked_for(tmp_path: Path) -> None:
    canon = folder(tmp_path / "canon", AUTHORS)
    zoo.export(canon, tmp_path / "back")
    assert (tmp_path / "back" / "README.md").read_text() == AUTHORS and len(hashes(tmp_path / "back")) == 4
    done = CliRunner().invoke(cli, ["export", str(canon), str(tmp_path / "carded"), "--card"])
    assert done.exit_code == 0, done.output
    was, new = hashes(tmp_path / "back"), hashes(tmp_path / "carded")
    assert new["README.source.md"] == was.pop("README.md")
    assert "No certificate says that no byte is another" in read_card(tmp_path / "carded")[1]
    assert {k: h for k, h in new.items() if not k.startswith("README")} == was


def test_a_licence_is_the_manifests_or_the_files_or_said_to_be_unknown(tmp_path: Path) -> None:
    def said(name: str, **how: Any) -> dict[str, Any]:
        data, _ = read_card(
            zoo.export(folder(tmp_path / name, **how), tmp_path / f"{name}-out", dtype="fp32")
        )
        return {k: v for k, v in data.items() if k.startswith("license")}

    assert said("a", repo="Qwen/Qwen3-0.6B") == {"license": "apache-2.0"}
    link = "https://huggingface.co/moonshotai/Kimi-K2-Instruct/blob/main/LICENSE"
    named = {"license": "other", "license_name": "modified-mit", "license_link": link}
    assert said("b", repo="moonshotai/Kimi-K2-Instruct") == named
    assert said("c", LICENSE="some") == {"license": "other", "license_link": "LICENSE"}
    assert said("d", repo="org/not-known") == {"license": "unknown"}


def test_trained_weights_are_a_finetune_of_what_they_began_as(tmp_path: Path) -> None:
    canon = folder(tmp_path / "canon", AUTHORS, repo="org/model")
    new = zoo.save({k: t.bfloat16() for k, t in trained("llama").items()}, canon, tmp_path / "new")
    data, text = read_card(zoo.export(new, tmp_path / "out"))
    assert (data["base_model"], data["base_model_relation"]) == ("org/model", "finetune")
    assert "no release's own" in text and str(tmp_path) not in text
    assert zoo.verify(new, against=tmp_path / "out", level="bytes").passed, "a card is no part of the release"
    (tmp_path / "out" / "README.md").write_text("somebody else's")
    assert not zoo.verify(new, against=tmp_path / "out", level="bytes").passed


def test_the_certificate_is_told_with_its_bounds_and_not_when_it_is_of_other_weights(tmp_path: Path) -> None:
    canon = folder(tmp_path / "canon")
    source = verified.ROOT / "llama-bfloat16-source"
    assert zoo.verify(canon, against=source, level="bytes").passed
    _, text = read_card(zoo.export(canon, tmp_path / "one", dtype="fp32"))
    held = json.loads((canon / "parity.json").read_text())["canonical"]["files"]
    assert all(f["sha256"] in text for f in held.values())
    assert "| `bytes` | `passed` | `elements that differ from the source` | 0 | `<= 0` |" in text
    assert "are as they were then" in text and "before its weights were converted" in text
    (canon / "LICENSE").write_text("put there since")
    _, text = read_card(zoo.export(canon, tmp_path / "two", dtype="fp32"))
    assert "**The folder has been changed since**" in text and "`not as it is now: LICENSE changed" in text


def test_a_card_that_nobody_edited_is_replaced_by_the_next_and_one_that_somebody_edited_is_kept(
    tmp_path: Path,
) -> None:
    out = zoo.export(folder(tmp_path / "canon", AUTHORS, repo="org/model"), tmp_path / "out", dtype="fp32")
    again = zoo.export(zoo.convert(out, tmp_path / "canon2"), tmp_path / "out2", dtype="bf16")
    assert (again / "README.source.md").read_text() == AUTHORS and not list(again.glob("README.source-*"))
    assert read_card(again)[0]["base_model"] == "org/model", "the source's own card says it"
    (out / "README.md").write_text((out / "README.md").read_text() + "My own words.\n")
    third = zoo.export(zoo.convert(out, tmp_path / "canon3"), tmp_path / "out3", dtype="bf16")
    assert (third / "README.source.md").read_text() == AUTHORS
    assert (third / "README.source-2.md").read_bytes() == (out / "README.md").read_bytes()


@pytest.mark.parametrize(
    "head",
    ["license: [1, 2]\nlanguage: {a: b}", "license: '` | <img src=x onerror=y>'\nlanguage: ['x\\ny']", "a: &a [*a]", "[", "- a", "1: 2",
     "license: 'apache\\n---\\nevil: true'\nbase_model: ../../etc", "model-index: [{}]\nlicense: MIT", "a: &a {k: 1}\nb: &b {<<: [*a, *a]}\nlicense: mit"],
)  # fmt: skip
def test_what_strangers_wrote_neither_breaks_the_card_nor_stands_in_it(head: str, tmp_path: Path) -> None:
    canon = folder(tmp_path / "canon", f"---\n{head}\n---\ntext")
    data, text = read_card(zoo.export(canon, tmp_path / "out", dtype="fp32"))
    assert data == {
        "library_name": "transformers", "license": "unknown", "pipeline_tag": "text-generation", "tags": ["zoo"],
    }  # fmt: skip
    assert "evil" not in text and "<img" not in text and "etc" not in text


def test_a_certificate_that_strangers_wrote_is_shown_as_text(tmp_path: Path) -> None:
    canon = folder(tmp_path / "canon")
    assert zoo.verify(canon, against=verified.ROOT / "llama-bfloat16-source", level="plan").passed
    said = json.loads((canon / "parity.json").read_text())
    said["dtype"] = "fp32`\n\n# Trust me\n| <script>"
    (canon / "parity.json").write_text(json.dumps(said))
    _, text = read_card(zoo.export(canon, tmp_path / "out", dtype="fp32"))
    assert "``fp32` # Trust me \\| <script>``" in text
    (canon / "parity.json").write_text('{"levels": {"a": 3}}')
    assert "nothing is proven" in read_card(zoo.export(canon, tmp_path / "out2", dtype="fp32"))[1]


def test_the_commands_of_a_card_prove_the_folder_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    zoo.export(folder(tmp_path / "canon"), tmp_path / "FOLDER", dtype="fp32")
    commands = read_card(tmp_path / "FOLDER")[1].partition("```sh\n")[2].partition("```")[0].splitlines()
    assert [c.split()[:2] for c in commands] == [["zoo", "convert"], ["zoo", "verify"]]
    for command in commands:
        done = CliRunner().invoke(
            cli, [*shlex.split(command)[1:], *(["--level", "bytes"] if "verify" in command else [])]
        )
        assert done.exit_code == 0, done.output
    ids = tiny.tokens("llama")
    with torch.inference_mode():
        assert torch.isfinite(tiny.logits(tiny.upstream(tmp_path / "FOLDER"), ids)).all()
    assert card.is_ours((tmp_path / "canonical" / "README.md").read_bytes()) and read(tmp_path / "canonical")


def test_a_backslash_before_a_bar_makes_no_column_of_a_name() -> None:
    assert card._code("a\\|<b>") == "`a\\ \\|<b>`" and card._code("a|b") == "`a\\|b`"
