"""DeepSeek-V3, V3-0324, V3.1, R1, and Kimi K2 to K2.7, which are the same architecture under `model_type: kimi_k2`.

What is unusual:
- Multi-head latent attention. The norms of both latents have a fixed eps of 1e-6, not `rms_norm_eps`.
- RoPE pairs neighbouring channels. The canonical layout keeps that order (`interleaved`) although it stores
  other families half-split: the rotary part is only the end of each head's rows, and the rows of an fp8 weight
  cannot change places without leaving the 128x128 block that their scale belongs to.
- YaRN acts twice: cos and sin times mscale / mscale_all_dim, and the softmax scale times mscale_all_dim's own
  magnitude squared.
- Sigmoid router with a selection bias and groups; the first layers are dense; shared experts beside the others.
- Releases are fp8 in 128x128 blocks, Kimi K2 Thinking int4 in groups of 32. A multi-token-prediction layer
  follows the last one (DeepSeek); every layer has an inverse-frequency buffer (Kimi K2). Kimi K2.5, 2.6 and 2.7
  wrap the same model (`kimi_k25`, the text in `text_config`), under `language_model.` beside what sees images.
- In a GGUF the keys' up-projection may be apart from the values', and transposed per head.
"""

from __future__ import annotations

from typing import Any

from zoo.family import (
    MLP,
    Config,
    Disagreement,
    Family,
    LatentAttention,
    Layer,
    Mixer,
    MoE,
    Norm,
    Rounding,
    Router,
    RuleLine,
    Spec,
    ZooError,
    extra,
    gguf,
    hf,
    per_head,
    read,
    rules,
    transpose,
)

LATENT_EPS = 1e-6


def spec(config: Config) -> Spec:
    c = read.text_config(config)
    c.refuse(moe_layer_freq=1)
    mixer = latent_attention(c, bool(c.said("rope_interleave", True)))
    return decoder("deepseek_v3", c, mixer, router(c), wrapper=config)


def latent_attention(
    c: Config, interleaved: bool = True, rounding: Rounding = "first", **more: Any
) -> LatentAttention:
    """MLA; `rounding` is that of its RoPE, `more` are fields of LatentAttention that other families with it add."""
    p = read.rope_parameters(c)
    nope, rotary = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    scale = (nope + rotary) ** -0.5
    if p["rope_type"] != "default" and p.get("mscale_all_dim"):
        scale *= read.yarn_mscale(p["factor"], p["mscale_all_dim"]) ** 2
    return LatentAttention(
        n_heads=c["num_attention_heads"],
        q_rank=c.get("q_lora_rank"),
        kv_rank=c["kv_lora_rank"],
        nope_dim=nope,
        rope_dim=rotary,
        v_head_dim=c["v_head_dim"],
        scale=scale,
        latent_norm=Norm(LATENT_EPS),
        rope=read.rope(c, p, rotary, interleaved=interleaved, rounding=rounding),
        qkv_bias=c.get("attention_bias", False),
        out_bias=c.get("attention_bias", False),
        **more,
    )


def decoder(
    family: str, c: Config, mixer: Mixer | list[Mixer], router: Router, wrapper: Config | None = None
) -> Spec:
    """The decoder around it: pre-norms, dense layers first, then experts with shared ones beside them. `mixer`: the same in
    every layer, or a list of each layer's."""
    c.choice("hidden_act", ("silu",))
    norm = Norm(c["rms_norm_eps"])
    dense = MLP(c["intermediate_size"])
    moe = MoE(read.n_experts(c), MLP(c["moe_intermediate_size"]), router, shared_experts(c))
    sparse = sparse_layers(c)
    mixers = mixer if isinstance(mixer, list) else [mixer] * len(sparse)
    return Spec(
        family=family,
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(m, moe if s else dense, attn_norm=norm, ffn_norm=norm)
            for m, s in zip(mixers, sparse, strict=True)
        ),
        norm=norm,
        tied=read.tied(wrapper or c, c, default=False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c, wrapper or c),
    )


def sparse_layers(c: Config) -> list[bool]:
    """Which layers have experts: a list as transformers 5 writes it, or all but the first k."""
    n = c["num_hidden_layers"]
    if "mlp_layer_types" in c:
        return [kind == "sparse" for kind in c.each_layer("mlp_layer_types", n, ("dense", "sparse"))]
    return [i >= c["first_k_dense_replace"] for i in range(n)]


