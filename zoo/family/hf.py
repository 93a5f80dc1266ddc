"""Rule lines for names that most of Hugging Face's decoders give the same parts.

A family still says what it has: it lists these groups beside the lines of its own. A line whose canonical
tensor the Spec doesn't have (a bias, a head that is tied) does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from zoo.mapping.rules import RuleLine, Source, cat, extra, squeeze, stack, ungroup
from zoo.spec import Attention, Layer, Spec

_L = "model.layers.{i}."

ENDS: tuple[RuleLine, ...] = (
    ("embed.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
)

ATTENTION: tuple[RuleLine, ...] = (
    (
        "layers.{i}.attn.qkv.weight",
        cat(_L + "self_attn.q_proj.weight", _L + "self_attn.k_proj.weight", _L + "self_attn.v_proj.weight"),
    ),
    (
        "layers.{i}.attn.qkv.bias",
        cat(_L + "self_attn.q_proj.bias", _L + "self_attn.k_proj.bias", _L + "self_attn.v_proj.bias"),
    ),
    ("layers.{i}.attn.out.weight", _L + "self_attn.o_proj.weight"),
    ("layers.{i}.attn.out.bias", _L + "self_attn.o_proj.bias"),
)

QK_NORM: tuple[tuple[str, str], ...] = (
    ("layers.{i}.attn.q_norm.weight", _L + "self_attn.q_norm.weight"),
    ("layers.{i}.attn.k_norm.weight", _L + "self_attn.k_norm.weight"),
)


def _shares_kv(layer: Layer | None, _: Spec | None = None) -> bool:
    return layer is not None and isinstance(layer.mixer, Attention) and layer.mixer.kv_from is not None


QUERIES_ALONE: RuleLine = ("layers.{i}.attn.qkv.weight", _L + "self_attn.q_proj.weight", _shares_kv)
"""Of a layer that takes another's keys and values: list it before ATTENTION."""

UNREAD_KV: tuple[RuleLine, ...] = tuple(
    extra(
        f"*layers.{{i}}.self_attn.{part}.weight",
        "keys and values of a layer that takes another layer's: released, never read",
        when=_shares_kv,
    )
    for part in ("k_proj", "v_proj", "k_norm")
)
"""What Gemma's releases hold of such a layer all the same."""

MLP: tuple[RuleLine, ...] = (
    ("layers.{i}.mlp.gate_up.weight", cat(_L + "mlp.gate_proj.weight", _L + "mlp.up_proj.weight")),
    ("layers.{i}.mlp.gate_up.bias", cat(_L + "mlp.gate_proj.bias", _L + "mlp.up_proj.bias")),
    ("layers.{i}.mlp.down.weight", _L + "mlp.down_proj.weight"),
    ("layers.{i}.mlp.down.bias", _L + "mlp.down_proj.bias"),
)

PRE_NORMS: tuple[tuple[str, str], ...] = (
    ("layers.{i}.attn_norm.weight", _L + "input_layernorm.weight"),
    ("layers.{i}.ffn_norm.weight", _L + "post_attention_layernorm.weight"),  # after attention, before the FFN
)

PARALLEL_NORM = (("layers.{i}.attn_norm.weight", _L + "input_layernorm.weight"),)
"""The one norm of a layer whose branches stand side by side."""

LAYER_NORMS: tuple[RuleLine, ...] = (
    *PRE_NORMS,
    ("layers.{i}.attn_norm.bias", _L + "input_layernorm.bias"),
    ("layers.{i}.ffn_norm.bias", _L + "post_attention_layernorm.bias"),
    ("norm.bias", "model.norm.bias"),
)
"""PRE_NORMS, and the biases that layer norms have."""

FOUR_NORMS: tuple[tuple[str, str], ...] = (
    ("layers.{i}.attn_norm.weight", _L + "input_layernorm.weight"),
    ("layers.{i}.attn_post_norm.weight", _L + "post_attention_layernorm.weight"),  # on what attention gives
    ("layers.{i}.ffn_norm.weight", _L + "pre_feedforward_layernorm.weight"),
    ("layers.{i}.ffn_post_norm.weight", _L + "post_feedforward_layernorm.weight"),
)
"""Gemma's names: a norm before and after either branch. `post_attention_layernorm` means another norm than in PRE_NORMS."""


def affine(key: str, *sources: str) -> tuple[RuleLine, ...]:
    """The weight and the bias of a linear map or a norm; several sources are the parts of one, in order."""

    def of(kind: str) -> Source:
        names = [f"{source}.{kind}" for source in sources]
        return names[0] if len(names) == 1 else cat(*names)

    return tuple((f"{key}.{kind}", of(kind)) for kind in ("weight", "bias"))


def fused_per_head(source: str) -> tuple[RuleLine, ...]:
    """q, k and v in one matrix, as Megatron lays them: for each key/value head the rows of its queries, its k, its v."""
    return tuple(
        (f"layers.{{i}}.attn.qkv.{kind}", ungroup(f"{source}.{kind}", "n_kv_heads", 3))
        for kind in ("weight", "bias")
    )


INV_FREQ = extra("*.rotary_emb.inv_freq", "rotary frequencies; computed from the config")

WRAPPERS: tuple[dict[str, str], ...] = (
    {},
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "model.language_model."},
)
"""Where a multimodal wrapper puts its language model: as released, and as transformers 5 has it in memory."""

