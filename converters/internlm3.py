"""InternLM3 8B (Shanghai AI Laboratory).

A Llama in other words: `qkv_bias` for the biases of q, k and v, `bias` for the others' (attention's output, the MLP).
RoPE is "dynamic": plain within the context, 32,768 positions; beyond, it would change with every length, and a text so
long is refused.
"""

from __future__ import annotations

from zoo.family import MLP, Config, Family, Spec, hf, read, rules

from . import llama


def spec(c: Config) -> Spec:
    bias = c.first("bias", "mlp_bias", default=False)
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS), bias=bias)
    qkv_bias = c.first("qkv_bias", "attention_bias", default=False)
    rope = read.whole_rope(c, read.rope_parameters(c), read.head_dim(c))
    return llama.decoder("internlm3", c, rope, mlp, qkv_bias=qkv_bias, out_bias=bias)


RULES = {"hf": rules(*hf.ENDS, *hf.PRE_NORMS, *hf.ATTENTION, *hf.MLP)}
FAMILY = Family("internlm3", ("internlm3",), ("InternLM3ForCausalLM",), spec, RULES)
