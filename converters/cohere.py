"""Command R, Command R+ and Aya 23 (Cohere).

A Llama with
- one norm for both branches, which stand side by side: x + attn(n(x)) + mlp(n(x));
- norms that remove the mean, with a weight and no bias;
- RoPE in neighbouring pairs, its tables rounded to the model's dtype and the rotation itself in fp32;
- logits multiplied by logit_scale, and a tied head;
- in Command R+ (`use_qk_norm`) a norm of q and k, with a weight for each head's each channel.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, QKNorm, Spec, hf, read, rules


def spec(c: Config) -> Spec:
    norm, head_dim = read.centred_norm(c), read.head_dim(c)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c), head_dim, interleaved=True, rounding="both"),
        qkv_bias=c.get("attention_bias", False),
        out_bias=c.get("attention_bias", False),
        qk_norm=QKNorm(norm, "each_head") if c.get("use_qk_norm", False) else None,
    )
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    return Spec(
        family="cohere",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, norm, parallel=True, adds="in_turn"),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c["max_position_embeddings"],
        logit_scale=c.get("logit_scale", 0.0625),
        dtype=read.dtype(c),
    )


RULES = {"hf": rules(*hf.ENDS, *hf.PARALLEL_NORM, *hf.ATTENTION, *hf.QK_NORM, *hf.MLP, hf.INV_FREQ)}

FAMILY = Family("cohere", ("cohere",), ("CohereForCausalLM",), spec, RULES)
