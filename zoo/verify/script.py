"""Somebody's own code as the oracle: a Python file that defines `logits`, run in this process.

    def logits(ids):            # int64 [T]
        return model(ids)       # floating [T, V], row t: of the token after ids[t]

It may return `(logits, states)` instead, with `states` a list of the hidden state [T, D] after each layer; then layers are
judged too, and the first that departs is named. The file is run as it is: name only files that you trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.verify.oracle import OnLayer


class Script:
    """The oracle that a file defines. Raises ZooError if the file has no function `logits`, or what it gives is none."""

    avoid_ids: frozenset[int] = frozenset()

    def __init__(self, path: Path, dtype: str = "fp32") -> None:
        if not path.is_file():
            raise ZooError(f"{path}: no such file; --oracle takes a Python file that defines logits(ids)")
        self.path, self.dtype = path, dtype
        try:
            found = runpy.run_path(str(path))
        except (
            Exception,
            SystemExit,
        ) as e:  # one that ends here would end the verification, without a verdict
            raise ZooError(f"{path}: raised {type(e).__name__} while it was run: {e}") from e
        self.logits: Any = found.get("logits")
        if not callable(self.logits):
            raise ZooError(
                f"{path}: defines no function logits(ids [T]) -> logits [T, V]; docs/verification.md has one"
            )

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return {"kind": "script", "name": f"logits() of {self.path.name}", "sha256": digest}

    def run(self, ids: Tensor, lengths: Sequence[int], on_layer: OnLayer | None = None) -> Tensor:
        made, layers = [], []
        for row, n in zip(ids, lengths, strict=True):
            logits, states = self._one(row[:n])
            made.append(nn.functional.pad(logits, (0, 0, 0, ids.shape[1] - n)))
            layers.append([nn.functional.pad(x, (0, 0, 0, ids.shape[1] - n)) for x in states])
        if on_layer is not None:
            for i, rows in enumerate(zip(*layers, strict=True)):
                on_layer(i, torch.stack(rows))
        return torch.stack(made)

    def _one(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        try:
            with torch.inference_mode():
                given = self.logits(ids)
        except (Exception, SystemExit) as e:
            raise ZooError(f"{self.path}: logits(ids [{len(ids)}]) raised {type(e).__name__}: {e}") from e
        logits, states = given if isinstance(given, tuple) and len(given) == 2 else (given, [])
        for what, x in (("logits", logits), *(("a state", s) for s in states)):
            if not isinstance(x, Tensor) or x.ndim != 2 or len(x) != len(ids) or not x.is_floating_point():
                has = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise ZooError(
                    f"{self.path}: {what} of {len(ids)} ids came as {has}; expected floating [{len(ids)}, ...]"
                )
        return logits, list(states)

    def second_way(self) -> contextlib.AbstractContextManager[tuple[str, str] | None]:
        return contextlib.nullcontext()

    def greedy(self, ids: Tensor, n: int) -> Tensor | None:
        return None
