"""A certificate says what was compared, follows its schema, and notices when it holds no longer."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
from verified import canonical, copy, with_tensor

import zoo
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


@pytest.mark.parametrize("file", ["model-00001-of-00001.safetensors", "zoo.json", "config.json"])
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
    check = Check("error", float("inf"), 1.0, "")
    assert not check.passed
    assert json.loads(json.dumps(check.to_json()))["value"] == "inf"


def test_a_check_passes_at_its_bound_and_says_how_far_it_was() -> None:
    assert Check("error", 2.0, 4.0, "").margin == 2.0
    assert Check("error", 4.0, 4.0, "").passed and not Check("error", 4.1, 4.0, "").passed
    assert Check("agreement", 0.99, 0.9, "", at_least=True).passed
    assert not Check("agreement", 0.8, 0.9, "", at_least=True).passed


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
    assert zoo.verify(folder).passed
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
