"""Which release a quantised one is a copy of, by what is published alone.

`base` answers where all of this holds, and never guesses:
- the release is quantised and its name is another's, "-", and the name of a scheme (`SCHEMES`);
- both are of one family;
- both have a published size, and it is the same;
- no other figure that both publish differs: active parameters, context.
"""

from __future__ import annotations

import re

from zoo import manifest
from zoo.manifest import Manifest

SCHEMES = ("awq", "gptq-int4", "gptq-int8", "fp8", "nvfp4", "mxfp4", "int4", "int8", "w8a8", "w4a16", "mlx-4bit", "bnb-4bit")  # fmt: skip
_COPY = re.compile(rf"(.+?)-(?:{'|'.join(SCHEMES)})")


def base(m: Manifest) -> Manifest | None:
    """The release that `m` is a quantised copy of, or None where that is not certain."""
    named = _COPY.fullmatch(m.name)
    if not m.quantization or named is None or named[1] not in manifest.stems():
        return None
    other = manifest.find(named[1])
    if other.family != m.family or not m.params_total or other.params_total != m.params_total:
        return None
    figures = ((m.params_active, other.params_active), (m.context_length, other.context_length))
    return None if any(a and b and a != b for a, b in figures) else other
