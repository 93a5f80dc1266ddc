"""Llama 4: Scout (16 experts) and Maverick (128), text of the released wrapper.

What is unusual:
- Every 4th layer has no RoPE and sees everything; its queries grow with position (attention temperature). The
  others rotate and see their own chunk of 8192 positions. An empty `no_rope_layers` means this default.
- RoPE pairs neighbouring channels, in fp32. The canonical layout keeps that order (`interleaved`), though it
  stores other families half-split: so fp8 releases keep their bytes, and both kinds of layer the same rows.
- QK "norm" without a weight, after RoPE, on the layers that rotate (Scout yes, Maverick no).
- The router's weight is the sigmoid of a chosen expert's logit and multiplies the expert's INPUT. Each MoE
  layer has a shared expert; in Maverick every second layer is dense, `intermediate_size_mlp` wide.
- Experts are stacked and stored [in, out], gate beside up; the fp8 release stores them one by one.
- Meta's own files are slices of 8 ranks: q, k and v of a rank's heads in one tensor, experts' and input axes as
  one, the dense gate and up in one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from zoo.family import (
    MLP,
    Attention,
    Config,
    Disagreement,
    Expr,
    Family,
    Layer,
    MoE,
    Norm,
    QKNorm,
    QueryScale,
    Router,
    RuleLine,
    Spec,
    cat,
    consolidated,
    extra,
    flatten,
    hf,
    ranks,
    read,
    rules,
    transpose,
)

CHUNKED = "chunked_attention"


def spec(config: Config) -> Spec:
    c = read.text_config(config)
    c.choice("hidden_act", ("silu",))
    n, head_dim = c["num_hidden_layers"], c["head_dim"]
    norm = Norm(c["rms_norm_eps"])
    rotary = read.rope(c, read.rope_parameters(c), head_dim, interleaved=True, rounding="last")
    qk_norm = QKNorm(Norm(norm.eps, weight="none"), after_rope=True) if c.get("use_qk_norm", True) else None
    temperature = None
    if c.get("attn_temperature_tuning", True):
        temperature = QueryScale(
            "floor_log", float(c.get("floor_scale", 8192)), float(c.get("attn_scale", 0.1)), 1
        )

    def attention(rotates: bool, chunked: bool) -> Attention:
        return Attention(
            n_heads=c["num_attention_heads"],
            n_kv_heads=c["num_key_value_heads"],
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=rotary if rotates else None,
            chunk=c["attention_chunk_size"] if chunked else None,
            qkv_bias=c.get("attention_bias", False),
            out_bias=c.get("attention_bias", False),
            qk_norm=qk_norm if rotates else None,
            query_scale=None if rotates else temperature,
        )

    interval = c.first("no_rope_layer_interval", "nope_layer_interval", default=4)
    if c.get("no_rope_layers"):
        rotates = [bool(r) for r in c.each_layer("no_rope_layers", n, (0, 1))]
    else:
        rotates = [(i + 1) % interval != 0 for i in range(n)]
    types = read.layer_types(c, lambda i: CHUNKED if rotates[i] else read.FULL, (CHUNKED, read.FULL))
    step = c.get("interleave_moe_layer_step", 1)
    sparse = c.get("moe_layers", range(step - 1, n, step))

    dense = MLP(c["intermediate_size_mlp"])
    expert = MLP(c["intermediate_size"])
    router = Router(c["num_experts_per_tok"], "sigmoid", over="chosen")
    moe = MoE(read.n_experts(c), expert, router, shared=expert, weight_input=True)
    return Spec(
        family="llama4",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(attention(r, t == CHUNKED), moe if i in sparse else dense, attn_norm=norm, ffn_norm=norm)
            for i, (r, t) in enumerate(zip(rotates, types, strict=True))
        ),
        norm=norm,
        tied=read.tied(config, c, default=False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c, config),
    )


_F = "model.layers.{i}.feed_forward"
_VISION = "sees images; the text model does not"
HF: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    *hf.gated_mlp("layers.{i}.mlp", _F),
    ("layers.{i}.moe.router.weight", f"{_F}.router.weight"),
    ("layers.{i}.moe.gate_up.weight", transpose(f"{_F}.experts.gate_up_proj")),
    ("layers.{i}.moe.down.weight", transpose(f"{_F}.experts.down_proj")),
    *hf.numbered(_F + ".experts.{e}", "gate_proj", "up_proj", "down_proj"),
    *hf.gated_mlp("layers.{i}.moe.shared", f"{_F}.shared_expert"),
    extra("vision_model.*", _VISION),
    extra("multi_modal_projector.*", _VISION),
)
_M, _X = "layers.{i}.", "rank{r}.layers.{i}.feed_forward.experts."
_STATISTICS = "counts of the experts' use in training"


def _meta(name: str, axis: int | None = None) -> Expr:
    return ranks("rank{r}." + name, axis)


def _has_experts(layer: Layer | None, _: Spec) -> bool:
    return layer is not None and isinstance(layer.ffn, MoE)


RULES = {
    "hf": rules(
        *HF, prefixes=({}, {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."})
    ),
    "meta": rules(
        ("embed.weight", _meta("tok_embeddings.weight", 0)),
        ("norm.weight", _meta("norm.weight")),
        ("head.weight", _meta("output.weight", 0)),
        ("layers.{i}.attn_norm.weight", _meta(_M + "attention.wqkv.layer_norm_weight")),
        ("layers.{i}.attn.qkv.weight", _meta(_M + "attention.wqkv.weight", 0)),
        ("layers.{i}.attn.out.weight", _meta(_M + "attention.wo.weight", 1)),
        ("layers.{i}.ffn_norm.weight", _meta(_M + "feed_forward.norm.weight"), _has_experts),
        ("layers.{i}.ffn_norm.weight", _meta(_M + "feed_forward.mlp.layer_norm_weight")),
        ("layers.{i}.mlp.gate_up.weight", _meta(_M + "feed_forward.mlp.fc1_weight", 0)),
        ("layers.{i}.mlp.down.weight", _meta(_M + "feed_forward.mlp.fc2_weight", 1)),
        ("layers.{i}.moe.router.weight", transpose(_meta(_M + "feed_forward.router_DE"))),
        (
            "layers.{i}.moe.gate_up.weight",
            cat(
                transpose(ranks(flatten(_X + "moe_w_in_eD_F"), 2)),
                transpose(ranks(flatten(_X + "moe_w_swiglu_eD_F"), 2)),
            ),
        ),
        ("layers.{i}.moe.down.weight", transpose(ranks(flatten(_X + "moe_w_out_eF_D"), 1))),
        (
            "layers.{i}.moe.shared.gate_up.weight",
            cat(
                _meta(_M + "feed_forward.w_in_shared_FD.weight", 0),
                _meta(_M + "feed_forward.w_swiglu_FD.weight", 0),
            ),
        ),
        ("layers.{i}.moe.shared.down.weight", _meta(_M + "feed_forward.w_out_shared_DF.weight", 1)),
        extra("rank*.vision_embeddings.*", _VISION),
        extra("rank*.vision_projection.*", _VISION),
        extra("rank*.rope.freqs", "rotary frequencies; computed from the config"),
        extra("rank*.layers.*.feed_forward.*gate_stats_3E", _STATISTICS),
        extra("rank*.layers.*.feed_forward.expert_activation_DE", _STATISTICS),
    ),
}


def meta_config(p: Config, tensors: Collection[str]) -> dict[str, Any] | None:
    """Meta's params.json. Source: ModelArgs, MoE and TransformerBlock of llama_models/llama4."""
    if "moe_args" not in p and "nope_layer_interval" not in p:
        return None  # Llama 2 or 3
    out = consolidated.meta_fields(p, tensors)
    moe = p.sub("moe_args")
    shrink = moe.get("capacity_factor", 1.0) + 1 if moe.get("auto_scale_F", True) else 1.0
    if p.choice("use_scaled_rope", (True, False), False):
        scaling = consolidated.llama3_rope(
            p.get("rope_scaling_factor", 16.0), p.get("rope_high_freq_factor", 1.0)
        )
        out["rope_scaling"] = scaling
    step = moe.get("interleave_moe_layer_step", 1)
    return out | {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "intermediate_size": consolidated.meta_ffn(p, int(p.get("ffn_exp", 4.0) * p["dim"]), shrink),
        "intermediate_size_mlp": consolidated.meta_ffn(p, 4 * p["dim"]),
        "num_local_experts": moe["num_experts"],
        "num_experts_per_tok": moe.get("top_k", 1),
        "interleave_moe_layer_step": step,
        "no_rope_layers": [],
        "no_rope_layer_interval": p.get("nope_layer_interval") or p["n_layers"] + 1,
        "attention_chunk_size": p["attention_chunk_size"],
        "use_qk_norm": p.get("use_qk_norm", False),
        "attn_temperature_tuning": p.get("attn_temperature_tuning", False),
        "floor_scale": p.get("floor_scale", 8192.0),
        "attn_scale": p.get("attn_scale", 0.1),
        # By release: 10M for 16 experts, 1M for 128 (model cards).
        "max_position_embeddings": 10485760 if moe["num_experts"] == 16 else 1048576,
    }


DISAGREEMENTS = (
    Disagreement(
        about="decoding beyond a chunk",
        upstream="gives what a prompt of the same tokens gives",
        vendor="drops the chunk's mask where it decodes one token (llama-models)",
        follows="upstream",
        why="a prompt is how the model was trained",
        source="https://github.com/meta-llama/llama-models/blob/main/models/llama4/model.py",
        since="2025-04",
    ),
)
FAMILY = Family(
    "llama4",
    ("llama4", "llama4_text"),
    ("Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
    spec,
    RULES,
    {"meta": meta_config},
    disagreements=DISAGREEMENTS,
)
