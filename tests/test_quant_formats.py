"""Quantised releases of other tools: each kind is read as what it stands for, carried as it was released where that can be, and
given back to the byte."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packs
import pytest
import tiny
import torch
import vendor
from safetensors.torch import load_file, save_file

import zoo
from zoo.errors import ZooError
from zoo.formats import canonical, open_checkpoint
from zoo.mapping.export import export
from zoo.mapping.plan import make_plan
from zoo.model.load import load
from zoo.quant.foreign import name_of
from zoo.quant.packed import octets
from zoo.quant.schemes import named
from zoo.testing.build import read_config, read_tensors, write_config, write_tensors

DENSE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 1,
}
EXPERTS = DENSE | {"moe_intermediate_size": 32, "num_hidden_layers": 2}


def linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def gptq(bits: int, group: int, **kw: Any) -> dict[str, Any]:
    """As Qwen's GPTQ releases have it."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    } | kw


def awq(group: int) -> dict[str, Any]:
    """As Qwen's AWQ releases have it."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": None,
    }


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """As RedHatAI's releases have it."""
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False} | weights,
    }
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }  # fmt: skip


def ints(bits: int, group: int, symmetric: bool = True, form: str = "pack-quantized") -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return compressed(form, num_bits=bits, symmetric=symmetric, **strategy)


FP4 = {"type": "float", "strategy": "tensor_group"}
MODULES = [f"self_attn.{x}" for x in "qkvo"] + [f"mlp.{x}" for x in ("gate", "up", "down")]
BNB: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": None}
BNB4 = BNB | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

