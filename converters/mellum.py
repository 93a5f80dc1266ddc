"""JetBrains' Mellum 2 and 2.1 (12B-A2.5B).

Qwen3 with experts in every layer, and
- windows: three layers of four see 1024 tokens, each with a RoPE of its own (`rope_parameters` by kind of layer; YaRN on
  the full ones only);
- layers that `mlp_layer_types` calls dense have a plain MLP (no release has any).
- `mtp.*` is a multi-token-prediction layer.
"""

from __future__ import annotations

from zoo.family import (
    FFN,
    MLP,
    Attention,
    Config,
    Family,
    Layer,
    MoE,
    Norm,
    QKNorm,
    Spec,
    extra,
    hf,
    read,
    rules,
)

from . import qwen3_moe


def spec(c: Config) -> Spec:
    c.choice("hidden_act", ("silu",))
    norm, head_dim, bias = Norm(c["rms_norm_eps"]), c["head_dim"], c.get("attention_bias", False)

    def attention(kind: str) -> Attention:
        return Attention(
            n_heads=c["num_attention_heads"],
            n_kv_heads=c["num_key_value_heads"],
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=read.whole_rope(c, read.rope_parameters(c, kind), head_dim),
            window=c["sliding_window"] if kind == read.SLIDING else None,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=QKNorm(norm),
        )

    n = c["num_hidden_layers"]
    ffn: dict[str, FFN] = {
        "dense": MLP(c["intermediate_size"]),
        "sparse": MoE(
            read.n_experts(c), MLP(c["moe_intermediate_size"]), qwen3_moe.router(c, normalize=True)
        ),
    }
    ffns = c.each_layer("mlp_layer_types", n, ffn) if "mlp_layer_types" in c else ["sparse"] * n
    kinds = read.layer_types(c, lambda _: read.FULL)
    return Spec(
        family="mellum",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(attention(kind), ffn[f], attn_norm=norm, ffn_norm=norm)
            for kind, f in zip(kinds, ffns, strict=True)
        ),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


HF = (*qwen3_moe.HF, extra("mtp.*", hf.MTP))
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *hf.STACKED))}

FAMILY = Family("mellum", ("mellum",), ("MellumForCausalLM",), spec, RULES)
