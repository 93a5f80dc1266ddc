"""nanochat: d20 to d34, as transformers has them.

What is unusual:
- No norm has a weight: those before attention and feed-forward, of queries and keys (per head, after RoPE), of the embeddings
  and the last.
- RoPE turns backwards: by the negative of the usual angle.
- An MLP without a gate: fc2(relu(fc1 x) squared). Logits capped at 15, unless the config says otherwise; older
  configs say `logits_soft_cap`.
- The first layout of the training code's checkpoints (`n_embd`, `window_pattern`, ...) is another, and has no class there.
"""

from __future__ import annotations

from dataclasses import replace

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, QKNorm, Spec, hf, read, rules


def spec(c: Config) -> Spec:
    norm, head_dim, bias = (
        Norm(c.get("rms_norm_eps", 1e-6), weight="none"),
        read.head_dim(c),
        c.get("attention_bias", False),
    )
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=replace(read.whole_rope(c, read.rope_parameters(c), head_dim), backwards=True),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=QKNorm(norm, after_rope=True),
    )
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS, "relu2"), gated=False)
    older = c.first("logits_soft_cap", default=15.0)
    cap = c.said("final_logit_softcapping", older)  # null: none
    return Spec(
        family="nanochat",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, ffn_norm=norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        logit_softcap=None if cap is None else float(cap),
        embed_norm=norm,
        dtype=read.dtype(c),
    )


RULES = {
    "hf": rules(
        ("embed.weight", "model.embed_tokens.weight"),
        ("head.weight", "lm_head.weight"),
        *hf.ATTENTION,
        ("layers.{i}.mlp.up.weight", "model.layers.{i}.mlp.fc1.weight"),
        ("layers.{i}.mlp.down.weight", "model.layers.{i}.mlp.fc2.weight"),
    )
}

FAMILY = Family("nanochat", ("nanochat",), ("NanoChatForCausalLM",), spec, RULES)
