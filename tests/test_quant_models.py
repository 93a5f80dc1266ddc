"""Quantised releases, end to end: carried or dequantised while converting, the logits are those of upstream's own
loading of the same files, and export gives the files back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vendor

import zoo
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.mapping.execute import convert
from zoo.mapping.export import export
from zoo.mapping.plan import make_plan
from zoo.model.load import load
from zoo.testing.build import read_config, read_tensors, write_config, write_tensors
from zoo.testing.rounding import agree

BLOCK = (4, 4)  # as 128 x 128 in a release; the widths below are multiples of it, but not of 128
Tensors = dict[str, torch.Tensor]

# Linear layers that no fp8 release quantises
PLAIN = re.compile(r"embed_tokens|lm_head|norm|\.gate\.|router|indexer\.weights_proj|e_score|bias|sinks")


def linear(name: str, t: torch.Tensor) -> bool:
    return t.ndim == 2 and "layers." in name and PLAIN.search(name) is None


def fp8_blocks(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    out: Tensors = {}
    for name, t in tensors.items():
        if linear(name, t):
            out[name], out[name + "_scale_inv"] = vendor.fp8_block(t, BLOCK)
        else:
            out[name] = t
    return out, {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK),
        "modules_to_not_convert": ["lm_head", "gate", "weights_proj"],
    }  # fmt: skip


def mxfp4_experts(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    out: Tensors = {}
    for name, t in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # [E, in, out]
            out[name + "_blocks"], out[name + "_scales"] = vendor.mxfp4(t.transpose(1, 2))
        else:
            out[name] = t
    skip = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return out, {"quant_method": "mxfp4", "modules_to_not_convert": skip}


def int4_experts(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    out: Tensors = {}
    for name, t in tensors.items():
        if ".mlp.experts." in name:
            # fp32 scales: upstream multiplies in the scales' dtype, and a release's bf16 would hide errors of ours
            for k, part in vendor.int4(t, dtype=torch.float32).items():
                out[name.removesuffix("weight") + k] = part
        else:
            out[name] = t
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
    }  # fmt: skip
    return out, {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    }  # fmt: skip


def fp8_channels(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    out: Tensors = {}
    for name, t in tensors.items():
        if linear(name, t):
            out[name], out[name + "_scale"] = vendor.fp8_channel(t)
        else:
            out[name] = t
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return out, {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head", r"re:.*mlp\.gate$"],
    }  # fmt: skip


MLA = {"q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "v_head_dim": 8}
Quantiser = Callable[[Tensors], tuple[Tensors, dict[str, Any]]]
MODELS: dict[str, tuple[str, dict[str, Any], Quantiser, str]] = {
    # id: (variant, settings, quantiser, scheme)
    "qwen3 fp8": ("qwen3", {}, fp8_blocks, "fp8-block-4x4"),
    "qwen3_moe fp8": ("qwen3_moe", {}, fp8_blocks, "fp8-block-4x4"),
    "deepseek_v3 fp8": ("deepseek_v3", MLA, fp8_blocks, "fp8-block-4x4"),
    "deepseek_v32 fp8": ("deepseek_v32", MLA | {"index_head_dim": 16, "index_n_heads": 4}, fp8_blocks, "fp8-block-4x4"),
    "minimax_m2 fp8": ("minimax_m2", {}, fp8_blocks, "fp8-block-4x4"),
    "mimo_v2_flash fp8": ("mimo_v2_flash", {"v_head_dim": 8}, fp8_blocks, "fp8-block-4x4"),
    "gpt_oss mxfp4": ("gpt_oss", {"hidden_size": 64, "intermediate_size": 96}, mxfp4_experts, "mxfp4"),
    "kimi_k2 int4": ("kimi_k2", {"hidden_size": 64, "moe_intermediate_size": 32}, int4_experts, "int4-group32"),
}  # fmt: skip


def quantised(name: str, settings: dict[str, Any], quantise: Quantiser, dst: Path) -> Path:
    """A tiny release with quantised weights."""
    path = vendor.make(dst, name, **settings)
    tensors, config = quantise(read_tensors(path))
    write_tensors(path, tensors)
    write_config(path, read_config(path) | {"quantization_config": config})
    return path


@pytest.fixture(params=MODELS)
def release(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, Path]:
    name, settings, quantise, scheme = MODELS[request.param]
    return name, scheme, quantised(name, settings, quantise, tmp_path / "hf")


def ours(path: Path, name: str) -> torch.Tensor:
    with torch.inference_mode():
        return load(path, dtype=torch.float32)(tiny.tokens(name))


def as_upstream(path: Path, name: str, theirs: torch.Tensor) -> bool:
    """Whether a folder's fp32 logits are upstream's but for the rounding of this CPU's instructions."""
    model, ids = load(path, dtype=torch.float32), tiny.tokens(name)
    with torch.inference_mode():
        return agree(model(ids), theirs, model, ids)


