"""GPT-NeoX-20B, Pythia, and what EleutherAI's GPT-NeoX trained since (RedPajama-INCITE, StableLM alpha, Dolly v2).

GPT-2's blocks (LayerNorms and linear layers with biases, an MLP without gate), but
- both branches read the same x, each through a norm of its own, unless `use_parallel_residual` is false;
- RoPE on the first quarter of each head (`rotary_pct`), no learned positions; the head is not tied;
- q, k and v are fused head by head: q, k, v of the first head, then of the second;
- an exact GELU in Pythia; "gelu_fast" in the 20B is the tanh form.
The head is called `embed_out` in releases, `lm_head` by transformers 5 in memory.
"""

from __future__ import annotations

from typing import Any

from zoo.family import MLP, Attention, Config, Family, Layer, Norm, Spec, extra, gguf, hf, read, rules

ACTIVATIONS = read.ACTIVATIONS | {"gelu_fast": "gelu_tanh"}


def spec(c: Config) -> Spec:
    d, n_heads = c["hidden_size"], c["num_attention_heads"]
    head_dim, bias = d // n_heads, c.get("attention_bias", True)
    norm = Norm(c["layer_norm_eps"], kind="layer", rounding="last")
    p = read.rope_parameters(c, theta="rotary_emb_base", default_theta=10000.0)
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.partial_rope(c, p, head_dim, c.get("rotary_pct", 0.25)),
        qkv_bias=bias,
        out_bias=bias,
    )
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", ACTIVATIONS), gated=False, bias=True)
    layer = Layer(
        attention, mlp, attn_norm=norm, ffn_norm=norm, parallel=c.get("use_parallel_residual", True)
    )
    return Spec(
        family="gpt_neox",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=(layer,) * c["num_hidden_layers"],
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
    )


_L = "gpt_neox.layers.{i}."
HF = (
    ("embed.weight", "gpt_neox.embed_in.weight"),
    ("head.weight", "embed_out.weight"),
    *hf.affine("norm", "gpt_neox.final_layer_norm"),
    *hf.affine("layers.{i}.attn_norm", _L + "input_layernorm"),
    *hf.affine("layers.{i}.ffn_norm", _L + "post_attention_layernorm"),
    *hf.fused_per_head(_L + "attention.query_key_value"),
    *hf.affine("layers.{i}.attn.out", _L + "attention.dense"),
    *hf.affine("layers.{i}.mlp.up", _L + "mlp.dense_h_to_4h"),
    *hf.affine("layers.{i}.mlp.down", _L + "mlp.dense_4h_to_h"),
    extra("gpt_neox.layers.*.attention.bias", "the causal mask, saved as a buffer"),
    extra("gpt_neox.layers.*.attention.masked_bias", "what masked scores were set to, saved as a buffer"),
    hf.INV_FREQ,
)
RULES = {
    "hf": rules(*HF),
    "transformers": rules(*hf.in_memory(HF, ("head.weight", "lm_head.weight"))),
    "gguf": rules(*gguf.ENDS, *gguf.PRE_NORMS, *gguf.LAYER_NORM_BIASES, *gguf.QKV, *gguf.PLAIN_MLP),
}


def gguf_config(f: gguf.Fields, out: dict[str, Any]) -> dict[str, Any]:
    """q, k and v come apart from their heads. The file does not say which GELU: llama.cpp's graph has the tanh form for all,
    the releases have it in the 20B (44 layers) only."""
    del out["num_key_value_heads"]
    _, part = gguf.rotary(f, out)
    return {
        "attention_bias": f.has("attn_qkv.bias"),
        "layer_norm_eps": f["attention.layer_norm_epsilon"],
        "hidden_act": "gelu_fast" if out["num_hidden_layers"] == 44 else "gelu",
        "rotary_pct": part,
        "use_parallel_residual": f.get("use_parallel_residual", True),
    }


FAMILY = Family(
    "gpt_neox", ("gpt_neox",), ("GPTNeoXForCausalLM",), spec, RULES, gguf={"gptneox": gguf_config}
)
