"""All that a family is written with, under one name each: for the files in `converters/` and for other packages alike.

    from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Spec, hf, read, rules

- Config, and in the module `read` the readings that many families share: what a released `config.json` says.
- The parts of a Spec: what the architecture is.
- `rules`, its lines and operations: which released tensors make which canonical ones. Lines that many families share
  lie in the modules `hf`, `gguf` and `consolidated`, by whose names they map.
- Family: the three together, under the names that its configs go by.
"""

from zoo.config import Config
from zoo.disagreements import Disagreement
from zoo.errors import ZooError
from zoo.families import Family
from zoo.mapping.rules import (
    Expr,
    RuleLine,
    Source,
    cat,
    deinterleave,
    extra,
    flatten,
    per_head,
    pieces,
    ranks,
    rope_halves,
    rules,
    squeeze,
    stack,
    transpose,
    ungroup,
)
from zoo.spec import (
    FFN,
    MLP,
    Alibi,
    AltUp,
    Attention,
    CompressedAttention,
    Compressor,
    DeltaNet,
    HyperConnections,
    Indexer,
    LatentAttention,
    Layer,
    Mamba,
    Mamba1,
    Mixer,
    MoE,
    Norm,
    PerLayerEmbedding,
    QKNorm,
    QueryScale,
    Rope,
    RopeScaling,
    Rounding,
    Router,
    ShortConv,
    Spec,
)

__all__ = [
    "FFN", "MLP", "Alibi", "AltUp", "Attention", "CompressedAttention", "Compressor", "Config", "DeltaNet",
    "Disagreement", "Expr", "Family", "HyperConnections", "Indexer", "LatentAttention", "Layer", "Mamba", "Mamba1",
    "Mixer", "MoE", "Norm", "PerLayerEmbedding", "QKNorm", "QueryScale", "Rope", "RopeScaling", "Rounding", "Router",
    "RuleLine", "ShortConv", "Source", "Spec", "ZooError", "cat", "deinterleave", "extra", "flatten", "per_head", "pieces", "ranks",
    "rope_halves", "rules", "squeeze", "stack", "transpose", "ungroup",
]  # fmt: skip
