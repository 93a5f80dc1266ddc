"""One small gallery that the tests of its files and those in a browser look at: a release of every kind, and one that is not drawn."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from zoo import gallery

NAMES = (
    "gpt2-xl", "llama-3.1-8b", "olmo-2-7b", "gemma-3-27b", "deepseek-v3", "deepseek-r1", "gpt-oss-20b", "qwen3-next-80b-a3b-instruct",
    "kimi-linear-48b-a3b", "nemotron-3-nano-30b-a3b", "bloom-7b1", "gemma-4-e2b-it", "kimi-k2.6",
)  # fmt: skip
UNDRAWN = "kimi-k2.6"
_HOLDER = tempfile.TemporaryDirectory(prefix="zoo-gallery-")


@functools.cache
def site() -> Path:
    """The folder that `zoo gallery` wrote; once a process."""
    out = Path(_HOLDER.name) / "site"
    gallery.write(out, NAMES)
    return out


@functools.cache
def rows() -> dict[str, dict[str, Any]]:
    """The releases in its gallery.json, by name, each with what is counted of its architecture."""
    data = json.loads((site() / "gallery.json").read_text())
    return {r["name"]: r | data["architectures"].get(r.get("drawing"), {}) for r in data["releases"]}
