"""Little input that asks for much: refused within seconds and some hundred MiB, whatever it asks for."""

from __future__ import annotations

import json
import re
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.config import sound
from zoo.errors import ZooError
from zoo.formats.base import TensorRef
from zoo.formats.safetensors import parse_header
from zoo.mapping import export_config
from zoo.mapping.fold import fold
from zoo.mapping.merge import Adapter
from zoo.quant.foreign import codes_of
from zoo.untrusted.bounded import parse_json


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


@pytest.mark.parametrize(("experts", "layers"), [(65_536, 1_024), (65_535, 4)])
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
    assert "a key of 20000000 bytes" in at_most(5, 300, lambda: zoo.plan(source))
    raw = b'{"' + b"n" * 600 + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    assert "name has 600 characters (limit 512)" in at_most(5, 300, lambda: zoo.plan(source))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"' + b"k" * (20 << 20) + "é".encode() + b'" : 1}', "a key of"),
        (b'{"a": "' + b"t" * (20 << 20) + b'"}', "a text, or numbers, of"),
        (b'{"' + b'\\"' * (5 << 20) + b'": 1}', "quotation marks in its texts"),
    ],
    ids=["key", "text", "quotes"],
)
def test_a_key_or_text_of_megabytes_is_refused_before_it_is_parsed(
    text: bytes, says: str, source: Path
) -> None:
    """A wide letter makes each of its characters take four bytes, and each message, note and file that is made of it."""
    (source / "config.json").write_bytes((source / "config.json").read_bytes()[:-2] + b"," + text[1:])
    assert says in at_most(1, 150, lambda: zoo.plan(source))


