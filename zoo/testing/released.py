"""config.json as releases write it: the same meaning in the keys of the time, not in those of transformers 5.

What a family's release does is said by its case, with these helpers, and follows the config files of real releases. A
key that a release leaves out is left out where upstream's default says the same; a value that no release spells (an
explicit NoPE list, say) stays.
"""

from __future__ import annotations

from typing import Any

from .case import FamilyCase

Config = dict[str, Any]

# Keys that only transformers 5 writes.
_NEW = ("rope_parameters", "qk_head_dim", "is_encoder_decoder")


def released_config(case: FamilyCase, config: Config) -> Config:
    """A saved config in released keys; `config` is left alone."""
    out = {**config, "transformers_version": "4.57.1"}
    if "text_config" in out:
        out["text_config"] = _text(case, out["text_config"])
        out["vision_config"] = flat_rope(dict(out["vision_config"]))
        out = case.released_wrapper(out)
    else:
        out = _text(case, out)
    if (dtype := out.pop("dtype", None)) is not None:
        out["torch_dtype"] = dtype
    return out


def _text(case: FamilyCase, config: Config) -> Config:
    keeps = case.keeps.get(config["model_type"], ())
    out = case.released_text(dict(config))
    return {k: v for k, v in out.items() if k not in _NEW or k in keeps}


def drop(config: Config, *keys: str) -> Config:
    """Leave keys out."""
    for key in keys:
        config.pop(key, None)
    return config


def drop_default(config: Config, **defaults: Any) -> Config:
    """Leave out what says nothing new, as releases do."""
    for key, value in defaults.items():
        if config.get(key) == value:
            del config[key]
    return config


def flat_rope(config: Config, type_key: str = "rope_type") -> Config:
    """rope_parameters -> rope_theta, rope_scaling (null when unscaled), partial_rotary_factor."""
    rope = dict(config.pop("rope_parameters", None) or {})
    if not rope:
        return config
    config["rope_theta"] = rope.pop("rope_theta")
    if (partial := rope.pop("partial_rotary_factor", None)) is not None:
        config["partial_rotary_factor"] = partial
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind in ("default", "axial") else {type_key: kind, **rope}
    return config


def two_thetas(config: Config) -> Config:
    """rope_theta and rope_scaling for the full layers, rope_local_base_freq for the sliding ones."""
    local = config["rope_parameters"]["sliding_attention"]["rope_theta"]
    config["rope_parameters"] = config["rope_parameters"]["full_attention"]
    return flat_rope(config) | {"rope_local_base_freq": local}


def implied_head_dim(config: Config) -> Config:
    """Leave head_dim out where it follows from the width."""
    if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
        del config["head_dim"]
    return config


def plain_rope(config: Config) -> Config:
    """Llama's keys: `flat_rope`, and head_dim only where it says something."""
    return implied_head_dim(flat_rope(config))
