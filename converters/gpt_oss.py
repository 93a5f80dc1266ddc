"""gpt-oss 20B and 120B.

What is unusual:
- Sinks: one learned logit per head joins the softmax and is dropped. Biases on q, k, v, o, the router and
  every expert. Sliding (128) and full layers alternate.
- YaRN without rounding of its band (`truncate: false`), magnitude 0.1 ln(32) + 1 on cos and sin.
- Router: top-k of the logits, then a softmax over the chosen ones, in the model's dtype.
- Experts: (up + 1) * gate * sigmoid(1.702 gate), gate clamped above, up on both sides. Gate and up rows
  alternate on disk (gate is even).
- Norm weights are applied in fp32, then cast.
- Releases hold the experts in mxfp4, [out, in] in blocks of 32; transformers saves them unquantised as
  [in, out]. OpenAI's own files (`original/`) fuse q, k, v and have names of their own.
"""

from __future__ import annotations

from zoo.config import Config, rope_parameters
from zoo.families import Family
from zoo.mapping.rules import cat, deinterleave, rules, transpose
from zoo.spec import MLP, Attention, Layer, MoE, Norm, Router, Spec

from . import _dense as names
from . import _experts as experts


def spec(c: Config) -> Spec:
    c.choice("hidden_act", ("silu",))
    norm = Norm(c["rms_norm_eps"], rounding="last")
    bias = c.get("attention_bias", True)
    rotary = names.whole_rope(c, rope_parameters(c, needed=True), c["head_dim"])

    def attention(window: int | None) -> Attention:
        return Attention(
            n_heads=c["num_attention_heads"],
            n_kv_heads=c["num_key_value_heads"],
            head_dim=c["head_dim"],
            v_head_dim=c["head_dim"],
            scale=c["head_dim"] ** -0.5,
            rope=rotary,
            window=window,
            qkv_bias=bias,
            out_bias=bias,
            sinks=True,
        )

    expert = MLP(
        c["intermediate_size"],
        "silu_clamped",
        bias=True,
        limit=float(c.get("swiglu_limit", 7.0)),
        alpha=float(c.get("swiglu_alpha", 1.702)),
    )
    router = Router(c.first("num_experts_per_tok", "experts_per_token"), "softmax", over="chosen", bias=True)
    moe = MoE(experts.n_experts(c), expert, router)
    n = c["num_hidden_layers"]
    kinds = {experts.SLIDING: attention(c["sliding_window"]), experts.FULL: attention(None)}
    alternate = [experts.FULL if i % 2 else experts.SLIDING for i in range(n)]
    types = c.each_layer("layer_types", n, kinds) if "layer_types" in c else alternate
    return Spec(
        family="gpt_oss",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(Layer(kinds[t], moe, attn_norm=norm, ffn_norm=norm) for t in types),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=experts.dtype(c),
    )


_E = "model.layers.{i}.mlp.experts."
RULES = {
    "hf": rules(
        *names.ENDS,
        *names.PRE_NORMS,
        *names.ATTENTION,
        ("layers.{i}.attn.sinks", "model.layers.{i}.self_attn.sinks"),
        ("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.router.weight"),
        ("layers.{i}.moe.router.bias", "model.layers.{i}.mlp.router.bias"),
        ("layers.{i}.moe.gate_up.weight", transpose(deinterleave(_E + "gate_up_proj"))),
        ("layers.{i}.moe.gate_up.weight", deinterleave(_E + "gate_up_proj_blocks")),
        ("layers.{i}.moe.gate_up.bias", deinterleave(_E + "gate_up_proj_bias")),
        ("layers.{i}.moe.down.weight", transpose(_E + "down_proj")),
        ("layers.{i}.moe.down.weight", _E + "down_proj_blocks"),
        ("layers.{i}.moe.down.bias", _E + "down_proj_bias"),
    ),
    "openai": rules(
        ("embed.weight", "embedding.weight"),
        ("norm.weight", "norm.scale"),
        ("head.weight", "unembedding.weight"),
        ("layers.{i}.attn_norm.weight", "block.{i}.attn.norm.scale"),
        ("layers.{i}.attn.qkv.weight", "block.{i}.attn.qkv.weight"),
        ("layers.{i}.attn.qkv.bias", "block.{i}.attn.qkv.bias"),
        ("layers.{i}.attn.out.weight", "block.{i}.attn.out.weight"),
        ("layers.{i}.attn.out.bias", "block.{i}.attn.out.bias"),
        ("layers.{i}.attn.sinks", "block.{i}.attn.sinks"),
        ("layers.{i}.ffn_norm.weight", "block.{i}.mlp.norm.scale"),
        ("layers.{i}.moe.router.weight", "block.{i}.mlp.gate.weight"),
        ("layers.{i}.moe.router.bias", "block.{i}.mlp.gate.bias"),
        ("layers.{i}.moe.gate_up.weight", deinterleave("block.{i}.mlp.mlp1_weight")),
        ("layers.{i}.moe.gate_up.weight", deinterleave("block.{i}.mlp.mlp1_weight.blocks")),
        ("layers.{i}.moe.gate_up.bias", deinterleave("block.{i}.mlp.mlp1_bias")),
        ("layers.{i}.moe.down.weight", "block.{i}.mlp.mlp2_weight"),
        ("layers.{i}.moe.down.weight", "block.{i}.mlp.mlp2_weight.blocks"),
        ("layers.{i}.moe.down.bias", "block.{i}.mlp.mlp2_bias"),
    ),
    "gguf": rules(
        *names.GGUF_ENDS,
        ("layers.{i}.attn_norm.weight", "blk.{i}.attn_norm.weight"),
        ("layers.{i}.ffn_norm.weight", "blk.{i}.post_attention_norm.weight"),
        *names.gguf_attention(interleaved=False),
        ("layers.{i}.attn.sinks", "blk.{i}.attn_sinks.weight"),
        *experts.GGUF_MOE,
        ("layers.{i}.moe.router.bias", "blk.{i}.ffn_gate_inp.bias"),
        ("layers.{i}.moe.gate_up.bias", cat("blk.{i}.ffn_gate_exps.bias", "blk.{i}.ffn_up_exps.bias")),
        ("layers.{i}.moe.down.bias", "blk.{i}.ffn_down_exps.bias"),
    ),
}

FAMILY = Family("gpt_oss", ("gpt_oss",), ("GptOssForCausalLM",), spec, RULES)
