"""Canonical folders of tiny variants, for the verifier's tests: made once per run, copied where one is damaged."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.spec import Spec
from zoo.verify.certificate import Certificate
from zoo.verify.faults import CATALOGUE, Subject

_HOLDER = tempfile.TemporaryDirectory(prefix="zoo-tests-")
ROOT = Path(_HOLDER.name)

# Families that between them have every part and switch in which the verifier can seed a fault (test_verify_faults holds them
# to that). What depends on the parts is tested with these; `make proofs` does the same with every variant of every family.
COVERING = (
    "apertus", "bloom", "deepseek_v4", "ernie4_5_moe", "falcon_h1", "gemma2", "gemma3n", "gemma4", "glm_moe_dsa", "gpt_oss", "gptj", "jamba", "lfm2",
    "llama4", "minicpm3", "nanochat", "olmo", "opt", "phimoe", "qwen3_5_moe", "step3p5",
)  # fmt: skip


@functools.cache
def canonical(name: str, dtype: str = "float32") -> Path:
    """The variant, converted. Not to be changed: see `copy`."""
    source = tiny.make(name, ROOT / f"{name}-{dtype}-source", dtype=dtype)
    return zoo.convert(source, ROOT / f"{name}-{dtype}")


def copy(folder: Path, dst: Path) -> Path:
    shutil.copytree(folder, dst)
    return dst


def rewrite(folder: Path, change: Callable[[Subject], Subject]) -> Path:
    """Change the tensors or the Spec of a canonical folder on disk."""
    files = sorted(folder.glob("model-*.safetensors"))
    tensors = {k: t for f in files for k, t in load_file(f).items()}
    description = json.loads((folder / "zoo.json").read_text())
    new = change(Subject(Spec.from_dict(description["spec"]), tensors, description.get("quant", {})))
    for f in files:
        f.unlink()
    name = "model-00001-of-00001.safetensors"
    save_file({k: t.clone().contiguous() for k, t in new.tensors.items()}, folder / name)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    aside = {k: f for k, f in index["weight_map"].items() if f.startswith("extras-")}
    index["weight_map"] = dict.fromkeys(new.tensors, name) | aside
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    description["spec"] = new.spec.to_dict()
    (folder / "zoo.json").write_text(json.dumps(description))
    return folder


def broken(name: str, fault: str, dst: Path) -> Path:
    """A copy of the variant's canonical folder with one fault of the catalogue in it."""
    return rewrite(copy(canonical(name), dst), CATALOGUE[fault].inject)


def with_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    return rewrite(folder, lambda s: s.put({name: change(s.tensors[name])}))


def faults_unseen(faults: dict[str, Any]) -> list[str]:
    """What a verifier's own test lacks: faults that it missed, that changed nothing, or that only a comparison of bytes saw,
    which would see nothing if the rules themselves were wrong."""
    results = faults["results"]
    numbers = [r["fault"] for r in results if r["level"] in ("layers", "logits")]
    lacks = [f"{r['fault']} is not caught" for r in results if not r["caught"]]
    lacks += [f"{name} is without effect" for name in faults["without_effect"]]
    lacks += [
        f"{r['fault']} moves no number" for r in results if r["kind"] == "spec" and r["fault"] not in numbers
    ]
    if not len(numbers) >= 0.95 * faults["applicable"] >= 20:
        lacks.append(
            f"{len(numbers)} of {faults['applicable']} faults move numbers; at least 20 and 95 % of them should"
        )
    return lacks


def streams_alike(folder: Path, whole: Certificate) -> bool:
    """Whether a model streamed layer by layer gives to the bit the figures of one that was loaded (`level="logits"`)."""
    streamed = zoo.verify(folder, level="logits", stream=True, write=False)
    level = streamed.level("logits")
    # A class with one attention has no spread of its own when it streams: that would take a second pass.
    spread = level is not None and bool(level.figures["spread"]["ways"])
    return streamed.passed and figures(streamed, spread) == figures(whole, spread)


def figures(cert: Certificate, spread: bool = True) -> list[Any]:
    layers, logits = cert.level("layers"), cert.level("logits")
    assert layers is not None and logits is not None
    keys = ("error", "kl", "tokens", *(["spread"] if spread else []))
    by_layer = [{k: v for k, v in x.items() if k != "spread" or spread} for x in layers.figures["layers"]]
    return [by_layer, {k: logits.figures[k] for k in keys}]
