"""The room that a streamed pass is left beside what is copied ahead: what was counted on paper, counted again of a run."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_verify_stream import Copies
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zoo
from zoo.kernels import product
from zoo.testing import build
from zoo.verify import metrics, room
from zoo.verify.stream import StreamedTransformers

HISTOGRAMS = 5 << 20
"""Of the metrics, on the CPU wherever the pass computes."""


class Held(TorchDispatchMode):
    """Counts bytes of storages that operations made and that are alive: of all threads in which it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.lock = threading.RLock()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not t.is_meta:
                made = t.untyped_storage()
                if made._cdata not in given:
                    self._add(made.nbytes())
                    weakref.finalize(made, self._add, -made.nbytes())
        return out

    def _add(self, n: int) -> None:
        with self.lock:
            self.now += n
            self.most = max(self.most, self.now)


CASES = {
    # the head's part: a vocabulary that is most of the model
    "logits": ("llama", {"vocab_size": 4096}, "bf16"),
    # a layer's: weights made of others, a second way in fp32, experts
    "experts": ("gpt_oss", {"intermediate_size": 256, "hidden_size": 256, "num_local_experts": 16}, "bf16"),
    "stacked": ("qwen3_moe", {"moe_intermediate_size": 256, "hidden_size": 256, "num_experts": 16}, "fp32"),
    # that of attention's scores, over a window
    "scores": ("gemma2", {"sliding_window": 500, "vocab_size": 512}, "bf16"),
}


def test_the_room_of_every_familys_layers_is_known_where_these_differ_too() -> None:
    for name in tiny.MAIN.values():
        config = tiny.VARIANTS[name].build()[0].get_text_config()
        assert room._highest(config, "num_attention_heads") >= 1, name
        assert room._highest(config, "num_experts_per_tok") >= 1, name
    differ = tiny.VARIANTS["step3p5"].build()[0].get_text_config()
    with pytest.raises(RuntimeError, match="per-layer"):
        _ = differ.num_attention_heads
    assert room._highest(differ, "num_attention_heads") == max(
        layer.num_attention_heads for layer in differ.per_layer_config
    )


@pytest.mark.parametrize(
    "case", ["logits", *(pytest.param(c, marks=pytest.mark.proof) for c in CASES if c != "logits")]
)
def test_a_pass_holds_no_more_than_the_room_it_is_left_and_not_a_small_part_of_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, settings, dtype = CASES[case]
    variant = tiny.VARIANTS[name]
    model = tiny.perturbed(variant.with_text(variant.settings | settings))
    build.cast(model, "bfloat16")
    model.save_pretrained(tmp_path / "source")
    folder = zoo.convert(tmp_path / "source", tmp_path / "canonical")
    left, held = [], Held()

    def ahead(self: StreamedTransformers, batches: Any, _sharing: Any) -> Copies:
        left.append(self._takes(batches))
        self.around_pass = lambda: held
        return Copies(uncounted=True)

    monkeypatch.setattr(StreamedTransformers, "_ahead", ahead)
    monkeypatch.setattr(room, "PRODUCTS", 0)  # no cuBLAS here
    monkeypatch.setattr(
        product, "_native", lambda _: True
    )  # a CPU without bf16 rounds products of fp32, which no GPU holds
    monkeypatch.setitem(metrics.CHUNK, "cpu", 1 << 18)
    with held:
        assert zoo.verify(folder, level="logits", dtype=dtype, stream=True, write=False).passed
    assert left[0] / 4 <= held.most <= left[0] + HISTOGRAMS
