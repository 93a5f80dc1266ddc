"""The test data itself: every variant is complete, away from every default, and says what upstream says."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny
from tiny import VARIANTS, build, names, released

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

each_variant = pytest.mark.parametrize("name", VARIANTS)
FAMILIES = sorted({v.family for v in VARIANTS.values()})

# Constants of the architectures, and the values that class defaults and releases have for them. At least one
# variant of each family has something else, so code that carries one instead of reading it is caught.
DEFAULTS: dict[str, set[Any]] = {
    "rms_norm_eps": {1e-5, 1e-6},
    "layer_norm_epsilon": {1e-5},
    "rope_theta": {1e4, 5e4, 1e5, 1.5e5, 5e5, 1e6, 2e6, 5e6, 1e7, 1e8, 1e9},
    "factor": {8, 16, 32, 36, 40, 64, 128},
    "low_freq_factor": {1},
    "high_freq_factor": {1, 4},
    "original_max_position_embeddings": {4096, 8192, 16384},
    "beta_fast": {32},
    "beta_slow": {1},
    "mscale": {1},
    "mscale_all_dim": {1},
    "attention_factor": {1.2079441541679836, 1.3465735902799727},
    "truncate": {True},
    "llama_4_scaling_beta": {0.1},
    "partial_rotary_factor": {1, 0.25, 0.334},
    "sliding_window": {128, 129, 512, 1024, 4096, 32768},
    "attention_chunk_size": {8192},
    "floor_scale": {8192},
    "attn_scale": {0.1},
    "query_pre_attn_scalar": {256, 168, 128},
    "final_logit_softcapping": {30, 50},
    "attention_value_scale": {0.707},
    "routed_scaling_factor": {1, 2.5, 2.446, 2.827},
    "num_experts_per_tok": {1, 4, 6, 8, 10},
    "topk_group": {4, 8},
    "index_topk": {2048},
    "swiglu_limit": {7},
    "swiglu_alpha": {1.702},
    "time_step_min": {0.001},
    "conv_kernel": {4},
    "linear_conv_kernel_dim": {4},
    "activation_sparsity_pattern": {0.95},
    "altup_num_inputs": {4},
    "laurel_rank": {64},
}

# A wrong value for each constant that can change without changing a shape: what code would have that does not
# read it. The change of the logits is what a test of that code would see.
WRONG: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "layer_norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "attention_factor": 1.3465735902799727,
    "truncate": True,
    "llama_4_scaling_beta": 0.1,
    "sliding_window": 4096,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "attn_temperature_tuning": False,
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": 30.0,
    "attention_value_scale": 0.707,
    "routed_scaling_factor": 2.5,
    "num_experts_per_tok": 1,
    "index_topk": 2048,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
    "scale_attn_by_inverse_layer_idx": False,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A variant's files, made once."""
    return functools.cache(lambda name: tiny.make(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """Upstream's logits of a variant."""
    return functools.cache(lambda name: tiny.logits(tiny.upstream(checkpoint(name)), tiny.tokens(name)))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(name: str) -> dict[str, Any]:
    """The language model's settings of a variant, RoPE parameters of all layer types flattened in."""
    text = VARIANTS[name].text
    rope = text.get("rope_parameters", {})
    nested = [v for v in rope.values() if isinstance(v, dict)] or [rope]
    return text | {k: v for part in nested for k, v in part.items()}


# --- the checkpoints ----------------------------------------------------------------------------------------


@each_variant
def test_upstream_loads_it_and_its_logits_spread(name: str, reference: Callable[[str], Any]) -> None:
    variant, ids, out = VARIANTS[name], tiny.tokens(name), reference(name)
    assert out.shape == (2, variant.seq_len, variant.vocab_size)
    assert out.isfinite().all()
    assert 3 < out.abs().max() < 30
    assert out.std(-1).min() > 0.5, "some position has nothing to say"
    assert out.std((0, 1)).min() > 0.3, "some token's logit hardly depends on the input"
    # What came through the files is what was built.
    model = tiny.perturbed(variant)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    assert (tiny.logits(model, ids) - out).abs().max() < 5e-5


@each_variant
def test_upstream_decodes_as_it_prefills_unless_dt_is_clamped(
    name: str, checkpoint: Callable[[str], Path], reference: Callable[[str], Any]
) -> None:
    model, ids = tiny.upstream(checkpoint(name)), tiny.tokens(name)
    n = ids.shape[1] - 3
    with torch.inference_mode():
        cache = model(input_ids=ids[:, :n], use_cache=True).past_key_values
        steps = [
            model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            for i in range(n, ids.shape[1])
        ]
    difference = (torch.cat(steps, 1) - reference(name)[:, n:]).abs().max()
    assert difference > 0.5 if name == "nemotron_h_dtmin" else difference < 5e-5


@each_variant
def test_every_parameter_and_persistent_buffer_is_moved_from_its_initial_value(name: str) -> None:
    initial, moved = tiny.fresh(VARIANTS[name]).state_dict(), tiny.perturbed(VARIANTS[name]).state_dict()
    assert initial.keys() == moved.keys()
    still = [k for k in moved if (initial[k] == moved[k]).float().mean() > 0.01]
    assert not still


@each_variant
def test_a_seed_gives_the_same_bytes_again_and_another_seed_others(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def digest(path: Path) -> dict[str, str]:
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.iterdir()}

    torch.rand(7)  # the state of the global generator must not matter
    assert digest(tiny.make(name, tmp_path / "again")) == digest(checkpoint(name))
    one, other = (tiny.perturbed(VARIANTS[name], seed).state_dict() for seed in (0, 1))
    assert not [k for k in one if torch.equal(one[k], other[k])]


@each_variant
def test_shards_hold_the_same_tensors_and_bf16_keeps_what_releases_keep_in_fp32(
    name: str, tmp_path: Path
) -> None:
    whole = build.read_tensors(tiny.make(name, tmp_path / "whole", dtype="bfloat16"))
    path = tiny.make(name, tmp_path / "shards", dtype="bfloat16", max_shard_size="20KB")
    parts = build.read_tensors(path)
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == parts.keys() == whole.keys()
    assert len(set(index.values())) >= 3
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    kept = {k.rsplit(".", 1)[-1] for k, t in whole.items() if t.dtype == torch.float32}
    strict = {"deepseek_v3", "deepseek_v32", "glm4_moe", "nemotron_h", "mimo_v2_flash"}
    expected = {"e_score_correction_bias"} if VARIANTS[name].family in strict else set()
    assert kept - {"bias"} == expected
    out = tiny.logits(tiny.upstream(path, dtype="bfloat16"), tiny.tokens(name))
    assert out.isfinite().all()


# --- the variants -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_constants_are_neither_class_defaults_nor_released_values(family: str) -> None:
    for key, usual in DEFAULTS.items():
        values = [
            v for n in VARIANTS if VARIANTS[n].family == family and (v := settings(n).get(key)) is not None
        ]
        flat = [x for v in values for x in (v if isinstance(v, list) else [v])]
        assert not flat or any(x not in usual for x in flat), f"{key} is {flat}"


@each_variant
def test_a_constant_that_is_not_read_shows_in_the_logits(name: str) -> None:
    variant, ids = VARIANTS[name], tiny.tokens(name)
    model = tiny.perturbed(variant)
    right, state = tiny.logits(model, ids), model.state_dict()
    silent = []
    for label, changed in wrong_constants(name):
        wrong = tiny.fresh(build.replace_settings(variant, changed))
        wrong.load_state_dict(state)
        difference = (tiny.logits(wrong, ids) - right).abs().max().item()
        if difference < 1e-3:
            silent.append((label, difference))
    assert not silent


def wrong_constants(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """One changed copy of the text settings per constant, RoPE parameters included."""
    text = VARIANTS[name].text
    for key, wrong in WRONG.items():
        if text.get(key) not in (None, wrong):
            yield key, text | {key: wrong}
        rope = text.get("rope_parameters", {})
        if rope.get(key) not in (None, wrong):
            yield f"rope_parameters.{key}", text | {"rope_parameters": rope | {key: wrong}}
        for kind, part in rope.items():
            if isinstance(part, dict) and part.get(key) not in (None, wrong):
                yield f"{kind}.{key}", text | {"rope_parameters": rope | {kind: part | {key: wrong}}}


@each_variant
def test_widths_heads_groups_and_length_leave_no_room_for_mix_ups(name: str) -> None:
    variant = VARIANTS[name]
    config = variant.build()[0].get_text_config()
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if variant.family not in ("gpt2", "deepseek_v3", "deepseek_v32", "mistral_large3", "kimi_linear"):
        assert kv_heads < heads and heads % kv_heads == 0
    else:
        assert kv_heads in (None, heads), "MHA and MLA have no groups"
    widths = {config.vocab_size}
    for key in ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank"):
        value = getattr(config, key, None) or 0
        widths |= set(value if isinstance(value, list) else [value]) - {0}
    assert not [(a, b) for a in widths for b in widths if a < b and b % a == 0]
    derived = heads * head_dim(config) == config.hidden_size
    by_design = r"attn.c_proj|altup_\w*projections|coefs|vision|multi_modal"
    may_be_square = re.compile(by_design + (r"|[qo]_proj" if derived else ""))
    state = variant.build()[1]._from_config(variant.build()[0]).state_dict()
    square = [k for k, t in state.items() if t.ndim > 1 and t.shape[-1] == t.shape[-2]]
    assert not [k for k in square if not may_be_square.search(k)]
    if getattr(config, "n_group", None) is not None and config.n_group > 1:
        assert config.topk_group < config.n_group
        assert config.num_experts_per_tok <= config.topk_group * config.num_local_experts // config.n_group
    for limit in ("sliding_window", "attention_chunk_size", "index_topk", "chunk_size", "floor_scale"):
        value = getattr(config, limit, None)
        assert value is None or variant.seq_len > 2 * value
    if "linear_key_head_dim" in variant.text or "linear_head_dim" in variant.text:
        assert variant.seq_len > 64, "upstream computes the delta rule in chunks of 64"


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_layer_that_alternates_is_there(family: str) -> None:
    """Per family, both sides of each switch occur."""
    kinds: dict[str, set[Any]] = {
        "layer_types": set(),
        "mlp_layer_types": set(),
        "no_rope_layers": set(),
        "moe_layers": set(),
    }
    for variant in VARIANTS.values():
        if variant.family == family:
            config = variant.build()[0].get_text_config()
            for key, found in kinds.items():
                value = getattr(config, key, None)
                if key == "moe_layers" and value is not None:
                    value = [i in value for i in range(config.num_hidden_layers)]
                found |= set(value or ())
    full, sliding, linear = "full_attention", "sliding_attention", "linear_attention"
    expected = {
        "llama4": {full, "chunked_attention"},
        "mistral": {full, sliding},
        "qwen3": {full, sliding},
        "qwen3_next": {full, linear},
        "smollm3": {full, sliding},
        "olmo3": {full, sliding},
        "gemma3": {full, sliding},
        "gemma3n": {full, sliding},
        "gpt_oss": {full, sliding},
        "kimi_linear": {full, linear},
        "nemotron_h": {full, linear, "moe", "mlp"},
        "mimo_v2_flash": {full, sliding},
    }
    if family in expected:
        assert kinds["layer_types"] == expected[family]
    assert len(kinds["no_rope_layers"]) in (0, 2)
    assert len(kinds["moe_layers"]) in (0, 2)
    assert len(kinds["mlp_layer_types"]) in (0, 2)


@each_variant
def test_scaled_rope_keeps_blends_and_scales(name: str) -> None:
    config = VARIANTS[name].build()[0].get_text_config()
    rope = config.rope_parameters if hasattr(config, "rope_parameters") else None
    parts = [p for p in rope.values() if isinstance(p, dict)] or [rope] if rope else []
    for part in parts:
        if part["rope_type"] not in ("llama3", "yarn"):
            continue
        config.rope_parameters = part
        function = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[part["rope_type"]]
        scaled, _ = function(config, "cpu")
        n = 2 * len(scaled)
        plain = part["rope_theta"] ** -(torch.arange(0, n, 2) / n)
        ratio = (plain / scaled).tolist()
        close = [[x for x in ratio if abs(x - y) < 1e-3] for y in (1.0, part["factor"])]
        assert all(close) and len(close[0]) + len(close[1]) < len(ratio), ratio


@each_variant
def test_no_choice_of_an_expert_or_a_key_hangs_on_rounding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps: list[float] = []
    topk = torch.topk

    def watched(x: Any, k: int, dim: int = -1, **more: Any) -> Any:
        group_score = x.ndim == 3 and k == 2  # a sum over the two best: the same whichever is second
        if x.shape[dim] > k and not group_score:
            best = topk(x.detach(), k + 1, dim=dim).values.movedim(dim, -1)
            gap = best[..., k - 1] - best[..., k]
            gaps.append(gap[best[..., k] > -1e30].min().item())  # masked ones cannot be chosen
        return topk(x, k, dim=dim, **more)

    monkeypatch.setattr(torch, "topk", watched)
    monkeypatch.setattr(torch.Tensor, "topk", watched)
    tiny.logits(tiny.perturbed(VARIANTS[name]), tiny.tokens(name))
    assert bool(gaps) == ("num_experts_per_tok" in VARIANTS[name].text)
    assert not gaps or min(gaps) > 1e-5


# --- released keys, names, formats --------------------------------------------------------------------------


@each_variant
def test_a_config_in_released_keys_means_the_same(
    name: str, reference: Callable[[str], Any], tmp_path: Path
) -> None:
    path = tiny.make(name, tmp_path / name, released_config=True)
    config = build.read_config(path)
    if names.text_config(config)["model_type"] not in ("ministral3", "mistral4"):
        assert "rope_parameters" not in names.text_config(config)
    ids = tiny.tokens(name)
    if name not in released.NOT_READ_BY_UPSTREAM:
        assert torch.equal(tiny.logits(tiny.upstream(path), ids), reference(name))
        return
    try:
        wrong = tiny.logits(tiny.upstream(path), ids)
    except RuntimeError:  # shapes of other layers than the file's
        return
    assert (wrong - reference(name)).abs().max() > 0.1, "upstream reads it now: take it off the list"


@each_variant
def test_released_names_lists_the_files(name: str, checkpoint: Callable[[str], Path]) -> None:
    path, variant = checkpoint(name), VARIANTS[name]
    on_disk = {k: tuple(t.shape) for k, t in build.read_tensors(path).items()}
    listed = tiny.released_names(build.read_config(path), mtp=variant.mtp)
    if name == "gpt2_release":  # older than the naming that is listed
        listed = {k.removeprefix("transformer."): s for k, s in listed.items()}
        listed |= {f"h.{i}.attn.bias": (1, 1, 37, 37) for i in range(3)}
    elif name == "gemma3n":  # as saved; its release is what gemma3n_wrapper is
        on_disk = {names.gemma3n_prefix(k): s for k, s in on_disk.items()}
        unused = names.gemma3n_shared_kv(variant.build()[0].to_dict())
        listed = {k: s for k, s in listed.items() if k not in unused}
    timm = {k for k in on_disk if "vision_tower.timm_model" in k}
    assert listed == {k: s for k, s in on_disk.items() if k not in timm}


def test_the_full_list_of_deepseek_v3_is_its_release() -> None:
    """641.30 GiB of tensors, 91,991 of them; upstream's class defaults are the release's sizes."""
    config = tiny.config_of_class_defaults("deepseek_v3").config | {
        "quantization_config": {"quant_method": "fp8"}
    }
    tensors = tiny.released_tensors(config, mtp=1, quantised=True)
    assert len(tensors) == 91_991
    assert sum(t.nbytes for t in tensors.values()) == 688_574_839_360
    assert tensors["model.layers.60.mlp.experts.255.down_proj.weight"] == names.Tensor(
        "F8_E4M3", (7168, 2048)
    )
    assert tensors["model.layers.60.mlp.experts.255.down_proj.weight_scale_inv"] == names.Tensor(
        "F32", (56, 16)
    )


@pytest.mark.parametrize(
    ("model_type", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("deepseek_v3", 671_026_404_352),
        ("gpt_oss", 116_829_156_672),
        ("minimax_m2", 228_689_748_992),
        ("mimo_v2_flash", 308_778_768_832),
        ("qwen3_next", 79_674_391_296),
    ],
)
def test_class_defaults_have_upstreams_parameter_count(model_type: str, parameters: int) -> None:
    assert tiny.parameter_count(tiny.config_of_class_defaults(model_type).config) == parameters


def test_gpt_oss_and_kimi_k2_list_their_packed_experts() -> None:
    scheme: dict[str, Any] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    config = tiny.config_of_class_defaults("gpt_oss").config | {"num_hidden_layers": 1, "layer_types": None}
    shapes = tiny.released_names(config | {"quantization_config": scheme}, quantised=True)
    assert shapes["model.layers.0.mlp.experts.gate_up_proj_blocks"] == (128, 5760, 90, 16)
    assert shapes["model.layers.0.mlp.experts.gate_up_proj_scales"] == (128, 5760, 90)
    assert "model.layers.0.mlp.experts.gate_up_proj" not in shapes
    scheme = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|down)_proj.*",
        ],
    }
    config = tiny.config_of_class_defaults("deepseek_v3").config
    config |= {
        "model_type": "kimi_k2",
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": 3,
    }
    shapes = tiny.released_names(config | {"n_group": 1, "quantization_config": scheme}, quantised=True)
    packed = {k.rsplit(".", 1)[-1]: s for k, s in shapes.items() if "experts.2.up_proj" in k}
    assert packed == {"weight_packed": (2048, 896), "weight_scale": (2048, 224), "weight_shape": (2,)}
    assert "model.layers.0.mlp.up_proj.weight" in shapes
    assert "model.layers.1.mlp.gate.weight" in shapes


def test_mistral_large_3_in_mistrals_own_format_is_the_same_model(
    reference: Callable[[str], Any], tmp_path: Path
) -> None:
    path = tiny.make_mistral_format("mistral_large3", tmp_path)
    assert sorted(f.name for f in path.iterdir()) == ["consolidated.safetensors", "params.json"]
    ids = tiny.tokens("mistral_large3")
    assert torch.equal(tiny.logits(tiny.upstream_mistral_format(path), ids), reference("mistral_large3"))
    listed = tiny.released_names(json.loads((path / "params.json").read_text()))
    assert listed == {k: tuple(t.shape) for k, t in build.read_tensors(path).items()}
    assert "layers.2.experts.7.w3.weight" in listed and "layers.1.feed_forward.w1.weight" in listed


def test_a_head_in_the_file_is_used_though_the_wrapper_defaults_to_tied(tmp_path: Path) -> None:
    """Mistral Small 3.1 does not say: the class default is tied, but the release has a head."""
    path = tiny.make("mistral3", tmp_path, released_config=True)
    assert "tie_word_embeddings" not in build.read_config(path)
    model = tiny.upstream(path)
    assert model.config.tie_word_embeddings is True
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
