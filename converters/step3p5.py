"""StepFun's Step 3.5 Flash (`step3p5`, 196B-A11B), and Step 3.7 Flash (`step3p7`), which is it within a wrapper that sees.

What is unusual:
- Each fourth layer sees everything; layers with a window have more query heads and a RoPE of their own. Full layers turn
  half of a head, with Llama 3's scaling. Releases list theta and the turning share by layer, transformers 5 by kind.
- Attention's output times sigmoid of a gate for each head, from a matrix of its own. QK-norm per head, before RoPE; norms
  multiply by 1 + w.
- Sigmoid router with a selection bias; the experts' sum times a factor, beside a shared expert. The first layers are dense.
- SwiGLU clamped after its activation, in the layers whose limit is not 0: one list is for experts, the other for the shared
  expert and for dense layers.
- `need_fp32_gate`: the vendor's router multiplies in fp32, transformers' in the model's dtype. The model as trained counts.
- Layers after the last one predict further tokens; lists by layer go on for them.
"""

from __future__ import annotations

from zoo.config import Recorded
from zoo.family import (
    MLP,
    Attention,
    Config,
    Family,
    Layer,
    MoE,
    QKNorm,
    Rope,
    Router,
    RuleLine,
    Spec,
    ZooError,
    cat,
    extra,
    hf,
    read,
    rules,
)


def spec(c: Config) -> Spec:
    t = read.text_config(c)
    t.refuse(
        attention_bias=False, mlp_bias=False, use_head_wise_attn_gate=True, zero_centered=True, att_impl_type="GQA",
        moe_router_activation="sigmoid", use_moe_router_bias=True, norm_expert_weight=True, fp32_residual_connection=False,
        use_bidirectional_attention=False, use_rope_layers=[], yarn_only_types=[read.FULL], sink=False, use_moe=True,
    )  # fmt: skip
    t.choice("hidden_act", ("silu",), "silu")
    n, norm, head_dim = t["num_hidden_layers"], read.plus_one_norm(t), t["head_dim"]
    kinds = t.each_layer("layer_types", n, (read.FULL, read.SLIDING))
    kv_heads = t.first("num_key_value_heads", "num_attention_groups")
    ropes = {kind: rope(t, kinds, kind) for kind in sorted(set(kinds))}
    limits, shared_limits = (
        t.each_layer(key, n) if t.get(key) else [0] * n for key in ("swiglu_limits", "swiglu_limits_shared")
    )

    def attention(kind: str, heads: int) -> Attention:
        return Attention(
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            scale=t.get("query_pre_attn_scalar", head_dim) ** -0.5,
            rope=ropes[kind],
            window=t["sliding_window"] if kind == read.SLIDING else None,
            qk_norm=QKNorm(norm),
            gate=True,
            gate_over="head",
        )

    router = Router(
        top_k=t.first("num_experts_per_tok", "moe_top_k"),
        score="sigmoid",
        selection_bias=True,
        normalize=True,
        rounding="last" if t.get("need_fp32_gate", False) else "first",
        weights_rounding="last",
    )

    def ffn(sparse: bool, limit: float, shared_limit: float) -> MLP | MoE:
        if not sparse:
            return clamped(t["intermediate_size"], shared_limit)
        return MoE(
            t.first("n_routed_experts", "moe_num_experts"),
            clamped(t["moe_intermediate_size"], limit),
            router,
            shared=clamped(t.first("share_expert_dim", "share_expert_dims"), shared_limit),
            routed_scale=float(t.get("moe_router_scaling_factor", 1.0)),
        )

    layers = zip(kinds, query_heads(t, kinds), sparse_layers(t, n), limits, shared_limits, strict=True)
    return Spec(
        family="step3p5",
        d_model=t["hidden_size"],
        vocab_size=t["vocab_size"],
        layers=tuple(Layer(attention(k, h), ffn(*f), attn_norm=norm, ffn_norm=norm) for k, h, *f in layers),
        norm=norm,
        tied=read.tied(c, t, default=False),
        context_length=t["max_position_embeddings"],
        dtype=read.dtype(t, c),
    )


def clamped(d_ff: int, limit: float | None) -> MLP:
    """SwiGLU with a limit after its activation; 0 and null are none."""
    return MLP(d_ff, limit=float(limit), limit_after=True) if limit else MLP(d_ff)