CARRIED: dict[str, tuple[str, packs.Pack, dict[str, Any], str]] = {
    # id: (variant, how, quantization_config, scheme)
    "gptq 4": ("qwen2", packs.gptq(4, 32), gptq(4, 32), "gptq4-group32"),
    "gptq 4, act-order": ("llama", packs.gptq(4, 32, ordered=True), gptq(4, 32, desc_act=True), "gptq4-group32"),
    "gptq 8, channels": ("llama", packs.gptq(8, 0, symmetric=True), gptq(8, -1), "gptq8-channel"),
    "gptq 3": ("llama", packs.gptq(3, 32), gptq(3, 32), "gptq3-group32"),
    "gptq 2, act-order, v2": (
        "llama", packs.gptq(2, 16, ordered=True, version=2), gptq(2, 16, checkpoint_format="gptq_v2"), "gptq2-v2-group16",
    ),
    "gptq 4, experts": ("qwen3_moe", packs.gptq(4, 16), gptq(4, 16), "gptq4-group16"),
    "awq": ("qwen2", packs.awq(32), awq(32), "awq4-group32"),
    "awq, experts": ("qwen3_moe", packs.awq(32), awq(32), "awq4-group32"),
    "awq, fused": ("phi3", packs.awq(16), awq(16), "awq4-group16"),
    "packed 4": ("llama", packs.packed(4, 32), ints(4, 32), "int4-group32"),
    "packed 4, channels": ("qwen3_moe", packs.packed(4, 0), ints(4, 0), "packed4-channel"),
    "packed 4, zeros": ("phi3", packs.packed(4, 16, zeros=True), ints(4, 16, False), "packed4-group16-zeros"),
    "packed 8, act-order": ("llama", packs.packed(8, 32, ordered=True), ints(8, 32), "packed8-group32"),
    "packed 3, zeros": ("llama", packs.packed(3, 32, zeros=True), ints(3, 32, False), "packed3-group32-zeros"),
    "int8": ("qwen3_moe", packs.int8(), ints(8, 0, form="int-quantized"), "int8-channel"),
    "int8, one scale": ("llama", packs.int8(None), ints(8, 0, form="int-quantized"), "int8-tensor"),
    "bitsandbytes 8": ("llama", packs.bnb8, BNB | {"load_in_8bit": True}, "bnb8"),
    "nvfp4": ("qwen3_moe", packs.fp4("modelopt"), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
    "nvfp4, packed": ("llama", packs.fp4("compressed"), compressed("nvfp4-pack-quantized", **FP4 | {"group_size": 16}), "nvfp4-packed"),
    "mxfp4, packed": ("qwen3_moe", packs.fp4("mx"), compressed("mxfp4-pack-quantized", **FP4 | {"group_size": 32}), "mxfp4-packed"),
    "mlx 4": ("llama", packs.mlx(4, 32), {"group_size": 32, "bits": 4, "mode": "affine"}, "mlx4-group32"),
    "mlx 6": ("phi3", packs.mlx(6, 16), {"group_size": 16, "bits": 6}, "mlx6-group16"),
    "mlx 8, of one module": (
        "llama", packs.mlx(8, 32),
        {"group_size": 32, "bits": 4, "mode": "affine"} | {f"model.layers.0.{m}_proj": {"group_size": 32, "bits": 8} for m in MODULES},
        "mlx8-group32",
    ),
    "mlx mxfp4": ("llama", packs.mlx_float("mxfp4"), {"group_size": 32, "bits": 4, "mode": "mxfp4"}, "mlx-mxfp4"),
    "mlx mxfp8": ("phi3", packs.mlx_float("mxfp8"), {"group_size": 32, "bits": 8, "mode": "mxfp8"}, "mlx-mxfp8"),
    "mlx nvfp4": ("llama", packs.mlx_float("nvfp4"), {"group_size": 16, "bits": 4, "mode": "nvfp4"}, "mlx-nvfp4"),
    "int8, zeros": ("llama", packs.int8(32, zeros=True), ints(8, 32, False, "int-quantized"), "int8-group32-zeros"),
}  # fmt: skip


def release(
    name: str, pack: packs.Pack, config: dict[str, Any], at: Path, which: Callable[[str], bool] = linear
) -> tuple[Path, Path]:
    """(the release, the same with the values that its codes stand for)."""
    key = "quantization_config" if "quant_method" in config else "quantization"
    settings = (
        EXPERTS if "moe" in name else {k: v for k, v in DENSE.items() if name != "phi3" or k != "head_dim"}
    )
    path = vendor.make(at / "hf", name, **settings)
    coded, plain = packs.quantise(read_tensors(path), pack, which)
    (at / "plain").mkdir()
    write_config(at / "plain", read_config(path))
    write_tensors(at / "plain", plain)
    write_config(path, read_config(path) | {key: config})
    write_tensors(path, coded)
    return path, at / "plain"


def logits(path: Path, name: str) -> torch.Tensor:
    with torch.inference_mode():
        return load(path, dtype=torch.float32)(tiny.tokens(name))


ALWAYS = {
    "gptq 4", "gptq 4, act-order", "gptq 3", "awq, experts", "packed 4, zeros", "packed 8, act-order", "int8", "bitsandbytes 8",
    "nvfp4", "nvfp4, packed", "mxfp4, packed", "mlx 8, of one module", "mlx nvfp4",
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in ALWAYS else pytest.mark.proof) for k in CARRIED]
)
def test_a_release_is_what_its_codes_stand_for_carried_or_dequantised_and_comes_back_to_the_byte(
    kind: str, tmp_path: Path
) -> None:
    name, pack, config, scheme = CARRIED[kind]
    path, plain = release(name, pack, config, tmp_path)
    fp32 = vendor.canonical(path, tmp_path / "fp32", dtype="fp32")
    vendor.same(fp32, vendor.canonical(plain, tmp_path / "want", dtype="fp32"))
    bf16 = vendor.canonical(path, tmp_path / "bf16", dtype="bf16")
    assert all(torch.equal(t.to(torch.bfloat16), bf16[n].to(torch.bfloat16)) for n, t in fp32.items())
    assert set(make_plan(ckpt := open_checkpoint(path)).quant.values()) == {scheme}
    assert named(ckpt.tensors, ckpt.config) == [scheme] * sum(
        n.endswith("_proj.weight") for n in read_tensors(plain)
    )
    vendor.canonical(path, tmp_path / "carried")
    assert torch.equal(logits(tmp_path / "carried", name), logits(tmp_path / "fp32", name))
    export(tmp_path / "carried", tmp_path / "back")
    for file in path.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("kind", ["tensor", "channel"])
