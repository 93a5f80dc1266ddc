"""MiMo-V2-Flash.

What is unusual:
- Full and sliding layers differ in more than the window: sliding ones have twice the K/V heads, sinks, and a
  theta of their own. Layer 0 and every 6th are full.
- A sliding layer of a released window of 128 shows 129 keys, the query's own included; transformers 5 saves
  the 129.
- v is narrower than q and k (128 against 192) and multiplied by 0.707; RoPE on the first third of each head.
- DeepSeek's router, no shared expert, layer 0 dense. `routed_scaling_factor: null` means 1.
- Released keys are the vendor's own (`hybrid_layer_pattern`, `moe_layer_freq`, `swa_*`, `layernorm_epsilon`).
"""

from __future__ import annotations

from zoo.config import Config, rope, rope_parameters
from zoo.families import Family
from zoo.mapping.rules import extra, rules
from zoo.spec import MLP, Attention, Layer, MoE, Norm, Spec

from . import _dense as names
from . import _experts as experts


def spec(c: Config) -> Spec:
    c.choice("hidden_act", ("silu",))
    c.refuse(n_shared_experts=None)
    n = c["num_hidden_layers"]
    if "layer_types" in c:
        types = c.each_layer("layer_types", n, (experts.FULL, experts.SLIDING))
    else:
        kinds = (experts.FULL, experts.SLIDING)
        types = [kinds[k] for k in c.each_layer("hybrid_layer_pattern", n, (0, 1))]
    if "moe_layer_freq" in c:
        sparse = [bool(k) for k in c.each_layer("moe_layer_freq", n, (0, 1))]
    else:
        sparse = experts.sparse_layers(c)
    layers = {kind: attention(c, kind == experts.SLIDING) for kind in (experts.FULL, experts.SLIDING)}
    norm = Norm(c.first("rms_norm_eps", "layernorm_epsilon"))
    dense = MLP(c["intermediate_size"])
    router = experts.sigmoid_router(c, scale=c.get("routed_scaling_factor", 1.0))
    moe = MoE(experts.n_experts(c), MLP(c["moe_intermediate_size"]), router)
    return Spec(
        family="mimo_v2_flash",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(layers[t], moe if s else dense, attn_norm=norm, ffn_norm=norm)
            for t, s in zip(types, sparse, strict=True)
        ),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=experts.dtype(c),
    )


def attention(c: Config, sliding: bool) -> Attention:
    n_heads, n_kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    head_dim, v_head_dim, window = c["head_dim"], c["v_head_dim"], None
    p = rope_parameters(c, experts.FULL)
    if sliding:
        n_heads, n_kv_heads = (
            c.get("swa_num_attention_heads", n_heads),
            c.get("swa_num_key_value_heads", 2 * n_kv_heads),
        )
        head_dim, v_head_dim = c.get("swa_head_dim", head_dim), c.get("swa_v_head_dim", v_head_dim)
        if "sliding_window_size" in c:  # the releases say it three times
            c.refuse(sliding_window=c["sliding_window_size"], attention_chunk_size=c["sliding_window_size"])
        window = c["sliding_window_size"] + 1 if "sliding_window_size" in c else c["sliding_window"]
        p = rope_parameters(c, experts.SLIDING, theta="swa_rope_theta")
    bias = c.get("attention_bias", False)
    scale = c.data.get("attention_value_scale", 0.707)  # absent: upstream's default; null: none
    return Attention(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        scale=head_dim**-0.5,
        rope=rope(c, p, int(head_dim * Config(p, f"{c.where}: rope_parameters")["partial_rotary_factor"])),
        window=window,
        qkv_bias=bias,
        sinks=c.get("add_swa_attention_sink_bias", True)
        if sliding
        else c.get("add_full_attention_sink_bias", False),
        value_scale=1.0 if scale is None else float(scale),
    )


RULES = {
    "hf": rules(
        *names.ENDS,
        *names.PRE_NORMS,
        *names.ATTENTION,
        ("layers.{i}.attn.sinks", "model.layers.{i}.self_attn.attention_sink_bias"),
        *names.MLP,
        *experts.DEEPSEEK_MOE,
        extra("model.mtp.*", experts.MTP),
    ),
}

FAMILY = Family("mimo_v2_flash", ("mimo_v2_flash",), ("MiMoV2FlashForCausalLM",), spec, RULES)
