"""Falcon-H1 (TII): 0.5B to 34B.

What is unusual:
- In every layer attention and Mamba-2 read the same normed x, and their sum is the branch; then an MLP.
- A factor on almost everything: embeddings, logits, keys, what attention reads and gives, what the state space
  reads, each of the five parts its input matrix gives, what it gives, the gate of the MLP and what that gives.
  Attention's are part of the scores' scale and of the values' here: RoPE and the projections are linear, and no release
  has biases in them.
- The state space has a norm with its gate in some sizes (`mamba_rms_norm`), after the gate or before it; else a gate alone.
- Its inner width is `mamba_d_ssm`, not `mamba_expand` times the model's.
"""

from __future__ import annotations

from typing import Any

from zoo.family import (
    MLP,
    Attention,
    Config,
    Family,
    Layer,
    Mamba,
    Norm,
    RuleLine,
    Spec,
    gguf,
    hf,
    read,
    rules,
)

from .nemotron_h import dt_floor


def spec(c: Config) -> Spec:
    c.refuse(attention_bias=False, projectors_bias=False, mamba_use_mlp=True)
    act = c.choice("hidden_act", ("silu",))  # it is the convolution's too
    norm = Norm(c["rms_norm_eps"])
    gate, down = map(float, c.get("mlp_multipliers", (1.0, 1.0)))
    mlp = MLP(c["intermediate_size"], act, bias=c.get("mlp_bias", False), gate_scale=gate, out_scale=down)
    layer = Layer(attention(c), mlp, norm, ffn_norm=norm, beside=mamba(c))
    return Spec(
        family="falcon_h1",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(layer,) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        embed_scale=float(c.get("embedding_multiplier", 1.0)),
        embed_rounding="last",
        logit_scale=float(c.get("lm_head_multiplier", 1.0)),
        dtype=read.dtype(c),
    )


def attention(c: Config) -> Attention:
    reads, gives = (float(c.get(f"attention_{way}_multiplier", 1.0)) for way in ("in", "out"))
    head_dim = read.head_dim(c)
    return Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
        head_dim=head_dim,
        scale=reads**2 * float(c.get("key_multiplier", 1.0)) * head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c), head_dim),
        value_scale=reads * gives,
    )


def mamba(c: Config) -> Mamba:
    c.refuse(mamba_proj_bias=False)
    inner = c.first("mamba_d_ssm", default=None) or c["mamba_expand"] * c["hidden_size"]
    c.get("mamba_expand")  # says nothing where there is a width
    n_heads, head_dim = read.mamba_heads(c, inner, "mamba_d_ssm (or mamba_expand * hidden_size)")
    normed, first = c.get("mamba_rms_norm", False), c.get("mamba_norm_before_gate", True)
    return Mamba(
        n_heads=n_heads,
        head_dim=head_dim,
        n_groups=c.get("mamba_n_groups", 1),
        state=c["mamba_d_state"],
        conv=c["mamba_d_conv"],
        out_norm=Norm(c["rms_norm_eps"], rounding="last") if normed else None,
        conv_bias=c.get("mamba_conv_bias", True),
        dt_min=dt_floor(c),
        norm_first=normed and first,
        in_scale=float(c.get("ssm_in_multiplier", 1.0)),
        parts_scales=tuple(map(float, c.get("ssm_multipliers", (1.0,) * 5))),
        out_scale=float(c.get("ssm_out_multiplier", 1.0)),
    )


_L = "model.layers.{i}."
ENDS: tuple[RuleLine, ...] = (
    ("embed.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.final_layernorm.weight"),
    ("head.weight", "lm_head.weight"),
    ("layers.{i}.attn_norm.weight", _L + "input_layernorm.weight"),
    ("layers.{i}.ffn_norm.weight", _L + "pre_ff_layernorm.weight"),
)
HF = (
    *ENDS,
    *hf.ATTENTION,
    *hf.mamba(_L + "mamba"),
    *hf.affine("layers.{i}.mlp.gate_up", _L + "feed_forward.gate_proj", _L + "feed_forward.up_proj"),
    *hf.affine("layers.{i}.mlp.down", _L + "feed_forward.down_proj"),
)
RULES = {
    "hf": rules(*HF),
    "gguf": rules(
        *gguf.ENDS,
        ("layers.{i}.attn_norm.weight", "blk.{i}.attn_norm.weight"),
        ("layers.{i}.ffn_norm.weight", "blk.{i}.ffn_norm"),  # as gguf-py's map has it
        *gguf.attention(interleaved=False),
        *gguf.MAMBA,
        *gguf.MLP,
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """What a GGUF of `falcon-h1` says. The factors are in its weights, which llama.cpp's converter multiplies by them: so all
    are 1. Its graph has the norm after the gate."""
    inner, heads = f["ssm.inner_size"], f["ssm.time_step_rank"]
    return {
        "head_dim": gguf.head_dim(f, out),
        "mamba_d_ssm": inner,
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_n_groups": f["ssm.group_count"],
        "mamba_d_state": f["ssm.state_size"],
        "mamba_d_conv": f["ssm.conv_kernel"],
        "mamba_conv_bias": True,  # llama.cpp's graph has no other
        "mamba_rms_norm": f.has("ssm_norm.weight"),
        "mamba_norm_before_gate": False,
        "mlp_bias": f.has("ffn_gate.bias"),
    }


FAMILY = Family(
    "falcon_h1", ("falcon_h1",), ("FalconH1ForCausalLM",), spec, RULES, gguf={"falcon-h1": gguf_config}
)
