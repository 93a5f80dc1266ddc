"""DeepSeek V3 / R1 and Kimi K2, which transformers knows as deepseek_v3.

Releases hold their prediction layer as one more layer, which upstream leaves unread.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from zoo import families
from zoo.mapping.plan import match
from zoo.spec import LatentAttention
from zoo.testing import BASE, FamilyCase, Listed, Variant, build, names, rope, yarn
from zoo.testing.assemble import assemble, view
from zoo.testing.build import rename
from zoo.testing.full_size import read, refs
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


def released(config: Settings) -> Settings:
    drop_default(config, rope_interleave=True)
    drop(config, "head_dim", "mlp_layer_types", "layer_types", "mlp_bias", "output_router_logits")
    return flat_rope(config, "type") | {
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "ep_size": 1,
    }


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
        ("deepseek-v3", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type is 'dynamic'"),
        ("deepseek-v3", {"n_group": 256, "topk_group": 4}, "groups of 1 experts cannot be judged by their best 2"),
        ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank"),
    ),
    released_text=released,
)
# fmt: on


def test_kimi_k2_5_is_the_same_text_model_in_a_wrapper() -> None:
    text = read("kimi-k2-thinking")
    config = {
        "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": text,
    }  # fmt: skip
    assert families.spec_of(config) == families.spec_of(text)


def test_the_split_up_projections_of_a_deepseek_gguf_make_the_released_one(tmp_path: Path) -> None:
    """attn_k_b is the keys' part of kv_b, transposed per head; attn_v_b the values' part."""
    folder = build.make(CASE, CASE.variant("deepseek_v3"), tmp_path / "deepseek")
    canonical = assemble(folder)
    spec = families.spec_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    hf = load_file(folder / "model.safetensors")
    a = spec.layers[0].mixer
    assert isinstance(a, LatentAttention)
    llama_cpp = {"attn_k_b.weight": "k", "attn_v_b.weight": "v"}
    tensors = {}
    for i in range(spec.n_layers):
        both = hf[f"model.layers.{i}.self_attn.kv_b_proj.weight"].view(a.n_heads, -1, a.kv_rank)
        k, v = both.split([a.nope_dim, a.v_head_dim], 1)
        tensors |= dict(zip((f"blk.{i}.{n}" for n in llama_cpp), (k.transpose(1, 2), v), strict=True))
    ruleset = families.get("deepseek_v3").rules["gguf"]
    m = match(spec, ruleset, refs({n: ("F32", tuple(t.shape)) for n, t in tensors.items()}), naming="gguf")
    for i in range(spec.n_layers):
        o = m.outputs[f"layers.{i}.attn.kv_up.weight"]
        made = torch.full(o.shape, torch.nan)
        for source, fit in zip(o.sources, o.fits, strict=True):
            view(made.view(-1), fit.canonical).copy_(view(tensors[source].reshape(-1), fit.source))
        assert torch.equal(made, canonical[o.name])


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