WITHIN_MODEL: tuple[dict[str, str], ...] = (
    {
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
)
"""What stands beside the language model in `Mistral3ForConditionalGeneration`, as released and as transformers 5 has it in memory."""

VISION: tuple[RuleLine, ...] = tuple(
    extra(f"{prefix}{part}.*", reason)
    for prefix in ("", "model.")
    for part, reason in (
        ("vision_tower", "the vision tower; text needs none of it"),
        ("multi_modal_projector", "carries image features into the text model's width"),
    )
)

MODALITIES: tuple[RuleLine, ...] = (
    extra("model.vision_tower.*", "the vision tower; text needs none of it"),
    extra("model.audio_tower.*", "the audio encoder; text needs none of it"),
    extra("model.embed_vision.*", "carries image features into the text model's width"),
    extra("model.embed_audio.*", "carries audio features into the text model's width"),
)
"""Beside the language model in wrappers that see and hear (Gemma 3n, Gemma 4)."""

PER_LAYER: tuple[RuleLine, ...] = (
    ("per_layer.embed.weight", "model.embed_tokens_per_layer.weight"),
    ("per_layer.proj.weight", "model.per_layer_model_projection.weight"),
    ("per_layer.norm.weight", "model.per_layer_projection_norm.weight"),
    ("layers.{i}.per_layer.gate.weight", _L + "per_layer_input_gate.weight"),
    ("layers.{i}.per_layer.out.weight", _L + "per_layer_projection.weight"),
    ("layers.{i}.per_layer.norm.weight", _L + "post_per_layer_input_norm.weight"),
)
"""Per-layer embeddings, as Gemma names them."""


def gated_mlp(key: str, source: str) -> tuple[RuleLine, ...]:
    """A gated MLP whose tensors lie under `source`."""
    return (
        (f"{key}.gate_up.weight", cat(f"{source}.gate_proj.weight", f"{source}.up_proj.weight")),
        (f"{key}.down.weight", f"{source}.down_proj.weight"),
    )


def mamba(source: str) -> tuple[RuleLine, ...]:
    """A Mamba-2 mixer whose tensors lie under `source`."""
    return (
        ("layers.{i}.mamba.in_proj.weight", f"{source}.in_proj.weight"),
        ("layers.{i}.mamba.conv.weight", squeeze(f"{source}.conv1d.weight", 1)),
        ("layers.{i}.mamba.conv.bias", f"{source}.conv1d.bias"),
        ("layers.{i}.mamba.A_log", f"{source}.A_log"),
        ("layers.{i}.mamba.D", f"{source}.D"),
        ("layers.{i}.mamba.dt_bias", f"{source}.dt_bias"),
        ("layers.{i}.mamba.norm.weight", f"{source}.norm.weight"),
        ("layers.{i}.mamba.out.weight", f"{source}.out_proj.weight"),
    )


def numbered(source: str, gate: str, up: str, down: str) -> tuple[RuleLine, ...]:
    """Gated experts that are stored one by one under `source`, which holds `{e}`."""
    return (
        ("layers.{i}.moe.gate_up.weight", stack(cat(f"{source}.{gate}.weight", f"{source}.{up}.weight"))),
        ("layers.{i}.moe.down.weight", stack(f"{source}.{down}.weight")),
    )


NUMBERED = numbered("model.layers.{i}.mlp.experts.{e}", "gate_proj", "up_proj", "down_proj")
"""Experts stored one by one, under the names that most families give them."""

STACKED: tuple[RuleLine, ...] = (
    ("layers.{i}.moe.gate_up.weight", "model.layers.{i}.mlp.experts.gate_up_proj"),
    ("layers.{i}.moe.down.weight", "model.layers.{i}.mlp.experts.down_proj"),
)
"""Experts as transformers 5 has them in memory, whatever their release's names are."""

SWITCHED: tuple[RuleLine, ...] = (
    (
        "layers.{i}.moe.gate_up.weight",
        cat(
            "model.layers.{i}.mlp.switch_mlp.gate_proj.weight",
            "model.layers.{i}.mlp.switch_mlp.up_proj.weight",
        ),
    ),
    ("layers.{i}.moe.down.weight", "model.layers.{i}.mlp.switch_mlp.down_proj.weight"),
)
"""Experts as MLX's releases have them: those of one kind in a stack."""

SHARED_EXPERT: tuple[RuleLine, ...] = (
    *gated_mlp("layers.{i}.moe.shared", "model.layers.{i}.mlp.shared_expert"),
    ("layers.{i}.moe.shared_gate.weight", "model.layers.{i}.mlp.shared_expert_gate.weight"),
)
"""Qwen's expert that every token visits, with a gate of its own."""


def in_memory(released: Iterable[RuleLine], *held: RuleLine) -> tuple[RuleLine, ...]:
    """The lines of a release with `held` in place of those for the same canonical tensors: transformers 5's own names,
    which a trainer writes that saves the state as it is (FSDP, accelerate). For the naming "transformers"."""
    keys = {line[0] for line in held if isinstance(line, tuple)}
    return (*(line for line in released if not isinstance(line, tuple) or line[0] not in keys), *held)


MTP = "multi-token prediction: no part in the next token's logits"
MTP_LAYERS = extra("model.layers.{i}.*", MTP, beside="eh_proj.weight")
"""Layers after the last one, each with the projection that joins the next token's embedding to the state."""
