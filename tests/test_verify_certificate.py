"""A certificate says what was compared, follows its schema, and notices when it holds no longer."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner
from verified import canonical, copy, with_tensor

import zoo
from zoo.cli.verify import command
from zoo.errors import ZooError
from zoo.verify import certificate
from zoo.verify.certificate import Certificate, Check, Level


@pytest.fixture
def verified(tmp_path: Path) -> Path:
    """A canonical folder of its own, with its source and its certificate."""
    source = tiny.make("llama", tmp_path / "source")
    folder = zoo.convert(source, tmp_path / "canonical")
    zoo.verify(folder, level="logits")
    return folder


def test_a_certificate_follows_its_schema(verified: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(certificate.__file__).parent / "parity.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads((verified / "parity.json").read_text()), schema)


def test_what_the_schema_requires_is_there(verified: Path) -> None:
    """The same without the jsonschema package: required fields, and no unknown ones, at the top and in levels."""
    schema = json.loads((Path(certificate.__file__).parent / "parity.schema.json").read_text())
    data = json.loads((verified / "parity.json").read_text())
    assert set(schema["required"]) <= set(data) <= set(schema["properties"])
    level = schema["$defs"]["level"]
    for x in data["levels"].values():
        assert set(x) == set(level["required"])
        for check in x["checks"]:
            assert set(check) == set(schema["$defs"]["check"]["required"])


def test_it_names_every_file_of_both_sides_and_the_rules(verified: Path) -> None:
    data = json.loads((verified / "parity.json").read_text())
    assert set(data["canonical"]["files"]) == {p.name for p in verified.iterdir()} - {"parity.json"}
    assert "model.safetensors" in data["source"]["files"]
    assert data["rules"]["version"] and data["versions"]["transformers"] and data["inputs"]["sha256"]


def test_it_holds_until_something_changes(verified: Path) -> None:
    assert certificate.check(verified) == []
    # A report beside it changes nothing.
    (verified / "report.html").write_text("")
    assert certificate.check(verified) == []


@pytest.mark.parametrize("file", ["model-00001-of-00001.safetensors", "zoo.json", "config.released.json"])
def test_a_changed_byte_breaks_it(verified: Path, file: str) -> None:
    path = verified / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert certificate.check(verified) == [f"{file}: content changed"]


def test_a_file_more_or_less_breaks_it(verified: Path) -> None:
    (verified / "extra.json").write_text("{}")
    (verified / "generation_config.json").unlink()
    assert set(certificate.check(verified)) == {
        "extra.json: was not there when it was issued",
        "generation_config.json: gone",
    }


def test_a_changed_source_and_changed_rules_break_it(verified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (verified.parent / "source" / "config.json").write_text("{}")
    data = json.loads((verified / "parity.json").read_text())
    data["rules"]["version"] = "0123456789abcdef"
    (verified / "parity.json").write_text(json.dumps(data))
    problems = certificate.check(verified)
    assert any(p.startswith("source config.json:") for p in problems)
    assert any(p.startswith("rules of llama (hf): version") and "0123456789abcdef" in p for p in problems)


def test_a_failed_certificate_never_holds(tmp_path: Path) -> None:
    folder = with_tensor(copy(canonical("llama"), tmp_path / "c"), "norm.weight", lambda t: t * 1.1)
    assert not zoo.verify(folder, level="bytes").passed
    assert certificate.check(folder) == ["its verdict was 'failed'"]


def test_no_certificate_is_an_error_that_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="there is no certificate; write one with: zoo verify"):
        certificate.check(tmp_path)


def test_what_was_not_judged_does_not_pass() -> None:
    nothing = Certificate(
        canonical={}, source=None, rules=None, oracle={}, dtype="fp32", levels=[Level("plan")]
    )
    assert not nothing.passed
    assert Level("plan").verdict == "skipped"


def test_numbers_that_json_cannot_hold_are_words() -> None:
    check = Check("|logit error| max", float("inf"), 1.0, "", 1)
    assert not check.passed
    assert json.loads(json.dumps(check.to_json()))["value"] == "inf"


def test_a_check_passes_at_its_bound_and_says_how_far_it_was() -> None:
    assert Check("|logit error| max", 2.0, 4.0, "", 1).margin == 2.0
    assert (
        Check("|logit error| max", 4.0, 4.0, "", 1).passed
        and not Check("|logit error| max", 4.1, 4.0, "", 1).passed
    )
    assert Check("top-1 agreement", 0.99, 0.9, "", 1, at_least=True).passed
    assert not Check("top-1 agreement", 0.8, 0.9, "", 1, at_least=True).passed


def test_a_certificate_that_says_more_is_kept(tmp_path: Path) -> None:
    folder = copy(canonical("llama"), tmp_path / "c")
    zoo.verify(folder, level="logits")
    before = (folder / "parity.json").read_bytes()
    assert "is still that of" in zoo.verify(folder, level="plan").kept
    assert (folder / "parity.json").read_bytes() == before
    assert zoo.verify(folder, level="logits").kept == "parity.json written"


def test_files_that_departed_from_their_certificate_are_named_where_the_source_is_gone(
    tmp_path: Path,
) -> None:
    source = tiny.make("llama", tmp_path / "source")
    folder = zoo.convert(source, tmp_path / "c")
    zoo.verify(folder, level="bytes")
    shutil.rmtree(source)
    # Nothing but shapes can be compared now: that passes no longer, and takes nothing away from what is on record.
    before = (folder / "parity.json").read_bytes()
    cert = zoo.verify(folder)
    assert not cert.passed and not cert.failed and "is still that of" in cert.kept
    assert (folder / "parity.json").read_bytes() == before
    file = next(folder.glob("model-*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ZooError, match=rf"{file.name}: not what parity.json vouches for"):
        zoo.verify(folder)


def test_a_folder_that_cannot_be_written_is_verified_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, folder: Path) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Certificate, "write", full)
    cert = zoo.verify(copy(canonical("llama"), tmp_path / "c"), level="bytes")
    assert cert.passed and cert.kept == "parity.json not written: Read-only file system"


def test_a_certificate_without_its_fields_is_called_that(tmp_path: Path) -> None:
    folder = copy(canonical("llama"), tmp_path / "c")
    (folder / "parity.json").write_text('{"schema": "zoo-parity-1", "verdict": "passed"}')
    with pytest.raises(ZooError, match="not as zoo writes it"):
        certificate.check(folder)


def test_shapes_alone_pass_only_where_they_were_asked_for(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "source")
    folder = zoo.convert(source, tmp_path / "c")
    (folder / "parity.json").unlink(missing_ok=True)
    source.rename(tmp_path / "moved")
    for name in [n for n in _names(folder) if n.endswith("weight")]:
        with_tensor(folder, name, lambda t: t * float("nan"))
    result = CliRunner().invoke(command, [str(folder)])
    assert result.exit_code == 1 and result.output.startswith("FAILED")
    assert "neither the source's bytes nor logits were compared" in result.output
    assert "--against SRC" in result.output
    assert json.loads((folder / "parity.json").read_text())["verdict"] == "failed"
    (folder / "parity.json").unlink()
    asked = CliRunner().invoke(command, [str(folder), "--level", "plan"])
    assert asked.exit_code == 0 and asked.output.startswith("PASSED (plan only)")
    assert certificate.check(folder) == [
        "it compared shapes alone, no value: verify again, up to bytes at least"
    ]
    assert "(shapes alone, no value)" in (certificate.standing(folder) or "")


def _names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(next(folder.glob("model-*.safetensors")), "pt") as f:
        return list(f.keys())


def test_a_source_that_is_gone_is_not_said_to_be_what_it_was(verified: Path) -> None:
    there = CliRunner().invoke(command, [str(verified), "--check-certificate"])
    assert there.exit_code == 0 and "every file, source and rule is what it was" in there.output
    shutil.rmtree(verified.parent / "source")
    gone = CliRunner().invoke(command, [str(verified), "--check-certificate"])
    assert gone.exit_code == 0 and "the certificate holds" in gone.output
    assert "source is what" not in gone.output and "source and rule" not in gone.output
    assert (
        f"the source ({verified.parent / 'source'}) is not there any more and was not checked" in gone.output
    )
    told = json.loads(CliRunner().invoke(command, [str(verified), "--check-certificate", "--json"]).output)
    assert told["holds"] and "not there any more" in told["not_checked"][0]


def _level_failed(data: dict[str, Any]) -> None:
    data["levels"]["logits"]["verdict"] = "failed"


def _check_failed(data: dict[str, Any]) -> None:
    data["levels"]["logits"]["checks"][0]["passed"] = False


def _beyond_its_bound(data: dict[str, Any]) -> None:
    data["levels"]["logits"]["checks"][0]["value"] = "inf"


def _no_levels(data: dict[str, Any]) -> None:
    data["levels"] = {}


def _of(level: str, **what: Any) -> Callable[[dict[str, Any]], None]:
    """The first check of a level, which passes, says this too."""

    def edit(data: dict[str, Any]) -> None:
        data["levels"][level]["checks"][0] |= what

    return edit


def _another_check(data: dict[str, Any]) -> None:
    data["levels"]["logits"]["checks"] = data["levels"]["plan"]["checks"][:1]


def _no_count(data: dict[str, Any]) -> None:
    del data["levels"]["bytes"]["checks"][0]["compared"]


def _no_values(data: dict[str, Any]) -> None:
    data["levels"] = {"plan": data["levels"]["plan"]}
    data["not_checked"] = ["bytes: the source is not there any more"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_level_failed, "logits: its verdict is 'failed', but that of its checks is 'passed'"),
        (_check_failed, "logits: its verdict is 'passed', but that of its checks is 'failed'"),
        (_beyond_its_bound, "is marked passed, but inf is not <= "),
        (_no_levels, "it has no levels: nothing was compared"),
        (_no_values, "its verdict is 'passed', but neither the source's bytes nor logits were compared"),
        (_of("logits", bound=1e300), "'|logit error| p50' is marked passed, but its bound is wider than"),
        (_of("logits", bound=1e300, scale=1e300), "marked passed, but its bound is none"),
        (_of("logits", bound=1e9, scale=1e12), "its checks are of logits larger than"),
        (_of("layers", bound=1.0), "its bound is wider than 0.5"),
        (_of("logits", bound=-1, relation=">="), "its bound is the least that it may be"),
        (_of("logits", value=-1), "its value, -1, is none that can be measured"),
        (_of("bytes", bound=5, value=5), "it counts what differs, and 5 may"),
        (
            _of("bytes", compared=0),
            "'elements that differ from the source' is marked passed, but it compared nothing",
        ),
        (_of("plan", compared=0), "'layout tensors missing' is marked passed, but it compared nothing"),
        (_no_count, "it does not say how many things it compared"),
        (_another_check, "logits: it has no check of |logit error| p50"),
    ],
)
def test_a_certificate_that_contradicts_itself_does_not_hold(
    verified: Path, edit: Callable[[dict[str, Any]], None], said: str
) -> None:
    data = json.loads((verified / "parity.json").read_text())
    edit(data)
    (verified / "parity.json").write_text(json.dumps(data))
    assert any(said in p for p in certificate.check(verified))


def test_a_verdict_is_that_of_the_levels(verified: Path) -> None:
    data = json.loads((verified / "parity.json").read_text())
    _level_failed(data)
    _check_failed(data)
    (verified / "parity.json").write_text(json.dumps(data))
    assert certificate.check(verified) == [
        "its verdict is 'passed', but its levels or seeded faults say 'failed'"
    ]


def test_it_has_no_path_of_the_machine_and_finds_its_source_where_both_were_moved_to(tmp_path: Path) -> None:
    here = tmp_path / "here"
    source = tiny.make("llama", here / "source")
    folder = zoo.convert(source, here / "canonical")
    zoo.verify(folder, level="logits")
    text = (folder / "parity.json").read_text()
    data = json.loads(text)
    assert str(tmp_path) not in text
    assert (data["canonical"]["path"], data["source"]["path"]) == ("canonical", "../source")
    assert data["oracle"]["loaded_from"] == "../source"
    here.rename(tmp_path / "there")
    moved = tmp_path / "there" / "canonical"
    assert certificate.check(moved) == [] and certificate.unchecked(moved) is None
    (tmp_path / "there" / "source" / "config.json").write_text("{}")
    assert certificate.check(moved) == [
        "source config.json: 2 bytes, was " + f"{data['source']['files']['config.json']['bytes']:,}"
    ]


def test_a_way_to_the_source_that_leads_over_the_root_is_left_as_it_is() -> None:
    way = "../../../root/model/x.gguf"
    places = {"/root/model/x.gguf": way, "/root/model": "../../../root/model", "/data/canon": "canon"}
    level = Level("plan", notes=["no /root/model/x.gguf; /root/model-b is another, as is /data/canon.gguf"])
    made = Certificate(
        canonical={}, source={"path": way}, rules=None, oracle={}, dtype="fp32", levels=[level], places=places
    ).to_json()
    assert made["source"]["path"] == way
    assert made["levels"]["plan"]["notes"] == [f"no {way}; /root/model-b is another, as is /data/canon.gguf"]


def test_it_has_no_path_of_the_machine_where_it_says_what_is_not_there(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "source")
    folder = zoo.convert(source, tmp_path / "c")
    shutil.rmtree(source)
    zoo.verify(folder, level="plan")
    text = (folder / "parity.json").read_text()
    assert str(tmp_path) not in text and "the source it was converted from (../source) is not there" in text
