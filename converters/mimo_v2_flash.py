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

from zoo.family import (
    MLP,
    Attention,
    Config,
    Disagreement,
    Family,
    Layer,
    MoE,
    Norm,
    Spec,
    extra,
    hf,
    read,
    rules,
)

from . import deepseek_v3


def spec(c: Config) -> Spec:
    c.choice("hidden_act", ("silu",))
    c.refuse(n_shared_experts=None)
    n = c["num_hidden_layers"]
    if "layer_types" in c:
        types = c.each_layer("layer_types", n, (read.FULL, read.SLIDING))
    else:
        kinds = (read.FULL, read.SLIDING)
        types = [kinds[k] for k in c.each_layer("hybrid_layer_pattern", n, (0, 1))]
    if "moe_layer_freq" in c:
        sparse = [bool(k) for k in c.each_layer("moe_layer_freq", n, (0, 1))]
    else:
        sparse = deepseek_v3.sparse_layers(c)
    layers = {kind: attention(c, kind == read.SLIDING) for kind in (read.FULL, read.SLIDING)}
    norm = Norm(c.first("rms_norm_eps", "layernorm_epsilon"))
    dense = MLP(c["intermediate_size"])
    router = deepseek_v3.router(c, scale=c.get("routed_scaling_factor", 1.0))
    moe = MoE(read.n_experts(c), MLP(c["moe_intermediate_size"]), router)
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
        dtype=read.dtype(c),
    )


def attention(c: Config, sliding: bool) -> Attention:
    n_heads, n_kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    head_dim, v_head_dim, window = c["head_dim"], c["v_head_dim"], None
    p = read.rope_parameters(c, read.FULL)
    if sliding:
        n_heads, n_kv_heads = (
            c.get("swa_num_attention_heads", n_heads),
            c.get("swa_num_key_value_heads", 2 * n_kv_heads),
        )
        head_dim, v_head_dim = c.get("swa_head_dim", head_dim), c.get("swa_v_head_dim", v_head_dim)
        if "sliding_window_size" in c:  # the releases say it three times
            c.refuse(sliding_window=c["sliding_window_size"], attention_chunk_size=c["sliding_window_size"])
        window = c["sliding_window_size"] + 1 if "sliding_window_size" in c else c["sliding_window"]
        p = read.rope_parameters(c, read.SLIDING, theta="swa_rope_theta")
    bias = c.get("attention_bias", False)
    scale = c.said("attention_value_scale", 0.707)  # absent: upstream's default; null: none
    return Attention(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        scale=head_dim**-0.5,
        rope=read.rope(
            c, p, int(head_dim * Config(p, f"{c.where}: read.rope_parameters")["partial_rotary_factor"])
        ),
        window=window,
        qkv_bias=bias,
        sinks=c.get("add_swa_attention_sink_bias", True)
        if sliding
        else c.get("add_full_attention_sink_bias", False),
        value_scale=1.0 if scale is None else float(scale),
    )


HF = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    ("layers.{i}.attn.sinks", "model.layers.{i}.self_attn.attention_sink_bias"),
    *hf.MLP,
    *deepseek_v3.MOE,
    extra("model.mtp.*", hf.MTP),
)
_SINKS = ("layers.{i}.attn.sinks", "model.layers.{i}.self_attn.sinks")
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *hf.STACKED, _SINKS))}

DISAGREEMENTS = (
    Disagreement(
        about="the window of the sliding layers",
        upstream="shows 129 keys for a released window of 128, the query's own included (SGLang too)",
        vendor="shows 128, by transformers' mask helper in the release's own files",
        follows="open",
        why="the vendor has not said which its training used",
        source="https://huggingface.co/XiaomiMiMo/MiMo-V2-Flash/blob/main/modeling_mimo_v2_flash.py",
        since="2025-12",
    ),
)
FAMILY = Family(
    "mimo_v2_flash", ("mimo_v2_flash",), ("MiMoV2FlashForCausalLM",), spec, RULES, disagreements=DISAGREEMENTS
)