def router(c: Config, scale: float | None = None) -> Router:
    """The router (arXiv 2412.19437, section 2.1.2): sigmoid scores in fp32, a selection bias instead
    of an auxiliary loss, groups of experts ranked by their two best. No field has a default: families with this
    router differ in theirs. `scale`: instead of `routed_scaling_factor`."""
    c.choice("scoring_func", ("sigmoid",), "sigmoid")
    c.choice("topk_method", ("noaux_tc",), "noaux_tc")
    return Router(
        top_k=c["num_experts_per_tok"],
        score="sigmoid",
        selection_bias=True,
        n_groups=c["n_group"],
        top_groups=c["topk_group"],
        normalize=c["norm_topk_prob"],
        normalize_eps=1e-20,
        scale=float(c["routed_scaling_factor"] if scale is None else scale),
        rounding="last",
        weights_rounding="last",
    )


def shared_experts(c: Config) -> MLP | None:
    """The experts that every token visits are one MLP of their widths together."""
    n = c.first("n_shared_experts", "num_shared_experts", default=0)
    return MLP(n * c["moe_intermediate_size"]) if n else None


_A = "model.layers.{i}.self_attn."
MLA: tuple[RuleLine, ...] = (
    ("layers.{i}.attn.q.weight", _A + "q_proj.weight"),
    ("layers.{i}.attn.q_down.weight", _A + "q_a_proj.weight"),
    ("layers.{i}.attn.q_down.bias", _A + "q_a_proj.bias"),
    ("layers.{i}.attn.q_latent_norm.weight", _A + "q_a_layernorm.weight"),
    ("layers.{i}.attn.q_up.weight", _A + "q_b_proj.weight"),
    ("layers.{i}.attn.kv_down.weight", _A + "kv_a_proj_with_mqa.weight"),
    ("layers.{i}.attn.kv_down.bias", _A + "kv_a_proj_with_mqa.bias"),
    ("layers.{i}.attn.kv_latent_norm.weight", _A + "kv_a_layernorm.weight"),
    ("layers.{i}.attn.kv_up.weight", _A + "kv_b_proj.weight"),
    ("layers.{i}.attn.out.weight", _A + "o_proj.weight"),
    ("layers.{i}.attn.out.bias", _A + "o_proj.bias"),
)
MOE: tuple[RuleLine, ...] = (
    ("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.gate.weight"),
    ("layers.{i}.moe.router.selection_bias", "model.layers.{i}.mlp.gate.e_score_correction_bias"),
    *hf.NUMBERED,
    *hf.gated_mlp("layers.{i}.moe.shared", "model.layers.{i}.mlp.shared_experts"),
)
HF: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *MLA,
    *hf.MLP,
    *MOE,
    hf.INV_FREQ,
    hf.MTP_LAYERS,
)
_VISION = "sees images; the text model does not"
_WRAPPED = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
"""Kimi K2.5's language model."""
_TOWER = tuple(extra(f"{x}.*", _VISION) for x in ("vision_tower", "mm_projector", "model.mm_projector"))
_BESIDE = {
    "mm_projector.pre_norm.": "model.mm_projector.pre_norm.",
    "mm_projector.proj.0.": "model.mm_projector.in_proj.",
    "mm_projector.proj.2.": "model.mm_projector.out_proj.",
    "vision_tower.": "",  # its rows are moved, too
}
_BLOCKS = {"model.layers.": "language_model.model.blocks.", **_WRAPPED}
"""As transformers saves it: layers are called as the vision tower's are."""
RULES = {
    "hf": rules(*HF, *_TOWER, prefixes=({}, _WRAPPED), beside=(_BESIDE,)),
    "saved": rules(*HF, *_TOWER, prefixes=({}, _BLOCKS)),
    "transformers": rules(
        *hf.in_memory(HF, *hf.STACKED),
        extra("model.vision_tower.*", _VISION),
        extra("model.mm_projector.*", _VISION),
        prefixes=({}, {"model.": "model.language_model."}),
    ),
    "gguf": rules(
        *gguf.ENDS,
        *gguf.PRE_NORMS,
        ("layers.{i}.attn.q.weight", "blk.{i}.attn_q.weight"),
        ("layers.{i}.attn.q_down.weight", "blk.{i}.attn_q_a.weight"),
        ("layers.{i}.attn.q_latent_norm.weight", "blk.{i}.attn_q_a_norm.weight"),
        ("layers.{i}.attn.q_up.weight", "blk.{i}.attn_q_b.weight"),
        ("layers.{i}.attn.kv_down.weight", "blk.{i}.attn_kv_a_mqa.weight"),
        ("layers.{i}.attn.kv_latent_norm.weight", "blk.{i}.attn_kv_a_norm.weight"),
        ("layers.{i}.attn.kv_up.weight", "blk.{i}.attn_kv_b.weight"),
        (
            "layers.{i}.attn.kv_up.weight",
            per_head(
                "n_heads", nope_dim=transpose("blk.{i}.attn_k_b.weight"), v_head_dim="blk.{i}.attn_v_b.weight"
            ),
        ),
        ("layers.{i}.attn.out.weight", "blk.{i}.attn_output.weight"),
        *gguf.MLP,
        *gguf.MOE,
        gguf.MTP_LAYERS,
        *(
            extra(f"blk.*.attn_{x}_b.weight", "a part of attn_kv_b, which the file also has whole")
            for x in "kv"
        ),
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp's `deepseek2`: what it leaves out, and where it differs from the fields its architectures share."""
    # Sigmoid scores with a selection bias. Softmax scores, which are also what an absent field means, are other models.
    if (gating := f.get("expert_gating_func", 1)) != 2:
        raise ZooError(
            f"{f.where}: {f.arch}.expert_gating_func is {gating} (1, or absent: softmax, as in DeepSeek V2); "
            "supported: 2 (sigmoid, as in V3)"
        )
    rank, rope_dim, scaling = f["attention.kv_lora_rank"], f["rope.dimension_count"], out["rope_scaling"]
    if scaling and "mscale" in scaling:
        # Here yarn_log_multiplier is 0.1 * mscale_all_dim; the released mscale is the same number.
        mscale = round(scaling["mscale_all_dim"] * 10, 6)
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    if scaling and (f["expert_count"], scaling["factor"]) == (384, 32.0):
        # Kimi K2 Instruct says 1, and its GGUFs of 2025 do not say it; K2 Thinking (factor 64) has the usual 32.
        scaling["beta_fast"] = f.get("rope.scaling.yarn_beta_fast", 1.0)
    key_length = f.get("attention.key_length_mla") or f["attention.key_length"]
    value_length = f.get("attention.value_length_mla") or f["attention.value_length"]
    f.expect("attention.key_length", rank + rope_dim, key_length)  # the latent head's
    f.expect("attention.value_length", rank, value_length)
    f.expect(
        "expert_shared_feed_forward_length", 0, f["expert_feed_forward_length"] * f["expert_shared_count"]
    )
    return {
        "num_key_value_heads": out["num_attention_heads"],  # one latent head in the file's terms
        "q_lora_rank": f.get("attention.q_lora_rank"),
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_length - rope_dim,
        "v_head_dim": value_length,
        "first_k_dense_replace": f.get("leading_dense_block_count", 0),
        "moe_intermediate_size": f["expert_feed_forward_length"],
        "n_routed_experts": f["expert_count"],
        "n_shared_experts": f["expert_shared_count"],
        "num_experts_per_tok": f["expert_used_count"],
        "n_group": f.get("expert_group_count", 8 if f["expert_count"] == 256 else 1),
        "topk_group": f.get("expert_group_used_count", 4 if f["expert_count"] == 256 else 1),
        "norm_topk_prob": f.get("expert_weights_norm", False),
        "routed_scaling_factor": f.get("expert_weights_scale") or 1.0,  # 0: none
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "rope_scaling": scaling,
    }


def _chooses_by_groups(spec: Spec) -> bool:
    routers = (layer.ffn.router for layer in spec.layers if isinstance(layer.ffn, MoE))
    return any(r.selection_bias and r.top_groups < r.n_groups and r.masked_groups == "-inf" for r in routers)


DISAGREEMENTS = (
    Disagreement(
        about="what experts of other groups score",
        upstream="minus infinity since 5.6; before, 0, which an expert whose bias is low can be below",
        vendor="minus infinity since March 2025, and 0 before",
        follows="vendor",
        why="DeepSeek mended it; the biases of its releases are all above 2, where both choose alike",
        source="https://github.com/huggingface/transformers/pull/45441",
        since="2025-03",
        applies=_chooses_by_groups,
    ),
)
FAMILY = Family(
    "deepseek_v3",
    ("deepseek_v3", "kimi_k2", "kimi_k25"),
    ("DeepseekV3ForCausalLM", "KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"),
    spec,
    RULES,
    gguf={"deepseek2": gguf_config},
    disagreements=DISAGREEMENTS,
)
