"""gpt-oss: sinks, so upstream has no sdpa path; experts in mxfp4 on disk, gate and up rows alternating."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from zoo import families
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Gguf, Listed, Variant, build, yarn
from zoo.testing.assemble import assemble, in_other_names, same
from zoo.testing.full_size import read
from zoo.testing.released import drop_default, flat_rope
from zoo.testing.variant import Config, Settings, Tensors

# fmt: off

_GPT_OSS = BASE | {
    "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
    "intermediate_size": 28, "num_hidden_layers": 4, "num_local_experts": 5, "num_experts_per_tok": 3,
    "sliding_window": 6, "swiglu_limit": 1.3,
    "rope_parameters": yarn(97.0, 6.0, 64, 3.6, 0.36, truncate=False),
}

# fmt: on


def gguf_fields(c: Config) -> Settings:
    rope = c["rope_parameters"]
    return {
        "rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": rope["beta_fast"], "rope.scaling.yarn_beta_slow": rope["beta_slow"],
        "attention.key_length": c["head_dim"], "attention.sliding_window": c["sliding_window"],
        "expert_count": c["num_local_experts"], "expert_used_count": c["num_experts_per_tok"],
        "expert_feed_forward_length": c["intermediate_size"],
    }  # fmt: skip


def gguf_weights(tensors: Tensors, c: Config) -> Tensors:
    """Gate and up taken apart, [E, out, in], and sinks called weights: GptOssModel of llama.cpp's converter."""
    out: Tensors = {}
    for name, t in tensors.items():
        base, _, kind = name.partition(".experts.")
        to = f"{base}.experts.{{}}.{'bias' if name.endswith('bias') else 'weight'}"
        turned = t if name.endswith("bias") or not kind else t.transpose(1, 2)
        if kind.startswith("gate_up_proj"):
            parts = turned.unflatten(1, (-1, 2)).unbind(2)  # gate and up alternate
            out |= {
                to.format(p): x.contiguous() for p, x in zip(("gate_proj", "up_proj"), parts, strict=True)
            }
        elif kind:
            out[to.format("down_proj")] = turned.contiguous()
        else:
            out[f"{name}.weight" if name.endswith(".sinks") else name] = t
    return out


def released(config: Settings) -> Settings:
    drop_default(config, swiglu_alpha=1.702)
    config["experts_per_token"] = config["num_experts_per_tok"]
    config["initial_context_length"] = config["rope_parameters"]["original_max_position_embeddings"]
    return flat_rope(config)


def upstream_reads_limit_and_gain() -> None:
    for variant in CASE.variants:
        experts = build.fresh(variant).model.layers[0].mlp.experts
        said = variant.build()[0]
        assert (experts.limit, experts.alpha) == (said.swiglu_limit, said.swiglu_alpha) != (7.0, 1.702)


# fmt: off
# What bf16 logits differ by from upstream's with sdpa, in the median over tokens.
_ROUNDS = "0.08 apart with attention written out as upstream's is; the cause is not known yet"

CASE = FamilyCase(
    "gpt_oss",
    (
        Variant("gpt_oss", "GptOssForCausalLM", _GPT_OSS,
            "sinks, biases everywhere, interleaved gate/up with a clamp at 1.3 that acts often, YaRN without "
            "truncation",
            eager_only=True, rounds_otherwise=_ROUNDS),
        Variant("gpt_oss_alpha", "GptOssForCausalLM",
            _GPT_OSS | {
                "swiglu_alpha": 1.2, "num_local_experts": 6, "num_hidden_layers": 3, "num_key_value_heads": 3,
                "layer_types": [FULL, SLIDING, FULL], "attention_bias": False,
                "rope_parameters": yarn(97.0, 6.0, 64, 3.6, 0.36, attention_factor=1.17),
            },
            "another sigmoid gain, no attention biases, layers start with a full one, truncated YaRN, given "
            "magnitude",
            eager_only=True, rounds_otherwise=_ROUNDS),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    listed={"gpt-oss-20b": Listed("gpt-oss-20b")},
    refused=(
        ("gpt-oss-20b", {"layer_types": ["chunked_attention"] * 24}, "layer_types[0] is 'chunked_attention'"),
        ("gpt-oss-20b", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ("gpt-oss-20b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("gpt-oss-20b", {"sliding_window": None}, "sliding_window"),
    ),
    released_text=released,
    disputes={"an activation of the experts with other constants than the releases'": upstream_reads_limit_and_gain},
    gguf=(
        Gguf(
            "gpt-oss", gguf_fields, settings={"swiglu_limit": 7.0}, weights=gguf_weights,
            silent={
                "attention.sliding_window_pattern": 2, "swiglu_clamp_exp": [7.0] * 4, "attention.value_length": 12,
                "rope.dimension_count": 12,
            },
            refused=({"expert_gating_func": 2}, {"swiglu_clamp_exp": 5.0}),
        ),
    ),
)
# fmt: on


OPENAI = {
    "model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight", "input_layernorm.weight": "attn.norm.scale",
    "post_attention_layernorm.weight": "mlp.norm.scale", "self_attn.sinks": "attn.sinks",
    "self_attn.o_proj.weight": "attn.out.weight", "self_attn.o_proj.bias": "attn.out.bias",
    "mlp.router.weight": "mlp.gate.weight", "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias", "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}  # fmt: skip


def test_gpt_oss_in_openais_names_is_the_same_model(tmp_path: Path) -> None:
    """q, k, v fused; experts [out, in], gate and up rows alternating (gpt-oss: gpt_oss/torch/weights.py)."""
    build.make(CASE, CASE.variant("gpt_oss"), tmp_path / "gpt_oss")
    theirs = {}
    hf = load_file(tmp_path / "gpt_oss" / "model.safetensors")
    for name, t in hf.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        block, part = (f"block.{layer[1]}.", layer[2]) if layer else ("", name)
        if part in OPENAI:
            theirs[block + OPENAI[part]] = t
        elif part.startswith("self_attn.q_proj"):
            qkv = [hf[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            theirs[block + part.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(qkv)
        elif part.startswith("mlp.experts."):
            theirs[block + ("mlp.mlp1_weight" if "gate_up" in part else "mlp.mlp2_weight")] = t.mT
    openai = in_other_names(tmp_path / "gpt_oss", theirs, "openai")
    assert same(assemble(openai), assemble(tmp_path / "gpt_oss"))


def test_truncation_that_is_null_is_none() -> None:
    config = read("gpt-oss-20b")
    whole = families.spec_of(config)  # which says false
    config["rope_scaling"]["truncate"] = None
    assert families.spec_of(config) == whole
