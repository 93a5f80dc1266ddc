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

from zoo.config import Config, rope, rope_parameters
from zoo.families import Family
from zoo.mapping.rules import Expr, RuleLine, cat, extra, flatten, ranks, rules, transpose
from zoo.spec import MLP, Attention, Layer, MoE, Norm, QKNorm, QueryScale, Router, Spec

from . import _dense as names
from . import _experts as experts

CHUNKED = "chunked_attention"


def spec(config: Config) -> Spec:
    c = config.sub("text_config") if "text_config" in config else config
    c.choice("hidden_act", ("silu",))
    n, head_dim = c["num_hidden_layers"], c["head_dim"]
    norm = Norm(c["rms_norm_eps"])
    rotary = rope(c, rope_parameters(c), head_dim, interleaved=True, rounding="last")
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
            v_head_dim=head_dim,
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
    chunked = rotates
    if "layer_types" in c:
        chunked = [t == CHUNKED for t in c.each_layer("layer_types", n, (CHUNKED, experts.FULL))]
    step = c.get("interleave_moe_layer_step", 1)
    sparse = c.get("moe_layers", range(step - 1, n, step))

    dense = MLP(c["intermediate_size_mlp"])
    expert = MLP(c["intermediate_size"])
    router = Router(c["num_experts_per_tok"], "sigmoid", over="chosen")
    moe = MoE(experts.n_experts(c), expert, router, shared=expert, weight_input=True)
    return Spec(
        family="llama4",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(attention(r, k), moe if i in sparse else dense, attn_norm=norm, ffn_norm=norm)
            for i, (r, k) in enumerate(zip(rotates, chunked, strict=True))
        ),
        norm=norm,
        tied=names.tied(config, c, default=False),
        context_length=c["max_position_embeddings"],
        dtype=experts.dtype(c, config),
    )


_F = "model.layers.{i}.feed_forward"
_VISION = "sees images; the text model does not"
HF: tuple[RuleLine, ...] = (
    *names.ENDS,
    *names.PRE_NORMS,
    *names.ATTENTION,
    *experts.gated_mlp("layers.{i}.mlp", _F),
    ("layers.{i}.moe.router.weight", f"{_F}.router.weight"),
    ("layers.{i}.moe.gate_up.weight", transpose(f"{_F}.experts.gate_up_proj")),
    ("layers.{i}.moe.down.weight", transpose(f"{_F}.experts.down_proj")),
    *experts.numbered(_F + ".experts.{e}", "gate_proj", "up_proj", "down_proj"),
    *experts.gated_mlp("layers.{i}.moe.shared", f"{_F}.shared_expert"),
    extra("vision_model.*", _VISION),
    extra("multi_modal_projector.*", _VISION),
)
_M, _X = "layers.{i}.", "rank{r}.layers.{i}.feed_forward.experts."
_STATISTICS = "counts of the experts' use in training"


def _meta(name: str, axis: int | None = None) -> Expr:
    return ranks("rank{r}." + name, axis)


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
        ("layers.{i}.ffn_norm.weight", _meta(_M + "feed_forward.norm.weight")),
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

FAMILY = Family(
    "llama4", ("llama4", "llama4_text"), ("Llama4ForConditionalGeneration", "Llama4ForCausalLM"), spec, RULES
)
