"""Meta's Muse Glimmer 30B, the language model within a wrapper that sees.

What is unusual:
- Embeddings are RMS-normalised, without a weight. Four norms a layer, of 1 + w; those after a branch have an eps of their own,
  and the last norm a plain weight.
- QK-norm per head without a weight; queries then times `qk_scale_factor`, here part of the scores' scale.
- Layers with a window have RoPE, each fourth counted from the last is full and has none. `layer_rope_theta` says so once
  more: 0, or the one theta that upstream uses everywhere.
- Attention's output times sigmoid of a gate for each channel, from a matrix of its own.
- Logits are scaled, then soft-capped.
- Older copies whose config is flat mean another thing by `qk_scale_factor` (it holds sqrt(head_dim)): they are refused.
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
    RuleLine,
    Spec,
    ZooError,
    cat,
    extra,
    hf,
    read,
    rules,
)


def spec(c: Config) -> Spec:
    t = read.text_config(c)
    t.choice("model_type", ("muse_glimmer_text",))
    t.refuse(attention_bias=False)
    n, eps, head_dim = t["num_hidden_layers"], t["rms_norm_eps"], t["head_dim"]
    pre, post = (Norm(e, weight="plus_one", rounding="last") for e in (eps, t["post_norm_eps"]))
    from_the_end = read.every(4)
    kinds = read.layer_types(t, lambda i: from_the_end(i - n))
    rope = read.whole_rope(t, read.rope_parameters(t), head_dim)

    def attention(kind: str, turns: bool) -> Attention:
        return Attention(
            n_heads=t["num_attention_heads"],
            n_kv_heads=t["num_key_value_heads"],
            head_dim=head_dim,
            scale=t["qk_scale_factor"] * head_dim**-0.5,
            rope=rope if turns else None,
            window=t["sliding_window"] if kind == read.SLIDING else None,
            qk_norm=QKNorm(Norm(eps, weight="none", rounding="last")),
            gate=True,
        )

    mlp = MLP(t["intermediate_size"], t.table("hidden_activation", {"silu": read.ACTIVATIONS["silu"]}))
    return Spec(
        family="muse_glimmer",
        d_model=t["hidden_size"],
        vocab_size=t["vocab_size"],
        layers=tuple(
            Layer(attention(kind, turns), mlp, pre, post, pre, post)
            for kind, turns in zip(kinds, turning(t, n, rope.theta), strict=True)
        ),
        norm=Norm(eps, rounding="last"),
        tied=read.tied(c, t, default=False),
        context_length=t["max_position_embeddings"],
        embed_norm=Norm(eps, weight="none", rounding="last"),
        logit_scale=t["output_multiplier"],
        logit_softcap=t["final_logit_softcapping"],
        dtype=read.dtype(t, c),
    )


def turning(t: Config, n: int, theta: float) -> list[bool]:
    """Which layers have RoPE: those whose theta is not 0; else all but each fourth, counted from the last."""
    if "layer_rope_theta" not in t:
        return [(n - 1 - i) % 4 != 0 for i in range(n)]
    said = t.each_layer("layer_rope_theta", n)
    for i, own in enumerate(said):
        if own not in (0, theta):
            raise ZooError(
                f"{t.where}: layer_rope_theta[{i}] is {own}, but rope_theta {theta}; upstream turns by that one in every "
                "layer whose own is not 0"
            )
    return [own != 0 for own in said]


_A = "model.layers.{i}.self_attn."
HF: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.FOUR_NORMS,
    ("layers.{i}.attn.qkv.weight", cat(*(f"{_A}{x}_proj.weight" for x in ("q", "gate", "k", "v")))),
    ("layers.{i}.attn.out.weight", _A + "o_proj.weight"),
    *hf.MLP,
    *(
        extra(f"model.vision_{part}.*", "sees images; the text model does not")
        for part in ("tower", "adapter", "projection")
    ),
)
RULES = {"hf": rules(*HF, prefixes=({"model.": "model.language_model."},))}

FAMILY = Family(
    "muse_glimmer",
    ("muse_glimmer", "muse_glimmer_text"),
    ("MuseGlimmerForConditionalGeneration",),
    spec,
    RULES,
)