def test_its_logits_are_upstreams_carried_or_dequantised(
    release: tuple[str, str, Path], tmp_path: Path
) -> None:
    name, scheme, path = release
    plan = make_plan(open_checkpoint(path))
    assert set(plan.quant.values()) == {scheme}
    vendor.canonical(path, tmp_path / "carried")
    plain = vendor.canonical(path, tmp_path / "fp32", dtype="fp32")
    assert {t.dtype for t in plain.values()} == {torch.float32}
    assert torch.equal(ours(tmp_path / "carried", name), ours(tmp_path / "fp32", name))
    if (
        scheme == "int4-group32"
    ):  # upstream holds experts fused and cannot load packed ones: the package unpacks them
        path = unpacked(path, tmp_path / "plain")
    theirs = tiny.logits(tiny.upstream(path), tiny.tokens(name))
    assert as_upstream(tmp_path / "fp32", name, theirs)


def unpacked(path: Path, dst: Path) -> Path:
    """The release with its int4 weights dequantised by compressed-tensors."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    dst.mkdir()
    config = read_config(path)
    group = config.pop("quantization_config")["config_groups"]["group_0"]["weights"]
    write_config(dst, config)
    tensors = read_tensors(path)
    out: Tensors = {}
    for key, t in tensors.items():
        base = key.removesuffix("_packed")
        if key.endswith("weight_packed"):
            codes = unpack_from_int32(t, 4, torch.Size(tensors[base + "_shape"].tolist()))
            out[base] = dequantize(codes, tensors[base + "_scale"], args=QuantizationArgs(**group))
        elif not key.endswith(("weight_scale", "weight_shape")):
            out[key] = t
    write_tensors(dst, out)
    return dst


def test_bf16_is_the_fp32_value_rounded_once(release: tuple[str, str, Path], tmp_path: Path) -> None:
    _, _, path = release
    fp32 = vendor.canonical(path, tmp_path / "a", dtype="fp32")
    bf16 = vendor.canonical(path, tmp_path / "b", dtype="bf16")
    assert sorted(fp32) == sorted(bf16)
    for key, t in bf16.items():
        assert torch.equal(fp32[key].to(t.dtype), t), key


def test_carried_weights_are_given_back_to_the_byte(release: tuple[str, str, Path], tmp_path: Path) -> None:
    _, _, path = release
    vendor.canonical(path, tmp_path / "zoo")
    export(tmp_path / "zoo", tmp_path / "back")
    for file in path.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_channel_scales_have_the_logits_of_the_values_they_stand_for(tmp_path: Path) -> None:
    settings = {"num_nextn_predict_layers": 0}
    path = quantised("glm4_moe_air", settings, fp8_channels, tmp_path / "hf")
    assert set(make_plan(open_checkpoint(path)).quant.values()) == {"fp8-channel"}
    vendor.canonical(path, tmp_path / "carried")
    vendor.canonical(path, tmp_path / "fp32", dtype="fp32")
    assert torch.equal(ours(tmp_path / "carried", "glm4_moe_air"), ours(tmp_path / "fp32", "glm4_moe_air"))
    theirs = tiny.logits(tiny.upstream(values_of(path, tmp_path / "plain")), tiny.tokens("glm4_moe_air"))
    assert as_upstream(tmp_path / "fp32", "glm4_moe_air", theirs)


@pytest.mark.parametrize("block", [(7, 5), (16, 16), (128, 128)])
def test_blocks_that_divide_nothing_have_the_logits_of_the_values_they_stand_for(
    block: tuple[int, int], tmp_path: Path
) -> None:
    """Upstream's loader refuses such edges; DeepSeek's own releases have them (576 rows in blocks of 128)."""

    def quantise(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        out: Tensors = {}
        for key, t in tensors.items():
            if linear(key, t):
                out[key], out[key + "_scale_inv"] = vendor.fp8_block(t, block)
            else:
                out[key] = t
        return out, {"quant_method": "fp8", "weight_block_size": list(block)}

    path = quantised("deepseek_v3", {}, quantise, tmp_path / "hf")
    vendor.canonical(path, tmp_path / "carried")
    vendor.canonical(path, tmp_path / "fp32", dtype="fp32")
    assert torch.equal(ours(tmp_path / "carried", "deepseek_v3"), ours(tmp_path / "fp32", "deepseek_v3"))
    theirs = tiny.logits(
        tiny.upstream(values_of(path, tmp_path / "plain", block)), tiny.tokens("deepseek_v3")
    )
    assert as_upstream(tmp_path / "fp32", "deepseek_v3", theirs)


@pytest.mark.parametrize("name", ["nemotron_h", "qwen3_next", "gpt2", "mistral4"])
@pytest.mark.parametrize("block", [(6, 5), (128, 128)])
def test_scales_that_cannot_be_fused_are_those_of_the_released_weights_when_dequantised(
    name: str, block: tuple[int, int], tmp_path: Path
) -> None:
    """One stands for rows of several parts that a released tensor holds, or for other axes than are stored here."""

    def quantise(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        out: Tensors = {}
        for key, t in tensors.items():
            if t.ndim == 2 and re.search(r"in_proj_qkvz|mixer\.in_proj|c_attn|self_attn\.o_proj", key):
                out[key], out[key + "_scale_inv"] = vendor.fp8_block(t, block)
            elif key.endswith("experts.gate_up_proj"):
                pairs = [vendor.fp8_block(matrix, block) for matrix in t]
                out[key], out[key + "_scale_inv"] = (torch.stack(both) for both in zip(*pairs, strict=True))
            else:
                out[key] = t
        return out, {"quant_method": "fp8", "weight_block_size": list(block)}

    path = quantised(name, {}, quantise, tmp_path / "hf")
    with pytest.raises(ZooError, match="--dtype") as e:
        make_plan(open_checkpoint(path))
    assert "no rule uses" not in str(e.value)
    plain = values_of(path, tmp_path / "plain", block)
    vendor.same(
        vendor.canonical(path, tmp_path / "a", dtype="fp32"),
        vendor.canonical(plain, tmp_path / "b", dtype="fp32"),
    )


def values_of(path: Path, dst: Path, block: tuple[int, int] | None = None) -> Path:
    """The release as if it had been published unquantised, with the values of its codes."""
    dst.mkdir()
    config = read_config(path)
    del config["quantization_config"]
    write_config(dst, config)
    tensors = read_tensors(path)
    out: Tensors = {}
    for key, t in tensors.items():
        if key.endswith(("_scale", "_scale_inv")):
            continue
        if t.dtype == torch.float8_e4m3fn and block is None:
            t = t.float() * tensors[key + "_scale"]
        elif t.dtype == torch.float8_e4m3fn:
            spread = (
                tensors[key + "_scale_inv"].repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
            )  # type: ignore[index]
            t = t.float() * spread[..., : t.shape[-2], : t.shape[-1]]
        out[key] = t
    write_tensors(dst, out)
    return dst


def test_openais_own_layout_gives_the_canonical_bytes_of_hugging_faces(tmp_path: Path) -> None:
    settings = {
        "hidden_size": 64, "intermediate_size": 96, "swiglu_limit": 7.0, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 384,
    }  # fmt: skip
    hf = quantised("gpt_oss", settings, mxfp4_experts, tmp_path / "hf")
    own = to_openai(hf, tmp_path / "original")
    assert open_checkpoint(own).format == "openai"
    vendor.same(vendor.canonical(own, tmp_path / "a"), vendor.canonical(hf, tmp_path / "b"))
    for folder, dtype in (("c", "bf16"), ("d", "fp32")):
        ours_, theirs = (vendor.canonical(p, tmp_path / (folder + p.name), dtype=dtype) for p in (own, hf))
        vendor.same(ours_, theirs)
    specs = [make_plan(open_checkpoint(p)).spec.to_dict() for p in (own, hf)]
    for s in specs:
        s.pop("dtype")
    assert specs[0] == specs[1]
    # and upstream, which reads no such layout, reads what it is exported to
    given, ids = export(tmp_path / "a", tmp_path / "again"), tiny.tokens("gpt_oss")
    assert torch.equal(tiny.logits(tiny.upstream(given), ids), tiny.logits(tiny.upstream(hf), ids))


def test_the_codes_of_gpt_oss_go_into_a_ggufs_blocks_as_they_are(tmp_path: Path) -> None:
    """A block of llama.cpp's is a scale, then bytes whose low halves are its first 16 codes and whose high halves the last."""
    settings = {"hidden_size": 64, "intermediate_size": 96, "swiglu_limit": 7.0}
    hf = quantised("gpt_oss", settings, mxfp4_experts, tmp_path / "hf")
    vendor.canonical(hf, tmp_path / "canon")
    file = export(tmp_path / "canon", tmp_path / "x.gguf", format="gguf")
    refs, released = open_checkpoint(file).tensors, read_tensors(hf)
    for name, kind, rows in (
        ("ffn_gate", "gate_up", 0),
        ("ffn_up", "gate_up", 1),
        ("ffn_down", "down", None),
    ):
        ref = refs[f"blk.1.{name}_exps.weight"]
        assert ref.dtype == "MXFP4"
        raw = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)[
            ref.offset : ref.offset + ref.nbytes
        ]
        blocks = raw.view(*ref.shape[:2], -1, 17)
        codes, scales = (
            released[f"model.layers.1.mlp.experts.{kind}_proj_{x}"] for x in ("blocks", "scales")
        )
        if rows is not None:  # of gate and up, row by row
            codes, scales = codes[:, rows::2], scales[:, rows::2]
        assert torch.equal(blocks[..., 0], scales)
        low, high = blocks[..., 1:] & 15, blocks[..., 1:] >> 4
        assert torch.equal(torch.cat([low, high], -1), torch.stack([codes & 15, codes >> 4], -1).flatten(-2))
    assert zoo.verify(file, tmp_path / "canon", level="bytes").passed


