"""InternLM3 8B (Shanghai AI Laboratory).

A Llama in other words: `qkv_bias` for the biases of q, k and v, `bias` for the others' (attention's output, the MLP).
RoPE is "dynamic": plain within the context, 32,768 positions; beyond, it would change with every length, and a text so
long is refused.
"""

from __future__ import annotations

from zoo.family import MLP, Config, Family, Rope, RopeScaling, Spec, hf, read, rules

from . import llama


def spec(c: Config) -> Spec:
    bias = c.first("bias", "mlp_bias", default=False)
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS), bias=bias)
    qkv_bias = c.first("qkv_bias", "attention_bias", default=False)
    return llama.decoder("internlm3", c, rope(c), mlp, qkv_bias=qkv_bias, out_bias=bias)


def rope(c: Config) -> Rope:
    """RoPE over the whole head; "dynamic" has its factor from the end of the context on."""
    p, dim = read.rope_parameters(c), read.head_dim(c)
    if p["rope_type"] != "dynamic":
        return read.whole_rope(c, p, dim)
    q = Config(p, f"{c.where}: rope_parameters")
    q.refuse(partial_rotary_factor=1.0)
    scaling = RopeScaling("dynamic", float(q["factor"]), c["max_position_embeddings"])
    return Rope(float(q["rope_theta"]), dim, scaling)


RULES = {"hf": rules(*hf.ENDS, *hf.PRE_NORMS, *hf.ATTENTION, *hf.MLP)}
FAMILY = Family("internlm3", ("internlm3",), ("InternLM3ForCausalLM",), spec, RULES)
