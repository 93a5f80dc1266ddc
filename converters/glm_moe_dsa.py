"""GLM-5, 5.1 and 5.2 (744B-A40B): DeepSeek-V3.2's design in GLM's sizes.

What is unusual, beyond deepseek_v32:
- The indexer's RoPE pairs neighbouring channels, as the attention's own does.
- 5.2: most layers have no indexer and see the keys that the last one before them chose (arXiv 2603.12201). Which do is
  listed, or a pattern of letters (F, S), or every `index_topk_freq`-th layer after `index_skip_topk_offset`.
- `head_dim` says 64 or 192, depending on the release; the rotary channels are `qk_rope_head_dim`.
- A multi-token-prediction layer follows the last one. FP8 releases have one scale per 128x128 block.
"""

from __future__ import annotations

from zoo.family import Config, Disagreement, Family, Mixer, Spec, ZooError, read, rules

from . import deepseek_v3, deepseek_v32

FULL, SHARED = "full", "shared"


def spec(c: Config) -> Spec:
    c.refuse(moe_layer_freq=1, rope_interleave=True, indexer_rope_interleave=True, moe_router_dtype="float32")
    Config(read.rope_parameters(c), f"{c.where}: rope_parameters").refuse(partial_rotary_factor=1.0)
    if "layer_types" in c:
        c.each_layer("layer_types", c["num_hidden_layers"], deepseek_v32.SPARSE)
    own = deepseek_v3.latent_attention(c, indexer=deepseek_v32.indexer(c, interleaved=True))
    mixers: list[Mixer] = []
    last: int | None = None
    for i, kind in enumerate(indexer_types(c)):
        if kind == FULL:
            last = i
            mixers.append(own)
        elif last is None:
            raise ZooError(
                f"{c.where}: layer {i} shares an indexer, but no layer before it has one; expected {FULL!r} first"
            )
        else:
            mixers.append(deepseek_v3.latent_attention(c, indexer_from=last))
    return deepseek_v3.decoder("glm_moe_dsa", c, mixers, deepseek_v3.router(c))


def indexer_types(c: Config) -> list[str]:
    """Of each layer: "full", it has an indexer; "shared", it uses the last one before it."""
    n = c["num_hidden_layers"]
    frequency, offset = max(c.get("index_topk_freq", 1), 1), c.get("index_skip_topk_offset", 2)
    pattern = c.get("index_topk_pattern", None)
    if "indexer_types" in c:
        return c.each_layer("indexer_types", n, (FULL, SHARED))
    if pattern is None:
        return [SHARED if max(i - offset + 1, 0) % frequency else FULL for i in range(n)]
    if not isinstance(pattern, str) or len(pattern) < n or set(pattern) - {"F", "S"}:
        raise ZooError(
            f"{c.where}: index_topk_pattern is {pattern!r}; expected {n} letters, F (full) or S (shared)"
        )
    return [FULL if letter == "F" else SHARED for letter in pattern[:n]]


RULES = {"hf": rules(*deepseek_v32.HF), "transformers": deepseek_v32.RULES["transformers"]}

DISAGREEMENTS = (
    Disagreement(
        about="the pairing of rotary channels",
        upstream="turns neighbours since 5.11, and halves before, in the attention and in the indexer",
        vendor="turns neighbours: rope_interleave and indexer_rope_interleave are true in its configs",
        follows="vendor",
        why="it is how the releases were trained",
        source="https://huggingface.co/zai-org/GLM-5/blob/main/config.json",
        since="2026-02",
    ),
)
FAMILY = Family(
    "glm_moe_dsa",
    ("glm_moe_dsa",),
    ("GlmMoeDsaForCausalLM",),
    spec,
    RULES,
    disagreements=DISAGREEMENTS,
)
