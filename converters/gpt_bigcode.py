"""StarCoder, StarCoderBase, SantaCoder.

GPT-2 with one key/value head for all query heads (`multi_query`), and linear weights [out, in]. q, k and v are one matrix:
rows of all queries, of k, of v; without `multi_query` head by head.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Spec, hf, read, rules


def spec(c: Config) -> Spec:
    c.refuse(add_cross_attention=False)
    d, n_heads = c["n_embd"], c["n_head"]
    multi_query = c.get("multi_query", True)
    c.choice("num_key_value_heads", (1 if multi_query else n_heads,), 1 if multi_query else n_heads)
    head_dim = d // n_heads
    norm = Norm(c["layer_norm_epsilon"], kind="layer", rounding="last")
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=1 if multi_query else n_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if c.get("scale_attn_weights", True) else 1.0,
        qkv_bias=True,
        out_bias=True,
    )
    act = c.table("activation_function", read.ACTIVATIONS, "gelu_pytorch_tanh")
    mlp = MLP(c.get("n_inner", 4 * d), act, gated=False, bias=True)
    return Spec(
        family="gpt_bigcode",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, ffn_norm=norm),) * c["n_layer"],
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
        ("head.weight", "lm_head.weight"),
        *hf.affine("norm", "transformer.ln_f"),
        *hf.affine("layers.{i}.attn_norm", _H + "ln_1"),
        *hf.fused_per_head(_H + "attn.c_attn"),
        *hf.affine("layers.{i}.attn.out", _H + "attn.c_proj"),
        *hf.affine("layers.{i}.ffn_norm", _H + "ln_2"),
        *hf.affine("layers.{i}.mlp.up", _H + "mlp.c_fc"),
        *hf.affine("layers.{i}.mlp.down", _H + "mlp.c_proj"),
    )
}

FAMILY = Family("gpt_bigcode", ("gpt_bigcode",), ("GPTBigCodeForCausalLM",), spec, RULES)
