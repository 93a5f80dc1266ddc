"""Phi-3 (mini, medium), Phi-3.5-mini, Phi-4, Phi-4-mini and their reasoning models.

A Llama with
- q | k | v in one matrix and gate | up in another, as the layout has them;
- LongRoPE beyond the original context: two tables of divisors, the long one for every position of a text that is longer.
  Early configs call it "su" or "yarn". Releases for the original context have plain RoPE;
- RoPE on a part of each head in Phi-4-mini (`partial_rotary_factor` 0.75);
- a window in Phi-3-mini (2047; where it is wider than the context, as in later configs, it hides nothing).
"""

from __future__ import annotations

import math
from typing import Any

from zoo.family import (
    MLP,
    Attention,
    Config,
    Family,
    Layer,
    Norm,
    Spec,
    ZooError,
    extra,
    gguf,
    hf,
    read,
    rules,
)


def spec(c: Config) -> Spec:
    c.refuse(attention_bias=False, mlp_bias=False, lm_head_bias=False)
    n_heads, head_dim, norm = c["num_attention_heads"], read.head_dim(c), Norm(c["rms_norm_eps"])
    p = read.rope_parameters(c, default_theta=10000.0)
    # Upstream's class has this field, 4096 where a config has none, and never looks for it among the settings.
    original = c.get("original_max_position_embeddings", 4096)
    if p.setdefault("original_max_position_embeddings", original) != original:
        raise ZooError(
            f"{c.where}: original_max_position_embeddings is {p['original_max_position_embeddings']} in the settings of RoPE, and "
            f"upstream would take {original}, the field beside them: write the same there"
        )
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=c.get("num_key_value_heads", n_heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.partial_rope(c, p, head_dim, longrope=("longrope", "su", "yarn")),
        window=c.get("sliding_window"),
    )
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS))
    return Spec(
        family="phi3",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, ffn_norm=norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


_L = "model.layers.{i}."
RULES = {
    "hf": rules(
        *hf.ENDS,
        *hf.PRE_NORMS,
        ("layers.{i}.attn.qkv.weight", _L + "self_attn.qkv_proj.weight"),
        ("layers.{i}.attn.out.weight", _L + "self_attn.o_proj.weight"),
        ("layers.{i}.mlp.gate_up.weight", _L + "mlp.gate_up_proj.weight"),
        ("layers.{i}.mlp.down.weight", _L + "mlp.down_proj.weight"),
        hf.INV_FREQ,
    ),
    "gguf": rules(
        *gguf.ENDS,
        *gguf.PRE_NORMS,
        *gguf.QKV,
        *gguf.FUSED_MLP,
        *(
            extra(f"rope_factors_{which}.weight", "divisors of LongRoPE; they belong to the config")
            for which in ("long", "short")
        ),
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """LongRoPE's divisors are tensors, and what cos and sin are multiplied by is a field. llama.cpp's graph has no windows;
    the release does, where the file says so, as those of before August 2024 do not."""
    head_dim, part = gguf.rotary(f, out)
    context = out["max_position_embeddings"]
    original = f.get("rope.scaling.original_context_length", context)
    unsaid = 2047 if context == 4096 else None  # Phi-3-mini and -medium for 4096 positions
    own: dict[str, Any] = {
        "head_dim": head_dim,
        "partial_rotary_factor": part,
        "original_max_position_embeddings": original,
        "sliding_window": f.get("attention.sliding_window", unsaid) or None,
    }
    long, short = (f.table(f"rope_factors_{which}.weight") for which in ("long", "short"))
    if long is None or short is None:
        f.expect("rope.scaling.attn_factor", 1)
        return own
    scale = context / original
    released = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    if not math.isclose(found := f.get("rope.scaling.attn_factor", 1.0), released, rel_tol=1e-5):
        raise ZooError(
            f"{f.where}: field 'phi3.rope.scaling.attn_factor' is {found}; LongRoPE from {original} to {context} positions "
            f"has {released:.6g}: not supported"
        )
    factors = {"long_factor": list(map(gguf.shortest, long)), "short_factor": list(map(gguf.shortest, short))}
    return own | {"rope_scaling": {"type": "longrope", **factors}}


FAMILY = Family("phi3", ("phi3",), ("Phi3ForCausalLM",), spec, RULES, gguf={"phi3": gguf_config})