def test_a_tensor_in_two_of_openais_files_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    settings = {"hidden_size": 64, "intermediate_size": 96}
    own = to_openai(quantised("gpt_oss", settings, mxfp4_experts, tmp_path / "hf"), tmp_path / "original")
    save_file({"norm.scale": torch.zeros(64)}, own / "zz.safetensors")
    with pytest.raises(ZooError, match=r"zz.safetensors: tensor 'norm.scale' is also in model.safetensors"):
        open_checkpoint(own)


def to_openai(hf: Path, dst: Path) -> Path:
    """gpt-oss under OpenAI's names: gpt_oss/torch/model.py and weights.py of openai/gpt-oss."""
    from safetensors.torch import save_file

    dst.mkdir()
    c, tensors = read_config(hf), read_tensors(hf)
    out = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "norm.scale": tensors["model.norm.weight"],
        "unembedding.weight": tensors["lm_head.weight"],
    }
    for i in range(c["num_hidden_layers"]):
        a, b = f"model.layers.{i}.", f"block.{i}."
        for kind in ("weight", "bias"):
            out[f"{b}attn.qkv.{kind}"] = torch.cat([tensors[f"{a}self_attn.{x}_proj.{kind}"] for x in "qkv"])
            out[f"{b}attn.out.{kind}"] = tensors[f"{a}self_attn.o_proj.{kind}"]
            out[f"{b}mlp.gate.{kind}"] = tensors[f"{a}mlp.router.{kind}"]
        out[b + "attn.sinks"] = tensors[a + "self_attn.sinks"]
        out[b + "attn.norm.scale"] = tensors[a + "input_layernorm.weight"]
        out[b + "mlp.norm.scale"] = tensors[a + "post_attention_layernorm.weight"]
        for theirs, name in (("mlp1", "gate_up_proj"), ("mlp2", "down_proj")):
            for x in ("blocks", "scales"):
                out[f"{b}mlp.{theirs}_weight.{x}"] = tensors[f"{a}mlp.experts.{name}_{x}"]
            out[f"{b}mlp.{theirs}_bias"] = tensors[f"{a}mlp.experts.{name}_bias"]
    save_file({k: t.contiguous() for k, t in out.items()}, dst / "model.safetensors")
    rope = c["rope_parameters"]
    own = {
        "num_hidden_layers": c["num_hidden_layers"], "num_experts": c["num_local_experts"],
        "experts_per_token": c["num_experts_per_tok"], "vocab_size": c["vocab_size"], "hidden_size": c["hidden_size"],
        "intermediate_size": c["intermediate_size"], "swiglu_limit": c["swiglu_limit"], "head_dim": c["head_dim"],
        "num_attention_heads": c["num_attention_heads"], "num_key_value_heads": c["num_key_value_heads"],
        "sliding_window": c["sliding_window"], "initial_context_length": rope["original_max_position_embeddings"],
        "rope_theta": rope["rope_theta"], "rope_scaling_factor": rope["factor"], "rope_ntk_alpha": rope["beta_slow"],
        "rope_ntk_beta": rope["beta_fast"],
    }  # fmt: skip
    (dst / "config.json").write_text(json.dumps(own))
    return dst


