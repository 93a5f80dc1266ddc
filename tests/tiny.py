"""The small checkpoints of zoo's own families, by name: `zoo.testing` over the cases in `tests/families`.

make(name, dst)              write a variant as a release would have it
upstream(path)               load it with transformers; then logits(model, tokens(name))
released_tensors(config)     every tensor a release of this config has, without any weight
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import families as modules

from zoo import families, testing
from zoo.testing import FamilyCase, Variant, build, names
from zoo.testing.build import fresh, logits, perturbed

__all__ = ["fresh", "logits", "perturbed"]

CASES: dict[str, FamilyCase] = testing.cases(modules)
VARIANTS: dict[str, Variant] = {v.name: v for case in CASES.values() for v in case.variants}
# Of each family that upstream can run, the variant that uses most of what it can do.
MAIN = {name: case.main_variant.name for name, case in CASES.items() if case.variants}


def case_of(config: Mapping[str, Any]) -> FamilyCase:
    return CASES[families.find(config).name]


def make(name: str, dst: Path, **how: Any) -> Path:
    variant = VARIANTS[name]
    return build.make(CASES[variant.family], variant, dst, **how)


def upstream(path: Path, **how: Any) -> Any:
    return build.upstream(case_of(json.loads((Path(path) / "config.json").read_text())), path, **how)


def tokens(name: str, batch: int = 2, seed: int = 0) -> Any:
    return build.tokens(VARIANTS[name], batch, seed)


def released_config(config: dict[str, Any]) -> dict[str, Any]:
    return case_of(config).released_config(config)


def released_tensors(config: Mapping[str, Any], **how: Any) -> dict[str, names.Tensor]:
    return names.released_tensors(case_of(config), config, **how)


def released_names(config: Mapping[str, Any], **how: Any) -> dict[str, tuple[int, ...]]:
    return names.released_names(case_of(config), config, **how)


def parameter_count(config: Mapping[str, Any]) -> int:
    return names.parameter_count(case_of(config), config)


def class_defaults(model_type: str) -> dict[str, Any]:
    """The config that upstream's class makes when told nothing ("llama", "gemma3_text", ...)."""
    from transformers import AutoConfig

    config: dict[str, Any] = AutoConfig.for_model(model_type).to_dict()
    return config
