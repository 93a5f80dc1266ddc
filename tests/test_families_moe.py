"""The families with experts or linear mixers, at full size and in every spelling of their configs and names.

No weight is made but for the namings that transformers does not write: those are rebuilt from a tiny
checkpoint's tensors and must give the same canonical bytes. That logits are upstream's: `test_parity.py`.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from assemble import assemble, view
from safetensors.torch import load_file, save_file
from test_families_dense import account, family_of, read, refs, saved
from test_manifests import CONFIGS, COUNTS, TENSORS, expand, rounds_to

from zoo import families, manifest
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.layout import active_params, layout, total_params
from zoo.mapping.plan import match
from zoo.spec import Attention, DeltaNet, LatentAttention, Mamba, Spec

FAMILIES = (
    "qwen3_moe", "llama4", "deepseek_v3", "deepseek_v32", "mistral_large3", "gpt_oss", "glm4_moe", "minimax_m2",
    "mimo_v2_flash", "qwen3_next", "kimi_linear", "nemotron_h",
)  # fmt: skip
VARIANTS = [v.name for v in tiny.VARIANTS.values() if v.family in FAMILIES]
STEMS = [
    stem
    for stem in sorted(p.name.removesuffix(".config.json") for p in CONFIGS.glob("*.config.json"))
    if family_of(read(stem)) in FAMILIES
]
PER_EXPERT = "llama4-maverick-17b-128e-instruct-fp8"  # transformers saves its experts stacked
RELEASES = [m for m in manifest.load_all() if m.family in FAMILIES and m.config]

# ------------------------------------------------------------------------------------ real releases


def test_every_release_with_experts_has_its_config_here() -> None:
    assert {family_of(read(stem)) for stem in STEMS} == set(FAMILIES)
    assert len(STEMS) >= 25


def selection_biases(spec: Spec) -> int:
    return sum(slot.size for name, slot in layout(spec).items() if name.endswith("selection_bias"))


@pytest.mark.parametrize("stem", STEMS)
def test_the_spec_has_exactly_the_parameters_that_upstreams_class_has(stem: str) -> None:
    spec, counted = families.spec_of(read(stem)), COUNTS[stem]
    biases = selection_biases(spec)  # buffers there, stored like parameters
    assert total_params(spec) - biases == counted["total"]
    assert active_params(spec) - biases == counted["active"]
    assert spec.tied == counted["tied"]
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("m", RELEASES, ids=[m.name for m in RELEASES])
def test_the_published_figures_are_the_counted_ones_rounded(m: manifest.Manifest) -> None:
    assert m.config is not None and m.params_total is not None and m.params_active is not None
    spec = families.spec_of(m.config)
    assert spec.family == m.family
    embedding = spec.vocab_size * spec.d_model
    # A publisher may leave out the embeddings, or count the vision tower (then the manifest says so).
    within = 0.05 if "vision" in (m.params_convention or "") else 0.025
    assert rounds_to(total_params(spec), m.params_total, within)
    assert any(rounds_to(active_params(spec) - k * embedding, m.params_active, within) for k in range(3))


@pytest.mark.parametrize(
    ("stem", "total", "active"),
    [
        ("deepseek-v3", 671.03, 36.63),  # less the embedding, as published: 37
        ("gpt-oss-120b", 116.83, 5.13),
        ("qwen3-235b-a22b", 235.09, 21.57),
        ("llama4-scout-17b-16e-instruct", 107.77, 16.14),
        ("kimi-k2-instruct", 1026.41, 31.69),
    ],
)
def test_well_known_sizes_in_billions(stem: str, total: float, active: float) -> None:
    spec = families.spec_of(read(stem))
    embedding = spec.vocab_size * spec.d_model
    assert round(total_params(spec) / 1e9, 2) == total
    assert round((active_params(spec) - embedding) / 1e9, 2) == active


MTP = {  # prediction layers in the release, where the config does not count them
    "qwen3-next-80b-a3b": 1,
    "mimo-v2-flash": 3,
    "kimi-linear-48b-a3b": 0,
    "minimax-m2": 0,
}


@pytest.mark.parametrize("stem", [s for s in STEMS if s != PER_EXPERT])
def test_the_rules_account_for_every_tensor_of_the_release(stem: str) -> None:
    config = read(stem)
    mtp = MTP.get(stem, config.get("num_nextn_predict_layers") or 0)
    released = tiny.released_tensors(config, mtp=mtp, quantised="quantization_config" in config)
    tensors = refs({name: (t.dtype, t.shape) for name, t in released.items()})
    families.families()
    start = time.process_time()
    m = account(config, tensors)
    assert time.process_time() - start <= 3.0
    used = {name for o in m.outputs.values() for name in o.sources}
    assert used | set(m.extras) == set(tensors)
    assert not used & set(m.extras)
    assert bool(m.extras) == bool(mtp or "text_config" in config)
    assert all(m.extras.values())


@pytest.mark.parametrize(
    ("listed", "stem"),
    [
        ("deepseek-r1", "deepseek-r1"),
        ("deepseek-v3.2", "deepseek-v3.2"),
        ("glm-4.5-fp8", "glm-4.5"),
        ("gpt-oss-20b", "gpt-oss-20b"),
        ("kimi-k2-instruct", "kimi-k2-instruct"),
        ("kimi-k2.5-text", "kimi-k2-thinking"),
        ("kimi-linear-48b-a3b", "kimi-linear-48b-a3b"),
        ("minimax-m2.7", "minimax-m2"),
        ("qwen3-next-80b-a3b", "qwen3-next-80b-a3b"),
        ("qwen3-next-80b-a3b-fp8", "qwen3-next-80b-a3b"),
    ],
)
def test_the_rules_account_for_the_tensors_listed_in_the_releases_own_files(listed: str, stem: str) -> None:
    config = read(stem)
    patterns = json.loads((TENSORS / f"{listed}.tensors.json").read_text(encoding="utf-8"))["patterns"]
    tensors = {name: (kind[0], tuple(kind[1])) for p, kind in patterns.items() for name in expand(p)}
    m = account(config, refs(tensors))
    n = families.spec_of(config).n_layers
    extras = {"rotary" if "inv_freq" in name else name.split(".")[0] for name in m.extras}
    expected = {"deepseek-r1": {"model"}, "deepseek-v3.2": {"model"}, "glm-4.5-fp8": {"model"},
                "kimi-k2-instruct": {"rotary"}}.get(listed, {"mtp"} if "next" in listed else set())  # fmt: skip
    assert extras == expected
    assert all(name.startswith(f"model.layers.{n}.") for name in m.extras if expected == {"model"})


def test_mistral_large_3_is_accounted_for_in_mistrals_own_names() -> None:
    params = json.loads((CONFIGS / "mistral-large-3-675b.params.json").read_text(encoding="utf-8"))
    config = read("mistral-large-3-675b") | {"quantization_config": params["quantization_config"]}
    listed = json.loads((TENSORS / "mistral-large-3-675b.tensors.json").read_text(encoding="utf-8"))
    tensors = tiny.released_tensors(params, quantised=True)
    assert set(tensors) == {name for pattern in listed["patterns"] for name in expand(pattern)}
    vision = {
        "vision_encoder.conv.weight": ("BF16", (1, 1)),
        "patch_merger.merging_layer.weight": ("BF16", (1, 1)),
    }
    m = account(config, refs({n: (t.dtype, t.shape) for n, t in tensors.items()} | vision), "mistral")
    assert set(m.extras) == set(vision)


def test_maverick_fp8_stores_its_experts_one_by_one() -> None:
    """`for_llm_compressor`: [out, in] per expert, one scale per row; attention, router and vision plain."""
    config = read(PER_EXPERT)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}

    def channels(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = ("F8_E4M3", (rows, columns))
        tensors[f"{name}.weight_scale"] = ("BF16", (rows, 1))

    for name, t in tiny.released_tensors(config).items():
        base, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            experts, d, both = t.shape
            for e in range(experts):
                channels(f"{base}.{e}.gate_proj", both // 2, d)
                channels(f"{base}.{e}.up_proj", both // 2, d)
        elif leaf == "down_proj":
            experts, f, d = t.shape
            for e in range(experts):
                channels(f"{base}.{e}.down_proj", d, f)
        elif "shared_expert" in name:
            channels(base, *t.shape)
        else:
            tensors[name] = (t.dtype, t.shape)
    m = account(config, refs(tensors))
    assert m.quant["layers.1.moe.gate_up"] == m.quant["layers.1.moe.shared.down"] == "fp8-channel"
    assert set(m.extras) == {n for n in tensors if not n.startswith("language_model.")}


def test_kimi_k2_5_is_the_same_text_model_in_a_wrapper() -> None:
    text = read("kimi-k2-thinking")
    config = {
        "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": text,
    }  # fmt: skip
    assert families.spec_of(config) == families.spec_of(text)


# ------------------------------------------------------------------------------- spellings of configs


@pytest.mark.parametrize("name", VARIANTS)
def test_released_keys_and_resaved_keys_say_the_same(name: str) -> None:
    new, old = saved(name), tiny.released_config(saved(name))
    assert new != old
    assert families.spec_of(new) == families.spec_of(old)


def test_numbers_of_experts_are_read_under_every_name() -> None:
    config = read("qwen3-30b-a3b")
    renamed = {**config, "num_local_experts": config["num_experts"]}
    del renamed["num_experts"]
    assert families.spec_of(renamed) == families.spec_of(config)


def mixers(spec: Spec) -> str:
    letters = {Attention: "a", LatentAttention: "l", DeltaNet: "d", Mamba: "m", type(None): "-"}
    return "".join(letters[type(layer.mixer)] for layer in spec.layers)


def test_kimi_linear_counts_its_layers_from_one() -> None:
    spec = families.spec_of(read("kimi-linear-48b-a3b"))
    assert mixers(spec) == "dddl" * 6 + "ddl"


def test_every_fourth_layer_of_qwen3_next_is_attention() -> None:
    assert mixers(families.spec_of(read("qwen3-next-80b-a3b"))) == "ddda" * 12


def test_nemotrons_letters_become_layers_of_one_thing_each() -> None:
    spec = families.spec_of(read("nemotron3-nano-30b-a3b"))
    assert mixers(spec).startswith("m-m-ma-m-m-ma")
    for layer in spec.layers:
        assert (layer.mixer is None) != (layer.ffn is None)
        assert (layer.attn_norm is None) == (layer.mixer is None)


def test_a_nope_layer_of_llama_4_sees_everything_and_has_no_qk_norm() -> None:
    spec = families.spec_of(read("llama4-scout-17b-16e-instruct"))
    for i, layer in enumerate(spec.layers):
        a = layer.mixer
        assert isinstance(a, Attention)
        nope = (i + 1) % 4 == 0
        assert [a.rope is None, a.chunk is None, a.qk_norm is None, a.query_scale is not None] == [nope] * 4


def test_a_window_of_mimo_shows_one_key_more_than_the_config_says() -> None:
    config = read("mimo-v2-flash")
    windows = {
        a.window
        for a in (layer.mixer for layer in families.spec_of(config).layers)
        if isinstance(a, Attention)
    }
    assert config["sliding_window_size"] == 128 and windows == {None, 129}


def test_yarn_of_mistral_large_3_changes_no_magnitude_and_that_of_deepseek_does() -> None:
    large, v3 = (families.spec_of(read(s)).layers[0].mixer for s in ("mistral-large-3-675b", "deepseek-v3"))
    assert isinstance(large, LatentAttention) and isinstance(v3, LatentAttention)
    assert (
        large.rope is not None
        and large.rope.scaling is not None
        and v3.rope is not None
        and v3.rope.scaling is not None
    )
    assert large.rope.scaling.attention_factor == v3.rope.scaling.attention_factor == 1.0
    assert large.scale == 192**-0.5
    assert v3.scale == pytest.approx(192**-0.5 * 1.3688879454113936**2, abs=0, rel=1e-15)
    assert large.query_scale is not None and (large.query_scale.beta, large.query_scale.period) == (
        0.1,
        8192.0,
    )


# --------------------------------------------------------------------------------------- other namings


def in_other_names(folder: Path, tensors: dict[str, torch.Tensor], naming: str) -> Any:
    """The same release's config with other tensors, opened as a reader of that naming would."""
    new = folder.parent / f"{folder.name}-{naming}"
    new.mkdir()
    (new / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(
        {k: t.clone(memory_format=torch.contiguous_format) for k, t in tensors.items()},
        new / "model.safetensors",
    )
    return replace(open_checkpoint(new), naming=(naming,))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
    tiny.make("gpt_oss", tmp_path / "gpt_oss")
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


def test_the_split_up_projections_of_a_deepseek_gguf_make_the_released_one(tmp_path: Path) -> None:
    """attn_k_b is the keys' part of kv_b, transposed per head; attn_v_b the values' part."""
    folder = tiny.make("deepseek_v3", tmp_path / "deepseek")
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


@pytest.mark.parametrize("name", ["kimi_linear", "kimi_linear_two_dense"])
def test_kimi_linears_dense_layers_are_found_where_transformers_saves_them(name: str, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / name)
    hf = load_file(folder / "model.safetensors")
    renamed = {n.replace(".mlp.", ".block_sparse_moe."): t for n, t in hf.items()}
    assert renamed.keys() != hf.keys()
    assert same(assemble(in_other_names(folder, renamed, "hf")), assemble(folder))


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("stem", "change", "says"),
    [
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek-v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek-v3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("deepseek-v3", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type is 'dynamic'"),
        ("deepseek-v3.2", {"rope_interleave": False}, "rope_interleave is False"),
        ("gpt-oss-20b", {"layer_types": ["chunked_attention"] * 24}, "layer_types[0] is 'chunked_attention'"),
        ("gpt-oss-20b", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("glm-4.5", {"topk_method": "group_limited_greedy"}, "topk_method is 'group_limited_greedy'"),
        ("kimi-linear-48b-a3b", {"mla_use_nope": False}, "mla_use_nope is False"),
        ("kimi-linear-48b-a3b", {"moe_router_activation_func": "softmax"}, "moe_router_activation_func is 'softmax'"),
        ("mimo-v2-flash", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("mimo-v2-flash", {"hybrid_layer_pattern": [2] * 48}, "hybrid_layer_pattern[0] is 2"),
        ("mimo-v2-flash", {"n_shared_experts": 1}, "n_shared_experts is 1"),
        ("mimo-v2-flash", {"partial_rotary_factor": None}, "'partial_rotary_factor' is missing"),
        ("gpt-oss-20b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("minimax-m2", {"partial_rotary_factor": 0.25}, "rotary_dim and partial_rotary_factor differ"),
        ("minimax-m2", {"attn_type_list": [0] * 62}, "attn_type_list[0] is 0"),
        ("minimax-m2", {"qk_norm_type": "per_head"}, "qk_norm_type is 'per_head'"),
        ("minimax-m2", {"shared_intermediate_size": 64}, "shared_intermediate_size is 64"),
        ("nemotron3-nano-30b-a3b", {"hybrid_override_pattern": "ME?"}, "unknown layer type(s) ?"),
        ("nemotron3-nano-30b-a3b", {"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'"),
        ("nemotron3-nano-30b-a3b", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3-30b-a3b", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3-30b-a3b", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ("qwen3-next-80b-a3b", {"layer_types": ["mamba"] * 48}, "layer_types[0] is 'mamba'"),
        ("qwen3-next-80b-a3b", {"layer_types": ["full_attention"]}, "should list 48 layers"),
    ],
)  # fmt: skip
def test_what_a_family_does_not_support_is_refused_by_name(
    stem: str, change: dict[str, Any], says: str
) -> None:
    config = read(stem)
    if "layer_types" in change:
        config.pop("full_attention_interval", None)
    with pytest.raises(ZooError) as e:
        families.spec_of(config | change, where="here/config.json")
    assert says in str(e.value)
    assert "here/config.json" in str(e.value)


def test_layers_that_kimi_linear_lists_twice_or_never_are_refused() -> None:
    config = read("kimi-linear-48b-a3b")
    lists = {**config["linear_attn_config"], "kda_layers": [0, 1, 2]}
    with pytest.raises(ZooError, match="do not make layers 1 to 27"):
        families.spec_of(config | {"linear_attn_config": lists})


@pytest.mark.parametrize(
    ("stem", "key"),
    [
        ("deepseek-v3", "kv_lora_rank"),
        ("gpt-oss-20b", "sliding_window"),
        ("minimax-m2", "num_experts_per_tok"),
    ],
)
def test_a_missing_field_is_named(stem: str, key: str) -> None:
    config = read(stem)
    del config[key]
    with pytest.raises(ZooError, match=key):
        families.spec_of(config)
