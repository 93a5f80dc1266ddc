"""Mistral 7B, Mistral Small 3.x, Ministral 8B, Ministral 3: `mistral`, `ministral`, `ministral3`, and the
`mistral3` wrapper around them.

A Llama without biases, and:
- `sliding_window` null means none; a number means all layers (Mistral 7B v0.1), or those that `layer_types`
  names (Ministral 8B).
- Mistral Small has 32 heads of 128 at d_model 5120: head_dim is its own field.
- Ministral 3 has YaRN whose attention factor comes to 1 (mscale = mscale_all_dim), and multiplies queries by
  1 + beta ln(1 + floor(position / original_max_position_embeddings)).
- The wrapper holds a vision tower. Its releases don't say whether the head is tied: their text config does,
  or there is a head in the files.
- Mistral's own files (`params.json`, `consolidated.safetensors`) hold q and k rows in interleaved RoPE order.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from zoo.family import (
    MLP,
    Attention,
    Config,
    Disagreement,
    Family,
    Layer,
    Norm,
    QueryScale,
    Source,
    Spec,
    ZooError,
    consolidated,
    extra,
    hf,
    read,
    rules,
)

TEXT_TYPES = ("mistral", "ministral", "ministral3")


def spec(c: Config) -> Spec:
    t = read.text_config(c)
    kind = t.choice("model_type", TEXT_TYPES)
    t.refuse(attention_bias=False, mlp_bias=False)
    norm = Norm(t["rms_norm_eps"])
    head_dim = read.head_dim(t)
    parameters = read.rope_parameters(t, needed=kind == "ministral3")
    query_scale = None
    if (beta := parameters.get("llama_4_scaling_beta")) is not None:
        if kind != "ministral3":
            raise ZooError(
                f"{t.where}: llama_4_scaling_beta is {beta!r}; of this family only ministral3 has it"
            )
        original = Config(parameters, f"{t.where}: read.rope_parameters")["original_max_position_embeddings"]
        query_scale = QueryScale("floor_log", float(original), float(beta))

    def attention(window: int | None) -> Attention:
        return Attention(
            n_heads=t["num_attention_heads"],
            n_kv_heads=t["num_key_value_heads"],
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=read.whole_rope(t, parameters, head_dim),
            window=window,
            query_scale=query_scale,
        )

    mlp = MLP(t["intermediate_size"], t.table("hidden_act", read.ACTIVATIONS))
    return Spec(
        family="mistral",
        d_model=t["hidden_size"],
        vocab_size=t["vocab_size"],
        layers=tuple(Layer(attention(w), mlp, attn_norm=norm, ffn_norm=norm) for w in windows(t)),
        norm=norm,
        tied=read.tied(c, t, default=False),
        context_length=t["max_position_embeddings"],
        dtype=read.dtype(c, t),
    )


def windows(t: Config) -> list[int | None]:
    """Each layer's window. The key must be written, be it as null: left out, upstream means 4096."""
    if "sliding_window" not in t.data:
        raise ZooError(f"{t.where}: field 'sliding_window' is missing; write null for full attention")
    window, n = t.get("sliding_window"), t["num_hidden_layers"]
    if "layer_types" not in t:
        return [window] * n
    kinds = t.each_layer("layer_types", n, (read.FULL, read.SLIDING))
    if t["model_type"] != "ministral" and window is not None and read.FULL in kinds:
        raise ZooError(
            f"{t.where}: layer_types has full layers, but upstream gives all layers of a {t['model_type']} the "
            "window; is the model_type ministral?"
        )
    if window is None and read.SLIDING in kinds:
        raise ZooError(f"{t.where}: layer_types has sliding layers, but sliding_window is null")
    return [window if kind == read.SLIDING else None for kind in kinds]


def _at(name: str, axis: int | None) -> Source:
    return name


_PIXTRAL = ("vision_encoder.*", "vision_language_adapter.*", "patch_merger.*", "pre_mm_projector_norm.*")
RULES = {
    "hf": rules(
        *hf.ENDS,
        *hf.PRE_NORMS,
        *hf.ATTENTION,
        *hf.MLP,
        hf.INV_FREQ,
        *hf.VISION,
        prefixes=hf.WRAPPERS,
        beside=hf.WITHIN_MODEL,
    ),
    "mistral": rules(
        ("embed.weight", "tok_embeddings.weight"),
        *consolidated.decoder(_at),
        *(
            extra(pattern, "the vision encoder and its adapter; text needs none of it")
            for pattern in _PIXTRAL
        ),
    ),
}


def own_config(p: Config, tensors: Collection[str]) -> dict[str, Any] | None:
    """Mistral's params.json of a dense model."""
    if p.get("kv_lora_rank") is not None or p.get("moe") is not None:
        return None  # Mistral Large 3, Mixtral
    out = consolidated.mistral_fields(p)
    if "yarn" in p or "llama_4_scaling" in p:
        out |= {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3"}
        out["rope_parameters"] = consolidated.mistral_rope(p)
    return out


DISAGREEMENTS = (
    Disagreement(
        about="theta where params.json names none",
        upstream="has it from config.json, which names one",
        vendor="takes 1e6 today; until May 2024 1e4 with a window and 1e6 without",
        follows="vendor",
        why="files without the field date from then: 1e4 only where there is a window",
        source="https://github.com/mistralai/mistral-inference/blob/main/src/mistral_inference/transformer.py",
        since="2024-05",
    ),
)
FAMILY = Family(
    "mistral",
    (*TEXT_TYPES, "mistral3"),
    (
        "MistralForCausalLM",
        "MinistralForCausalLM",
        "Ministral3ForCausalLM",
        "Mistral3ForConditionalGeneration",
    ),
    spec,
    RULES,
    {"mistral": own_config},
    disagreements=DISAGREEMENTS,
)
