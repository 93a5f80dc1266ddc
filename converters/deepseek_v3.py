"""DeepSeek-V3, V3-0324, V3.1, R1, and Kimi K2, which is the same architecture under `model_type: kimi_k2`.

What is unusual:
- Multi-head latent attention. The norms of both latents have a fixed eps of 1e-6, not `rms_norm_eps`.
- RoPE pairs neighbouring channels. The canonical layout keeps that order (`interleaved`) although it stores
  other families half-split: the rotary part is only the end of each head's rows, and the rows of an fp8 weight
  cannot change places without leaving the 128x128 block that their scale belongs to.
- YaRN acts twice: cos and sin times mscale / mscale_all_dim, and the softmax scale times mscale_all_dim's own
  magnitude squared.
- Sigmoid router with a selection bias and groups; the first layers are dense; shared experts beside the others.
- Releases are fp8 in 128x128 blocks, Kimi K2 Thinking int4 in groups of 32. A multi-token-prediction layer
  follows the last one (DeepSeek); every layer has an inverse-frequency buffer (Kimi K2). Kimi K2.5 wraps the
  same model, under `language_model.`.
- In a GGUF the keys' up-projection may be apart from the values', and transposed per head.
"""

from __future__ import annotations

from typing import Any

from zoo.config import Config, rope, rope_parameters, yarn_mscale
from zoo.families import Family
from zoo.mapping.rules import RuleLine, extra, per_head, rules, transpose
from zoo.spec import MLP, LatentAttention, Layer, Mixer, MoE, Norm, Router, Spec

from . import _dense as names
from . import _experts as experts

LATENT_EPS = 1e-6


def spec(config: Config) -> Spec:
    c = config.sub("text_config") if "text_config" in config else config
    c.refuse(moe_layer_freq=1)
    mixer = latent_attention(c, bool(c.data.get("rope_interleave", True)))
    return decoder("deepseek_v3", c, mixer, experts.sigmoid_router(c), wrapper=config)


def latent_attention(c: Config, interleaved: bool = True, **more: Any) -> LatentAttention:
    """MLA; `more` are fields of LatentAttention that other families with it add."""
    p = rope_parameters(c)
    nope, rotary = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    scale = (nope + rotary) ** -0.5
    if p["rope_type"] != "default" and p.get("mscale_all_dim"):
        scale *= yarn_mscale(p["factor"], p["mscale_all_dim"]) ** 2
    return LatentAttention(
        n_heads=c["num_attention_heads"],
        q_rank=c.get("q_lora_rank"),
        kv_rank=c["kv_lora_rank"],
        nope_dim=nope,
        rope_dim=rotary,
        v_head_dim=c["v_head_dim"],
        scale=scale,
        latent_norm=Norm(LATENT_EPS),
        rope=rope(c, p, rotary, interleaved=interleaved),
        qkv_bias=c.get("attention_bias", False),
        out_bias=c.get("attention_bias", False),
        **more,
    )


def decoder(family: str, c: Config, mixer: Mixer, router: Router, wrapper: Config | None = None) -> Spec:
    """The decoder around it: pre-norms, dense layers first, then experts with shared ones beside them."""
    c.choice("hidden_act", ("silu",))
    norm = Norm(c["rms_norm_eps"])
    dense = MLP(c["intermediate_size"])
    moe = MoE(experts.n_experts(c), MLP(c["moe_intermediate_size"]), router, experts.shared_experts(c))
    return Spec(
        family=family,
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(mixer, moe if s else dense, attn_norm=norm, ffn_norm=norm) for s in experts.sparse_layers(c)
        ),
        norm=norm,
        tied=names.tied(wrapper or c, c, default=False),
        context_length=c["max_position_embeddings"],
        dtype=experts.dtype(c, wrapper or c),
    )


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
HF: tuple[RuleLine, ...] = (
    *names.ENDS,
    *names.PRE_NORMS,
    *MLA,
    *names.MLP,
    *experts.DEEPSEEK_MOE,
    names.INV_FREQ,
    experts.MTP_LAYERS,
)
_VISION = "sees images; the text model does not"
RULES = {
    "hf": rules(
        *HF,
        extra("vision_tower.*", _VISION),
        extra("mm_projector.*", _VISION),
        prefixes=({}, {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}),
    ),
    "gguf": rules(
        *names.GGUF_ENDS,
        *names.GGUF_PRE_NORMS,
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
        *names.GGUF_MLP,
        *experts.GGUF_MOE,
        experts.GGUF_MTP_LAYERS,
        *(
            extra(f"blk.*.attn_{x}_b.weight", "a part of attn_kv_b, which the file also has whole")
            for x in "kv"
        ),
    ),
}

FAMILY = Family(
    "deepseek_v3",
    ("deepseek_v3", "kimi_k2", "kimi_k25"),
    ("DeepseekV3ForCausalLM", "KimiK25ForConditionalGeneration"),
    spec,
    RULES,
)
