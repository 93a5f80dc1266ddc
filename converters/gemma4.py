"""Gemma 4: E2B, E4B, 26B-A4B, 31B, and the 12B (`gemma4_unified`): text model of the wrappers.

- Norm weights are plain, applied in fp32; before and after both branches, per head on q and k, and on v without a weight.
  Scores are not scaled at all. GEGLU (tanh), embeddings times sqrt(d_model), tied head, final softcap.
- Full layers have heads of their own size (`global_head_dim`) and RoPE over the whole of them of which only the first,
  fastest pairs turn ("proportional"). The last layer is a full one. Sliding layers: the usual RoPE, a theta of their own.
- `attention_k_eq_v`: full layers have no v matrix. Values are what keys are before norm and RoPE, under v's own norm;
  and they have `num_global_key_value_heads`.
- The last `num_kv_shared_layers` take keys and values from the last layer of their own kind before them, and have an MLP
  twice as wide (`use_double_wide_mlp`). Releases hold k and v weights for those layers too: nothing reads them.
- Per-layer embeddings as in Gemma 3n, but added to the one residual, over the whole vocabulary.
- A layer ends with a learned scalar (upstream: a buffer).
- `enable_moe_block`: dense MLP and experts side by side, each with norms of its own. Router and experts read the residual,
  not what the layer's norm makes of it; the router has a norm, and a learned factor for each expert it weighs.
- `use_bidirectional_attention` "vision" is about the tokens of images; "all" is an embedding model, refused.
- transformers 5 saves `per_layer_config` where releases have the two global sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.family import (
    FFN,
    MLP,
    Attention,
    Config,
    Family,
    Layer,
    MoE,
    Norm,
    PerLayerEmbedding,
    QKNorm,
    Rope,
    RopeScaling,
    Router,
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
    t.refuse(attention_bias=False)
    t.choice("use_bidirectional_attention", (None, "vision"), None)
    unified = str(c.get("model_type")).startswith("gemma4_unified")
    d, n = t["hidden_size"], t["num_hidden_layers"]
    norm, unweighted = (Norm(t["rms_norm_eps"], weight=w, rounding="last") for w in ("plain", "none"))
    act = t.table("hidden_activation", read.ACTIVATIONS)
    kinds = read.layer_types(t, lambda i: read.FULL if i == n - 1 else read.every(6)(i))
    if kinds[-1] != read.FULL:
        raise ZooError(f"{t.where}: layer_types ends with {kinds[-1]}; upstream would make it {read.FULL}")
    sizes, same = head_sizes(t, kinds), t.get("attention_k_eq_v", False)
    sources = [read.kv_source(t, kinds, i, t.get("num_kv_shared_layers", 0)) for i in range(n)]

    def attention(i: int) -> Attention:
        full, (head_dim, n_kv_heads) = kinds[i] == read.FULL, sizes[i]
        return Attention(
            n_heads=t["num_attention_heads"],
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            scale=1.0,
            rope=rope(t, kinds[i], head_dim),
            window=None if full else t["sliding_window"],
            qk_norm=QKNorm(norm),
            value_norm=unweighted,
            kv_from=sources[i],
            value_from_key=same and full and sources[i] is None,
        )

    def ffn(i: int) -> FFN:
        wide = t.get("use_double_wide_mlp", False) and sources[i] is not None
        mlp = MLP(t["intermediate_size"] * (2 if wide else 1), act)
        if unified or not t.get("enable_moe_block", False):
            return mlp
        router = Router(
            t["top_k_experts"],
            "softmax",
            normalize=True,
            weights_rounding="last",
            expert_scale=True,
            norm=Norm(norm.eps),
            input_scale=d**-0.5,
        )
        return MoE(
            t["num_experts"],
            MLP(t["moe_intermediate_size"], act),
            router,
            shared=mlp,
            norm=norm,
            post_norm=norm,
            shared_post_norm=norm,
        )

    dim = 0 if unified else t.get("hidden_size_per_layer_input", 256)
    table = t.get("vocab_size_per_layer_input", 262144)
    return Spec(
        family="gemma4",
        d_model=d,
        vocab_size=t["vocab_size"],
        layers=tuple(Layer(attention(i), ffn(i), norm, norm, norm, norm, scalar=True) for i in range(n)),
        norm=norm,
        tied=read.tied(c, t, default=True),
        context_length=t["max_position_embeddings"],
        embed_scale=d**0.5,
        logit_softcap=t.get("final_logit_softcapping"),
        per_layer_embedding=PerLayerEmbedding(table, dim, norm, act, rounding="last") if dim else None,
        dtype=read.dtype(c, t),
    )


def head_sizes(t: Config, kinds: list[str]) -> list[tuple[int, int]]:
    """head_dim and number of key/value heads of each layer."""
    plain = t["head_dim"], t["num_key_value_heads"]
    if "per_layer_config" not in t:
        kv_heads = t.get("num_global_key_value_heads", plain[1])  # counts only where keys serve as values
        full = t.get("global_head_dim", 512), kv_heads if t.get("attention_k_eq_v", False) else plain[1]
        return [full if kind == read.FULL else plain for kind in kinds]
    sizes, own = [plain] * len(kinds), t.sub("per_layer_config")
    for key in own:
        if not key.isdigit() or int(key) >= len(kinds):
            raise ZooError(f"{own.where}: {key!r} is no layer; expected 0 to {len(kinds) - 1}")
        layer = own.sub(key)
        layer.refuse(skip=[])
        sizes[int(key)] = layer.get("head_dim", plain[0]), layer.get("num_key_value_heads", plain[1])
    return sizes


def rope(t: Config, kind: str, head_dim: int) -> Rope:
    """RoPE of the layers of one kind."""
    p = read.rope_parameters(t, kind)
    return (
        proportional(t, p, head_dim) if p["rope_type"] == "proportional" else read.whole_rope(t, p, head_dim)
    )


def proportional(t: Config, p: Mapping[str, Any], head_dim: int) -> Rope:
    """RoPE whose pairs and frequencies are those of the whole head, and only a part of them turns, the fastest."""
    q = Config(p, f"{t.where}: rope_parameters")
    turning = int(q.get("partial_rotary_factor", 1.0) * head_dim // 2)
    factor = float(q.get("factor", 1.0))
    scaling = None if factor == 1.0 else RopeScaling("linear", factor)
    return Rope(float(q["rope_theta"]), head_dim, scaling, turning=turning)


_L = "model.layers.{i}."


def _same(layer: Layer | None, _: Spec) -> bool:
    return layer is not None and isinstance(layer.mixer, Attention) and layer.mixer.value_from_key


RULES = {
    "hf": rules(
        *hf.ENDS,
        *hf.PER_LAYER,
        *hf.FOUR_NORMS,
        hf.QUERIES_ALONE,
        (
            "layers.{i}.attn.qkv.weight",
            cat(_L + "self_attn.q_proj.weight", _L + "self_attn.k_proj.weight"),
            _same,
        ),
        *hf.ATTENTION,
        *hf.QK_NORM,
        *hf.MLP,
        *hf.gated_mlp("layers.{i}.moe.shared", _L + "mlp"),
        ("layers.{i}.moe.shared_post_norm.weight", _L + "post_feedforward_layernorm_1.weight"),
        ("layers.{i}.moe.norm.weight", _L + "pre_feedforward_layernorm_2.weight"),
        ("layers.{i}.moe.post_norm.weight", _L + "post_feedforward_layernorm_2.weight"),
        ("layers.{i}.moe.router.norm.weight", _L + "router.scale"),
        ("layers.{i}.moe.router.weight", _L + "router.proj.weight"),
        ("layers.{i}.moe.router.expert_scale", _L + "router.per_expert_scale"),
        ("layers.{i}.moe.gate_up.weight", _L + "experts.gate_up_proj"),
        ("layers.{i}.moe.down.weight", _L + "experts.down_proj"),
        ("layers.{i}.scalar", _L + "layer_scalar"),
        *hf.UNREAD_KV,
        *hf.MODALITIES,
        extra("model.vision_embedder.*", "embeds the patches of images; text needs none of it"),
        prefixes=hf.WRAPPERS,
        beside=(  # of the unified class
            {
                "model.vision_embedder.": "model.embed_vision.",
                "model.embed_vision.": "model.embed_vision.multimodal_embedder.",
            },
        ),
    ),
}
FAMILY = Family(
    "gemma4",
    ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
    (
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForCausalLM",
        "Gemma4UnifiedForConditionalGeneration",
    ),
    spec,
    RULES,
)
