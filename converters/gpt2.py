"""GPT-2: 124M, medium, large, xl.

- LayerNorms with bias before both branches; every linear layer has a bias; the head is tied.
- Learned positions are added to the embedding: no RoPE. One key/value head per query head.
- The MLP has no gate: down(gelu_tanh(up(x))), 4 d_model wide where `n_inner` is null.
- Linear weights are stored [in, out] ("Conv1D"), q | k | v fused along the columns.
- The files of 2019 have no `transformer.` prefix and carry each layer's causal mask as `attn.bias`.
- `scale_attn_by_inverse_layer_idx` divides a layer's scores by its index + 1 (used by fine-tunes).
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Spec, extra, read, rules, transpose


def spec(c: Config) -> Spec:
    c.refuse(add_cross_attention=False)
    d, n_heads = c["n_embd"], c["n_head"]
    norm = Norm(c["layer_norm_epsilon"], kind="layer", rounding="last")
    mlp = MLP(
        c.get("n_inner", 4 * d), c.table("activation_function", read.ACTIVATIONS), gated=False, bias=True
    )

    def attention(i: int) -> Attention:
        head_dim = d // n_heads
        scale = head_dim**-0.5 if c.get("scale_attn_weights", True) else 1.0
        if c.get("scale_attn_by_inverse_layer_idx", False):
            scale /= i + 1
        return Attention(n_heads, n_heads, head_dim, scale, qkv_bias=True, out_bias=True)

    return Spec(
        family="gpt2",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=tuple(Layer(attention(i), mlp, attn_norm=norm, ffn_norm=norm) for i in range(c["n_layer"])),
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c["n_positions"],
        positions=c["n_positions"],
        dtype=read.dtype(c),
    )


_H = "transformer.h.{i}."
RULES = {
    "hf": rules(
        ("embed.weight", "transformer.wte.weight"),
        ("positions.weight", "transformer.wpe.weight"),
        ("norm.weight", "transformer.ln_f.weight"),
        ("norm.bias", "transformer.ln_f.bias"),
        ("head.weight", "lm_head.weight"),
        ("layers.{i}.attn_norm.weight", _H + "ln_1.weight"),
        ("layers.{i}.attn_norm.bias", _H + "ln_1.bias"),
        ("layers.{i}.attn.qkv.weight", transpose(_H + "attn.c_attn.weight")),
        ("layers.{i}.attn.qkv.bias", _H + "attn.c_attn.bias"),
        ("layers.{i}.attn.out.weight", transpose(_H + "attn.c_proj.weight")),
        ("layers.{i}.attn.out.bias", _H + "attn.c_proj.bias"),
        ("layers.{i}.ffn_norm.weight", _H + "ln_2.weight"),
        ("layers.{i}.ffn_norm.bias", _H + "ln_2.bias"),
        ("layers.{i}.mlp.up.weight", transpose(_H + "mlp.c_fc.weight")),
        ("layers.{i}.mlp.up.bias", _H + "mlp.c_fc.bias"),
        ("layers.{i}.mlp.down.weight", transpose(_H + "mlp.c_proj.weight")),
        ("layers.{i}.mlp.down.bias", _H + "mlp.c_proj.bias"),
        extra("*h.*.attn.bias", "the causal mask, saved as a buffer"),
        extra("*h.*.attn.masked_bias", "what masked scores were set to, saved as a buffer"),
        prefixes=({}, {"transformer.": ""}),
    ),
}

FAMILY = Family("gpt2", ("gpt2",), ("GPT2LMHeadModel",), spec, RULES)