# --- what can be wrong ----------------------------------------------------------------------------------------

SCALE = "model.layers.1.self_attn.k_proj.weight_scale_inv"


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    return quantised("qwen3", {}, fp8_blocks, tmp_path / "hf")


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_scales_of_another_shape_are_refused_by_name(fp8: Path, dtype: str | None) -> None:
    write_tensors(fp8, read_tensors(fp8) | {SCALE: torch.ones(5, 8)})
    with pytest.raises(ZooError, match=re.escape(SCALE) + r".*shape \[5, 8\], expected \[5, 9\]"):
        make_plan(open_checkpoint(fp8), dtype=dtype)


def test_scales_of_what_is_multiplied_and_of_the_cache_go_along(fp8: Path, tmp_path: Path) -> None:
    more = {
        "model.layers.1.self_attn.k_proj.input_scale": torch.tensor(0.5), "model.layers.1.self_attn.k_scale": torch.ones(1),
        "model.layers.1.self_attn.q_proj.input_scale": torch.tensor(0.25),
        "model.layers.1.self_attn.v_proj.input_scale": torch.tensor(0.75),
        "model.layers.0.self_attn.v_proj.v_scale": torch.ones(1),
    }  # fmt: skip
    write_tensors(fp8, read_tensors(fp8) | more)
    plan = make_plan(open_checkpoint(fp8))
    assert plan.extras.keys() == {n for n in more if n.endswith(("k_scale", "v_scale"))}
    convert(plan, tmp_path / "zoo")
    again = export(tmp_path / "zoo", tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (fp8 / "model.safetensors").read_bytes()


GROUP = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 4]}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"config_groups": {"a": {"weights": GROUP | {"block_structure": "4x4"}}}}, "fp8-block-4x4"),
        (
            {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}, "b": {"weights": GROUP}}},
            "fp8-block-4x4",
        ),
        (
            {"config_groups": {"a": {"weights": GROUP}, "b": {"weights": GROUP | {"strategy": "channel"}}}},
            "fp8-block-4x4",
        ),
        (
            {
                "config_groups": {
                    "a": {"weights": GROUP | {"block_structure": [8, 8]}},
                    "b": {"weights": GROUP},
                }
            },
            "fp8-block-4x4",
        ),
        ({"config_groups": {"a": {"weights": None}}, "weight_block_size": [4, 4]}, "fp8-block-4x4"),
        ({"config_groups": {"FP8_BLOCK": ["Linear"]}}, "expected"),  # of shapes that 128 x 128 would have
        ({"config_groups": {"MXFP6": ["Linear"]}}, "the preset 'MXFP6'; known: FP8,"),
        ({"config_groups": [GROUP]}, "config_groups is .*expected an object"),
        ({"config_groups": {"a": None}}, "config_groups has 'a' as None; expected an object"),
        ({"config_groups": {"a": {"weights": ["Linear"]}}}, "config_groups has 'a' as .*expected an object"),
        ({"weight_block_size": 4}, "block size 4; expected two positive numbers"),
        ({"weight_block_size": [4, 4], "transform_config": {}, "sparsity_config": {}}, "fp8-block-4x4"),
        (
            {
                "weight_block_size": [4, 4],
                "sparsity_config": {"format": "dense", "sparsity_structure": "2:4"},
            },
            "fp8-block-4x4",
        ),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "stored as 'sparse-24-bitmask'"),
        ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "has a transform_config"),
        ({"weight_block_size": [4.0, 4.0]}, "expected two positive numbers"),
    ],
)
def test_what_a_config_says_of_blocks_is_read_or_refused(
    settings: dict[str, Any], expected: str, fp8: Path
) -> None:
    config = read_config(fp8)
    write_config(fp8, config | {"quantization_config": {"quant_method": "compressed-tensors"} | settings})
    if expected.startswith("fp8"):
        assert set(make_plan(open_checkpoint(fp8)).quant.values()) == {expected}
        return
    with pytest.raises(ZooError, match=expected):
        make_plan(open_checkpoint(fp8))


