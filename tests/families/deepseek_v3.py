"""DeepSeek V3 / R1 and Kimi K2, which transformers knows as deepseek_v3.

Releases hold their prediction layer as one more layer, which upstream leaves unread.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo import families
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.mapping.execute import convert
from zoo.mapping.plan import make_plan
from zoo.testing import BASE, FamilyCase, Gguf, Listed, Variant, build, gguf, names, rope, yarn
from zoo.testing.build import rename
from zoo.testing.full_size import read
from zoo.testing.names import Config, Tensor
from zoo.testing.released import drop, drop_default, flat_rope
from zoo.testing.variant import Draw, Settings, Tensors

# fmt: off

_MLA = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 18, "kv_lora_rank": 15,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 12, "v_head_dim": 9,
}
_DEEPSEEK = BASE | _MLA | {
    "hidden_size": 40, "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 4,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7,
    "rope_parameters": yarn(97.0, 7.0, 64, 3.6, 0.36, mscale=0.8, mscale_all_dim=0.6),
}
_NO_MTP = {"num_nextn_predict_layers": 0}
_KIMI = _DEEPSEEK | _NO_MTP | {
    "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1, "num_hidden_layers": 3,
    "rope_parameters": yarn(83.0, 6.0, 64, 3.6, 0.36, mscale=0.7, mscale_all_dim=0.7),
}
_MOON_VIT = {
    "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 20, "patch_size": 4,
    "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2,
}
_MOON_IDS = {  # of images and videos beyond the vocabulary: upstream embeds these two as id 0
    "projection_hidden_size": 24, "tie_word_embeddings": False, "image_token_id": 131, "video_token_id": 132,
    "vision_start_token_id": 128, "vision_end_token_id": 127,
}

# fmt: on


def mtp(case: FamilyCase, config: Config, count: int) -> dict[str, Tensor]:
    """One more decoder layer each, with two input norms, a projection of [embedding, hidden], an output norm and a
    head of its own (as sglang and vLLM load them)."""
    text = dict(names.text_config(config))
    d, v, dtype = text["hidden_size"], text["vocab_size"], names.DTYPES[names.dtype_of(config)]
    vector, matrix = Tensor(dtype, (d,)), Tensor(dtype, (d, 2 * d))
    out: dict[str, Tensor] = {}
    block = names.first_layer(
        case, names.one_layer(text, {"first_k_dense_replace": 0, "mlp_layer_types": None})
    )
    for i in range(text["num_hidden_layers"], text["num_hidden_layers"] + count):
        base = f"model.layers.{i}."
        out |= {base + name: t for name, t in block.items()}
        out |= {f"{base}{name}.weight": vector for name in ("enorm", "hnorm", "shared_head.norm")}
        out |= {
            f"{base}{name}.weight": Tensor(dtype, (v, d)) for name in ("embed_tokens", "shared_head.head")
        }
        out[f"{base}eh_proj.weight"] = matrix
    return out


def kimi_name(name: str) -> str:
    """Of Kimi K2.5's wrapper transformers 5.23 writes the text's layers as `blocks`, as the vision tower's are called,
    and one norm of the projector under `model.`; neither is so in a release."""
    name = re.sub(r"^language_model\.model\.blocks\.", "language_model.model.layers.", name)
    return re.sub(r"^model\.mm_projector\.", "mm_projector.", name)


def kimi_renamed(case: FamilyCase, tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    return {kimi_name(name): t for name, t in tensors.items()}


def kimi_release(tensors: Tensors, config: Settings, draw: Draw) -> None:
    rename(tensors, kimi_name)


def gguf_fields(c: Config) -> Settings:
    rope, rank, rotary = c["rope_parameters"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    return {
        "attention.head_count_kv": 1, "rope.dimension_count": rotary,
        "rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        "rope.scaling.yarn_beta_fast": rope["beta_fast"], "rope.scaling.yarn_beta_slow": rope["beta_slow"],
        "attention.q_lora_rank": c["q_lora_rank"], "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rotary, "attention.value_length": rank,
        "attention.key_length_mla": c["qk_nope_head_dim"] + rotary, "attention.value_length_mla": c["v_head_dim"],
        "leading_dense_block_count": c["first_k_dense_replace"], "expert_count": c["n_routed_experts"],
        "expert_used_count": c["num_experts_per_tok"], "expert_shared_count": c["n_shared_experts"],
        "expert_feed_forward_length": c["moe_intermediate_size"], "expert_group_count": c["n_group"],
        "expert_group_used_count": c["topk_group"], "expert_weights_scale": c["routed_scaling_factor"],
        "expert_weights_norm": c["norm_topk_prob"], "expert_gating_func": 2,
    }  # fmt: skip


def gguf_weights(tensors: Tensors, c: Config) -> Tensors:
    """The up-projection split per head, the keys' part transposed: DeepseekV2Model of llama.cpp's converter."""
    out: Tensors = {}
    for name, t in tensors.items():
        if name.endswith("kv_b_proj.weight"):
            heads = t.view(c["num_attention_heads"], -1, c["kv_lora_rank"])
            k, v = heads.split([c["qk_nope_head_dim"], c["v_head_dim"]], 1)
            out[name.replace("kv_b_proj", "k_b_proj")] = k.transpose(1, 2).contiguous()
            out[name.replace("kv_b_proj", "v_b_proj")] = v.contiguous()
        else:
            out[name.replace("e_score_correction_bias", "e_score_correction.bias")] = t
    return out


def released(config: Settings) -> Settings:
    drop_default(config, rope_interleave=True)
    drop(config, "head_dim", "mlp_layer_types", "layer_types", "mlp_bias", "output_router_logits")
    return flat_rope(config, "type") | {
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "ep_size": 1,
    }


def upstream_masks_other_groups_by_infinity() -> None:
    router = build.perturbed(CASE.variants[0]).model.layers[-1].mlp.gate
    router.e_score_correction_bias -= 9.0  # far below 0, which would win
    x = torch.randn(50, router.hidden_dim, generator=torch.Generator().manual_seed(1))
    chosen = router(x)[2] // (router.num_experts // router.num_group)
    assert max(len(set(groups)) for groups in chosen.tolist()) <= router.topk_group < router.num_group


# fmt: off
CASE = FamilyCase(
    "deepseek_v3",
    (
        Variant("deepseek_v3", "DeepseekV3ForCausalLM", _DEEPSEEK | _NO_MTP,
            "MLA with query latent, interleaved RoPE, YaRN with mscale and mscale_all_dim (two separate "
            "effects), groups"),
        Variant("deepseek_v3_noqlora", "DeepseekV3ForCausalLM",
            _DEEPSEEK | _NO_MTP | {
                "q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False, "n_group": 2,
                "topk_group": 1, "first_k_dense_replace": 2, "n_shared_experts": 1, "rope_parameters": rope(83.0),
            },
            "q_proj instead of the latent, half-split RoPE unscaled, router weights not renormalised"),
        Variant("deepseek_v3_mtp", "DeepseekV3ForCausalLM",
            _DEEPSEEK | {"num_hidden_layers": 3, "num_nextn_predict_layers": 1},
            "with the extra layer that predicts a second token, as model.layers.3.*", mtp=1),
        Variant("kimi_k2", "DeepseekV3ForCausalLM",
            _KIMI,
            "model_type kimi_k2 in config.json; transformers knows it as deepseek_v3",
            rewrite={"model_type": "kimi_k2"}),
        Variant("kimi_k25", "Kimi_K25ForConditionalGeneration",
            {"text_config": _KIMI | {"model_type": "deepseek_v3", "moe_intermediate_size": 24}, "vision_config": _MOON_VIT, **_MOON_IDS},
            "the wrapper of K2.5 and later: language_model.* with a vision tower and a projector beside it",
            release=kimi_release),
    ),
    grouped=False,
    classes={"kimi_k2": "DeepseekV3ForCausalLM"},
    kept_in_fp32=frozenset({"e_score_correction_bias"}),
    mtp=mtp,
    released=kimi_renamed,
    disputes={"what experts of other groups score": upstream_masks_other_groups_by_infinity},
    listed={
        "deepseek-r1": Listed("deepseek-r1", frozenset({"model"})),
        "kimi-k2-instruct": Listed("kimi-k2-instruct", frozenset({"rotary"})),
        "kimi-k2.5-text": Listed("kimi-k2-thinking"),
    },
    refused=(
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek-v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek-v3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("deepseek-v3", {"rope_scaling": {"type": "ntk", "factor": 2}}, "rope_type is 'ntk'"),
        ("deepseek-v3", {"n_group": 256, "topk_group": 4}, "groups of 1 experts cannot be judged by their best 2"),
        ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank"),
    ),
    released_text=released,
    gguf=(
        Gguf(
            "deepseek2", gguf_fields, weights=gguf_weights,
            settings={"rope_parameters": yarn(97.0, 7.0, 64, 3.6, 0.36, mscale=0.7, mscale_all_dim=0.7)},
            silent={"expert_shared_feed_forward_length": 56},
            refused=(
                {"attention.temperature_scale": 0.1}, {"nextn_predict_layers": 1}, {"attention.indexer.top_k": 64},
                {"expert_shared_feed_forward_length": 28},
            ),
        ),
    ),
)
# fmt: on


def test_kimi_k2_5_is_the_same_text_model_in_a_wrapper() -> None:
    text = read("kimi-k2-thinking")
    config = {
        "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": text,
    }  # fmt: skip
    assert families.spec_of(config) == families.spec_of(text)


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> gguf.Header:
    return gguf.header(CASE, CASE.gguf[0], tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize(
    ("experts", "factor", "fast"), [(384, 32.0, 1.0), (384, 64.0, 32.0), (256, 40.0, 32.0)]
)
def test_yarns_betas_that_a_gguf_leaves_out_are_those_of_the_release(
    experts: int, factor: float, fast: float, header: gguf.Header
) -> None:
    """Kimi K2 Instruct, Kimi K2 Thinking, DeepSeek V3, as their config.json say."""
    left_out = {"rope.scaling.yarn_beta_fast": None, "rope.scaling.yarn_beta_slow": None}
    fields = {"expert_count": experts, "rope.scaling.factor": factor} | left_out
    scaling = gguf.config(CASE.gguf[0], header, fields)["rope_scaling"]
    assert (scaling["beta_fast"], scaling["beta_slow"]) == (fast, 1.0)


def test_softmax_routing_of_a_gguf_is_refused_by_its_field(header: gguf.Header) -> None:
    with pytest.raises(ZooError, match=r"deepseek2\.expert_gating_func is 1 .*supported: 2 \(sigmoid"):
        gguf.config(CASE.gguf[0], header, {"expert_gating_func": None})


def test_layers_of_a_gguf_that_predict_further_tokens_are_no_layers_of_the_decoder(
    header: gguf.Header,
) -> None:
    metadata, tensors, tables = header
    tensors = tensors | {"blk.3.nextn.eh_proj.weight": tensors["token_embd.weight"]}
    config = gguf.config(CASE.gguf[0], (metadata, tensors, tables), {"nextn_predict_layers": 1})
    assert config["num_hidden_layers"] == 3


def test_an_up_projection_that_a_gguf_has_whole_and_in_parts_is_taken_whole(tmp_path: Path) -> None:
    """As ik_llama.cpp writes it: attn_kv_b beside attn_k_b, transposed per head, and attn_v_b."""
    of = CASE.gguf[0]
    folder, apart = gguf.make(CASE, of, tmp_path)

    def whole_too(tensors: Tensors, c: Config) -> Tensors:
        whole = {name: t for name, t in tensors.items() if name.endswith("kv_b_proj.weight")}
        return gguf_weights(tensors, c) | whole

    both = gguf.write(folder, tmp_path / "both.gguf", replace(of, weights=whole_too))
    made = [convert(make_plan(open_checkpoint(f)), tmp_path / f.stem) for f in (apart, both)]
    a, b = (load_file(folder / "model-00001-of-00001.safetensors") for folder in made)
    assert sorted(a) == sorted(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_the_full_list_of_deepseek_v3_is_its_release() -> None:
    """641.30 GiB of tensors, 91,991 of them; upstream's class defaults are the release's sizes."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("deepseek_v3").to_dict() | {"quantization_config": {"quant_method": "fp8"}}
    tensors = names.released_tensors(CASE, config, mtp=1, quantised=True)
    assert len(tensors) == 91_991
    assert sum(t.nbytes for t in tensors.values()) == 688_574_839_360
    assert tensors["model.layers.60.mlp.experts.255.down_proj.weight"] == Tensor("F8_E4M3", (7168, 2048))
    assert tensors["model.layers.60.mlp.experts.255.down_proj.weight_scale_inv"] == Tensor("F32", (56, 16))


def test_an_explicit_null_is_no_where_a_field_that_is_absent_is_yes() -> None:
    config = {k: v for k, v in read("deepseek-v3").items() if k != "rope_interleave"}
    interleaved = [
        families.spec_of(config | more).layers[0].mixer.rope.interleaved
        for more in ({}, {"rope_interleave": None}, {"rope_interleave": False})
    ]
    assert interleaved == [True, False, False]
