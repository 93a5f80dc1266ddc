"""Mistral Large 3 (675B) and Mistral Small 4 (119B; `mistral4` in transformers).

What is unusual, beyond deepseek_v3:
- Softmax router in the model's dtype, without a bias. Experts of groups that are not eligible score zero, not
  -inf, so they can still be chosen when nothing else is left.
- Queries grow with position: 1 + beta ln(1 + floor(pos / original context)).
- Mistral Large 3's YaRN has no magnitude at all (`apply_scale: false`): neither on cos and sin, nor on the
  softmax scale. Mistral Small 4 has the latter.
- Mistral's own format (`params.json`, `consolidated*.safetensors`) numbers the experts and calls the parts w1
  (gate), w3 (up) and w2 (down). transformers stores them stacked, gate rows first. The rows of a head are the
  same in both: RoPE pairs neighbouring channels.
- The Small 4 release wraps it in a model that sees images; so does Large 3, in its own names.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from zoo.family import (
    Config,
    Family,
    QueryScale,
    Router,
    RuleLine,
    Spec,
    cat,
    consolidated,
    extra,
    hf,
    read,
    rules,
)

from . import deepseek_v2, deepseek_v3


def spec(config: Config) -> Spec:
    c = read.text_config(config)
    p = read.rope_parameters(c, needed=True)
    growth = None
    if beta := p.get("llama_4_scaling_beta"):
        growth = QueryScale("floor_log", float(p["original_max_position_embeddings"]), float(beta))
    router = Router(
        top_k=c["num_experts_per_tok"],
        score="softmax",
        n_groups=c["n_group"],
        top_groups=c["topk_group"],
        masked_groups="zero",
        normalize=c["norm_topk_prob"],
        normalize_eps=1e-20,
        scale=float(c["routed_scaling_factor"]),
    )
    mixer = deepseek_v3.latent_attention(c, bool(c.said("rope_interleave", True)), query_scale=growth)
    return deepseek_v3.decoder("mistral_large3", c, mixer, router, wrapper=config)


_M = "model.layers.{i}.mlp."
_VISION = "sees images; the text model does not"
HF: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *deepseek_v3.MLA,
    *hf.MLP,
    ("layers.{i}.moe.router.weight", _M + "gate.weight"),
    ("layers.{i}.moe.gate_up.weight", _M + "experts.gate_up_proj"),
    ("layers.{i}.moe.down.weight", _M + "experts.down_proj"),
    *hf.NUMBERED,
    *hf.gated_mlp("layers.{i}.moe.shared", _M + "shared_experts"),
    extra("vision_tower.*", _VISION),
    extra("multi_modal_projector.*", _VISION),
)


def _w123(key: str, source: str) -> tuple[RuleLine, ...]:
    return (
        (f"{key}.gate_up.weight", cat(f"{source}.w1.weight", f"{source}.w3.weight")),
        (f"{key}.down.weight", f"{source}.w2.weight"),
    )


_L = "layers.{i}."
RULES = {
    "hf": rules(*HF, prefixes=hf.WRAPPERS, beside=hf.WITHIN_MODEL),
    "mistral": rules(
        ("embed.weight", "tok_embeddings.weight"),
        ("norm.weight", "norm.weight"),
        ("head.weight", "output.weight"),
        ("layers.{i}.attn_norm.weight", _L + "attention_norm.weight"),
        ("layers.{i}.attn.q_down.weight", _L + "attention.wq_a.weight"),
        ("layers.{i}.attn.q_latent_norm.weight", _L + "attention.q_a_norm.weight"),
        ("layers.{i}.attn.q_up.weight", _L + "attention.wq_b.weight"),
        ("layers.{i}.attn.kv_down.weight", _L + "attention.wkv_a_with_mqa.weight"),
        ("layers.{i}.attn.kv_latent_norm.weight", _L + "attention.kv_a_norm.weight"),
        ("layers.{i}.attn.kv_up.weight", _L + "attention.wkv_b.weight"),
        ("layers.{i}.attn.out.weight", _L + "attention.wo.weight"),
        ("layers.{i}.ffn_norm.weight", _L + "ffn_norm.weight"),
        *_w123("layers.{i}.mlp", _L + "feed_forward"),
        ("layers.{i}.moe.router.weight", _L + "gate.weight"),
        *hf.numbered(_L + "experts.{e}", "w1", "w3", "w2"),
        *_w123("layers.{i}.moe.shared", _L + "shared_experts"),
        extra("vision_encoder.*", _VISION),
        extra("vision_language_adapter.*", _VISION),
        extra("patch_merger.*", _VISION),
        extra("pre_mm_projector_norm.*", _VISION),
    ),
}


def own_config(p: Config, tensors: Collection[str]) -> dict[str, Any] | None:
    """Mistral's params.json."""
    if p.get("kv_lora_rank") is None:
        return None
    moe = p.sub("moe")
    moe.choice("route_every_n", (1,), 1)
    return consolidated.mistral_fields(p) | {
        "architectures": ["Mistral4ForCausalLM"],
        "model_type": "mistral4",
        "num_key_value_heads": p["n_heads"],
        "q_lora_rank": p.get("q_lora_rank"),
        "kv_lora_rank": p["kv_lora_rank"],
        "qk_nope_head_dim": p["qk_nope_head_dim"],
        "qk_rope_head_dim": p["qk_rope_head_dim"],
        "v_head_dim": p["v_head_dim"],
        "n_routed_experts": moe["num_experts"],
        "num_experts_per_tok": moe["num_experts_per_tok"],
        "n_shared_experts": moe.get("num_shared_experts", 0),
        "moe_intermediate_size": moe["expert_hidden_dim"],
        "first_k_dense_replace": moe.get("first_k_dense_replace", 0),
        "n_group": moe.get("num_expert_groups", 1),
        "topk_group": moe.get("num_expert_groups_per_tok", 1),
        "routed_scaling_factor": moe.get("routed_scale", 1.0),
        "norm_topk_prob": True,  # vLLM's MistralLarge3: renormalised
        "rope_parameters": consolidated.mistral_rope(p),
    }


FAMILY = Family(
    "mistral_large3",
    ("mistral4",),
    ("Mistral4ForCausalLM", "Mistral3ForConditionalGeneration"),
    spec,
    RULES,
    {"mistral": own_config},
    disagreements=deepseek_v2.DISAGREEMENTS,
)
