"""`zoo.testing.built` by the name of a variant."""

from __future__ import annotations

import tiny

from zoo.testing import built as sides
from zoo.testing.built import Built, decoder

__all__ = ["Built", "built", "decoder"]


def built(name: str, dtype: str = "float32") -> Built:
    variant = tiny.VARIANTS[name]
    return sides.built(tiny.CASES[variant.family], variant, dtype)
