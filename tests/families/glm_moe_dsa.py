"""GLM-5 and 5.2: DeepSeek V3.2 whose indexer pairs neighbours, and may serve several layers."""

from __future__ import annotations

import pytest

from families.deepseek_v3 import mtp
from zoo import families
from zoo.spec import LatentAttention
from zoo.testing import BASE, FamilyCase, Variant, rope
from zoo.testing.full_size import read
from zoo.testing.released import drop
from zoo.testing.variant import Settings

# fmt: off

_GLM = BASE | {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 18, "kv_lora_rank": 15,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 12, "v_head_dim": 9,
    "hidden_size": 40, "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 3,
    "first_k_dense_replace": 1, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "routed_scaling_factor": 1.7, "rope_parameters": rope(97.0),
    "index_topk": 6, "index_n_heads": 7, "index_head_dim": 17,
}

# fmt: on


def released(config: Settings) -> Settings:
    """GLM-5's says nothing of indexers shared or not; 5.2's lists them."""
    if set(config["indexer_types"]) == {"full"}:
        drop(config, "indexer_types")
    drop(config, "mlp_layer_types", "layer_types", "output_router_logits", "mlp_bias")
    return config | {
        "moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "ep_size": 1,
        "rope_interleave": True, "indexer_rope_interleave": True,
    }  # fmt: skip


def upstream_turns_neighbours() -> None:
    from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as theirs

    assert hasattr(theirs, "apply_rotary_pos_emb_interleave")


# fmt: off
CASE = FamilyCase(
    "glm_moe_dsa",
    (
        Variant("glm_moe_dsa", "GlmMoeDsaForCausalLM", _GLM,
            "an indexer in every layer: 29 tokens, 6 keys each; with the MTP layer",
            mtp=1, rewrite={"num_nextn_predict_layers": 1}),
        Variant("glm_moe_dsa_shared", "GlmMoeDsaForCausalLM",
            _GLM | {
                "num_hidden_layers": 5, "indexer_types": ["full", "shared", "full", "shared", "shared"],
                "index_n_heads": 9, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 2,
            },
            "layers that see the keys an earlier layer's indexer chose; groups, two dense layers"),
    ),
    main="glm_moe_dsa_shared",
    grouped=False,
    keeps={"glm_moe_dsa": ("rope_parameters", "qk_head_dim")},
    released_text=released,
    kept_in_fp32=frozenset({"e_score_correction_bias"}),
    mtp=mtp,
    refused=(
        ("glm-5", {"rope_interleave": False}, "rope_interleave is False"),
        ("glm-5", {"indexer_rope_interleave": False}, "indexer_rope_interleave is False"),
        ("glm-5", {"index_topk_pattern": "FSX"}, "index_topk_pattern is 'FSX'"),
        ("glm-5.2", {"indexer_types": ["shared"] * 78}, "no layer before it has one"),
    ),
    disputes={"the pairing of rotary channels": upstream_turns_neighbours},
    optional_rules={
        "layers.{i}.attn.q.weight": "DeepSeek V3's queries without a latent",
    },
)
# fmt: on


@pytest.mark.parametrize(
    "said",
    [{"index_topk_pattern": "FFFSSS" + "FSSS" * 18}, {"index_topk_freq": 4, "index_skip_topk_offset": 3}],
)
def test_glm_5_2_says_which_layers_share_an_indexer_in_three_ways(said: Settings) -> None:
    config = read("glm-5.2")
    lists = families.spec_of(config)
    keys = ("indexer_types", "index_topk_freq", "index_skip_topk_offset", "index_topk_pattern")
    assert families.spec_of({k: v for k, v in config.items() if k not in keys} | said) == lists
    mixers = [layer.mixer for layer in lists.layers]
    assert all(isinstance(m, LatentAttention) for m in mixers)
    assert [m.indexer_from for m in mixers[:8]] == [None, None, None, 2, 2, 2, None, 6]


def test_layer_types_may_be_called_as_when_nvidias_copy_was_made() -> None:
    config = read("glm-5.2")
    older = {"layer_types": ["deepseek_sparse_attention"] * config["num_hidden_layers"]}
    assert families.spec_of(config | older) == families.spec_of(config)