def query_heads(t: Config, kinds: list[str]) -> list[int]:
    """Query heads of each layer: those with a window have their own number, which releases keep in
    `attention_other_setting`, transformers 5 in a key and once more in `per_layer_config`."""
    full = sliding = t["num_attention_heads"]
    if "attention_other_setting" in t:
        other = t.sub("attention_other_setting")
        kv_heads = t.first("num_key_value_heads", "num_attention_groups")
        other.refuse(attention_type=read.SLIDING, num_attention_groups=kv_heads, head_dim=t["head_dim"])
        sliding = other.get("num_attention_heads", full)
    sliding = t.get("num_sliding_attention_heads", sliding)
    heads = [sliding if kind == read.SLIDING else full for kind in kinds]
    own = t.sub("per_layer_config") if "per_layer_config" in t else Config({})
    for key in own:
        if not str(key).isdigit() or int(key) >= len(heads):
            raise ZooError(f"{own.where}: {key!r} is no layer; expected 0 to {len(heads) - 1}")
        own.sub(key).refuse(skip=[], num_attention_heads=heads[int(key)])
    return heads


def sparse_layers(t: Config, n: int) -> list[bool]:
    """Which layers have experts: a list of kinds, or the numbers of those that have ("3,4,..."); else all but three."""
    if "mlp_layer_types" in t:
        return [kind == "sparse" for kind in t.each_layer("mlp_layer_types", n, ("dense", "sparse"))]
    said = t.data.get("moe_layers_enum") or range(3, n)
    numbers = said.split(",") if isinstance(said, str) else said
    return [i in {int(x) for x in numbers} for i in range(n)]


def rope(t: Config, kinds: list[str], kind: str) -> Rope:
    """RoPE of a kind of layer. Of lists by layer, its layers must say the same; scaling concerns full ones."""
    if "rope_parameters" in t:
        p = read.rope_parameters(t, kind, scaling=None)
    else:
        scaling = t.get("rope_scaling")
        p = (
            Recorded({"rope_type": "default"})
            if scaling is None or kind != read.FULL
            else scaling.over(scaling)
        )
        p = p.over(p | {"rope_theta": alike(t, "rope_theta", kinds, kind)})
        if "partial_rotary_factors" in t:
            p = p.over(p | {"partial_rotary_factor": alike(t, "partial_rotary_factors", kinds, kind)})
    return read.partial_rope(t, p, t["head_dim"])


def alike(t: Config, key: str, kinds: list[str], kind: str) -> float:
    """What `key` says of the layers of a kind: one number for all layers, or one for each."""
    said = t[key]
    if not isinstance(said, list):
        return float(said)
    values = {float(v) for v, k in zip(t.each_layer(key, len(kinds)), kinds, strict=True) if k == kind}
    if len(values) > 1:
        raise ZooError(f"{t.where}: {key} of {kind} layers is {sorted(values)}; zoo supports one for all")
    return values.pop()


_L = "model.layers.{i}."
_A, _E = _L + "self_attn.", _L + "moe."
HF: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    ("layers.{i}.attn.qkv.weight", cat(*(f"{_A}{x}_proj.weight" for x in "qgkv"))),
    ("layers.{i}.attn.out.weight", _A + "o_proj.weight"),
    *hf.QK_NORM,
    *hf.MLP,
    ("layers.{i}.moe.router.weight", _E + "gate.weight"),
    ("layers.{i}.moe.router.selection_bias", _E + "router_bias"),
    ("layers.{i}.moe.gate_up.weight", cat(_E + "gate_proj.weight", _E + "up_proj.weight")),
    ("layers.{i}.moe.down.weight", _E + "down_proj.weight"),
    *hf.gated_mlp("layers.{i}.moe.shared", _L + "share_expert"),
    hf.MTP_LAYERS,
)
_HELD: tuple[RuleLine, ...] = (
    ("layers.{i}.moe.router.weight", _L + "mlp.gate.weight"),
    ("layers.{i}.moe.router.selection_bias", _L + "mlp.gate.e_score_correction_bias"),
    *hf.STACKED,
    *hf.gated_mlp("layers.{i}.moe.shared", _L + "mlp.shared_experts"),
)
_VISION = tuple(
    extra(f"{prefix}{part}.*", "sees images; the text model does not")
    for prefix in ("", "model.")
    for part in ("vision_model", "vit_large_projector", "multi_modal_projector")
)
_WITHIN = {"model.": "model.language_model."}
_BESIDE = {"vit_large_projector.": "model.multi_modal_projector.", "vision_model.": ""}
_MTP = extra("model.language_model.layers.{i}.*", hf.MTP, beside="eh_proj.weight")
RULES = {
    "hf": rules(*HF, _MTP, *_VISION, prefixes=({}, _WITHIN), beside=(_BESIDE,)),
    "transformers": rules(*hf.in_memory(HF, *_HELD), *_VISION, prefixes=(_WITHIN,)),
}

FAMILY = Family(
    "step3p5",
    ("step3p5", "step3p7"),
    ("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration", "Step3p7FlashForCausalLM"),
    spec,
    RULES,
)