@pytest.mark.parametrize("size", [None, -1, 0, "x", 33])
def test_int4_without_groups_of_one_size_is_refused(size: Any, tmp_path: Path) -> None:
    name, settings, quantise, _ = MODELS["kimi_k2 int4"]
    path = quantised(name, settings, quantise, tmp_path / "hf")
    config = read_config(path)
    next(iter(config["quantization_config"]["config_groups"].values()))["weights"]["group_size"] = size
    write_config(path, config)
    with pytest.raises(
        ZooError, match="group_size .*expected a whole number|do not divide into groups of 33"
    ):
        make_plan(open_checkpoint(path))


def test_a_quantised_embedding_is_refused_unless_it_is_dequantised(tmp_path: Path) -> None:
    """It is looked up, not multiplied: its codes would be taken for values."""
    name = "model.embed_tokens.weight"
    src = quantised("qwen3", {}, fp8_blocks, tmp_path / "hf")
    tensors = read_tensors(src)
    codes, _ = fp8_blocks({"model.layers.0.mlp.up_proj.weight": tensors[name].float()})
    write_tensors(
        src, tensors | {k.replace("model.layers.0.mlp.up_proj.weight", name): v for k, v in codes.items()}
    )
    with pytest.raises(ZooError, match=rf"embed.weight: {re.escape(name)} is quantised \(fp8-block.*--dtype"):
        make_plan(open_checkpoint(src))
    assert make_plan(open_checkpoint(src), dtype="bf16").outputs["embed.weight"].scheme is not None


