"""The task pages are run from the first block to the last, on a small model and against a Hub on loopback."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
import verified
from hub_client import pointed_at
from hub_server import HubServer
from huggingface_hub import constants
from test_merge import adapter, lora

import zoo

TASKS = pages.DOCS / "tasks"
pytestmark = pytest.mark.skipif(not TASKS.is_dir(), reason="installed without its documentation")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder, and a Hub that has the pages' release under its name and takes what is pushed."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer() as hub, pointed_at(hub, tmp_path / "home", monkeypatch, 10):
        hub.repo("HuggingFaceTB/SmolLM2-135M-Instruct").commit(pages.release())
        hub.tokens["hf_me"] = set()
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        work = tmp_path / "work"
        work.mkdir()
        monkeypatch.chdir(work)
        yield work


@pytest.mark.proof  # test_docs_training runs most of it
def test_training(here: Path) -> None:
    a, b = lora(torch.empty(64, 64))
    module = "model.layers.0.self_attn.q_proj"
    adapter(here / "ADAPTER", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})
    torch.manual_seed(0)
    names: dict[str, Any] = {"batches": [torch.randint(288, (2, 24)) for _ in range(3)]}
    pages.run(TASKS / "training.md", names)
    ids = names["batches"][0]
    with torch.no_grad():
        ours = zoo.load("tuned")(ids)
        assert not torch.allclose(ours, zoo.load("smollm2-135m")(ids), atol=1e-2), "nothing was learnt"
        torch.testing.assert_close(names["theirs"].eval()(ids).logits, ours, rtol=1e-4, atol=1e-4)


def test_the_answer_that_verification_explains(here: Path) -> None:
    zoo.convert(pages.release(), here / "smollm2-135m")
    pages.run(pages.DOCS / "verification.md", {}, first=2)


@pytest.mark.proof
def test_gguf(here: Path) -> None:
    pages.run(TASKS / "gguf.md", {})


@pytest.mark.proof
def test_quick_start(here: Path) -> None:
    pages.run(pages.DOCS / "quickstart.md", {})


@pytest.mark.proof
def test_quantised(here: Path) -> None:
    from test_quant_models import fp8_blocks

    from zoo.testing.build import read_config, read_tensors, write_config, write_tensors

    release = verified.copy(pages.release(), here / "model-fp8")
    tensors, config = fp8_blocks(read_tensors(release))
    write_tensors(release, tensors)
    write_config(release, read_config(release) | {"quantization_config": config})
    pages.run(TASKS / "quantised.md", {})


def test_compare(here: Path) -> None:
    pages.run(TASKS / "compare.md", {})


def test_cluster(here: Path) -> None:
    verified.copy(pages.release(), here / "SRC")
    pages.run(TASKS / "cluster.md", {})


@pytest.mark.proof
def test_publish(here: Path) -> None:
    pytest.importorskip("model_signing", reason="zoo-weights[sign] is not installed")
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    zoo.convert(verified.copy(pages.release(), here / "SRC"), here / "CANON")
    for block in pages.blocks(TASKS / "publish.md"):
        if block.title.startswith("With OpenSSL"):
            subprocess.run(["sh", "-ec", block.code], check=True, capture_output=True)
    pages.run(TASKS / "publish.md", {})
