"""Gemma 4. Full layers have heads of another size, which transformers 5 saves as `per_layer_config`.

The files hold k_proj, v_proj and k_norm of the layers that reuse another layer's K and V, which nothing reads.
"""

from __future__ import annotations

import json

import pytest

from zoo import families
from zoo.spec import MoE
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Variant, names, rope
from zoo.testing.build import draw_all
from zoo.testing.full_size import attention, edited, read
from zoo.testing.names import Config, Tensor
from zoo.testing.variant import Draw, Settings, Shapes, Tensors

# fmt: off

_GEMMA4 = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "global_head_dim": 14,
    "intermediate_size": 52, "num_hidden_layers": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "sliding_window": 6, "final_logit_softcapping": 11.0, "hidden_size_per_layer_input": 0,
    "rope_parameters": {
        FULL: {"rope_type": "proportional", "rope_theta": 613.0, "partial_rotary_factor": 0.45}, SLIDING: rope(71.0),
    },
}
_SAME = {"attention_k_eq_v": True, "num_global_key_value_heads": 3, "use_bidirectional_attention": "vision"}
_VISION = {
    "model_type": "gemma4_vision", "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12,
    "num_hidden_layers": 1, "intermediate_size": 20, "patch_size": 4, "position_embedding_size": 9,
}
# fmt: on


def released_text(config: Settings) -> Settings:
    """Two sizes for all full layers, where transformers 5 saves those of each layer."""
    sizes = list(config.pop("per_layer_config").values())
    assert all(size == sizes[0] for size in sizes)
    config["global_head_dim"] = sizes[0]["head_dim"]
    config["num_global_key_value_heads"] = sizes[0].get("num_key_value_heads")
    return config


def unread(case: FamilyCase, config: Config) -> dict[str, Tensor]:
    """k_proj, v_proj, k_norm of the layers that reuse another layer's K and V: released, never read."""
    cfg = names.upstream_config(case, config).get_text_config()
    n, d = cfg.num_hidden_layers, cfg.hidden_size
    out = {}
    for i in range(n - cfg.num_kv_shared_layers, n):
        layer, base = cfg.per_layer_config[i], f"model.language_model.layers.{i}.self_attn."
        kv = (layer.num_key_value_heads * layer.head_dim, d)
        out |= {f"{base}{part}_proj.weight": Tensor("BF16", kv) for part in "kv"}
        out[f"{base}k_norm.weight"] = Tensor("BF16", (layer.head_dim,))
    return out


