"""Readings of a config that many families share: `read.dtype(c)`, `read.rope(c, ...)`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from zoo.config import ACTIVATIONS as ACTIVATIONS
from zoo.config import Config, rope
from zoo.config import rope_parameters as rope_parameters
from zoo.config import yarn_mscale as yarn_mscale
from zoo.errors import ZooError
from zoo.soundness import layer_count as layer_count
from zoo.spec import Norm, Rope, Rounding

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""Kinds of layers, as configs call them in `layer_types`."""


def text_config(c: Config) -> Config:
    """The language model's part of a config, wrapper or not."""
    return c.sub("text_config") if "text_config" in c else c


def dtype(*configs: Config) -> str | None:
    """The declared dtype, under its old or new key, of the first config (wrapper, text) that has one. It decides nothing,
    since the files have their own: one that is no text counts as none."""
    found = (c.first("dtype", "torch_dtype", default=None) for c in configs)
    return next((d for d in found if isinstance(d, str) and d), None)


def tied(c: Config, text: Config, default: bool) -> bool:
    """Whether the head is the embedding: the wrapper's word counts before its text model's."""
    return bool(c.get("tie_word_embeddings", text.get("tie_word_embeddings", default)))


def plus_one_norm(c: Config) -> Norm:
    """RMS norms of (1 + w), in fp32."""
    return Norm(c["rms_norm_eps"], weight="plus_one", rounding="last")


def centred_norm(c: Config) -> Norm:
    """Cohere's norm: the mean is removed; a weight, no bias."""
    return Norm(c.get("layer_norm_eps", 1e-5), kind="layer", rounding="last", bias=False)


def head_dim(c: Config) -> int:
    """Channels of a head: a field of its own, or what the heads share of the model's width."""
    dim: int = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    return dim


def mamba_heads(c: Config, inner: int, said_by: str = "mamba_expand * hidden_size") -> tuple[int, int]:
    """Heads of a Mamba-2 and channels of each: together its `inner` channels, which the fields `said_by` give."""
    n_heads, dim = c["mamba_n_heads"], c.get("mamba_d_head", "auto")
    if dim == "auto":
        dim = inner // n_heads
    if n_heads * dim != inner:
        raise ZooError(
            f"{c.where}: mamba_n_heads * mamba_d_head is {n_heads * dim}, but {said_by} is {inner}; they should be equal"
        )
    return n_heads, dim


def whole_rope(
    c: Config,
    p: Mapping[str, Any],
    head_dim: int,
    *,
    interleaved: bool = False,
    rounding: Rounding | Literal["both"] = "first",
) -> Rope:
    """RoPE over the whole head; a config that wants only a part of it rotated is refused."""
    Config(p, f"{c.where}: rope_parameters").refuse(partial_rotary_factor=1.0)
    return rope(c, p, head_dim, interleaved=interleaved, rounding=rounding)


def partial_rope(
    c: Config, p: Mapping[str, Any], head_dim: int, default: float = 1.0, *, longrope: tuple[str, ...] = ()
) -> Rope:
    """RoPE over the first `partial_rotary_factor` of a head, rounded down; over `default` where the config is silent."""
    return rope(c, p, turned(c, p, head_dim, default), longrope=longrope)


def turned(c: Config, p: Mapping[str, Any], head_dim: int, default: float = 1.0) -> int:
    """How many channels of a head RoPE turns, by `partial_rotary_factor`, rounded down; `default` where the config is silent.
    Raises ZooError for null where that is not the whole head: of transformers 5 it is, whose default is for a field that is absent."""
    part = p.get("partial_rotary_factor", default)
    if part is None and default != 1.0:
        raise ZooError(
            f"{c.where}: partial_rotary_factor is null, by which upstream turns whole heads or stops; releases of this family turn "
            f"{default:g} of each: write which"
        )
    return int(head_dim * float(1.0 if part is None else part))


def layer_types(
    c: Config, otherwise: Callable[[int], str], kinds: Collection[str] = (FULL, SLIDING)
) -> list[str]:
    """The kind of each layer: `layer_types`, each one of `kinds`; where the config has none, `otherwise(i)`."""
    n = c["num_hidden_layers"]
    return c.each_layer("layer_types", n, kinds) if "layer_types" in c else [otherwise(i) for i in range(n)]


def late_windows(c: Config) -> list[str]:
    """The kind of each layer where `use_sliding_window` gives those from `max_window_layers` on a window."""
    windowed = c.get("use_sliding_window", False)
    kinds = layer_types(c, lambda i: SLIDING if windowed and i >= c["max_window_layers"] else FULL)
    if SLIDING in kinds:
        c.choice("use_sliding_window", (True,), False)  # upstream forgets the window otherwise
    return kinds


def every(n: int, others: str = SLIDING) -> Callable[[int], str]:
    """For `layer_types`: each n-th layer (n - 1, 2 n - 1, ...) is full, the ones between are `others`."""
    return lambda i: others if (i + 1) % n else FULL


def n_experts(c: Config) -> int:
    """Experts of a layer, under the three spellings that releases and transformers have for them."""
    return int(c.first("n_routed_experts", "num_local_experts", "num_experts"))


def kv_source(c: Config, kinds: Sequence[str], i: int, shared: int) -> int | None:
    """The layer whose keys and values layer `i` takes, or None if it has its own: the last `shared` layers take those of
    the last layer of their own kind before them. Raises ZooError where there is none."""
    own = len(kinds) - shared
    if i < own:
        return None
    same = [j for j in range(own) if kinds[j] == kinds[i]]
    if not same:
        raise ZooError(
            f"{c.where}: layer {i} shares keys and values, but no layer before {own} is {kinds[i]}"
        )
    return same[-1]
