"""OpenAI's own layout of an open release (the folder `original/`): safetensors under its own names.

`config.json` has keys of its own, by which the folder is known; `dtypes.json` only repeats the headers.
mxfp4 weights are pairs `X.blocks` and `X.scales`; q, k and v are one tensor already.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from zoo import families
from zoo.errors import ZooError
from zoo.formats import safetensors
from zoo.formats.base import Checkpoint, named, read_json

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
    indexed = (root / safetensors.INDEX).exists()
    ckpt = safetensors.open_files(root, names, own, safetensors.INDEX if indexed else None)
    config = families.own_config("openai", own, ckpt.tensors, str(root / "config.json"))
    return replace(ckpt, format="openai", naming=("openai",), config=config)
