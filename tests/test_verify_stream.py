"""Streaming gives the numbers of the unstreamed run within the memory of one layer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from verified import COVERING, ROOT, broken, canonical, figures, streams_alike, with_tensor

import zoo
from zoo.errors import ZooError
from zoo.formats.base import TensorRef
from zoo.formats.canonical import read as read_folder
from zoo.formats.opening import open_checkpoint
from zoo.testing import build, gguf
from zoo.verify import diagnose, exact, reading
from zoo.verify.certificate import Certificate
from zoo.verify.stream import StreamedTransformers

NAMES = [*(tiny.MAIN[family] for family in COVERING), "gemma4_shared", "qwen3_tied"]


@pytest.mark.parametrize("name", NAMES)
def test_every_part_streams_to_the_same_numbers(name: str) -> None:
    assert streams_alike(canonical(name), zoo.verify(canonical(name), level="logits", write=False))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_bf16_files_stream_in_bf16_and_in_fp32(name: str) -> None:
    folder = canonical(name, "bfloat16")
    for dtype in ("bf16", "fp32"):
        streamed = zoo.verify(folder, level="logits", dtype=dtype, stream=True, write=False)
        assert figures(streamed) == figures(zoo.verify(folder, level="logits", dtype=dtype, write=False))


@pytest.mark.parametrize(
    ("name", "fault", "where", "cause"),
    [
        ("llama", "rope_rows_interleaved", "layer 1, attention", "rows of q and k in interleaved RoPE order"),
        ("llama", "norm_stale", "layer 1, norm (ffn_norm)", "is 1 throughout"),
        ("llama", "norm_eps", "layer 0, norm (attn_norm)", "attn_norm.eps"),
        ("llama", "head_off_by_one", "the final norm or the head", "rows of the head shifted"),
        ("llama", "embedding_off_by_one", "the embedding", ""),
        ("qwen3_moe", "gate_up_swapped", "layer 1, feed-forward", "gate and up exchanged"),
        ("qwen3_tied", "norm_stale", "layer 1, attention", "k_norm.weight is 1 throughout"),
        ("gemma3n", "gate_up_swapped", "layer 3, feed-forward", "gate and up exchanged"),
    ],
)
def test_streaming_names_layer_part_and_cause(
    name: str, fault: str, where: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = broken(name, fault, tmp_path / "c")
    built = []
    build = diagnose.build
    monkeypatch.setattr(diagnose, "build", lambda subject: built.append(subject) or build(subject))
    cert = zoo.verify(folder, level="logits", stream=True, write=False)
    assert not cert.passed and cert.diagnosis is not None
    assert cert.diagnosis["where"] == where
    assert any(cause in text for text in cert.diagnosis["suggestions"])
    # one layer is in memory, or two where it reuses keys and values
    layers = {n.split(".")[1] for subject in built for n in subject.tensors if n.startswith("layers.")}
    assert len(layers) <= 2 and built
    if name != "llama":  # of which test_verify_levels says the same of these faults, loaded whole
        whole = zoo.verify(folder, level="logits", write=False).diagnosis
        assert whole is not None and whole["where"] == where


@pytest.mark.parametrize("name", ["qwen3_tied", "qwen3_moe"])
def test_each_weight_is_read_once_and_one_layer_ahead(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By upstream's two ways, ours and the bytes level together (the hashes of whole files are another reading)."""
    folder = read_folder(canonical(name))
    source = open_checkpoint(folder.source["path"])
    called = {(folder.path(t), t.offset): f"canonical {t.name}" for t in folder.tensors.values()}
    called |= {(source.path(t.file), t.offset): f"source {t.name}" for t in source.tensors.values()}
    happened: list[tuple[str, str]] = []
    plain, ahead = reading.mapped_range, reading.read_ahead

    def count(path: Path, offset: int, nbytes: int) -> torch.Tensor:
        happened.append(("read", called[path, offset]))
        return plain(path, offset, nbytes)

    def count_ahead(ranges: list[reading.Range]) -> None:
        happened.extend(("ahead", n) for n in {called[path, offset] for path, offset, _ in ranges})
        ahead(ranges)

    monkeypatch.setattr(reading, "mapped_range", count)
    monkeypatch.setattr(exact, "mapped_range", count)
    monkeypatch.setattr(reading, "read_ahead", count_ahead)
    cert = zoo.verify(folder.root, level="logits", stream=True, write=False)
    assert cert.passed and [x.name for x in cert.levels] == ["plan", "bytes", "layers", "logits"]
    times = Counter(happened)
    layers = {n for n in called.values() if "layers." in n}
    assert {n: times["read", n] for n in layers} == dict.fromkeys(layers, 1)
    assert {n: times["ahead", n] for n in layers} == dict.fromkeys(layers, 1)
    # Of embeddings rows are taken before the layers, and all is read after them.
    assert {times["read", n] for n in called.values()} == {1, 2}
    known = -1  # the last layer that was asked for
    for what, n in happened:
        if (found := re.search(r"layers\.(\d+)\.", n)) is not None:
            layer = int(found[1])
            assert layer <= known + 1 if what == "ahead" else known - 1 <= layer <= known
            known = max(known, layer) if what == "ahead" else known


