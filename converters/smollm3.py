"""SmolLM3 3B.

A Llama with a tied head and
- no RoPE on every fourth layer (`no_rope_layers`: 1 means rotated, `no_rope_layer_interval` where it is absent);
- optionally (`use_sliding_window`) a window, on the layers without RoPE only.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Spec, hf, read, rules


def spec(c: Config) -> Spec:
    d, n_heads = c["hidden_size"], c["num_attention_heads"]
    head_dim = read.head_dim(c)
    norm = Norm(c["rms_norm_eps"])
    rope = read.whole_rope(c, read.rope_parameters(c), head_dim)

    def attention(rotated: int, kind: str) -> Attention:
        return Attention(
            n_heads=n_heads,
            n_kv_heads=c["num_key_value_heads"],
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=rope if rotated else None,
            window=c["sliding_window"] if kind == read.SLIDING else None,
            qkv_bias=c.get("attention_bias", False),
            out_bias=c.get("attention_bias", False),
        )

    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS), bias=c.get("mlp_bias", False))
    return Spec(
        family="smollm3",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=tuple(Layer(attention(*kind), mlp, attn_norm=norm, ffn_norm=norm) for kind in layers(c)),
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


def layers(c: Config) -> list[tuple[int, str]]:
    """For each layer, whether it is rotated (1 or 0), and the kind of its attention."""
    n = c["num_hidden_layers"]
    if "no_rope_layers" in c:
        rotated = c.each_layer("no_rope_layers", n, (0, 1))
    else:
        rotated = [int((i + 1) % c["no_rope_layer_interval"] != 0) for i in range(n)]
    windowed = c.get("use_sliding_window", False) and "sliding_window" in c
    kinds = read.layer_types(c, lambda i: read.SLIDING if windowed and not rotated[i] else read.FULL)
    return list(zip(rotated, kinds, strict=True))


RULES = {
    "hf": rules(*hf.ENDS, *hf.PRE_NORMS, *hf.ATTENTION, *hf.MLP, hf.INV_FREQ),
}

FAMILY = Family("smollm3", ("smollm3",), ("SmolLM3ForCausalLM",), spec, RULES)
