"""How a release is meant to be sampled: generation_config.json, as transformers' `generate(do_sample=True)` takes it.

Facts: transformers 5.23, `generation/configuration_utils.py` (what an absent field stands for) and `generation/utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import inside, read_json

FILE = "generation_config.json"
# Other fields that move what is drawn, with the values that do not. None is followed.
_OTHERS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "typical_p", "guidance_scale", "num_beams"), (1,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(
        """min_p top_h bad_words_ids sequence_bias suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
        exponential_decay_length_penalty watermarking_config""".split(),
        (),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """See `zoo.model.generate.probabilities`."""

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0

    def __str__(self) -> str:
        return f"temperature {self.temperature:g}, top_k {self.top_k}, top_p {self.top_p:g}"


def read(root: Path) -> tuple[Sampling, list[str]]:
    """How the release in the folder `root` is sampled, and notes on what is not followed. Raises ZooError for a value
    that can't be drawn with."""
    file = root / FILE
    said = read_json(inside(root, FILE, str(root)), "it says how to sample") if file.is_file() else {}
    notes = [] if said else [f"{FILE} is not there: sampled as transformers does without it"]

    def number(name: str, allowed: Callable[[Any], bool], expected: str) -> Any:
        value = said.get(name)
        if value is None:
            return getattr(Sampling, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (math.isfinite(value) and allowed(value))
        ):
            raise ZooError(f"{file}: {name} is {str(value)[:40]!r}; expected {expected}")
        return value

    sampling = Sampling(
        float(number("temperature", lambda x: 0 < x < math.inf, "a number above 0; without --sample it is greedy")),
        int(number("top_k", lambda x: x >= 0 and x == int(x), "a whole number, 0 for all")),
        float(number("top_p", lambda x: 0 < x <= 1, "a number above 0, up to 1")),
    )  # fmt: skip
    odd = [
        f"{name} ({str(said[name])[:40]})"
        for name, neutral in _OTHERS.items()
        if said.get(name) is not None and said[name] not in (*neutral, [], {})
    ]
    if odd:
        notes.append(f"{FILE}: {', '.join(odd)} not followed")
    return sampling, notes
