"""OpenAI's own layout of an open release (the folder `original/`): safetensors under its own names.

`config.json` has keys of its own, by which the folder is known; `dtypes.json` only repeats the headers.
mxfp4 weights are pairs `X.blocks` and `X.scales`; q, k and v are one tensor already.
"""

from __future__ import annotations

import json
from pathlib import Path

from zoo.formats import safetensors
from zoo.formats.base import Checkpoint, TensorRef, add_tensors, carried_files, inside, named, read_json

_OWN_KEYS = {"num_experts", "experts_per_token", "initial_context_length", "rope_ntk_beta"}


def detect(path: Path) -> bool:
    root = path if path.is_dir() else path.parent
    if not (root / "config.json").is_file() or not named(root, "*.safetensors"):
        return False
    try:
        config = json.loads((root / "config.json").read_bytes())
    except (ValueError, RecursionError):
        return False  # whose turn it is will say so
    return isinstance(config, dict) and _OWN_KEYS <= set(config) and "architectures" not in config


def open(path: Path) -> Checkpoint:
    """Open the folder `original/` of a release."""
    from converters import _params

    root = path if path.is_dir() else path.parent
    own = read_json(root / "config.json", "a checkpoint needs its config to be understood")
    names = (
        safetensors.weight_files(root)
        if (root / safetensors.INDEX).exists()
        else named(root, "*.safetensors")
    )
    tensors: dict[str, TensorRef] = {}
    files: dict[str, int] = {}
    headers: dict[str, bytes] = {}
    for name in names:
        file = inside(root, name, str(root))
        files[name] = file.stat().st_size
        headers[name] = raw = safetensors.read_header(file)
        add_tensors(tensors, safetensors.parse_header(raw, name, files[name], str(file)), file)
    if (root / safetensors.INDEX).exists():
        index = read_json(root / safetensors.INDEX, "")["weight_map"]
        safetensors.check_index(index, tensors, root / safetensors.INDEX)
    mxfp4 = any(name.endswith(".blocks") for name in tensors)
    config = _params.openai(own, "unembedding.weight" not in tensors, mxfp4, str(root / "config.json"))
    return Checkpoint(root, "openai", ("openai",), config, tensors, files, carried_files(root), headers)
