"""`zoo push`: what arrives on the Hub is the export, its card and its certificate; and what must not arrive there, does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_uploads
import pytest
import verified
from click.testing import CliRunner
from hub_client import pointed_at
from hub_server import HubServer
from huggingface_hub import ModelCard, constants, snapshot_download
from test_card import AUTHORS, folder

import zoo
from zoo import card
from zoo.check import check
from zoo.cli import _common, cli
from zoo.errors import ZooError
from zoo.formats.canonical import read
from zoo.hub import HubError
from zoo.push import push

REPO, TOKEN = "me/a_model", "hf_written"
SOURCE = verified.ROOT / "llama-bfloat16-source"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with an account that may write, whose token this process has."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer() as server, pointed_at(server, tmp_path / "home", monkeypatch, 10):
        server.tokens[TOKEN] = set()
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        assert not server.leaked_tokens()


@pytest.fixture
def canon(tmp_path: Path) -> Path:
    verified.canonical("llama", "bfloat16")
    release = verified.copy(SOURCE, tmp_path / "release")
    (release / "README.md").write_text(AUTHORS)
    made = folder(tmp_path / "canon", AUTHORS, repo="org/model")
    assert zoo.verify(made, against=release, level="bytes").passed
    return made


def files(hub: HubServer, branch: str = "main") -> dict[str, bytes]:
    repo = hub.repos[REPO]
    return {
        n: f.source.read_bytes() for n, f in repo.commits[repo.refs[branch]].items() if n != ".gitattributes"
    }


def test_what_arrives_is_the_export_with_card_and_certificate_and_proves_itself(
    hub: HubServer, canon: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _common.run(cli, ["push", str(canon), REPO, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    there, release = files(hub), {p.name: p.read_bytes() for p in SOURCE.iterdir()}
    assert hub.repos[REPO].private and said["certificate"] == "holds" and said["url"].startswith(hub.url)
    assert {n: len(b) for n, b in there.items()} == said["files"]
    assert there.keys() - release.keys() == {"README.md", "README.source.md", "parity.json"}
    assert {n: b for n, b in there.items() if n in release} == release, "the release to the byte"
    assert there["parity.json"] == (canon / "parity.json").read_bytes()
    assert there["README.source.md"].decode() == AUTHORS
    shown = ModelCard(there["README.md"].decode())
    assert (
        shown.data.base_model == "org/model"
        and "every canonical file that it names was hashed again" in shown.text
    )
    assert "byte for byte" in shown.text
    assert not list(tmp_path.glob(".*push*")) and TOKEN not in json.dumps(said)

    copy = Path(snapshot_download(REPO, local_dir=tmp_path / "copy"))
    report = check(copy, REPO)
    assert report.whole and report.family == "llama"
    assert check(copy, by=copy / "parity.json").whole, "its certificate lists the release's files, too"
    (copy / "README.source.md").write_text("words put into the authors' mouth")
    assert "README.source.md" in str(check(copy, by=copy / "parity.json").problems)

    hub.forget()
    (canon / "parity.json").unlink()
    second = push(canon, REPO, revision="bf16", dtype="fp32")
    assert "none" in second.certificate and "nobody has compared" in files(hub, "bf16")["README.md"].decode()
    assert files(hub) == there, "another branch"
    assert len(hub.requests(method="PUT")) == 1, "the weights alone, which are other ones now"


def test_a_certificate_that_failed_or_is_of_other_weights_stops_it(
    hub: HubServer, canon: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = next(canon.glob("model-*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert _common.run(cli, ["push", str(canon), REPO]) == 1
    said = capsys.readouterr().err
    assert "does not hold" in said and f"{weights.name}: content changed" in said and not hub.log
    assert _common.run(cli, ["push", str(canon), REPO, "--dry-run", "--unproven"]) == 0
    said = capsys.readouterr().out
    assert (
        "does NOT hold" in said
        and "model.safetensors" in said
        and "nothing was uploaded" in said
        and not hub.log
    )
    push(canon, REPO, unproven=True, private=False)
    assert not hub.repos[REPO].private
    assert f"**It does not hold**: `{weights.name}: content changed`" in files(hub)["README.md"].decode()


def test_a_card_that_somebody_edited_there_is_kept_and_weights_of_an_earlier_push_are_not(
    hub: HubServer, canon: Path
) -> None:
    old = {
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": "{}",
        "adapter_model.safetensors": b"x",
    }
    hub.repo(REPO).commit({"README.md": "My own.\n", **old})
    hub.tokens[TOKEN].add(REPO)
    done = push(canon, REPO)
    there = files(hub)
    assert there["README.md"] == b"My own.\n" and any("was kept" in n for n in done.notes)
    assert "adapter_model.safetensors" in there and not [n for n in old if "model-0" in n and n in there]
    assert "model.safetensors.index.json" not in there and any("removed" in n for n in done.notes)
    hub.repos[REPO].commit(
        {"README.md": card.files(read(canon), [], True, None, card.About())[0]["README.md"]}
    )
    push(canon, REPO)
    assert b"a\\_model" in files(hub)["README.md"], "an unedited card of zoo's gives way"
    with pytest.raises(zoo.ZooError, match="is public, and --private was asked for"):
        push(canon, REPO, private=True)


def test_what_was_said_of_other_weights_does_not_stay_beside_new_ones(hub: HubServer, canon: Path) -> None:
    shards = {f"model-{i:05}-of-00009.safetensors": b"old" for i in range(1, 10)}
    hub.repo(REPO).commit({"parity.json": "{}", "model.sig": "{}", **shards})
    (canon / "parity.json").unlink()
    (note,) = push(canon, REPO).notes
    assert ": model.sig, parity.json, model-00001-of" in note and note.endswith("and 3 more")
    assert not {"model.sig", "parity.json", *shards} & files(hub).keys()


def test_another_models_files_that_stay_in_the_repository_are_named(hub: HubServer, canon: Path) -> None:
    hub.repo(REPO).commit(
        {
            "adapter_config.json": "{}",
            "pytorch_model.bin": b"theirs",
            "chat_template.jinja": "theirs",
            "notes.txt": "theirs",
        }
    )
    (note,) = push(canon, REPO).notes
    assert note.endswith("adapter_config.json, chat_template.jinja, pytorch_model.bin") and "keeps" in note
    assert files(hub)["pytorch_model.bin"] == b"theirs"


def test_a_gguf_is_not_exported_and_the_command_that_uploads_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    result = CliRunner().invoke(cli, ["push", str(tmp_path / "x.gguf"), REPO, "--dry-run"])
    assert isinstance(result.exception, ZooError) and f"`hf upload {REPO} {tmp_path}/x.gguf`" in str(
        result.exception
    )


def test_what_the_hub_refuses_is_said_in_one_sentence_and_leaves_nothing(
    hub: HubServer, canon: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str = REPO) -> str:
        with pytest.raises(HubError) as e:
            push(canon, name)
        assert TOKEN not in str(e.value) and not list(canon.parent.glob(".*push*"))
        return str(e.value)

    assert "owner/name" in refused("model") and "owner/name" in refused("a/b/../c") and not hub.log
    hub.fail("status", f"{REPO}/create", code=403)
    assert "answered 403" in (text := refused()) and "May your token write there?" in text
    hub.fail("status", code=400, where="cdn")
    assert "the upload failed" in refused() and files(hub) == {}
    hub.fail("status", f"{REPO}/commit", code=412)
    assert "answered 412" in refused() and files(hub) == {}
    hub.forget()
    push(canon, REPO)
    assert not hub.requests(method="PUT") and files(hub), "what had arrived is not sent again"
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused()


def test_the_token_goes_to_no_host_that_an_answer_names(
    hub: HubServer, canon: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture holds the storage host to it, as which another host is seen here."""
    answer = hub_uploads._batch

    def elsewhere(self: Any, told: dict[str, Any]) -> None:
        with monkeypatch.context() as other:
            other.setattr(self.hub, "url", self.hub.cdn_url)  # where `verify` is
            answer(self, told)

    monkeypatch.setattr(hub_uploads, "_batch", elsewhere)
    with pytest.raises(HubError, match="Nothing of it is to be seen there"):
        push(canon, REPO)
    assert any(r.method == "POST" for r in hub.requests(origin="cdn"))
