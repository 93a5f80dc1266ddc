"""GPT-J 6B.

- Both branches read one LayerNorm of the same x; GPT-2's MLP (tanh GELU, biases).
- No biases in attention; the head is not tied and has one.
- RoPE in pairs of neighbours on the first `rotary_dim` channels of a head; theta is no field: 10000.
- Upstream has scores in fp32 in every dtype, and no sdpa.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Rope, Spec, extra, hf, read, rules

THETA = 10000.0


def spec(c: Config) -> Spec:
    c.refuse(tie_word_embeddings=False, rotary=True, scale_attn_weights=True)
    d, n_heads = c["n_embd"], c["n_head"]
    head_dim = d // n_heads
    norm = Norm(c["layer_norm_epsilon"], kind="layer", rounding="last")
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=Rope(THETA, c["rotary_dim"], interleaved=True),
    )
    act = c.table("activation_function", read.ACTIVATIONS)
    mlp = MLP(c.get("n_inner", 4 * d), act, gated=False, bias=True)
    return Spec(
        family="gptj",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, parallel=True),) * c["n_layer"],
        norm=norm,
        tied=False,
        head_bias=True,
        context_length=c["n_positions"],
        dtype=read.dtype(c),
    )


_H = "transformer.h.{i}."
_QKV = (_H + "attn.q_proj", _H + "attn.k_proj", _H + "attn.v_proj")
RULES = {
    "hf": rules(
        ("embed.weight", "transformer.wte.weight"),
        *hf.affine("norm", "transformer.ln_f"),
        *hf.affine("head", "lm_head"),
        *hf.affine("layers.{i}.attn_norm", _H + "ln_1"),
        *hf.affine("layers.{i}.attn.qkv", *_QKV),
        *hf.affine("layers.{i}.attn.out", _H + "attn.out_proj"),
        *hf.affine("layers.{i}.mlp.up", _H + "mlp.fc_in"),
        *hf.affine("layers.{i}.mlp.down", _H + "mlp.fc_out"),
        extra("transformer.h.*.attn.bias", "the causal mask, saved as a buffer"),
        extra("transformer.h.*.attn.masked_bias", "what masked scores were set to, saved as a buffer"),
    )
}

FAMILY = Family("gptj", ("gptj",), ("GPTJForCausalLM",), spec, RULES)
