"""VaultGemma 1B.

Gemma 2 without the norms behind its branches:
- RMS norms multiply by (1 + w), in fp32, before each branch and at the end.
- GEGLU (tanh form); embeddings are multiplied by sqrt(d_model), rounded to their dtype first; tied head.
- Scores are scaled by query_pre_attn_scalar^-0.5, then soft-capped; so are the logits.
- Layers alternate between a window and none where `layer_types` is absent; those of the release are all full
  (huggingface.co/docs/transformers/model_doc/vaultgemma).
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Spec, hf, read, rules


def spec(c: Config) -> Spec:
    d, head_dim = c["hidden_size"], c["head_dim"]
    norm = Norm(c["rms_norm_eps"], weight="plus_one", rounding="last")

    def attention(kind: str) -> Attention:
        return Attention(
            n_heads=c["num_attention_heads"],
            n_kv_heads=c["num_key_value_heads"],
            head_dim=head_dim,
            scale=c["query_pre_attn_scalar"] ** -0.5,
            rope=read.whole_rope(c, read.rope_parameters(c), head_dim),
            window=c["sliding_window"] if kind == read.SLIDING else None,
            qkv_bias=c.get("attention_bias", False),
            out_bias=c.get("attention_bias", False),
            softcap=c.get("attn_logit_softcapping"),
        )

    mlp = MLP(c["intermediate_size"], c.table("hidden_activation", read.ACTIVATIONS))
    return Spec(
        family="vaultgemma",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(attention(kind), mlp, attn_norm=norm, ffn_norm=norm)
            for kind in read.layer_types(c, read.every(2))
        ),
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c["max_position_embeddings"],
        embed_scale=d**0.5,
        logit_softcap=c.get("final_logit_softcapping"),
        dtype=read.dtype(c),
    )


_L = "model.layers.{i}."
RULES = {
    "hf": rules(
        *hf.ENDS,
        ("layers.{i}.attn_norm.weight", _L + "input_layernorm.weight"),
        ("layers.{i}.ffn_norm.weight", _L + "pre_feedforward_layernorm.weight"),
        *hf.ATTENTION,
        *hf.MLP,
    ),
}

FAMILY = Family("vaultgemma", ("vaultgemma",), ("VaultGemmaForCausalLM",), spec, RULES)
