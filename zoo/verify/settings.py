"""How a comparison is run: what the caller of `verify` chose, in one record that all rooms are handed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from zoo.verify.certificate import NUMERIC
from zoo.verify.stage import Clock, Progress, silent


@dataclass(frozen=True)
class Settings:
    """How far, in what arithmetic, where; and who hears of it."""

    wanted: tuple[str, ...]
    """Levels, in their order."""
    dtype: str
    device: torch.device
    stream: bool
    """One layer in memory at a time, of both sides."""
    max_length: int
    """Limits of the model (windows, ...) are crossed up to this many tokens."""
    n_greedy: int
    """Tokens that both sides generate."""
    say: Progress = silent
    clock: Clock = field(default_factory=Clock)

    @property
    def numeric(self) -> list[str]:
        """The levels wanted that run both sides."""
        return [n for n in NUMERIC if n in self.wanted]