class Copies:
    """In place of what carries layers to a GPU: copies of what is asked for, one of them with a bit turned."""

    def __init__(self, room: bool = True, wrong: TensorRef | None = None, uncounted: bool = False) -> None:
        """`uncounted`: by numpy, of which torch knows nothing."""
        self.room, self.wrong, self.asked = room, wrong, Counter[reading.Range]()
        self.uncounted = uncounted
        self.coming: dict[reading.Range, torch.Tensor] = {}

    def ask(self, ranges: Iterable[reading.Range]) -> Collection[reading.Range]:
        assert not self.coming, "more than a layer ahead"
        wanted = list(ranges)
        self.asked.update(wanted)
        self.coming = {r: self._copied(r) for r in wanted if self.room}
        for (path, offset, _), t in self.coming.items():
            if self.wrong is not None and (path.name, offset) == (self.wrong.file, self.wrong.offset):
                t[-1] ^= 1
        return list(self.coming)

    def _copied(self, r: reading.Range) -> torch.Tensor:
        there = reading.mapped_range(*r)
        return torch.from_numpy(there.numpy().copy()) if self.uncounted else there.clone()

    def take(self) -> dict[reading.Range, torch.Tensor]:
        taken, self.coming = self.coming, {}
        return taken

    def close(self) -> None:
        self.coming = {}


