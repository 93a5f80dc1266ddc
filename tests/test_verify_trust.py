"""What a certificate and a recording may say: no more than what was looked at."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from verified import canonical, copy, with_tensor

import zoo
from zoo.cli import cli
from zoo.cli.inspect import look
from zoo.cli.verify import command
from zoo.errors import ZooError
from zoo.verify import certificate, judge, recording, tolerance
from zoo.verify.compare import Measured
from zoo.verify.golden import Golden
from zoo.verify.metrics import references
from zoo.verify.tolerance import Spread


def run(*args: object) -> Any:
    return CliRunner().invoke(command, [str(a) for a in args])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tiny.make("llama", tmp_path / "source")
    return zoo.convert(source, tmp_path / "c")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    recording.record(canonical("llama"), path, "fp32", 64)
    return path


def edited(
    golden: Path, dst: Path, tensors: dict[str, torch.Tensor | None] | None = None, **about: Any
) -> Path:
    """A copy with other tensors (None: without it) and other metadata."""
    had: dict[str, Any] = load_file(golden) | (tensors or {})
    with safe_open(golden, "pt") as f:
        told = json.loads(f.metadata()["zoo"]) | about
    save_file({k: t for k, t in had.items() if t is not None}, dst, metadata={"zoo": json.dumps(told)})
    return dst


# ---- the verdict


def test_a_proof_that_compared_no_logits_does_not_read_like_one_that_did(folder: Path) -> None:
    bytes_only = run(folder, "--level", "bytes")
    assert bytes_only.exit_code == 0
    assert bytes_only.output.startswith("PASSED (bytes only)  ")
    assert "no logits were compared" in bytes_only.output.splitlines()[0]
    assert json.loads(run(folder, "--level", "bytes", "--json").output)["rests_on"] == "bytes"
    assert run(folder, "--level", "logits").output.startswith("PASSED  ")


def test_a_required_level_that_cannot_be_judged_is_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["zoo.verify.against"], "upstream_available", lambda: False)
    assert run(folder).exit_code == 0
    required = run(folder, "--require", "logits")
    assert required.exit_code == 1 and required.output.startswith("FAILED")
    assert "required: logits, which was not judged" in required.output
    told = json.loads(run(folder, "--require", "logits", "--json").output)
    assert (told["verdict"], told["required_level"], told["rests_on"]) == ("failed", "logits", "bytes")
    assert run(folder, "--require", "bytes").exit_code == 0


def test_a_required_level_that_passes_passes(folder: Path) -> None:
    assert zoo.verify(folder, level="logits", require="logits", write=False).passed
    with pytest.raises(ZooError, match="expected one of the levels asked for: plan, bytes"):
        zoo.verify(folder, level="bytes", require="logits", write=False)


# ---- the certificate in the folder


def test_a_failure_of_logits_is_not_replaced_by_bytes_that_pass(folder: Path) -> None:
    zoo.verify(folder, level="logits")
    path = folder / "parity.json"
    data = json.loads(path.read_text())
    data["verdict"] = data["levels"]["logits"]["verdict"] = "failed"
    path.write_text(json.dumps(data))
    cert = zoo.verify(folder, level="bytes")
    assert cert.passed and "which failed at logits, and this run did not compare that" in cert.kept
    assert json.loads(path.read_text()) == data
    assert zoo.verify(folder, level="logits").kept == "parity.json written"


def test_the_certificate_of_another_source_does_not_replace_the_folders_own(
    folder: Path, tmp_path: Path
) -> None:
    zoo.verify(folder, level="bytes")
    before = (folder / "parity.json").read_bytes()
    other = tiny.make("llama", tmp_path / "other")
    tensors = {k: t * 1.5 for k, t in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    result = run(folder, "--against", other, "--level", "bytes")
    assert result.exit_code == 1 and "nothing was kept: this is a failure against other files" in " ".join(
        result.output.split()
    )
    assert (folder / "parity.json").read_bytes() == before
    run(folder, "--against", other, "--level", "bytes", "-o", tmp_path / "else.json")
    assert json.loads((tmp_path / "else.json").read_text())["verdict"] == "failed"
    assert (folder / "parity.json").read_bytes() == before


def test_the_folders_own_source_takes_the_place_of_any_other(folder: Path, tmp_path: Path) -> None:
    """Of a copy of the source nothing is kept where there is the source's; the source's replaces whatever is there."""
    parity, alike = folder / "parity.json", tmp_path / "alike"
    shutil.copytree(tmp_path / "source", alike)
    narrow = zoo.export(folder, tmp_path / "narrow", dtype="bf16")
    cert = zoo.verify(folder, narrow, level="bytes")
    assert not cert.passed and "nothing was kept: this is a failure against other files" in cert.kept
    assert not parity.exists()
    note = f"of these are F32 in the folder, BF16 in {narrow}"
    assert any(note in text for text in cert.level("bytes").notes)
    assert zoo.verify(folder, alike, level="bytes").kept == "parity.json written"  # none was there
    assert zoo.verify(folder, level="bytes").kept == "parity.json written"
    before = parity.read_bytes()
    assert "of ../source, whose files are the same; -o FILE" in zoo.verify(folder, alike, level="logits").kept
    assert "nothing was kept" in zoo.verify(folder, narrow, level="bytes").kept
    assert "of another source; -o FILE" in zoo.verify(folder, narrow, level="plan").kept
    assert parity.read_bytes() == before
    assert zoo.verify(folder, tmp_path / "source", level="logits").kept == "parity.json written"
    (tmp_path / "source").rename(tmp_path / "moved")
    assert zoo.verify(folder, tmp_path / "moved", level="logits").kept == "parity.json written"


def test_inspect_does_not_call_an_edited_folder_verified(folder: Path) -> None:
    assert look(folder)[0]["verified"].startswith("no; ")
    zoo.verify(folder, level="bytes")
    assert look(folder)[0]["verified"].startswith("passed on ")
    weights = next(folder.glob("model-*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    os.utime(weights, (time.time() + 60,) * 2)
    said = look(folder)[0]["verified"]
    assert (
        said.startswith(f"not as it is now: {weights.name} changed since") and "--check-certificate" in said
    )


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_certificate_that_names_files_outside_opens_none(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.verify(folder, level="bytes")
    (folder.parent / "secret").write_text("x")
    data = json.loads((folder / "parity.json").read_text())
    data["canonical"]["files"][name] = {"sha256": "0", "bytes": 1}
    (folder / "parity.json").write_text(json.dumps(data))
    opened: list[Path] = []
    hashed = certificate.sha256
    monkeypatch.setattr(certificate, "sha256", lambda p: opened.append(p) or hashed(p))
    with pytest.raises(ZooError, match="which is outside: not opened"):
        certificate.check(folder)
    assert not any(p.name in ("secret", "hostname") for p in opened)


def edited_certificate(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    zoo.verify(folder, level="bytes")
    data = json.loads((folder / "parity.json").read_text())
    change(data)
    (folder / "parity.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("where", ["a folder", "a link in the folder", "a link in the source"])
def test_a_certificate_opens_no_file_of_the_users_own(
    where: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine := folder.parent / "mine").mkdir()
    (mine / "notes.txt").write_text("x")
    names = {"notes.txt": {"sha256": "0", "bytes": 1}}

    def change(data: dict[str, Any]) -> None:
        if where == "a link in the folder":
            (folder / "notes.txt").symlink_to(mine / "notes.txt")
            data["canonical"]["files"] |= names
        elif where == "a link in the source":
            (folder.parent / "source" / "notes.txt").symlink_to(mine / "notes.txt")
            data["source"]["files"] |= names
        else:
            data["source"] |= {"path": str(mine), "files": names}

    edited_certificate(folder, change)
    opened: list[str] = []
    hashed = certificate.sha256
    monkeypatch.setattr(certificate, "sha256", lambda p: opened.append(p.name) or hashed(p))
    with contextlib.suppress(ZooError):
        assert any("cannot be opened any more" in p for p in certificate.check(folder))
    assert "notes.txt" not in opened


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["canonical"]["files"].clear(), "vouches for none of model-00001-of-00001.safetensors"),
        (lambda d: d["levels"].update(all=d["levels"].pop("bytes")), "all: is no level"),
        (
            lambda d: d["levels"]["bytes"]["checks"][0].update(value="-inf"),
            "marked passed, but its value, -inf, is none",
        ),
    ],
    ids=["no files", "another level", "less than any number"],
)
def test_a_certificate_that_compared_nothing_does_not_hold(
    change: Callable[[dict[str, Any]], object], says: str, folder: Path
) -> None:
    assert any(says in p for p in certificate.check(edited_certificate(folder, change)))


# ---- recordings


@pytest.mark.parametrize("lengths", [0, -1, 10**6])
def test_rows_of_no_token_prove_nothing(lengths: int, golden: Path, tmp_path: Path) -> None:
    had = load_file(golden)["lengths.0"]
    path = edited(golden, tmp_path / "g.safetensors", {"lengths.0": torch.full_like(had, lengths)})
    with pytest.raises(ZooError, match=r"lengths\.0 is .*rows of no token prove nothing"):
        zoo.verify(canonical("llama"), path, write=False)


def test_a_recording_of_no_rows_is_refused(golden: Path, tmp_path: Path) -> None:
    had = load_file(golden)
    none = {
        "ids.0": had["ids.0"][:0],
        "lengths.0": had["lengths.0"][:0],
        "logits.0": had["logits.0"][:0],
    }
    with pytest.raises(ZooError, match=r"ids\.0 is I64 \[0, "):
        zoo.verify(canonical("llama"), edited(golden, tmp_path / "g.safetensors", none), write=False)


def test_one_outlier_makes_no_spread_believable(golden: Path, tmp_path: Path) -> None:
    """The largest logit sets how large rounding may be, and whoever writes a recording writes it."""
    logits = load_file(golden)["logits.0"]
    logits[:, 0] = 1e30
    wide = {"p50": 1e9, "max": 1e30}
    with safe_open(golden, "pt") as f:
        spread = json.loads(f.metadata()["zoo"])["spread"] | {"logits": wide}
    path = edited(golden, tmp_path / "g.safetensors", {"logits.0": logits}, dtype="bf16", spread=spread)
    assert Golden(path).spread.logits["p50"] < 100


def test_rows_and_flags_are_as_many_and_directions_may_be_doubles(golden: Path, tmp_path: Path) -> None:
    doubles = {"directions": load_file(golden)["directions"].double()}
    directions = Golden(edited(golden, tmp_path / "d.safetensors", doubles)).directions
    assert directions is not None and directions.dtype == torch.float32
    with pytest.raises(ZooError, match=r"'text' has 1 values for the \d+ rows of ids\.0"):
        Golden(edited(golden, tmp_path / "g.safetensors", text=[[True]]))


def test_random_logits_do_not_pass_whatever_spread_they_claim(golden: Path, tmp_path: Path) -> None:
    with safe_open(golden, "pt") as f:
        spread = json.loads(f.metadata()["zoo"])["spread"]
    wide = spread | {k: dict.fromkeys(spread[k], 1e9) for k in ("logits", "kl")}
    wide |= {"top1_agreement": 0.0, "log_perplexity": 1e9, "layers": [1e9] * len(spread["layers"])}
    random = {k: torch.randn_like(t) for k, t in load_file(golden).items() if k.startswith("logits.")}
    path = edited(golden, tmp_path / "g.safetensors", random, spread=wide)
    cert = zoo.verify(canonical("llama"), path, level="logits", write=False)
    assert not cert.passed
    whys = [c.why for c in cert.level("logits").checks]
    assert any("the spread that the recording claims" in w and "lowered to" in w for w in whys)
    honest = zoo.verify(canonical("llama"), golden, level="logits", write=False)
    assert honest.passed


def test_without_a_spread_the_bound_goes_by_the_scale_of_the_logits(golden: Path, tmp_path: Path) -> None:
    """Logits a hundred times as large round a hundred times as far: 5e-5 alone would fail a right model."""
    names = [k for k in load_file(golden) if k.startswith("states.")]
    plain: dict[str, Any] = dict.fromkeys([*names, "directions", "prompt", "greedy"])
    scaled = {k: t * 100 for k, t in load_file(golden).items() if k.startswith("logits.")}
    folder = copy(canonical("llama"), tmp_path / "c")
    head = next(n for n in ("head.weight", "norm.weight") if n in zoo.load(folder).state_dict())
    folder = with_tensor(folder, head, lambda t: t * 100)
    path = edited(golden, tmp_path / "g.safetensors", plain | scaled, spread=None)
    cert = zoo.verify(folder, path, level="logits", write=False)
    assert cert.level("logits").verdict == "passed"
    check = next(c for c in cert.level("logits").checks if c.name == "|logit error| max")
    assert check.value > 5e-5 and "the recording tells no spread" in check.why
    assert check.bound < 1e-5 * max(float(t.abs().max()) for t in scaled.values())


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"text": 3}, "'text' is 3; expected list"),
        ({"text": [[1]]}, "not a list of true and false"),
        ({"limits": []}, r"'limits' is \[\]; expected dict"),
        ({"family": 7}, "'family' is 7; expected str"),
        ({"dtype": "float32"}, "'dtype' is 'float32'; expected what it was computed in: fp32"),
        ({"dtype": None}, "'dtype' is None"),
    ],
)
def test_metadata_of_other_types_is_named(
    about: dict[str, Any], said: str, golden: Path, tmp_path: Path
) -> None:
    with pytest.raises(ZooError, match=said):
        zoo.verify(canonical("llama"), edited(golden, tmp_path / "g.safetensors", **about), write=False)


@pytest.mark.parametrize("raw", ["", "{", "[]", "[" * 5000])
def test_metadata_that_is_no_object_is_named(raw: str, golden: Path, tmp_path: Path) -> None:
    save_file(load_file(golden), tmp_path / "g.safetensors", metadata={"zoo": raw})
    with pytest.raises(ZooError, match="its metadata's 'zoo' is"):
        zoo.verify(canonical("llama"), tmp_path / "g.safetensors", write=False)


def test_ids_beyond_the_folders_vocabulary_are_named(golden: Path, tmp_path: Path) -> None:
    had = load_file(golden)
    wide = torch.nn.functional.pad(had["logits.0"], (0, 7))
    ids = had["ids.0"].clone()
    ids[0, 0] = had["logits.0"].shape[-1] + 3
    path = edited(golden, tmp_path / "g.safetensors", {"ids.0": ids, "logits.0": wide})
    with pytest.raises(ZooError, match=r"has the id \d+; the folder's vocabulary has \d+"):
        zoo.verify(canonical("llama"), path, write=False)


def test_the_inputs_say_what_family_they_are_for(tmp_path: Path) -> None:
    recording.inputs(canonical("llama"), tmp_path / "i.safetensors", "fp32", 64)
    with safe_open(tmp_path / "i.safetensors", "pt") as f:
        assert json.loads(f.metadata()["zoo"])["family"] == "llama"


def test_a_removed_source_still_leaves_the_copys_certificate_readable(folder: Path) -> None:
    zoo.verify(folder, level="bytes")
    shutil.rmtree(folder.parent / "source")
    assert look(folder)[0]["verified"].startswith("passed on ")


# ---- what compared nothing


def test_a_certificate_with_a_bound_that_everything_meets_is_shown_as_none(folder: Path) -> None:
    """To all that read one: the report, the check of the files, what a folder is said to be."""
    edited_certificate(folder, lambda d: d["levels"]["bytes"]["checks"][0].update(compared=0))
    report = CliRunner().invoke(cli, ["report", str(folder)])
    assert report.exit_code == 0 and "(failed: bytes: 'elements that differ" in report.output
    page = (folder / "report.html").read_text()
    assert '<p class="verdict failed">failed</p>' in page and "it compared nothing</li>" in page
    assert look(folder)[0]["verified"].startswith(
        "nothing is proven: its certificate contradicts itself (bytes:"
    )
    checked = CliRunner().invoke(cli, ["check", str(folder)])
    assert checked.exit_code == 0 and "proves nothing of the model: bytes: 'elements" in checked.output
    assert "is still that of" not in zoo.verify(folder, level="plan").kept


def test_of_a_thousand_problems_few_are_shown_and_a_list_without_end_is_refused(folder: Path) -> None:
    def listing(n: int) -> Callable[[dict[str, Any]], None]:
        return lambda d: d["canonical"]["files"].update(
            {f"f{i}": {"sha256": "0", "bytes": 1} for i in range(n)}
        )

    edited_certificate(folder, listing(1000))
    shown = run(folder, "--check-certificate")
    assert shown.exit_code == 1 and len(shown.output.splitlines()) < 50 and "960 more" in shown.output
    edited_certificate(folder, listing(30_000))
    with pytest.raises(ZooError, match=r"lists 30,00\d files \(limit 20,000\)"):
        certificate.check(folder)


def test_a_certificate_of_checks_without_end_is_none(folder: Path) -> None:
    edited_certificate(
        folder, lambda d: d["levels"]["plan"].update(checks=d["levels"]["plan"]["checks"] * 500)
    )
    with pytest.raises(ZooError, match="not as zoo writes it .*checks"):
        certificate.check(folder)
    assert "it is not as zoo writes it" in CliRunner().invoke(cli, ["report", str(folder)]).output


def test_a_report_is_no_longer_than_people_read(folder: Path) -> None:
    def long(data: dict[str, Any]) -> None:
        data["levels"]["plan"]["notes"] = ["x"] * 50_000
        data["canonical"]["files"].update({f"f{i}": {"sha256": "0", "bytes": 1} for i in range(50_000)})

    edited_certificate(folder, long)
    assert CliRunner().invoke(cli, ["report", str(folder)]).exit_code == 0
    page = (folder / "report.html").read_text()
    assert len(page) < 3 << 20 and "levels.plan.notes: 50,000 entries, of which 5,000 are shown" in page


def test_shapes_alone_are_said_to_be_no_proof_by_all_that_read_a_certificate(folder: Path) -> None:
    zoo.verify(folder, level="plan")
    assert run(folder, "--check-certificate").exit_code == 1
    report = CliRunner().invoke(cli, ["report", str(folder)])
    assert "(passed, plan only: it compared shapes alone" in report.output
    assert "What it does not prove, or is not shown" in (folder / "report.html").read_text()
    assert "it compared shapes alone" in CliRunner().invoke(cli, ["check", str(folder)]).output


def test_a_model_of_zeros_is_compared_all_the_same(tmp_path: Path) -> None:
    """Its differences are 0, of tokens and elements that were looked at."""
    source = tiny.make("llama", tmp_path / "source")
    tensors = {k: torch.zeros_like(t) for k, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    cert = zoo.verify(zoo.convert(source, tmp_path / "c"), level="logits", require="logits")
    assert cert.passed and all(c.compared for level in cert.levels for c in level.checks)
    assert certificate.check(tmp_path / "c") == []


@pytest.mark.parametrize("far", [30.0, math.inf])
def test_upstream_that_is_as_far_from_itself_as_from_any_model_judges_nothing(far: float) -> None:
    """Weights can be such that upstream's own two ways agree in nothing; twice that would let anything pass."""
    ids, logits = torch.zeros(8, dtype=torch.int64), torch.randn(8, 50) * 5
    measured = Measured([], spread=Spread(("eager", "sdpa"), dict.fromkeys(tolerance.QUANTILES, far)))
    for at, reference in references(logits, ids):
        measured.settled.add(torch.randn(8, 50)[at] * 5, reference)
    level = judge.logits_level(measured, "fp32")
    assert level.checks[0].value <= level.checks[0].bound and not level.checks[0].passed
    assert level.verdict == "failed" and level.notes


def test_folders_that_are_given_the_other_way_round_are_told_how(folder: Path) -> None:
    """Somebody who asks whether a folder of transformers' is a canonical one's, and of two canonical ones."""
    source = folder.parent / "source"
    with pytest.raises(ZooError, match=r"the other way round, `zoo verify .*/c --against .*/source -o FILE`"):
        zoo.verify(source, against=folder)
    with pytest.raises(ZooError, match=r"a canonical folder like .*`zoo export .*/c FOLDER`"):
        zoo.verify(folder, against=folder)
    assert not (folder / "parity.json").exists()
