"""A recording stands in for upstream; so does anybody's own code that writes the same file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from verified import ROOT, broken, canonical

import zoo
from zoo.errors import ZooError
from zoo.verify import recording
from zoo.verify.golden import Golden


@pytest.fixture(scope="module")
def golden() -> Path:
    path = ROOT / "llama.golden.safetensors"
    recording.record(canonical("llama"), path, "fp32", 4096)
    return path


def test_a_recording_judges_layers_logits_and_decoding(golden: Path) -> None:
    cert = zoo.verify(canonical("llama"), against=golden, write=False)
    assert cert.passed
    assert [x.name for x in cert.levels] == ["plan", "bytes", "layers", "logits", "decode"]
    live = zoo.verify(canonical("llama"), write=False)
    for name in ("logits", "layers"):
        ours, theirs = cert.level(name), live.level(name)
        assert ours is not None and theirs is not None
        # Bounds are the recorded spread's; a hidden state is judged by its sketch.
        assert [c.bound for c in ours.checks] == pytest.approx([c.bound for c in theirs.checks])
        assert [c.value for c in ours.checks] == pytest.approx([c.value for c in theirs.checks], rel=0.5)


@pytest.mark.parametrize("fault", ["rope_rows_interleaved", "head_off_by_one"])
def test_a_recording_catches_what_upstream_would(golden: Path, fault: str, tmp_path: Path) -> None:
    cert = zoo.verify(broken("llama", fault, tmp_path / "c"), against=golden, level="logits", write=False)
    assert not cert.passed
    assert cert.diagnosis is not None
    assert cert.diagnosis["where"].startswith("layer 1" if fault.startswith("rope") else "the final norm")


def test_upstream_is_not_needed_to_verify_against_a_recording(golden: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        f"import zoo; cert = zoo.verify({str(canonical('llama'))!r}, against={str(golden)!r}, write=False)\n"
        "assert cert.passed and cert.level('decode').verdict == 'passed'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_somebody_elses_code_can_be_the_oracle(tmp_path: Path) -> None:
    """The worked example of docs/verification.md: ids in, logits out, nothing else."""
    recording.inputs(canonical("llama"), tmp_path / "inputs.safetensors", "fp32", 4096)

    vendors_model = tiny.upstream(ROOT / "llama-float32-source")
    asked = load_file(tmp_path / "inputs.safetensors")
    with safe_open(tmp_path / "inputs.safetensors", "pt") as f:
        about = f.metadata()
    answer = dict(asked)
    for b in range(sum(name.startswith("ids.") for name in asked)):
        ids, lengths = asked[f"ids.{b}"], asked[f"lengths.{b}"]
        real = torch.arange(ids.shape[1])[None] < lengths[:, None]
        answer[f"logits.{b}"] = tiny.logits(vendors_model, ids)[real]
    save_file(answer, tmp_path / "vendor.safetensors", metadata=about)

    cert = zoo.verify(canonical("llama"), against=tmp_path / "vendor.safetensors", write=False)
    assert cert.passed
    logits = cert.level("logits")
    assert logits is not None and logits.verdict == "passed"
    assert any("no hidden states" in text for text in cert.not_checked)
    wrong = broken("llama", "norm_eps", tmp_path / "wrong")
    assert not zoo.verify(wrong, against=tmp_path / "vendor.safetensors", level="logits", write=False).passed


@pytest.mark.parametrize("name", ["llama", "glm4_moe", "gemma3n"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_copy_in_lower_precision_agrees_with_a_recording_in_fp32(
    name: str, dtype: str, tmp_path: Path
) -> None:
    recording.record(canonical(name), tmp_path / "g.safetensors", "fp32", 256)
    copied = zoo.convert(ROOT / f"{name}-float32-source", tmp_path / "c", dtype=dtype)
    cert = zoo.verify(copied, against=tmp_path / "g.safetensors", dtype=dtype, write=False)
    assert cert.passed, [c.to_json() for x in cert.levels for c in x.checks if not c.passed]
    logits = cert.level("logits")
    assert logits is not None and logits.verdict == "passed"
    assert any(f"what {dtype} makes of these weights" in c.why for c in logits.checks)


@pytest.mark.parametrize("fault", ["rope_rows_interleaved", "gate_up_swapped", "head_off_by_one"])
def test_a_wrong_copy_in_bf16_does_not(golden: Path, tmp_path: Path, fault: str) -> None:
    wrong = broken("llama", fault, tmp_path / "wrong")
    assert not zoo.verify(wrong, against=golden, dtype="bf16", level="logits", write=False).passed


def test_a_recording_in_lower_precision_is_refused_in_fp32(tmp_path: Path) -> None:
    recording.record(canonical("llama"), tmp_path / "g.safetensors", "bf16", 64)
    with pytest.raises(ZooError, match="recording was made in bf16; verify with --dtype bf16"):
        zoo.verify(canonical("llama"), against=tmp_path / "g.safetensors", write=False)


def test_a_copy_in_bf16_held_to_fp32_is_told_which_dtype_agrees(golden: Path, tmp_path: Path) -> None:
    copied = zoo.convert(ROOT / "llama-float32-source", tmp_path / "c", dtype="bf16")
    cert = zoo.verify(copied, against=golden, level="logits", write=False)
    assert not cert.passed and cert.diagnosis is not None
    assert "verify with --dtype bf16" in cert.diagnosis["suggestions"][0]


def test_a_recording_that_lost_its_metadata_is_called_that(golden: Path, tmp_path: Path) -> None:
    save_file(load_file(golden), tmp_path / "g.safetensors")
    with pytest.raises(ZooError, match=r"g\.safetensors: a recording .* without its metadata.*zoo-golden-1"):
        zoo.verify(canonical("llama"), against=tmp_path / "g.safetensors", write=False)


def test_a_recording_is_known_by_what_it_holds_and_not_by_its_name(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "answer.bin").write_bytes(golden.read_bytes())
    cert = zoo.verify(canonical("llama"), against=tmp_path / "answer.bin", level="logits", write=False)
    assert cert.passed and cert.oracle["kind"] == "golden"


def test_a_recording_with_logits_for_the_padding_is_refused(golden: Path, tmp_path: Path) -> None:
    tensors = load_file(golden)
    with safe_open(golden, "pt") as f:
        about = f.metadata()
    tensors["logits.0"] = torch.cat([tensors["logits.0"], tensors["logits.0"][:1]])
    save_file(tensors, tmp_path / "g.safetensors", metadata=about)
    with pytest.raises(ZooError, match="real positions"):
        zoo.verify(canonical("llama"), against=tmp_path / "g.safetensors", write=False)


def test_an_output_that_cannot_be_written_is_said_before_upstream_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for write in (recording.record, recording.inputs):
        with pytest.raises(ZooError, match="cannot be written: No such file or directory"):
            write(canonical("llama"), tmp_path / "none" / "g.safetensors", "fp32", 64)
    monkeypatch.setattr(recording, "upstream_available", lambda: False)
    with pytest.raises(ZooError, match="transformers is not installed"):
        recording.record(canonical("llama"), tmp_path / "g.safetensors", "fp32", 64)


def edited(
    golden: Path, to: Path, tensors: dict[str, torch.Tensor] | None = None, **about: Any
) -> tuple[dict[str, torch.Tensor], Path]:
    """A copy of a recording with other `tensors` and other metadata, and the tensors that it has."""
    had = load_file(golden)
    with safe_open(golden, "pt") as f:
        told = json.loads(f.metadata()["zoo"])
    path = to / "edited.safetensors"
    save_file(had | (tensors or {}), path, metadata={"zoo": json.dumps(told | about)})
    return had, path


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("lengths.0", torch.tensor(3)),
        ("logits.0", torch.ones(2, 160, dtype=torch.uint16)),
        ("logits.0", torch.ones(0, 160)),
        ("directions", torch.ones(64, 2).to(torch.float8_e4m3fn)),
        ("states.0.0", torch.ones(0, 2)),
        ("greedy", torch.tensor(3)),
    ],
)
def test_a_tensor_of_another_dtype_or_other_axes_is_refused(
    golden: Path, tmp_path: Path, name: str, tensor: torch.Tensor
) -> None:
    had, path = edited(golden, tmp_path, {name: tensor})
    with pytest.raises(ZooError, match=rf"{name} is .*; expected [12] axes, not empty, of "):
        made = Golden(path)
        made._largest()
        made.drive(made.inputs.batches, lambda *_: None, lambda *_: None)
        made.greedy(had["prompt"][None], 4)


def test_directions_that_hide_everything_are_refused(golden: Path, tmp_path: Path) -> None:
    had, _ = edited(golden, tmp_path)
    zeros = {n: torch.zeros_like(t) for n, t in had.items() if n == "directions" or n.startswith("states.")}
    _, path = edited(golden, tmp_path, zeros)
    with pytest.raises(ZooError, match=r"edited.safetensors: 'directions' has columns that are zero"):
        zoo.verify(canonical("llama"), against=path, write=False)


def test_recorded_states_of_zeros_fail_where_ours_are_not(golden: Path, tmp_path: Path) -> None:
    had, _ = edited(golden, tmp_path)
    _, path = edited(golden, tmp_path, {n: t * 0 for n, t in had.items() if n.startswith("states.")})
    layers = zoo.verify(canonical("llama"), against=path, level="layers", write=False).level("layers")
    assert layers is not None and layers.verdict == "failed"
    assert any(c.value == float("inf") for c in layers.checks)


def test_a_recording_of_another_family_is_refused(golden: Path, tmp_path: Path) -> None:
    assert Golden(golden, "llama").about["family"] == "llama"
    _, path = edited(golden, tmp_path, family="qwen2")
    with pytest.raises(
        ZooError, match=r"edited.safetensors: recorded of a model of family qwen2; expected llama"
    ):
        zoo.verify(canonical("llama"), against=path, write=False)


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_ids_beyond_the_vocabulary_are_refused(golden: Path, tmp_path: Path, wrong: int) -> None:
    had, _ = edited(golden, tmp_path)
    ids = had["ids.0"].clone()
    ids[0, 0] = wrong
    _, path = edited(golden, tmp_path, {"ids.0": ids})
    with pytest.raises(
        ZooError, match=rf"edited.safetensors: ids.0 has ids from .*{wrong}.*; expected 0 to "
    ):
        zoo.verify(canonical("llama"), against=path, write=False)


@pytest.mark.parametrize("spread", [{"x": 1}, [1], {"ways": None, "logits": {"max": "big"}}, {"ways": 3}])
def test_a_spread_that_is_none_is_refused(golden: Path, tmp_path: Path, spread: Any) -> None:
    _, path = edited(golden, tmp_path, spread=spread)
    with pytest.raises(ZooError, match=r"edited.safetensors: 'spread' is .*record it again"):
        zoo.verify(canonical("llama"), against=path, write=False)