def test_codes_without_scales_are_refused_by_name(fp8: Path) -> None:
    tensors = read_tensors(fp8)
    del tensors[SCALE]
    write_tensors(fp8, tensors)
    with pytest.raises(ZooError, match=r"layers\.1\.self_attn\.k_proj\.weight"):
        make_plan(open_checkpoint(fp8))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8])
def test_codes_of_another_kind_are_refused_as_such(dtype: torch.dtype, fp8: Path) -> None:
    tensors, name = read_tensors(fp8), "model.layers.1.self_attn.o_proj.weight"
    write_tensors(fp8, tensors | {name: tensors[name].view(torch.uint8).view(dtype)})
    with pytest.raises(ZooError, match=rf"{re.escape(name)} in .*codes with scales are not supported"):
        make_plan(open_checkpoint(fp8))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_all_of_a_weight_may_have_axes(
    shape: tuple[int, ...], fp8: Path, tmp_path: Path
) -> None:
    weights = GROUP | {"strategy": "tensor"}
    q = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": weights}}}
    tensors = {
        n: t[:1, :1].clone().reshape(shape) if n.endswith("_scale_inv") else t
        for n, t in read_tensors(fp8).items()
    }
    write_tensors(fp8, tensors)
    write_config(fp8, read_config(fp8) | {"quantization_config": q})
    assert set(make_plan(open_checkpoint(fp8)).quant.values()) == {"fp8-tensor"}
    vendor.canonical(fp8, tmp_path / "carried")
    vendor.canonical(fp8, tmp_path / "fp32", dtype="fp32")
    assert torch.equal(ours(tmp_path / "carried", "qwen3"), ours(tmp_path / "fp32", "qwen3"))


