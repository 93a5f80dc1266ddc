"""OLMo 2: 1B, 7B, 13B, 32B.

- Norms sit on the OUTPUT of attention and of the MLP, inside the residual; there are none on their inputs.
- QK-norm over the full width of all heads (weights [n_heads * head_dim], [n_kv_heads * head_dim]), before
  the split into heads and before RoPE.
- Norm weights multiply in fp32; RoPE is computed in fp32 and cast back.
- No `head_dim` field: it is d_model / n_heads. The head is not tied.
"""

from __future__ import annotations

from zoo.family import (
    MLP,
    Attention,
    Config,
    Family,
    Layer,
    Norm,
    QKNorm,
    Rope,
    RuleLine,
    Spec,
    hf,
    read,
    rules,
)


def spec(c: Config) -> Spec:
    rope = read.whole_rope(c, read.rope_parameters(c), read.head_dim(c), rounding="last")
    return decoder("olmo2", c, [(rope, None)] * c["num_hidden_layers"])


def decoder(family: str, c: Config, layers: list[tuple[Rope, int | None]]) -> Spec:
    """The whole model, given each layer's RoPE and window (Olmo 3 differs in just these)."""
    return model(family, c, [layer(c, *kind) for kind in layers])


def layer(c: Config, rope: Rope | None, window: int | None = None) -> Layer:
    """Attention and the MLP, a norm on what each gives."""
    norm = norm_of(c)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
        head_dim=read.head_dim(c),
        scale=read.head_dim(c) ** -0.5,
        rope=rope,
        window=window,
        qkv_bias=c.get("attention_bias", False),
        out_bias=c.get("attention_bias", False),
        qk_norm=QKNorm(norm, over="all_heads"),
    )
    return Layer(attention, mlp(c), attn_post_norm=norm, ffn_post_norm=norm)


def norm_of(c: Config) -> Norm:
    return Norm(c["rms_norm_eps"], rounding="last")


def mlp(c: Config) -> MLP:
    return MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))


def model(family: str, c: Config, layers: list[Layer]) -> Spec:
    return Spec(
        family=family,
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(layers),
        norm=norm_of(c),
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


POST_NORMS: tuple[RuleLine, ...] = (
    ("layers.{i}.attn_post_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    ("layers.{i}.ffn_post_norm.weight", "model.layers.{i}.post_feedforward_layernorm.weight"),
)
RULES = {"hf": rules(*hf.ENDS, *POST_NORMS, *hf.ATTENTION, *hf.QK_NORM, *hf.MLP)}

FAMILY = Family("olmo2", ("olmo2",), ("Olmo2ForCausalLM",), spec, RULES)