@pytest.mark.parametrize("name", ["qwen3_tied", "gpt_oss"])
def test_layers_that_are_copied_ahead_are_what_is_compared(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU bytes, too, are compared in the one copy of a weight that all compute with."""
    root = canonical(name, "bfloat16")
    folder = read_folder(root)
    norm = folder.tensors["layers.1.ffn_norm.weight"]

    def ran(ahead: Copies | None) -> Certificate:
        monkeypatch.setattr(
            StreamedTransformers,
            "_ahead",
            lambda self, batches, _sharing: ahead if self._takes(batches) > 0 else None,
        )
        return zoo.verify(root, level="logits", dtype="bf16", stream=True, write=False)

    plain, ahead, no_room = ran(None), Copies(), Copies(room=False)
    for copied in (ahead, no_room):
        cert = ran(copied)
        assert cert.passed and figures(cert) == figures(plain)
        assert cert.level("bytes").figures == plain.level("bytes").figures  # type: ignore[union-attr]
    all_of_it = {(folder.path(t), t.offset, t.nbytes) for t in folder.tensors.values()}
    assert all_of_it <= set(ahead.asked) and set(ahead.asked.values()) == {1}
    differing = ran(Copies(wrong=norm)).level("bytes").figures["differing"]  # type: ignore[union-attr]
    assert differing == {norm.name: 1}


def test_streaming_does_not_decode_and_says_so() -> None:
    cert = zoo.verify(canonical("llama"), stream=True, write=False)
    assert cert.passed and cert.level("decode") is None
    assert any(text.startswith("decode:") for text in cert.not_checked)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("qwen3_moe", {"moe_intermediate_size": 768}),
    ],  # upstream reads no other width of an expert
)
def test_a_gguf_streams_to_the_same_numbers(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    case = tiny.CASES[family]
    _, source = gguf.make(case, case.gguf[0], tmp_path, quant="Q8_0", **settings)
    folder = zoo.convert(source, tmp_path / "canonical")
    whole = zoo.verify(folder, level="logits", write=False)
    assert whole.oracle["note"] is None  # upstream reads the file itself
    assert streams_alike(folder, whole)


def test_a_gguf_that_upstream_cannot_read_is_streamed_through_an_export(tmp_path: Path) -> None:
    case = tiny.CASES["qwen3_moe"]
    _, source = gguf.make(case, case.gguf[0], tmp_path)
    cert = zoo.verify(zoo.convert(source, tmp_path / "canonical"), level="logits", stream=True, write=False)
    assert cert.passed
    assert "gate_up_proj, whose shape is [6, 1536, 36]" in cert.oracle["note"]


def test_a_file_that_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="verify this one without --stream"):
        StreamedTransformers(tmp_path / "model.bin")


GROWTH = """
import json, sys, torch, transformers
from zoo.verify.run import verify
def high():
    lines = (line.split(":") for line in open("/proc/self/status"))
    return {k: int(v.split()[0]) * 1024 for k, v in lines if k in ("VmHWM", "VmPeak")}
verify(sys.argv[1], level="logits", stream=True, write=False)  # whatever is imported or allocated once
before = high()
for folder, way in zip(sys.argv[2::2], sys.argv[3::2]):
    cert = verify(folder, level="logits", stream=way == "stream", write=False)
    after = high()
    print(json.dumps({"verdict": cert.verdict} | {k: after[k] - before[k] for k in after}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", [pytest.param("dense", marks=pytest.mark.proof), "moe"])
def test_memory_grows_by_a_layer_not_by_the_checkpoint(kind: str, tmp_path: Path) -> None:
    """Layers of 8 MB in fp32, 14 of them: what benchmarks/verify.py does with gigabytes under a hard limit."""
    settings = {
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "num_hidden_layers": 14,
    }
    if kind == "dense":
        name, settings = "llama", settings | {"intermediate_size": 2400}
        layer = 4 * (3 * 2400 * 256 + 3 * 256 * 256)
    else:
        name, settings = (
            "qwen3_moe",
            settings | {"moe_intermediate_size": 128, "num_experts": 20, "mlp_only_layers": []},
        )
        layer = 4 * (20 * 3 * 128 * 256 + 3 * 256 * 256)
    folder = large(name, settings, tmp_path)
    runs = [(folder, "stream"), (folder, "whole")]
    if kind == "dense":
        runs.insert(1, (large(name, settings | {"num_hidden_layers": 28}, tmp_path / "deep"), "stream"))
    else:
        wrong = Path(shutil.copytree(folder, tmp_path / "wrong"))
        runs.insert(1, (with_tensor(wrong, "layers.7.moe.gate_up.weight", lambda t: t.flip(-2)), "stream"))
    streamed, second, whole = growth(runs)
    assert streamed["verdict"] == whole["verdict"] == "passed"
    assert streamed["VmHWM"] <= 2.5 * layer + (32 << 20)
    if (
        kind == "dense"
    ):  # twice the layers: no more memory, nor address space, which is what a limit is set on
        assert second["verdict"] == "passed"
        assert all(second[k] - streamed[k] <= 2 * layer for k in ("VmHWM", "VmPeak"))
    else:  # a failure takes little more: experts stay as stored while its cause is looked for
        assert second["verdict"] == "failed"
        assert second["VmHWM"] <= 6 * layer + (32 << 20)
        assert streamed["VmPeak"] <= 2.5 * layer + (64 << 20)
    assert whole["VmHWM"] >= 14 * layer


def test_a_search_that_runs_out_of_memory_leaves_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(diagnose, "one_layer", full)
    folder = broken("llama", "gate_up_swapped", tmp_path / "c")
    cert = zoo.verify(folder, level="logits", stream=True, write=False)
    assert not cert.passed and cert.diagnosis is not None
    assert cert.diagnosis["where"] == "layer 1"
    assert "the search for the cause ended early: can't allocate memory" in cert.diagnosis["suggestions"]


def large(name: str, settings: dict[str, Any], tmp_path: Path) -> Path:
    variant = tiny.VARIANTS[name].with_text(tiny.VARIANTS[name].settings | settings)
    model = tiny.perturbed(variant)
    build.cast(model, "bfloat16")
    model.save_pretrained(tmp_path / "source", max_shard_size="20MB")
    return zoo.convert(tmp_path / "source", tmp_path / "canonical")


def growth(runs: list[tuple[Path, str]]) -> list[dict[str, Any]]:
    """What each of the runs, one after the other in one process, took at most, and its verdict."""
    env = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    env["MALLOC_ARENA_MAX"] = (
        "1"  # each thread's arena takes 64 MiB of addresses, and more cores make more threads
    )
    args = [sys.executable, "-c", GROWTH, str(canonical("llama")), *(str(x) for run in runs for x in run)]
    out = subprocess.run(args, check=True, capture_output=True, text=True, env=env)
    return [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]


def test_nothing_is_left_in_the_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    zoo.verify(canonical("llama"), level="logits", stream=True, write=False)
    assert not list(tmp_path.iterdir())
    assert ROOT.exists()
