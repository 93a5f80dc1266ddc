"""Bamba 9B (IBM, Princeton, CMU, UIUC).

- Mamba-2 in all layers but those of `attn_layer_indices`; a SwiGLU in every layer.
- RoPE on the first half of each head, whatever the config says or leaves out: upstream's class puts a half there.
  `attn_rotary_emb` says the same in channels. The first releases leave theta out, too (10000).
- Granite 4.0's reading of Mamba (see granitemoehybrid.py) and Falcon-H1's names.
"""

from __future__ import annotations

from zoo.family import (
    MLP,
    Attention,
    Config,
    Disagreement,
    Family,
    Layer,
    Mixer,
    Norm,
    Spec,
    ZooError,
    read,
    rules,
)

from . import falcon_h1, granitemoehybrid


def spec(c: Config) -> Spec:
    norm = Norm(c["rms_norm_eps"])
    mlp = MLP(c["intermediate_size"], c.choice("hidden_act", ("silu",)), bias=c.get("mlp_bias", False))
    attention, mamba = attention_of(c), granitemoehybrid.mamba(c)

    def mixer(i: int) -> Mixer:
        return attention if i in attends else mamba

    c.get("mamba_dt_rank")  # of Mamba-1: the first release's config has it, and no class reads it
    n, attends = c["num_hidden_layers"], c.get("attn_layer_indices") or ()
    return Spec(
        family="bamba",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(Layer(mixer(i), mlp, attn_norm=norm, ffn_norm=norm) for i in range(n)),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


def attention_of(c: Config) -> Attention:
    """Grouped heads, half of each rotated."""
    head_dim = read.head_dim(c)
    p = read.rope_parameters(c, default_theta=10000.0)
    if p.get("partial_rotary_factor") is None:  # upstream's class puts its own in
        p["partial_rotary_factor"] = 0.5
    rope = read.partial_rope(c, p, head_dim)
    if (said := c.get("attn_rotary_emb", rope.dim)) != rope.dim:
        raise ZooError(
            f"{c.where}: attn_rotary_emb is {said}, but of head_dim {head_dim} half, {rope.dim}, turn"
        )
    bias = c.get("attention_bias", False)
    return Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
    )


DISAGREEMENTS = (
    *granitemoehybrid.DISAGREEMENTS,
    Disagreement(
        about="how much of a head turns",
        upstream="half, but from 5.0 to 5.14, where whole heads turned",
        vendor="half",
        follows="vendor",
        why="it is how the release was trained",
        source="https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/bamba/configuration_bamba.py",
        since="2026-01",
    ),
)
FAMILY = Family(
    "bamba",
    ("bamba",),
    ("BambaForCausalLM",),
    spec,
    {"hf": rules(*falcon_h1.HF)},
    disagreements=DISAGREEMENTS,
)
