"""Verification of what upstream cannot simply load: quantised releases, and formats it has no reader for."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from test_quant_models import MODELS, quantised

import zoo
from zoo.errors import ZooError

STREAMABLE = [key for key in MODELS if "int4" not in key]


def converted(key: str, tmp_path: Path) -> Path:
    name, settings, quantise, _ = MODELS[key]
    return zoo.convert(quantised(name, settings, quantise, tmp_path / "release"), tmp_path / "canonical")


@pytest.mark.parametrize("key", MODELS)
def test_a_quantised_release_agrees_with_upstreams_own_dequantisation_and_its_faults_are_caught(
    key: str, tmp_path: Path
) -> None:
    cert = zoo.verify(converted(key, tmp_path), level="logits", self_test=True, write=False)
    assert cert.passed and not cert.not_checked
    assert cert.faults is not None
    in_scales = {r["fault"]: r["level"] for r in cert.faults["results"] if r["fault"].startswith("scale_")}
    assert {"scale_block_off", "scale_ignored"} <= set(in_scales)
    assert set(in_scales.values()) == {"layers"}


@pytest.mark.parametrize("key", STREAMABLE)
def test_a_quantised_release_streams_to_the_same_numbers(key: str, tmp_path: Path) -> None:
    folder = converted(key, tmp_path)
    streamed, whole = (
        zoo.verify(folder, level="logits", stream=s, write=False).level("logits") for s in (True, False)
    )
    assert streamed is not None and whole is not None
    assert streamed.verdict == "passed"
    assert streamed.figures["error"] == whole.figures["error"]


def test_what_upstream_cannot_dequantise_by_layers_is_refused(tmp_path: Path) -> None:
    (key,) = set(MODELS) - set(STREAMABLE)
    with pytest.raises(ZooError, match="verify without --stream"):
        zoo.verify(converted(key, tmp_path), level="logits", stream=True, write=False)


def test_a_format_upstream_cannot_read_is_compared_through_an_export_and_the_certificate_says_so(
    tmp_path: Path,
) -> None:
    source = tiny.make_mistral_format("mistral_large3", tmp_path / "release")
    cert = zoo.verify(zoo.convert(source, tmp_path / "canonical"), level="logits", write=False)
    assert cert.passed
    assert "a mistake that import and export share would not show" in cert.oracle["note"]
    assert cert.rules is not None and cert.rules["naming"] == "mistral"