def with_unread(case: FamilyCase, tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    return tensors | unread(case, config)


# Upstream's audio tower has no sdpa; a few of its names stand for it.
AUDIO: Shapes = {
    "model.audio_tower.layers.0.norm_out.weight": (16,),
    "model.embed_audio.embedding_projection.weight": (36, 18),
}


def shared_kv(tensors: Tensors, config: Settings, draw: Draw) -> None:
    draw_all(tensors, unread(CASE, config), draw)
    tensors.update({name: draw(name, shape) for name, shape in AUDIO.items()})


# fmt: off
CASE = FamilyCase(
    "gemma4",
    (
        Variant("gemma4", "Gemma4ForCausalLM", _GEMMA4 | _SAME,
            "K serves as V in full layers (three heads of 14, 6 of 14 channels turn), a scalar per layer; as 31B"),
        Variant("gemma4_shared", "Gemma4ForConditionalGeneration",
            {
                "text_config": _GEMMA4 | {
                    "num_hidden_layers": 6, "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
                    "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 15,
                    "vocab_size_per_layer_input": 137,
                },
                "vision_config": _VISION,
            },
            "last 2 layers reuse K and V of layers 3 and 2, with an MLP twice as wide; per-layer embeddings; unused K/V of "
            "those layers, vision and audio beside it; as E2B, E4B",
            release=shared_kv, listed=lambda shapes: shapes | AUDIO),
        Variant("gemma4_moe", "Gemma4ForConditionalGeneration",
            {
                "text_config": _GEMMA4 | _SAME | {
                    "enable_moe_block": True, "num_experts": 7, "top_k_experts": 3, "moe_intermediate_size": 28,
                    "rms_norm_eps": 0.03,
                },
                "vision_config": _VISION,
            },
            "dense MLP beside experts, a router with a norm and a scale for each expert; as 26B-A4B"),
        Variant("gemma4_unified", "Gemma4UnifiedForConditionalGeneration",
            {
                "text_config": {k: v for k, v in (_GEMMA4 | _SAME).items() if k != "hidden_size_per_layer_input"} | {
                    "hidden_size": 42, "num_key_value_heads": 3, "num_global_key_value_heads": 1,
                    "rope_parameters": {
                        FULL: {"rope_type": "proportional", "rope_theta": 613.0, "partial_rotary_factor": 0.6, "factor": 3.0},
                        SLIDING: rope(71.0),
                    },
                },
                "vision_config": {
                    "model_type": "gemma4_unified_vision", "patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 22,
                    "mm_posemb_size": 5, "output_proj_dims": 22,
                },
                "audio_config": {"model_type": "gemma4_unified_audio", "audio_embed_dim": 17},
            },
            "one global K/V head; vision and audio are embedders, no towers; scaled proportional RoPE; as 12B"),
    ),
    main="gemma4_shared",
    layer_kinds=frozenset({FULL, SLIDING}),
    keeps=dict.fromkeys(("gemma4_text", "gemma4_unified_text"), ("rope_parameters",)),
    released_text=released_text,
    released=with_unread,
    refused=(
        ("gemma-4-26b-a4b", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ("gemma-4-26b-a4b", {"attention_bias": True}, "attention_bias is True"),
        ("gemma-4-26b-a4b", {"num_kv_shared_layers": 29}, "shares keys and values"),
        ("gemma-4-26b-a4b", {"per_layer_config": {"30": {"head_dim": 512}}}, "'30' is no layer"),
        ("gemma-4-26b-a4b", {"layer_types": [FULL] * 29 + [SLIDING]}, "layer_types ends with sliding_attention"),
    ),
)
# fmt: on


def test_full_layers_have_heads_of_their_own_size_of_which_a_quarter_turns() -> None:
    spec = families.spec_of(read("gemma-4-26b-a4b"))
    sliding, full = attention(spec, 0), attention(spec, 5)
    assert (sliding.head_dim, sliding.n_kv_heads, sliding.value_from_key, sliding.window) == (
        256,
        8,
        False,
        1024,
    )
    assert (full.head_dim, full.n_kv_heads, full.value_from_key, full.window) == (512, 2, True, None)
    assert full.rope is not None and (full.rope.dim, full.rope.turning, full.rope.theta) == (512, 64, 1e6)


def test_a_config_that_transformers_5_saved_lists_the_sizes_of_each_layer() -> None:
    config = read("gemma-4-26b-a4b")
    saved = names.upstream_config(CASE, config).to_dict()
    assert "global_head_dim" not in saved["text_config"]
    assert families.spec_of(json.loads(json.dumps(saved))) == families.spec_of(config)


def test_without_k_as_v_full_layers_have_the_plain_number_of_heads_as_upstream_takes_it() -> None:
    spec = families.spec_of(edited("gemma-4-26b-a4b", attention_k_eq_v=False))
    full = attention(spec, 5)
    assert (full.n_kv_heads, full.head_dim, full.value_from_key) == (8, 512, False)


def test_layers_that_share_keys_take_the_last_of_their_kind_and_a_wide_mlp() -> None:
    spec = families.spec_of(edited("gemma-4-26b-a4b", num_kv_shared_layers=12, use_double_wide_mlp=True))
    assert [attention(spec, i).kv_from for i in range(16, 30)] == [
        None,
        None,
        *([16] * 5),
        17,
        *([16] * 5),
        17,
    ]
    widths = [
        ffn.shared.d_ff for la in spec.layers if isinstance(ffn := la.ffn, MoE) and ffn.shared is not None
    ]
    assert widths == [2112] * 18 + [4224] * 12


@pytest.mark.parametrize(
    "key",
    ["layer_types", "num_kv_shared_layers", "global_head_dim", "use_double_wide_mlp", "tie_word_embeddings"],
)
def test_what_is_left_out_is_what_upstream_takes_it_for(key: str) -> None:
    config = read("gemma-4-26b-a4b")
    whole = families.spec_of(config)
    for part in (config, config["text_config"]):
        part.pop(key, None)
    assert families.spec_of(config) == whole
