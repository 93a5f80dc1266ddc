"""Safetensors cut for tensor-parallel ranks: what can be wrong with a set. (That they are joined rightly, and given
back, is tested with the family that is released so.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zoo.errors import ZooError
from zoo.formats import open_checkpoint

W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Grok1ForCausalLM"]}))
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "pytorch_model-00000-TP-common.safetensors")
    for r in range(8):
        save_file(
            {W1: torch.full((2, 4), float(r))}, tmp_path / f"pytorch_model-00001-TP-{r:03d}.safetensors"
        )
    return tmp_path


def test_slices_are_called_by_their_rank_and_what_is_whole_is_not(folder: Path) -> None:
    ckpt = open_checkpoint(folder)
    assert ckpt.format == "sharded"
    assert ckpt.n_ranks == 8
    assert set(ckpt.tensors) == {"model.norm.weight", *(f"rank{r}.{W1}" for r in range(8))}


@pytest.mark.parametrize("rank", [0, 3, 7])
def test_a_missing_rank_is_named(folder: Path, rank: int) -> None:
    save_file({"x": torch.ones(2)}, folder / "pytorch_model-00002-TP-007.safetensors")
    for r in range(7):
        save_file({"x": torch.ones(2)}, folder / f"pytorch_model-00002-TP-{r:03d}.safetensors")
    (folder / f"pytorch_model-00001-TP-{rank:03d}.safetensors").unlink()
    with pytest.raises(
        ZooError, match=rf"pytorch_model-00001-TP-{rank:03d}\.safetensors is missing \(7 of 8 ranks"
    ):
        open_checkpoint(folder)


def test_ranks_of_different_shapes_disagree(folder: Path) -> None:
    save_file({W1: torch.ones(3, 4)}, folder / "pytorch_model-00001-TP-005.safetensors")
    with pytest.raises(ZooError, match=r"TP-005.*disagree.*w1\.weight.*\[3, 4\] here and F32 \[2, 4\]"):
        open_checkpoint(folder)


def test_ranks_of_different_tensors_disagree(folder: Path) -> None:
    save_file({"other": torch.ones(2, 4)}, folder / "pytorch_model-00001-TP-005.safetensors")
    with pytest.raises(ZooError, match=r"TP-005.*disagree"):
        open_checkpoint(folder)


def test_a_group_cannot_be_both_common_and_cut(folder: Path) -> None:
    save_file({W1: torch.ones(2, 4)}, folder / "pytorch_model-00001-TP-common.safetensors")
    with pytest.raises(ZooError, match="both common and cut"):
        open_checkpoint(folder)
