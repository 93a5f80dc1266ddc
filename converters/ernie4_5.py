"""ERNIE 4.5, dense: 0.3B.

A Llama with
- RoPE that pairs neighbouring channels, in fp32. The canonical layout keeps that order (`interleaved`);
- one flag, `use_bias`, for every matrix but the head; a tied head; head_dim (128) as its own field.
"""

from __future__ import annotations

from zoo.family import MLP, Config, Family, Spec, hf, read, rules

from . import llama


def spec(c: Config) -> Spec:
    p, head_dim, bias = read.rope_parameters(c), c["head_dim"], c.get("use_bias", False)
    Config(p, f"{c.where}: rope_parameters").refuse(partial_rotary_factor=1.0)
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS), bias=bias)
    rope = read.rope(c, p, head_dim, interleaved=True, rounding="last")
    return llama.decoder("ernie4_5", c, rope, mlp, qkv_bias=bias, out_bias=bias, tied=True)


RULES = {"hf": rules(*hf.ENDS, *hf.PRE_NORMS, *hf.ATTENTION, *hf.MLP)}

FAMILY = Family("ernie4_5", ("ernie4_5",), ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"), spec, RULES)
