"""Tiny but structurally complete checkpoints of every family, made by upstream's own classes.

    make(name, dst)                    write a variant as a release would have it
    make_mistral_format(name, dst)     the same in Mistral's own format (params.json, consolidated)
    upstream(path)                     load it with transformers; then logits(model, tokens(name))
    released_names(config)             every tensor a release of this config has, without any weight
    config_of_class_defaults(family)   upstream's real-size defaults: config, parameter count, names

Only for tests: needs torch and transformers, which are imported when a function runs.
"""

from .build import (
    VARIANTS,
    fresh,
    logits,
    make,
    make_mistral_format,
    perturbed,
    tokens,
    upstream,
    upstream_mistral_format,
)
from .names import (
    ClassDefaults,
    config_of_class_defaults,
    parameter_count,
    released_names,
    released_tensors,
)
from .released import NOT_READ_BY_UPSTREAM, released_config
from .variant import Variant

__all__ = [
    "NOT_READ_BY_UPSTREAM",
    "VARIANTS",
    "ClassDefaults",
    "Variant",
    "config_of_class_defaults",
    "fresh",
    "logits",
    "make",
    "make_mistral_format",
    "parameter_count",
    "perturbed",
    "released_config",
    "released_names",
    "released_tensors",
    "tokens",
    "upstream",
    "upstream_mistral_format",
]
