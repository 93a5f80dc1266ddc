"""Arcee's AFM-4.5B.

A Llama whose MLP is not gated: down(relu(up x) squared). Its context is stretched by YaRN.
"""

from __future__ import annotations

from zoo.family import MLP, Config, Family, Spec, hf, read, rules

from . import llama


def spec(c: Config) -> Spec:
    bias = c.get("attention_bias", False)
    act = c.table("hidden_act", read.ACTIVATIONS, "relu2")
    mlp = MLP(c["intermediate_size"], act, gated=False, bias=c.get("mlp_bias", False))
    rope = read.whole_rope(c, read.rope_parameters(c), read.head_dim(c))
    return llama.decoder("arcee", c, rope, mlp, qkv_bias=bias, out_bias=bias)


RULES = {
    "hf": rules(
        *hf.ENDS,
        *hf.PRE_NORMS,
        *hf.ATTENTION,
        *(
            (f"layers.{{i}}.mlp.{part}.{w}", f"model.layers.{{i}}.mlp.{part}_proj.{w}")
            for part in ("up", "down")
            for w in ("weight", "bias")
        ),
    )
}

FAMILY = Family("arcee", ("arcee",), ("ArceeForCausalLM",), spec, RULES)
