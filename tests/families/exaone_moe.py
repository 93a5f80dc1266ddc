"""K-EXAONE. Its first config names the number of dense layers otherwise and lists them too."""

from __future__ import annotations

from zoo import families
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Variant, names, rope
from zoo.testing.full_size import attention, edited, read
from zoo.testing.names import Config, Tensor
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_EXAONE = BASE | {
    "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 4, "first_k_dense_replace": 1,
    "num_experts": 6, "num_experts_per_tok": 2, "num_shared_experts": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 1.7, "sliding_window": 7, "sliding_window_pattern": 2, "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    drop(config, "mlp_layer_types", "output_router_logits")
    return flat_rope(config) | {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
    }


def mtp(case: FamilyCase, config: Config, count: int) -> dict[str, Tensor]:
    """A dense layer each; a projection of [embedding, hidden], the norms of both and one at the end for all."""
    d, dtype = config["hidden_size"], names.DTYPES[names.dtype_of(config)]
    block = names.first_layer(
        case, names.one_layer(dict(config), {"first_k_dense_replace": 1, "mlp_layer_types": None})
    )
    out = {f"mtp.layers.{i}.{name}": t for i in range(count) for name, t in block.items()}
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    return (
        out
        | {f"mtp.{name}.weight": Tensor(dtype, (d,)) for name in norms}
        | {"mtp.fc.weight": Tensor(dtype, (d, 2 * d))}
    )


# fmt: off
CASE = FamilyCase(
    "exaone_moe",
    (
        Variant("exaone_moe", "ExaoneMoeForCausalLM", _EXAONE,
            "windows with RoPE, full layers without, QK norm, DeepSeek's router, first layer dense; with the MTP layer",
            mtp=1),
        Variant("exaone_moe_groups", "ExaoneMoeForCausalLM",
            _EXAONE | {
                "sliding_window": 5, "layer_types": [FULL, SLIDING, SLIDING, FULL], "num_experts": 8, "n_group": 4, "topk_group": 2,
                "norm_topk_prob": False, "num_shared_experts": 2, "first_k_dense_replace": 2,
                "tie_word_embeddings": True,
            },
            "layers in another order, groups, not renormalised, two shared experts, two dense layers, tied"),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    released_text=released,
    kept_in_fp32=frozenset({"e_score_correction_bias"}),
    mtp=mtp,
    refused=(
        ("k-exaone-236b-a23b", {"is_moe_layer": [True] * 48}, "is_moe_layer lists other layers than 1 dense ones first"),
        ("k-exaone-236b-a23b", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("k-exaone-236b-a23b", {"routed_scaling_factor": None}, "routed_scaling_factor"),
    ),
)
# fmt: on


def test_the_first_config_means_the_same() -> None:
    config = read("k-exaone-236b-a23b")
    first = edited("k-exaone-236b-a23b", first_last_k_dense_replace=1, is_moe_layer=[False] + [True] * 47)
    del first["first_k_dense_replace"]
    assert families.spec_of(first) == families.spec_of(config)
    del first["is_moe_layer"]
    other = families.spec_of({**first, "first_last_k_dense_replace": 2})
    assert other.layers[1].ffn == other.layers[0].ffn != other.layers[2].ffn


def test_full_layers_have_no_rope() -> None:
    spec = families.spec_of(read("k-exaone-236b-a23b"))
    assert [attention(spec, i).rope is None for i in range(4)] == [False, False, False, True]
    assert [attention(spec, i).window for i in range(4)] == [128, 128, 128, None]
