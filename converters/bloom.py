"""BLOOM (560M to 176B) and BLOOMZ.

GPT-2's blocks with
- ALiBi: slope * position is added to the scores; no positions are learned or rotated;
- a LayerNorm of the embedding; the head is tied;
- q, k and v fused head by head; an MLP 4 d_model wide with the tanh GELU.
Releases spell `n_layer`, `n_head` and `hidden_size` in several ways; many have no `transformer.` prefix.
"""

from __future__ import annotations

from zoo.family import MLP, Alibi, Attention, Config, Family, Layer, Norm, Spec, hf, read, rules


def spec(c: Config) -> Spec:
    c.refuse(apply_residual_connection_post_layernorm=False, n_inner=None)
    d, n_heads = c.first("n_embed", "hidden_size"), c.first("n_head", "num_attention_heads")
    head_dim = d // n_heads
    norm = Norm(c["layer_norm_epsilon"], kind="layer", rounding="last")
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        qkv_bias=True,
        out_bias=True,
        alibi=Alibi(),
    )
    mlp = MLP(4 * d, "gelu_tanh", gated=False, bias=True)
    return Spec(
        family="bloom",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, ffn_norm=norm),)
        * c.first("n_layer", "num_hidden_layers"),
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c.get("seq_length", 2048),  # what they were trained on
        embed_norm=norm,
        dtype=read.dtype(c),
    )


_T = "transformer."
_L = "transformer.h.{i}."
RULES = {
    "hf": rules(
        ("embed.weight", _T + "word_embeddings.weight"),
        ("head.weight", "lm_head.weight"),
        *hf.affine("embed_norm", _T + "word_embeddings_layernorm"),
        *hf.affine("norm", _T + "ln_f"),
        *hf.affine("layers.{i}.attn_norm", _L + "input_layernorm"),
        *hf.fused_per_head(_L + "self_attention.query_key_value"),
        *hf.affine("layers.{i}.attn.out", _L + "self_attention.dense"),
        *hf.affine("layers.{i}.ffn_norm", _L + "post_attention_layernorm"),
        *hf.affine("layers.{i}.mlp.up", _L + "mlp.dense_h_to_4h"),
        *hf.affine("layers.{i}.mlp.down", _L + "mlp.dense_4h_to_h"),
        prefixes=({}, {"transformer.": ""}),
    )
}

FAMILY = Family("bloom", ("bloom",), ("BloomForCausalLM",), spec, RULES)
