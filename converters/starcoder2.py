"""StarCoder2: 3B, 7B, 15B.

A Llama with LayerNorms and biases everywhere (`use_bias`), an MLP without gate (tanh GELU), and a window of 4096 in every
layer. The head is tied where the config does not say otherwise. Configs repeat GPT-2's keys (`activation_function`,
`layer_norm_epsilon`), which upstream does not read: `hidden_act` and `norm_epsilon` count.
"""

from __future__ import annotations

from typing import Any

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Spec, gguf, hf, read, rules


def spec(c: Config) -> Spec:
    c.choice("mlp_type", ("default",), "default")
    c.choice("norm_type", ("layer_norm",), "layer_norm")
    c.get("activation_function")  # "gelu" in releases that mean hidden_act's
    norm = Norm(c["norm_epsilon"], kind="layer", rounding="last")
    head_dim, bias = read.head_dim(c), c.get("use_bias", True)
    attention = Attention(
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.whole_rope(c, read.rope_parameters(c, default_theta=10000.0), head_dim),
        window=c.get("sliding_window"),
        qkv_bias=bias,
        out_bias=bias,
    )
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS), gated=False, bias=bias)
    return Spec(
        family="starcoder2",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=(Layer(attention, mlp, attn_norm=norm, ffn_norm=norm),) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", True),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


RULES = {
    "hf": rules(
        *hf.ENDS,
        *hf.LAYER_NORMS,
        *hf.ATTENTION,
        *hf.affine("layers.{i}.mlp.up", "model.layers.{i}.mlp.c_fc"),
        *hf.affine("layers.{i}.mlp.down", "model.layers.{i}.mlp.c_proj"),
    ),
    "gguf": rules(
        *gguf.ENDS,
        *gguf.PRE_NORMS,
        *gguf.LAYER_NORM_BIASES,
        *gguf.attention(interleaved=False),
        *gguf.PLAIN_MLP,
    ),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """The file does not say that the three releases (30, 32 and 40 layers) have a window, and llama.cpp's graph has none."""
    gguf.head_dim(f, out)
    return {
        "use_bias": out.pop("attention_bias"),
        "norm_epsilon": f["attention.layer_norm_epsilon"],
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": 4096 if out["num_hidden_layers"] in (30, 32, 40) else None,
    }


FAMILY = Family(
    "starcoder2", ("starcoder2",), ("Starcoder2ForCausalLM",), spec, RULES, gguf={"starcoder2": gguf_config}
)
