"""Gemma 3n: E2B, E4B (text model of the wrapper).

- AltUp (arXiv 2301.13310): `altup_num_inputs` streams of the residual. Each layer predicts all of them,
  computes one, and corrects the others by what it found; they are merged before the final norm.
- LAuReL (arXiv 2411.07501): a low-rank residual beside attention; (x + attention + laurel) / sqrt(2).
- A second, per-layer embedding with a smaller vocabulary (ids beyond it count as 0), gated into the streams.
- Norm weights are plain here (not 1 + w), applied in fp32; before and after both branches; v has a norm
  without a weight; scores are not scaled at all.
- The last `num_kv_shared_layers` layers take keys and values from the last layer of their own kind before
  them. Releases hold k and v weights for those layers too: nothing reads them.
- Gaussian top-k on the gate of the first layers: only activations above mean + std * icdf(sparsity) pass.
- As in Gemma 3: GEGLU (tanh), embeddings times sqrt(d_model), tied head, windows with a theta of their own.
  The full layers are every fifth, the window 512, final softcap 30.
- `altup_coef_clip` acts in training only.
"""

from __future__ import annotations

from typing import Any

from zoo.family import (
    MLP,
    AltUp,
    Attention,
    Config,
    Disagreement,
    Family,
    Layer,
    Norm,
    PerLayerEmbedding,
    QKNorm,
    RuleLine,
    Spec,
    extra,
    hf,
    read,
    rules,
    stack,
)


def spec(c: Config) -> Spec:
    t = read.text_config(c)
    t.refuse(altup_active_idx=0, use_bidirectional_attention=False, attention_bias=False)
    d, n, head_dim = t["hidden_size"], t["num_hidden_layers"], t["head_dim"]
    norm = Norm(t["rms_norm_eps"], rounding="last")
    kinds = t.each_layer("layer_types", n, (read.FULL, read.SLIDING))
    act = t.table("hidden_activation", read.ACTIVATIONS)

    def attention(i: int) -> Attention:
        sliding = kinds[i] == read.SLIDING
        parameters = read.rope_parameters(
            t,
            kinds[i],
            theta="rope_local_base_freq" if sliding else "rope_theta",
            scaling=None if sliding else "rope_scaling",
        )
        return Attention(
            n_heads=t["num_attention_heads"],
            n_kv_heads=t["num_key_value_heads"],
            head_dim=head_dim,
            scale=1.0,
            rope=read.whole_rope(t, parameters, head_dim),
            window=t["sliding_window"] if sliding else None,
            qk_norm=QKNorm(norm),
            value_norm=Norm(norm.eps, weight="none", rounding="last"),
            kv_from=read.kv_source(t, kinds, i, t.get("num_kv_shared_layers", 15)),
        )

    widths, sparsities = per_layer(t, "intermediate_size"), per_layer(t, "activation_sparsity_pattern")
    mlps = [MLP(int(f), act, sparsity=float(s)) for f, s in zip(widths, sparsities, strict=True)]
    return Spec(
        family="gemma3n",
        d_model=d,
        vocab_size=t["vocab_size"],
        layers=tuple(Layer(attention(i), mlps[i], norm, norm, norm, norm) for i in range(n)),
        norm=norm,
        tied=read.tied(c, t, default=True),
        context_length=t["max_position_embeddings"],
        embed_scale=d**0.5,
        logit_softcap=t.get("final_logit_softcapping", 30.0),
        altup=AltUp(
            n_streams=t["altup_num_inputs"],
            active=0,
            laurel_rank=t["laurel_rank"],
            norm=norm,
            correct_scale=t.get("altup_correct_scale", True),
        ),
        per_layer_embedding=PerLayerEmbedding(
            t["vocab_size_per_layer_input"], t["hidden_size_per_layer_input"], norm, act
        ),
        dtype=read.dtype(c, t),
    )


def per_layer(t: Config, key: str) -> list[Any]:
    """A number for all layers, or a list with one for each."""
    if isinstance(t[key], list):
        return t.each_layer(key, t["num_hidden_layers"])
    return [t[key]] * t["num_hidden_layers"]


_L = "model.layers.{i}."
_SCALE = "`altup_correct_scale` is off: nothing reads it"

HF: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.PER_LAYER,
    ("altup.expand.weight", stack("model.altup_projections.{e}.weight")),
    ("altup.merge.weight", stack("model.altup_unembed_projections.{e}.weight")),
    *hf.FOUR_NORMS,
    hf.QUERIES_ALONE,
    *hf.ATTENTION,
    *hf.QK_NORM,
    *hf.MLP,
    ("layers.{i}.altup.router_norm.weight", _L + "altup.router_norm.weight"),
    ("layers.{i}.altup.router.weight", _L + "altup.modality_router.weight"),
    ("layers.{i}.altup.predict.weight", _L + "altup.prediction_coefs.weight"),
    ("layers.{i}.altup.correct.weight", _L + "altup.correction_coefs.weight"),
    ("layers.{i}.altup.correct_scale", _L + "altup.correct_output_scale"),
    ("layers.{i}.laurel.down.weight", _L + "laurel.linear_left.weight"),
    ("layers.{i}.laurel.up.weight", _L + "laurel.linear_right.weight"),
    ("layers.{i}.laurel.norm.weight", _L + "laurel.post_laurel_norm.weight"),
    extra("*layers.*.altup.correct_output_scale", _SCALE),
    *hf.UNREAD_KV,
    *hf.MODALITIES,
)
_SPELT: tuple[dict[str, str], ...] = (
    {},
    {"model.": "model.language_model."},
    {"model.": "language_model.model."},
)
_SAVED: RuleLine = ("per_layer.proj.weight", "model.per_layer_model.language_model_projection.weight")
"""By transformers up to 5.0, which puts `language_model` behind every `model` of a name."""
RULES = {"hf": rules(*HF, prefixes=_SPELT), "saved": rules(*HF, _SAVED, prefixes=_SPELT)}

DISAGREEMENTS = (
    Disagreement(
        about="the soft cap on the logits",
        upstream="caps at 30, as config.json says",
        vendor="has no cap in its JAX code (google-deepmind/gemma)",
        follows="upstream",
        why="the release's config states it",
        source="https://github.com/google-deepmind/gemma/blob/main/gemma/gm/nn/gemma3n/_gemma3n.py",
        since="2025-06",
        applies=lambda spec: spec.logit_softcap is not None,
    ),
    Disagreement(
        about="the clip of AltUp's coefficients",
        upstream="applies altup_coef_clip in training only",
        vendor="applies it whenever the model runs",
        follows="open",
        why="nobody has said which is meant; only a coefficient beyond the clip (120 in the releases) tells them apart",
        source="https://github.com/google-deepmind/gemma/blob/main/gemma/gm/nn/gemma3n/_modules.py",
        since="2025-06",
        applies=lambda spec: spec.altup is not None,
    ),
)
FAMILY = Family(
    "gemma3n",
    ("gemma3n", "gemma3n_text"),
    ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
    spec,
    RULES,
    disagreements=DISAGREEMENTS,
)
