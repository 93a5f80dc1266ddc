"""docs/training.md is run: its code in order, its commands, in a folder of small models."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
import verified
from safetensors.torch import load_file
from test_merge import adapter, lora
from test_save import held

import zoo

PAGE = pages.DOCS / "training.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="installed without its documentation")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the page has at hand: a model, an adapter to it, and what torchrun says to its processes."""
    monkeypatch.chdir(tmp_path)
    model = verified.copy(verified.canonical("llama_tied"), tmp_path / "smollm2-135m")
    a, b = lora(torch.empty(60, 36))
    module = "model.layers.0.self_attn.q_proj"
    adapter(tmp_path / "ADAPTER", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    told = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    yield model
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_all_of_the_page_runs_and_the_ways_out_agree(here: Path) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"batches": [torch.randint(131, (2, 24)) for _ in range(3)]}
    pages.run(PAGE, names)
    ids = names["batches"][0]
    ours = zoo.load("tuned")(ids)
    assert not torch.allclose(ours, zoo.load(here)(ids), atol=1e-2), "nothing was learnt"
    with torch.no_grad():
        torch.testing.assert_close(names["theirs"].eval()(ids).logits, ours, rtol=1e-4, atol=1e-4)
    again, tuned = held(Path("tuned-again")), held(Path("tuned"))
    assert all(torch.equal(again[k], t) for k, t in tuned.items())
    assert {t.dtype for t in load_file("tuned-bf16/model.safetensors").values()} == {torch.bfloat16}
    assert all(torch.equal(t, held(here)[k]) for k, t in held(Path("sharded")).items()), "no step was taken"
