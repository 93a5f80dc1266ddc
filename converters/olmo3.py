"""Olmo 3: 7B, 32B, Base, Instruct and Think.

OLMo 2 (see there: norms on branch outputs, full-width QK-norm) with
- a window of 4096 on three layers of four (`layer_types`);
- YaRN, with its attention factor given, on the full layers only. Releases have one `rope_theta` and one
  `rope_scaling`: sliding layers have the same theta, unscaled.
"""

from __future__ import annotations

from zoo.config import Config, rope_parameters
from zoo.families import Family
from zoo.spec import Rope, Spec

from . import _dense as dense
from . import olmo2


def spec(c: Config) -> Spec:
    n = c["num_hidden_layers"]
    if "layer_types" in c:
        kinds = c.each_layer("layer_types", n, (dense.FULL, dense.SLIDING))
    else:
        kinds = [dense.FULL if (i + 1) % 4 == 0 else dense.SLIDING for i in range(n)]

    def layer(kind: str) -> tuple[Rope, int | None]:
        sliding = kind == dense.SLIDING
        parameters = rope_parameters(c, kind, scaling=None if sliding else "rope_scaling")
        rope = dense.whole_rope(c, parameters, olmo2.head_dim(c), rounding="last")
        return rope, c["sliding_window"] if sliding else None

    return olmo2.decoder("olmo3", c, [layer(kind) for kind in kinds])


FAMILY = Family("olmo3", ("olmo3",), ("Olmo3ForCausalLM",), spec, olmo2.RULES)
