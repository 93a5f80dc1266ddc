"""OPT: 125M, 1.3B, 2.7B, 6.7B, 13B, 30B, 66B.

GPT-2's blocks with ReLU and separate q, k, v. Position p is row p + 2 of the learned table. The eps of the norms is no
field: 1e-5. The head is tied. The 350M differs in ways zoo does not have and is refused: norms after the residual
addition, and an embedding narrower than the model.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Spec, hf, read, rules

OFFSET = 2


def spec(c: Config) -> Spec:
    d, n_heads = c["hidden_size"], c["num_attention_heads"]
    c.refuse(
        do_layer_norm_before=True, _remove_final_layer_norm=False, word_embed_proj_dim=d,
        layer_norm_elementwise_affine=True,
    )  # fmt: skip
    norm, bias = Norm(1e-5, kind="layer", rounding="last"), c.get("enable_bias", True)
    head_dim = d // n_heads
    attention = Attention(n_heads, n_heads, head_dim, scale=head_dim**-0.5, qkv_bias=bias, out_bias=bias)
    mlp = MLP(c["ffn_dim"], c.table("activation_function", read.ACTIVATIONS, "relu"), gated=False, bias=bias)
    return Spec(
        family="opt",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, ffn_norm=norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c["max_position_embeddings"],
        positions=c["max_position_embeddings"],
        positions_offset=OFFSET,
        dtype=read.dtype(c),
    )


_D = "model.decoder."
_L = _D + "layers.{i}."
_A = _L + "self_attn."
RULES = {
    "hf": rules(
        ("embed.weight", _D + "embed_tokens.weight"),
        ("positions.weight", _D + "embed_positions.weight"),
        ("head.weight", "lm_head.weight"),
        *hf.affine("norm", _D + "final_layer_norm"),
        *hf.affine("layers.{i}.attn_norm", _L + "self_attn_layer_norm"),
        *hf.affine("layers.{i}.attn.qkv", _A + "q_proj", _A + "k_proj", _A + "v_proj"),
        *hf.affine("layers.{i}.attn.out", _A + "out_proj"),
        *hf.affine("layers.{i}.ffn_norm", _L + "final_layer_norm"),
        *hf.affine("layers.{i}.mlp.up", _L + "fc1"),
        *hf.affine("layers.{i}.mlp.down", _L + "fc2"),
        prefixes=({}, {"model.decoder.": "decoder."}),
    )
}

FAMILY = Family("opt", ("opt",), ("OPTForCausalLM",), spec, RULES)