def test_scales_keep_the_releases_names_in_new_files(kind: str, tmp_path: Path) -> None:
    """Which of `weight_scale` and `weight_scale_inv`, `input_scale` and `activation_scale` is opened is the quantiser's affair."""
    said = compressed("float-quantized", num_bits=8, type="float", strategy=kind)
    path, _ = release("llama", packs.fp8(kind), said, tmp_path)
    vendor.canonical(path, tmp_path / "canon")
    export(tmp_path / "canon", tmp_path / "small", shard_size=20_000)
    small, old = read_tensors(tmp_path / "small"), read_tensors(path)
    assert small.keys() == old.keys() and all(
        torch.equal(t.float(), small[n].float()) for n, t in old.items()
    )


@pytest.mark.parametrize(
    "variant, pack, config, ends",
    [
        # keys and values of layers that take another's; a layer that predicts further tokens
        ("gemma4_shared", packs.int8(), ints(8, 0, form="int-quantized"), ("k_proj.weight", "k_proj.weight_scale")),
        ("glm4_moe", packs.packed(8, 0), ints(8, 0), ("eh_proj.weight_packed", "eh_proj.weight_shape")),
    ],
)  # fmt: skip
def test_weights_that_the_model_does_not_use_are_kept_aside_with_all_that_stands_beside_their_codes(
    variant: str, pack: packs.Pack, config: dict[str, Any], ends: tuple[str, ...], tmp_path: Path
) -> None:
    path = tiny.make(variant, tmp_path / "hf", dtype="float32")
    tensors = read_tensors(path)
    coded, _ = packs.quantise(
        tensors, pack, lambda n: n.endswith("_proj.weight") and tensors[n].shape[-1] % 4 == 0
    )
    write_config(path, read_config(path) | {"quantization_config": config})
    write_tensors(path, coded)
    plan = make_plan(open_checkpoint(path))
    assert plan.quant and all(any(n.endswith(end) for n in plan.extras) for end in ends)
    vendor.canonical(path, tmp_path / "carried")
    export(tmp_path / "carried", tmp_path / "back")
    for file in path.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (3, 5)])
def test_words_are_taken_apart_whatever_their_strides(shape: tuple[int, int]) -> None:
    words = torch.empty_strided(shape, (8, 9), dtype=torch.int32).fill_(258)
    assert octets(words).tolist() == [[[2, 1, 0, 0]] * shape[1]] * shape[0]


STREAMED = [k for k in CARRIED if k.startswith(("gptq", "awq"))]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=[] if k in ("gptq 4, act-order", "awq, experts") else pytest.mark.proof)
        for k in STREAMED
    ],
)
def test_codes_that_upstream_does_not_dequantise_a_layer_at_a_time_stream(kind: str, tmp_path: Path) -> None:
    name, pack, config, _ = CARRIED[kind]
    path, _ = release(name, pack, config, tmp_path)
    folder = zoo.convert(path, tmp_path / "carried")
    cert = zoo.verify(folder, level="logits", stream=True, write=False)
    assert cert.passed and "under the source's names" in cert.oracle["note"]
    norm = "layers.0.attn_norm.weight"
    file = folder / canonical.read(folder).tensors[norm].file
    tensors = load_file(file)
    save_file(tensors | {norm: tensors[norm] * 1.01}, file, {"format": "pt"})
    assert zoo.verify(folder, level="logits", stream=True, write=False).failed