def test_scales_without_codes_are_refused_by_name(fp8: Path) -> None:
    tensors = read_tensors(fp8)
    name = SCALE.removesuffix("_scale_inv")
    write_tensors(fp8, tensors | {name: tensors[name].float()})
    with pytest.raises(ZooError, match=re.escape(SCALE)):
        make_plan(open_checkpoint(fp8))


def test_an_odd_count_of_blocks_is_refused_by_name(tmp_path: Path) -> None:
    path = quantised("gpt_oss", {"hidden_size": 64, "intermediate_size": 96}, mxfp4_experts, tmp_path / "hf")
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    tensors = read_tensors(path)
    write_tensors(path, tensors | {name: tensors[name][:, :, :2]})
    with pytest.raises(ZooError, match=re.escape(name)):
        make_plan(open_checkpoint(path))


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (0.0, "zero"), (float("inf"), "infinite")]
)
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_scales_that_are_no_scales_are_a_warning_and_with_strict_an_error(
    value: float, word: str, dtype: str | None, fp8: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = read_tensors(fp8)
    tensors[SCALE][1, 2] = value
    write_tensors(fp8, tensors)
    with pytest.raises(ZooError, match=rf"{re.escape(SCALE)}.*{word}"):
        vendor.canonical(fp8, tmp_path / "strict", dtype, strict=True)
    with caplog.at_level("WARNING", logger="zoo"):
        vendor.canonical(fp8, tmp_path / "warned", dtype)
    assert any(SCALE in r.getMessage() and word in r.getMessage() for r in caplog.records)


def test_codes_out_of_range_are_a_value_of_their_own_not_a_crash(fp8: Path, tmp_path: Path) -> None:
    """e4m3 has one code that is no number; it stays one."""
    tensors = read_tensors(fp8)
    name = SCALE.removesuffix("_scale_inv")
    tensors[name].view(torch.uint8)[0, 0] = 0x7F
    write_tensors(fp8, tensors)
    out = vendor.canonical(fp8, tmp_path / "zoo", dtype="fp32")["layers.1.attn.qkv.weight"]
    assert int(out.isnan().sum()) == 1
    assert out[60, 0].isnan()  # the first row of k


def test_llama4s_experts_published_one_by_one_have_the_logits_of_the_values_they_stand_for(
    tmp_path: Path,
) -> None:
    """The fp8 release of Maverick: experts stacked and [in, out] elsewhere are numbered and [out, in] here."""
    path = vendor.make(tmp_path / "hf", "llama4_maverick")
    plain, out, config = {}, {}, read_config(path)
    for key, t in read_tensors(path).items():
        found = re.fullmatch(r"(.+\.experts)\.(gate_up_proj|down_proj)", key)
        if found is None:
            plain[key] = out[key] = t
            continue
        names = ("gate_proj", "up_proj") if found[2] == "gate_up_proj" else ("down_proj",)
        values = torch.empty_like(t)
        for e in range(t.shape[0]):
            columns = []
            for name, w in zip(names, t[e].T.chunk(len(names)), strict=True):
                codes, scale = vendor.fp8_channel(w)
                out[f"{found[1]}.{e}.{name}.weight"], out[f"{found[1]}.{e}.{name}.weight_scale"] = (
                    codes,
                    scale,
                )
                columns.append((codes.float() * scale).T)
            values[e] = torch.cat(columns, -1)
        plain[key] = values
    _, quantisation = fp8_channels({})
    write_tensors(path, out)
    write_config(path, config | {"quantization_config": quantisation})
    (tmp_path / "plain").mkdir()
    write_tensors(tmp_path / "plain", plain)
    write_config(tmp_path / "plain", config)
    vendor.canonical(path, tmp_path / "carried")
    vendor.canonical(path, tmp_path / "fp32", dtype="fp32")
    assert set(make_plan(open_checkpoint(path)).quant.values()) == {"fp8-channel"}
    assert torch.equal(
        ours(tmp_path / "carried", "llama4_maverick"), ours(tmp_path / "fp32", "llama4_maverick")
    )
    theirs = tiny.logits(tiny.upstream(tmp_path / "plain"), tiny.tokens("llama4_maverick"))
    assert as_upstream(tmp_path / "fp32", "llama4_maverick", theirs)
