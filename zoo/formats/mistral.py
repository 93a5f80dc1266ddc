"""Mistral's own files: `consolidated*.safetensors` and `params.json`.

The same safetensors as elsewhere under other names; q and k rows are in interleaved RoPE order. fp8
releases hold `qscale_weight` and `qscale_act` beside a weight, one number each, or `weight_scale` per block.
A folder that also holds the release in Hugging Face's names is read by those.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from zoo import families
from zoo.errors import ZooError
from zoo.formats.base import Checkpoint, read_json
from zoo.formats.safetensors import open_files
from zoo.formats.sets import weight_map

INDEX = "consolidated.safetensors.index.json"


def detect(path: Path) -> bool:
    if path.is_file():
        return path.name.startswith("consolidated") and path.suffix == ".safetensors"
    own = (path / "params.json").exists() and any(path.glob("consolidated*.safetensors"))
    return own and not any(path.glob("model*.safetensors"))


def open(path: Path) -> Checkpoint:
    """Open a folder of `params.json` and `consolidated*.safetensors`."""
    root = path if path.is_dir() else path.parent
    where = root / "params.json"
    params = read_json(where, "Mistral's files need it to be understood")
    ckpt = open_files(root, _weight_files(root), {}, INDEX if (root / INDEX).exists() else None)
    config = families.own_config("mistral", params, ckpt.tensors, str(where))
    return replace(
        ckpt, format="mistral", naming=("mistral",), config=config,
        synthesised={"config.json": (json.dumps(config, indent=2) + "\n").encode()},
    )  # fmt: skip


def _weight_files(root: Path) -> list[str]:
    if (root / INDEX).exists():
        return sorted({*weight_map(root / INDEX, "delete it if consolidated.safetensors is whole").values()})
    names = sorted(p.name for p in root.glob("consolidated*.safetensors"))
    if len(names) > 1:
        raise ZooError(f"{root}: {len(names)} shards but no {INDEX}: is the download complete?")
    return names
