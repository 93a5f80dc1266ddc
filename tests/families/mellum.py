"""Mellum 2. Its config, younger than transformers 5, is what transformers saves; the prediction layer is Qwen3-Next's."""

from __future__ import annotations

from families import qwen3_next
from zoo import families
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Variant, rope, yarn
from zoo.testing.full_size import attention, read
from zoo.testing.variant import Settings

# fmt: off

_MELLUM = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 44, "moe_intermediate_size": 28, "num_experts": 6, "num_experts_per_tok": 2,
    "num_hidden_layers": 4, "sliding_window": 7, "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "rope_parameters": {FULL: yarn(97.0, 6.0, 64, 3.6, 0.36), SLIDING: rope(71.0)},
}

# fmt: on


def released(config: Settings) -> Settings:
    config["num_experts"] = config.pop("num_local_experts")
    return config | {"use_sliding_window": True}


# fmt: off
CASE = FamilyCase(
    "mellum",
    (
        Variant("mellum", "MellumForCausalLM", _MELLUM,
            "per-head QK norm, windows with a RoPE of their own, YaRN on full layers; with mtp.*", mtp=1),
        Variant("mellum_dense", "MellumForCausalLM",
            _MELLUM | {
                "mlp_layer_types": ["sparse", "dense", "dense", "sparse"], "norm_topk_prob": False,
                "attention_bias": True, "tie_word_embeddings": True, "num_experts": 5,
            },
            "two layers dense, not renormalised, biases, tied"),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    released_text=released,
    keeps={"mellum": ("rope_parameters",)},
    mtp=qwen3_next.mtp,
    refused=(
        ("mellum2.1-12b-a2.5b-thinking", {"sliding_window": None}, "'sliding_window' is missing"),
        ("mellum2.1-12b-a2.5b-thinking", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "sliding_attention"),
    ),
)
# fmt: on


def test_full_layers_alone_are_scaled() -> None:
    spec = families.spec_of(read("mellum2.1-12b-a2.5b-thinking"))
    sliding, full = attention(spec, 0).rope, attention(spec, 3).rope
    assert sliding is not None and full is not None and full.scaling is not None
    assert (sliding.scaling, full.scaling.factor) == (None, 16.0)
    assert [attention(spec, i).window for i in range(4)] == [1024, 1024, 1024, None]