@pytest.mark.parametrize(
    "name, pack",
    [
        ("llama", packs.bnb4()),
        ("qwen3_moe", packs.bnb4(128, kind="fp4")),
        ("phi3", packs.bnb4(64, nested=False)),
    ],
)
def test_four_bits_of_bitsandbytes_are_dequantised_when_asked_for(
    name: str, pack: packs.Pack, tmp_path: Path
) -> None:
    path, plain = release(name, pack, BNB4, tmp_path)
    with pytest.raises(
        ZooError, match=r"is quantised \(bnb4-block.*blocks run over .*; convert with --dtype bf16"
    ) as e:
        make_plan(open_checkpoint(path))
    assert "\n" not in str(e.value)
    fp32 = vendor.canonical(path, tmp_path / "fp32", dtype="fp32")
    vendor.same(fp32, vendor.canonical(plain, tmp_path / "want", dtype="fp32"))


@pytest.mark.parametrize(
    "kind, change, said",
    [
        ("gptq 4", {"checkpoint_format": "marlin"}, "format 'marlin'; of GPTQ zoo reads gptq, gptq_v2"),
        ("gptq 4", {"bits": 5}, "bits 5; of GPTQ zoo reads 2, 3, 4 and 8"),
        ("gptq 4", {"pack_dtype": "int64"}, "pack_dtype 'int64'; zoo reads int32"),
        ("gptq 4", {"group_size": "all"}, "group_size 'all'; expected a whole number"),
        ("gptq 4", {"group_size": 16}, r"q_proj.scales.*expected \[4, 64\]"),
        ("gptq 4", {"bits": 8}, "shape"),
        ("awq", {"version": "gemv"}, "version 'gemv'; of AWQ zoo reads gemm"),
        ("awq", {"bits": 3}, "bits 3; of AWQ zoo reads 4"),
        ("packed 4, channels", ints(9, 0), "num_bits 9; of packed integers zoo reads 2 to 8"),
        (
            "packed 4, channels",
            compressed("pack-quantized", strategy="tensor"),
            "strategy 'tensor'; of packed integers",
        ),
        ("packed 4, zeros", ints(4, 16), "zero points, though the config calls the weights symmetric"),
        ("packed 4", ints(4, 32, False), "q_proj.weight_zero_point"),
        (
            "mlx 4",
            {"mode": "mxfp4"},
            "mode 'mxfp4', and .* has biases; of MLX zoo reads affine with biases, and mxfp4,",
        ),
        ("mlx mxfp4", {"mode": "fp2"}, "mode 'fp2', and .* has no biases; of MLX zoo reads affine"),
        ("mlx mxfp4", {"group_size": 64}, "mode 'mxfp4' with bits 4 and group_size 64; MLX's has 4 and 32"),
        ("mlx 4", {"bits": 7}, "bits 7; of MLX zoo reads"),
    ],
)
def test_what_is_not_read_of_a_kind_that_is_is_named(
    kind: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    name, pack, config, _ = CARRIED[kind]
    path, _ = release(name, pack, config | change, tmp_path)
    for dtype in (None, "bf16"):
        with pytest.raises(ZooError, match=said):
            make_plan(open_checkpoint(path), dtype=dtype)


@pytest.mark.parametrize(
    "pack, settings",
    [
        (packs.packed(b, g, zeros=z), {"num_bits": b, "group_size": g or None, "symmetric": not z})
        for b, g, z in [
            (4, 32, False),
            (4, 0, True),
            (8, 64, True),
            (8, 0, False),
            (3, 32, True),
            (5, 16, False),
        ]
    ]
    + [(packs.int8(), {"num_bits": 8, "group_size": None, "symmetric": True})],
)
def test_the_values_of_the_tests_are_those_of_compressed_tensors(
    pack: packs.Pack, settings: dict[str, Any]
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    made, values = pack(32, 64, torch.Generator().manual_seed(1))
    args = QuantizationArgs(type="int", strategy="group" if settings["group_size"] else "channel", **settings)
    form = "pack-quantized" if "weight_packed" in made else "int-quantized"
    theirs = BaseCompressor.get_value_from_registry(form).decompress(
        made, QuantizationScheme(targets=["Linear"], weights=args)
    )
    assert torch.equal(theirs["weight"], values.to(theirs["weight"].dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_what_bitsandbytes_writes_is_what_it_reads(kind: str, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from zoo.quant import as_canonical, dequantise
    from zoo.quant.schemes import detect

    w = torch.randn(96, 64, generator=torch.Generator().manual_seed(3))
    if kind == "int8":
        codes, scale, _ = bnb.functional.int8_vectorwise_quant(w.half())
        made = {"weight": codes, "SCB": scale}
        theirs = bnb.functional.int8_vectorwise_dequant(codes, scale)
    else:
        codes, state = bnb.functional.quantize_4bit(w, quant_type=kind, compress_statistics=True)
        made = {"weight": codes} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
        theirs = bnb.functional.dequantize_4bit(codes, state)
    tensors = {f"a.{k}": v for k, v in made.items()}
    write_tensors(tmp_path, tensors)
    write_config(tmp_path, {})
    scheme = detect("a.weight", open_checkpoint(tmp_path).tensors, {})
    assert scheme is not None
    own = {c.name: tensors[n] for c in scheme.components for n in c.names("a.weight") if n in tensors}
    own = as_canonical(scheme, own)
    assert torch.equal(dequantise(scheme.name, own, (96,), torch.float32), theirs.float())


FLOATS = {  # id: (how, format, what it says of weights)
    "nvfp4": (packs.fp4("compressed"), "nvfp4-pack-quantized", {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": (packs.fp4("mx"), "mxfp4-pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "mxfp8": (packs.fp8("mx"), "mxfp8-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}),
    "fp8": (packs.fp8("tensor", static=False), "float-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "fp8 rows": (packs.fp8("channel"), "float-quantized", {"num_bits": 8, "strategy": "channel"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLOATS)
def test_the_floats_of_the_tests_are_those_of_compressed_tensors(kind: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    pack, form, weights = FLOATS[kind]
    made, values = pack(32, 64, torch.Generator().manual_seed(1))
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(type="float", **weights))
    theirs = BaseCompressor.get_value_from_registry(form).decompress(made, scheme)["weight"]
    assert torch.equal(theirs.float(), values.to(theirs.dtype).float())


def spoilt(kind: str, at: Path, end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The release, but for the tensors whose names end so."""
    name, pack, config, _ = CARRIED.get(kind) or ("llama", packs.bnb4(), BNB4, "")
    path, _ = release(name, pack, config, at)
    write_tensors(path, {n: change(t) if n.endswith(end) else t for n, t in read_tensors(path).items()})
    return path


@pytest.mark.parametrize(
    "kind, end, change, said",
    [
        (
            "gptq 4, act-order",
            ".g_idx",
            lambda t: t + 40,
            r"_proj.scales has [23] lines; some up to 4[23] are asked for",
        ),
        ("gptq 4, act-order", ".g_idx", lambda t: t - 1, r"_proj.scales has [23] lines"),
        (
            "packed 8, act-order",
            "_g_idx",
            lambda t: t + 1,
            r"inputs are of groups 1 to ([23]); there are scales of \1 groups",
        ),
        (
            "packed 8, act-order",
            "_shape",
            lambda t: t + 1,
            r"weight_shape says \[\d+, (65|97)\], the packed codes hold",
        ),
        (
            "nvfp4, packed",
            "_global_scale",
            lambda t: t.repeat(2),
            r"global_scale has the shape \[2\], expected one number",
        ),
        ("bitsandbytes 8", ".weight_format", lambda t: t + 1, "weight_format: expected 0"),
        ("bnb4", ".quant_map", lambda t: t[:8].clone(), r"its table has 8 numbers; \d+ blocks need 16"),
        ("bnb4", "__nf4", lambda t: t[:-1].clone(), "quant_state: expected JSON"),
        ("bnb4", ".absmax", lambda t: t.repeat(3), "no size of blocks has so many"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(
    kind: str, end: str, change: Callable[[torch.Tensor], torch.Tensor], said: str, tmp_path: Path
) -> None:
    path = spoilt(kind, tmp_path, end, change)
    with pytest.raises(ZooError, match=said) as e:
        vendor.canonical(path, tmp_path / "fp32", dtype="fp32")
    assert "_proj" in str(e.value)


@pytest.mark.parametrize(
    "pack, config, scheme",
    [
        (packs.packed(4, 16, zeros=True), ints(4, 16, False), "packed4-group16-zeros"),
        (packs.fp4("modelopt"), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
    ],
)
def test_stacked_experts_are_read_one_by_one(
    pack: packs.Pack, config: dict[str, Any], scheme: str, tmp_path: Path
) -> None:
    path = vendor.make(tmp_path / "hf", "mistral4", hidden_size=64, moe_intermediate_size=32)
    g, coded, plain = torch.Generator().manual_seed(0), {}, {}
    for name, t in read_tensors(path).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            coded[name] = plain[name] = t
            continue
        made = [pack(*t.shape[1:], g) for _ in t]
        plain[name] = torch.stack([values for _, values in made])
        for end in made[0][0]:
            if end != "input_scale":
                coded[name + end.removeprefix("weight")] = torch.stack([tensors[end] for tensors, _ in made])
    (tmp_path / "plain").mkdir()
    write_config(tmp_path / "plain", read_config(path))
    write_tensors(tmp_path / "plain", plain)
    write_config(path, read_config(path) | {"quantization_config": config})
    write_tensors(path, coded)
    assert set(make_plan(open_checkpoint(path)).quant.values()) == {scheme}
    fp32 = vendor.canonical(path, tmp_path / "fp32", dtype="fp32")
    vendor.same(fp32, vendor.canonical(tmp_path / "plain", tmp_path / "want", dtype="fp32"))
    vendor.canonical(path, tmp_path / "carried")
    assert torch.equal(logits(tmp_path / "carried", "mistral4"), logits(tmp_path / "fp32", "mistral4"))
    export(tmp_path / "carried", tmp_path / "back")
    assert all((tmp_path / "back" / f.name).read_bytes() == f.read_bytes() for f in path.iterdir())


@pytest.mark.parametrize(
    "said, ends, phrase",
    [
        (
            {"quant_method": "awq", "bits": 4},
            ["qweight", "scales"],
            "AWQ without zero points, as engines lay it out for Marlin",
        ),
        ({"quant_method": "gptq", "bits": 4}, ["B", "s"], "GPTQ in Marlin's layout"),
        (
            {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
            ["weight", "pre_quant_scale"],
            "ModelOpt's AWQ, which scales act",
        ),
        ({"quant_method": "fp_quant"}, ["qweight", "scales"], "its config says .*'fp_quant'"),
        (
            {"quant_method": "auto-round", "bits": 4},
            ["qweight", "qzeros", "scales"],
            "its config says .*'auto-round'",
        ),
        ({"quant_method": "eetq"}, ["weight", "weight_scales"], "its config says .*'eetq'"),
        ({"quant_method": "hqq"}, ["W_q", "scale", "zero"], "HQQ"),
        ({"quant_method": "quanto"}, ["weight._data", "weight._scale"], "quanto"),
        ({"quant_method": "aqlm"}, ["codes", "codebooks"], "AQLM"),
        ({"quant_method": "torchao"}, ["weight_qdata", "weight_scale"], "torchao"),
        ({"quant_method": "awq", "bits": 4}, ["qweight", "qzeros", "scales"], None),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            ["weight", "weight_scale", "weight_scale_2"],
            None,
        ),
    ],
)
def test_what_is_not_read_has_a_name(said: dict[str, Any], ends: list[str], phrase: str | None) -> None:
    found = name_of({"quantization_config": said}, [f"model.layers.0.mlp.up_proj.{end}" for end in ends])
    assert found is None if phrase is None else re.match(phrase, found or "")
