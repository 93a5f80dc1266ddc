"""Mixtral 8x7B and 8x22B.

A Mistral whose every layer has experts in place of its MLP:
- eight experts of `intermediate_size`; softmax over all logits in fp32, the best two renormalised to a sum of 1 and
  kept in fp32; no shared expert. Logits are in the model's dtype.
- Experts are released one by one, as w1 (gate), w2 (down) and w3 (up) under `block_sparse_moe`.
- A window where `sliding_window` says so. No release has one.
- Mistral's own files (`params.json`, `consolidated.safetensors`) hold q and k rows in interleaved RoPE order, and the gate and the
  experts under `feed_forward`. (The first release of all, stacked and in eight parts, is not read.)
- llama.cpp calls it `llama`, with experts: q and k rows are in interleaved RoPE order there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from zoo.family import (
    MLP,
    Attention,
    Config,
    Family,
    Layer,
    MoE,
    Norm,
    Router,
    Source,
    Spec,
    ZooError,
    consolidated,
    gguf,
    hf,
    read,
    rules,
)


def spec(c: Config) -> Spec:
    norm, head_dim = Norm(c["rms_norm_eps"]), read.head_dim(c)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c), head_dim),
        window=c.get("sliding_window"),
    )
    expert = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    router = Router(c["num_experts_per_tok"], "softmax", normalize=True, weights_rounding="last")
    layer = Layer(attention, MoE(c["num_local_experts"], expert, router), attn_norm=norm, ffn_norm=norm)
    return Spec(
        family="mixtral",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(layer,) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


_MOE = "model.layers.{i}.block_sparse_moe."
HF = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    hf.INV_FREQ,
    ("layers.{i}.moe.router.weight", _MOE + "gate.weight"),
    *hf.numbered(_MOE + "experts.{e}", "w1", "w3", "w2"),
)
_HELD = (*hf.STACKED, ("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.gate.weight"))
_OWN = "layers.{i}.feed_forward."


def _at(name: str, axis: int | None) -> Source:
    return name


RULES = {
    "hf": rules(*HF),
    "transformers": rules(*hf.in_memory(HF, *_HELD)),
    "mistral": rules(
        ("embed.weight", "tok_embeddings.weight"),
        *consolidated.decoder(_at),
        ("layers.{i}.moe.router.weight", _OWN + "gate.weight"),
        *hf.numbered(_OWN + "experts.{e}", "w1", "w3", "w2"),
    ),
    "gguf": rules(
        *gguf.ENDS,
        *gguf.PRE_NORMS,
        *gguf.attention(interleaved=True),
        *gguf.MOE,
        *gguf.MOE_ONE_BY_ONE,
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any] | None:
    if not f.get("expert_count"):
        return None
    return {
        "head_dim": gguf.head_dim(f, out),
        "num_local_experts": f["expert_count"],
        "num_experts_per_tok": f["expert_used_count"],
    }


def own_config(p: Config, tensors: Collection[str]) -> dict[str, Any] | None:
    """Mistral's params.json with experts. Source: MoeArgs and MoeLayer of mistral-inference."""
    if not isinstance(p.get("moe"), dict) or p.get("kv_lora_rank") is not None:
        return None
    moe = p.sub("moe")
    if isinstance(window := p.first("sliding_window", "_sliding_window", default=None), list):
        raise ZooError(f"{p.where}: sliding_window is {window}; with experts one for all layers is supported")
    return consolidated.mistral_fields(p) | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": moe["num_experts"],
        "num_experts_per_tok": moe["num_experts_per_tok"],
    }


FAMILY = Family(
    "mixtral",
    ("mixtral",),
    ("MixtralForCausalLM",),
    spec,
    RULES,
    {"mistral": own_config},
    {"llama": gguf_config},
)
