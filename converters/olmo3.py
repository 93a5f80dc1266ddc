"""Olmo 3: 7B, 32B, Base, Instruct and Think.

OLMo 2 (see there: norms on branch outputs, full-width QK-norm) with
- a window of 4096 on three layers of four (`layer_types`);
- YaRN, with its attention factor given, on the full layers only. Releases have one `rope_theta` and one
  `rope_scaling`: sliding layers have the same theta, unscaled.
"""

from __future__ import annotations

from zoo.family import Config, Disagreement, Family, Rope, Spec, read

from . import olmo2


def spec(c: Config) -> Spec:
    def layer(kind: str) -> tuple[Rope, int | None]:
        sliding = kind == read.SLIDING
        parameters = read.rope_parameters(c, kind, scaling=None if sliding else "rope_scaling")
        rope = read.whole_rope(c, parameters, read.head_dim(c), rounding="last")
        return rope, c["sliding_window"] if sliding else None

    return olmo2.decoder("olmo3", c, [layer(kind) for kind in read.layer_types(c, read.every(4))])


DISAGREEMENTS = (
    Disagreement(
        about="which layers YaRN stretches",
        upstream="the full ones only",
        vendor="the full ones only (OLMo-core); a popular copy written from scratch stretches all",
        follows="vendor",
        why="it is how the release was trained",
        source="https://github.com/allenai/OLMo-core",
        since="2025-11",
    ),
)
FAMILY = Family("olmo3", ("olmo3",), ("Olmo3ForCausalLM",), spec, olmo2.RULES, disagreements=DISAGREEMENTS)
