"""OpenAI's own layout of an open release (the folder `original/`): safetensors under its own names.

`config.json` has keys of its own, by which the folder is known; `dtypes.json` only repeats the headers.
mxfp4 weights are pairs `X.blocks` and `X.scales`; q, k and v are one tensor already.
"""

from __future__ import annotations

from pathlib import Path

from zoo import families
from zoo.errors import ZooError
from zoo.formats import safetensors
from zoo.formats.base import Checkpoint, TensorRef, add_tensors, carried_files, inside, named, read_json

MAX_OWN = 1 << 20
"""Bytes of their config, which has some 500: another's that is large is not parsed twice."""
_OWN_KEYS = {"num_experts", "experts_per_token", "initial_context_length", "rope_ntk_beta"}


def detect(path: Path) -> bool:
    root = path if path.is_dir() else path.parent
    if not (root / "config.json").is_file() or not named(root, "*.safetensors"):
        return False
    if (root / "config.json").stat().st_size > MAX_OWN:
        return False
    try:
        config = read_json(root / "config.json", "")
    except ZooError:
        return False  # whose turn it is will say so
    return set(config) >= _OWN_KEYS and "architectures" not in config


def open(path: Path) -> Checkpoint:
    """Open the folder `original/` of a release."""
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
    config = families.own_config("openai", own, tensors, str(root / "config.json"))
    return Checkpoint(root, "openai", ("openai",), config, tensors, files, carried_files(root), headers)
