"""Little input that asks for much: refused within seconds and some hundred MiB, whatever it asks for."""

from __future__ import annotations

import json
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

import zoo
from zoo.errors import ZooError
from zoo.formats.safetensors import parse_header
from zoo.mapping.fold import fold


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.make("llama", tmp_path / "source")


def at_most(seconds: float, mib: float, call: Callable[[], Any]) -> str:
    """What `call` is refused with, within these limits of time and memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ZooError) as error:
        call()
    assert time.process_time() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mib * 1024
    text = str(error.value)
    assert len(text) < 3000
    return text


@pytest.mark.parametrize(("experts", "layers"), [(65_536, 4_096), (65_535, 4)])
def test_a_config_of_more_tensors_than_the_files_have_is_not_spelled_out(
    experts: int, layers: int, tmp_path: Path
) -> None:
    source = tiny.make("qwen3_moe", tmp_path / "s")
    config = json.loads((source / "config.json").read_text())
    config |= {"num_local_experts": experts, "num_hidden_layers": layers}
    (source / "config.json").write_text(json.dumps(config))
    said = at_most(5, 500, lambda: zoo.plan(source))
    assert f"{experts} experts, and the files hold" in said or f"expected [{experts}, " in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": [' + b"[]," * 3_000_000 + b"[]]}", "lists and objects"),
        (b'{"a": [' + b"1," * 5_000_000 + b"1]}", "values"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"rms_norm_eps": 1' + b"0" * 400 + b"}", "number of 401 digits"),
        (b'{"rms_norm_eps": 1e999}', "beyond all floats"),
        ('{"rms_norm_eps": 1e999}'.encode("utf-16"), "beyond all floats"),
    ],
    ids=["lists", "values", "depth", "digits", "exponent", "exponent in UTF-16"],
)
def test_json_that_grows_is_refused_before_it_is_parsed(text: bytes, says: str, source: Path) -> None:
    (source / "config.json").write_bytes(text)
    assert says in at_most(5, 300, lambda: zoo.plan(source))
    file = next(source.glob("*.safetensors"))
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ZooError, match=says):
        list(parse_header(text, "f", 8 + len(text), "f"))


def test_a_shape_of_hundreds_of_thousands_of_axes_is_not_multiplied(source: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1] * 300_000, "data_offsets": [0, 4]}}).encode()
    assert "expected dtype, shape" in at_most(
        5, 300, lambda: list(parse_header(header, "f", 12 + len(header), "f"))
    )


def test_a_name_of_megabytes_is_refused_before_it_is_looked_at(source: Path) -> None:
    raw = b'{"' + b"1." * 10_000_000 + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    assert "name has 20000000 characters" in at_most(5, 300, lambda: zoo.plan(source))


def test_a_header_of_more_tensors_than_any_release_has_is_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.formats.safetensors.MAX_TENSORS", 10)
    with pytest.raises(ZooError, match=r"header names \d+ tensors \(limit 10\)"):
        zoo.plan(source)


def test_headers_of_many_files_count_together(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.formats.safetensors.MAX_HEADERS", 100)
    with pytest.raises(ZooError, match=r"bytes of headers \(limit 100\)"):
        zoo.plan(source)


def test_names_with_stars_and_any_number_of_digits_are_listed() -> None:
    names = ["a.*.b", "a.1.b", "c." + "9" * 200, "c.1", "d.3", "d.4", long := "e." + "9" * 5000, "e.1"]
    said = dict(fold(names))
    assert "a.*.b (2 tensors)" in said and "c.* (2 tensors)" in said and "d.{3-4} (2 tensors)" in said
    assert said[long] == long and "e.1" in said
