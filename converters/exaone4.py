"""EXAONE 4.0: 1.2B and 32B.

What is unusual:
- Norms sit on the OUTPUT of attention and of the MLP, inside the residual; there are none on their inputs.
- QK-norm per head, before RoPE.
- 32B: three layers with a window to a full one, and the full ones have no RoPE. Where `sliding_window` is null (1.2B)
  every layer is full and rotated.
- A pattern of layers is a number or letters (`LLLG`), where `layer_types` does not list them.
"""

from __future__ import annotations

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, QKNorm, Spec, ZooError, hf, read, rules

from . import olmo2

WINDOW = 4096
"""Of upstream's class, where a config does not say; null is none."""


def spec(c: Config) -> Spec:
    norm = Norm(c["rms_norm_eps"])
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    return Spec(
        family="exaone4",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(attention, mlp, attn_post_norm=norm, ffn_post_norm=norm) for attention in attentions(c)
        ),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


def attentions(c: Config) -> list[Attention]:
    """Each layer's attention. Of layers with and without a window, those without have no RoPE."""
    head_dim = read.head_dim(c)
    rope = read.whole_rope(c, read.rope_parameters(c), head_dim)
    window = c.said("sliding_window", WINDOW)

    def attention(kind: str) -> Attention:
        sliding = kind == read.SLIDING
        return Attention(
            n_heads=c["num_attention_heads"],
            n_kv_heads=c["num_key_value_heads"],
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=rope if sliding or window is None else None,
            window=(window or c["sliding_window"]) if sliding else None,
            qk_norm=QKNorm(Norm(c["rms_norm_eps"])),
        )

    return [attention(kind) for kind in layer_types(c)]


def layer_types(c: Config) -> list[str]:
    if c.said("sliding_window", WINDOW) is None:
        return read.layer_types(c, lambda _: read.FULL)
    pattern = c.get("sliding_window_pattern", 4)
    if isinstance(pattern, int):
        return read.layer_types(c, read.every(pattern))
    if not isinstance(pattern, str) or set(pattern) != {"L", "G"}:
        raise ZooError(
            f"{c.where}: sliding_window_pattern is {pattern!r}; expected a number, or letters L (window) and G (full)"
        )
    return read.layer_types(c, lambda i: read.FULL if pattern[i % len(pattern)] == "G" else read.SLIDING)


RULES = {"hf": rules(*hf.ENDS, *olmo2.POST_NORMS, *hf.ATTENTION, *hf.QK_NORM, *hf.MLP)}

FAMILY = Family("exaone4", ("exaone4",), ("Exaone4ForCausalLM",), spec, RULES)
