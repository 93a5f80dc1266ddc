"""Where a comparison is computed: on a GPU as on the CPU, and said in the certificate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from verified import canonical, copy, rewrite

import zoo
from zoo.cli import cli
from zoo.errors import ZooError
from zoo.verify import device
from zoo.verify.faults import CATALOGUE

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_the_certificate_names_the_device_and_its_seconds_add_up() -> None:
    cert = zoo.verify(canonical("llama"), device="cpu", write=False)
    assert cert.passed and cert.to_json()["device"]["type"] == "cpu"
    seconds = dict(cert.timing)
    total = seconds.pop("total")
    assert total > 0 and sum(seconds.values()) == pytest.approx(total, abs=0.01)
    assert {"opening", "hashes", "plan and bytes", "reading ours", "oracle", "ours", "metrics"} <= set(
        seconds
    )


@pytest.mark.parametrize("name", ["mps:7", "cuda:99", "tpu", ""])
def test_a_device_that_is_not_here_is_said_before_anything_is_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="device"):
        device.chosen(name)
    run = CliRunner().invoke(
        cli, ["pull", "smollm2-135m", "--to", str(tmp_path / "x"), "--verify", "logits", "--device", name]
    )
    assert run.exit_code == 1 and "device" in str(run.exception) and not list(tmp_path.iterdir())


def test_auto_is_a_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.chosen("auto") == torch.device("cpu")


def test_fp32_is_fp32_while_a_gpu_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _d: device.contextlib.nullcontext())
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with device.exact(torch.device("cuda", 0)):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(was)


@GPU
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["llama", "mimo_v2_flash", "gemma4_shared"])
def test_a_gpu_gives_the_cpus_verdict(name: str, stream: bool, tmp_path: Path) -> None:
    cert = zoo.verify(canonical(name), device="cuda", stream=stream, write=False)
    assert cert.passed and cert.device["name"] == torch.cuda.get_device_name()
    wrong = rewrite(copy(canonical(name), tmp_path / "wrong"), CATALOGUE["norm_eps"].inject)
    source = json.loads((wrong / "zoo.json").read_text())["source"]["path"]
    found = [
        zoo.verify(wrong, source, device=d, level="logits", stream=stream, write=False)
        for d in ("cpu", "cuda")
    ]
    assert not any(c.passed for c in found)
    assert found[0].diagnosis["layer"] == found[1].diagnosis["layer"]  # type: ignore[index]


@GPU
def test_faults_are_caught_on_a_gpu_too() -> None:
    cert = zoo.verify(canonical("llama"), device="cuda", self_test=True, write=False)
    assert cert.passed and cert.faults is not None and cert.faults["caught"] == cert.faults["applicable"]


def test_what_is_needed_is_said_and_what_does_not_fit_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.verify import need, run

    said: list[str] = []
    monkeypatch.setattr(need, "available", lambda _device: 100_000)
    monkeypatch.setattr(need, "WORTH_IT", 0)
    cert = run.verify(canonical("llama"), write=False, progress=said.append)
    assert cert.passed and cert.oracle["streamed"] and any("can be had" in text for text in said)
    (left,) = (text for text in cert.not_checked if text.startswith("decode"))
    assert "both sides take" in left and "100 kB can be had" in left
    assert cert.need is not None and cert.need["seconds"] > 0
    files = sum(x["bytes"] for side in (cert.canonical, cert.source) for x in side["files"].values())  # type: ignore[index]
    assert cert.need["reads"] == pytest.approx(2 * files, rel=0.01)  # hashed, and streamed once
    whole = run.verify(canonical("llama"), stream=False, write=False)
    assert "streamed" not in whole.oracle
    assert whole.need is not None and whole.need["memory"] > 1.5 * cert.need["memory"]
    monkeypatch.setattr(need, "available", lambda _device: 1 << 40)
    assert "streamed" not in run.verify(canonical("llama"), level="logits", write=False).oracle