def test_an_index_of_more_tensors_than_any_release_has_is_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.formats.sets.MAX_TENSORS", 10)
    names = {f"w{i}": "model-00001-of-00001.safetensors" for i in range(11)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    with pytest.raises(ZooError, match=r"names 11 tensors \(limit 10\)"):
        zoo.plan(source)


@pytest.mark.parametrize("text", ["1" * 60_000 + "x", "1." + "1" * 60_000 + "x", "1e" + "1" * 60_000 + "x"])
def test_a_text_that_begins_like_a_number_is_looked_at_once(text: str) -> None:
    start = time.process_time()
    assert sound("hidden_act", text, "config.json") == text
    assert time.process_time() - start < 0.5  # it took minutes
    for number in ("5", " 5. ", "-.5e+3", "1.5"):
        with pytest.raises(ZooError, match="without quotes"):
            sound("hidden_act", number, "config.json")


def test_a_config_of_modules_that_could_be_matched_for_ever_is_not_exported() -> None:
    modules = {"model.layers.0.mlp": ["layers.0.mlp"]}
    for entry in ("re:(a+)+$", "re:" + "a" * 501, r"re:(.*)\1\1"):
        with pytest.raises(ZooError, match="could be matched without end"):
            export_config._respell({"ignore": [entry]}, modules)
    q = {"ignore": ["re:.*mlp", "re:(", "lm_head"]}
    assert not export_config._respell(q, modules)
    with pytest.raises(ZooError, match="lists 10001 of ignore"):
        export_config._respell({"ignore": ["a"] * 10_001}, modules)


def test_no_more_small_files_are_carried_than_any_release_has(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.formats.base.MAX_SMALL_FILES", 5)
    for i in range(6):
        (source / f"notes-{i}.txt").write_text("x")
    with pytest.raises(ZooError, match="more than 5 small files lie beside the weights"):
        zoo.plan(source)


def test_spaces_are_no_text() -> None:
    spaces = b" " * (6 << 20)
    assert parse_json(b'{"a": 1, ' + spaces + b'"b": "x"}' + spaces) == {"a": 1, "b": "x"}
    assert parse_json(b'{"' + b"k" * 4096 + b'":1}') == {"k" * 4096: 1}


def test_tensors_of_many_files_count_together(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.formats.base.MAX_TENSORS", 10)
    with pytest.raises(ZooError, match=r"the files have \d+ tensors \(limit 10\)"):
        zoo.plan(source)


def test_more_tensors_that_are_no_part_of_the_model_than_any_release_has_are_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(0) for i in range(4)}
    save_file(tensors, source / "model.safetensors")
    assert len(zoo.plan(source).extras) == 4
    monkeypatch.setattr("zoo.mapping.plan.MAX_EXTRAS", 3)
    with pytest.raises(ZooError, match=r"4 tensors are no part of the model \(limit 3\), 'model.layers.0"):
        zoo.plan(source)


def test_of_what_begins_a_name_only_what_could_be_meant_is_made() -> None:
    """Of a name of 256 dots that would be 256 texts of up to 512 characters, and a file may have 200,000 such names."""
    names = [f"{'a.' * 250}{i}" for i in range(20_000)]
    codes = {n: TensorRef(n, "U8", (1, 1), "f", 0, 1) for n in names}
    start = time.process_time()
    assert codes_of({}, codes, {"model.a.weight", "model.b.weight"}) is None
    assert time.process_time() - start < 1


def test_a_header_of_more_tensors_than_any_release_has_is_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.formats.safetensors.MAX_TENSORS", 10)
    with pytest.raises(ZooError, match=r"header names \d+ tensors \(limit 10\)"):
        zoo.plan(source)


def test_names_of_all_tensors_count_together(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.formats.opening.MAX_NAMES", 100)
    with pytest.raises(ZooError, match=r"the names of its tensors have \d+ characters \(limit 100\)"):
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


@pytest.mark.parametrize(
    ("pattern", "refused"),
    [
        (r".*mlp\.(gate|up|gate_up|down)_proj.*", False), (r".*mlp\.(?:gate|up)_proj$", False), (r"^(?!.*lm_head).*", False),
        (r"(?<!x)q_proj", False), (r"(?:a|a)*b", True), (r"(a+)+b", True), (r"(?P<x>a+)(?P=x)", True), (r".*a.*b.*c.*d", True), ("a" * 501, True),
        # what is escaped is repeated like any other letter, and no group
        (r"\(*\(*\(*.*.*.*x", True), (r"\\*\\*\\*\\*x", True), (r"\(?\(?\(?.*.*x", True), (r"\(.*\(.*\(.*\(x", False), (r"a{b*c*d*e*}", True),
        (r"a{1,2}?b{,3}c{3}", False), (r"(a)\1", True), (r"\\1", False), ("a\\", True), (r"(?=a)*b", True),
        (r"layers\.(" + "|".join(map(str, range(64))) + r")\..*_proj", False), (3 * ("(?:" + "|" * 60 + ")") + ".*x", True), (3 * "(?:a|)" + ".*.*.*x", False),
    ],
)  # fmt: skip
def test_patterns_that_could_be_matched_for_ever_are_told_from_those_of_releases(
    pattern: str, refused: bool
) -> None:
    from zoo.untrusted.patterns import endless

    assert endless(pattern) == refused


@pytest.mark.parametrize(
    "pattern",
    [r".*.*.*\Zb", r"[^q]*[^q]*[^q]*q", 3 * "(?:a|.)" + ".*.*.*q", 2 * ("(?:" + "|" * 20 + ")") + ".*.*q"],
)
def test_the_worst_patterns_that_are_matched_take_no_second_of_a_name(pattern: str) -> None:
    from zoo.untrusted.patterns import LONGEST_NAME, endless

    assert not endless(pattern)
    start = time.process_time()
    for name in ("." * LONGEST_NAME, "a." * (LONGEST_NAME // 2)):
        assert re.compile(rf"(.*\.)?({pattern})$").match(name) is None
    assert time.process_time() - start < 2  # of both; behind every dot


def test_a_name_longer_than_any_modules_is_not_matched_with_patterns(tmp_path: Path) -> None:
    adapter = Adapter(tmp_path, {"alpha_pattern": {".*q": 1}})
    with pytest.raises(ZooError, match=r"has 130 characters \(limit 128\)"):
        adapter.scale("a." * 65, None, 2)
