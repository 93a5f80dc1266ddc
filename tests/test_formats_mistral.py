"""Mistral's own format, against the same weights in Hugging Face's layout."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vendor
from families.mistral_large3 import make_mistral_format, upstream_mistral_format
from safetensors.torch import load_file, save_file
from test_manifests import CONFIGS

from zoo import families
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.mapping.export import export
from zoo.model.load import load
from zoo.spec import Spec


def in_hf_terms(params: dict[str, Any]) -> dict[str, Any]:
    return families.own_config("mistral", params, (), "params.json")


def architecture(path: Path) -> Spec:
    return replace(families.spec_of(open_checkpoint(path).config), dtype=None)


@pytest.mark.parametrize("name", ["mistral", "mixtral", "ministral3", "mistral3", "mistral3_ministral3"])
def test_it_converts_to_the_bytes_of_the_hugging_face_layout(name: str, tmp_path: Path) -> None:
    hf = tiny.make(name, tmp_path / "hf", dtype="bfloat16")
    own = vendor.to_mistral(hf, tmp_path / "own")
    assert open_checkpoint(own).format == "mistral"
    vendor.same(vendor.canonical(own, tmp_path / "b"), vendor.canonical(hf, tmp_path / "a"))


@pytest.mark.parametrize("name", ["mistral", "mixtral"])
def test_params_json_says_what_config_json_says(name: str, tmp_path: Path) -> None:
    hf = tiny.make(name, tmp_path / "hf")
    assert architecture(vendor.to_mistral(hf, tmp_path / "own")) == architecture(hf)


def test_large3_has_the_logits_of_upstream_on_renamed_weights(tmp_path: Path) -> None:
    own = make_mistral_format("mistral_large3", tmp_path / "own")
    vendor.canonical(own, tmp_path / "zoo")
    ids = tiny.tokens("mistral_large3")
    with torch.inference_mode():
        ours = load(tmp_path / "zoo")(ids)
    assert (ours - tiny.logits(upstream_mistral_format(own), ids)).abs().max() <= 5e-5


def test_fp8_with_a_scale_per_tensor_has_the_logits_of_upstream_on_the_same_values(tmp_path: Path) -> None:
    hf = tiny.make("mistral", tmp_path / "hf")
    own = vendor.to_mistral(hf, tmp_path / "own", fp8=True)
    vendor.canonical(own, tmp_path / "carried")
    vendor.canonical(own, tmp_path / "fp32", dtype="fp32")
    dequantised = dequantised_hf(hf, own, tmp_path / "plain")
    ids = tiny.tokens("mistral")
    with torch.inference_mode():
        carried, plain = load(tmp_path / "carried", dtype=torch.float32)(ids), load(tmp_path / "fp32")(ids)
    assert torch.equal(carried, plain)
    assert (plain - tiny.logits(tiny.upstream(dequantised), ids)).abs().max() <= 5e-5


@pytest.mark.parametrize("shape", [(), (1,)])
def test_fp8_with_a_scale_per_tensor_is_exported_for_upstream(shape: tuple[int, ...], tmp_path: Path) -> None:
    hf = tiny.make("ministral3", tmp_path / "hf")
    own = vendor.to_mistral(hf, tmp_path / "own", fp8=True)
    tensors = load_file(own / "consolidated.safetensors")
    save_file(
        {n: t.reshape(shape) if "qscale" in n else t for n, t in tensors.items()},
        own / "consolidated.safetensors",
    )
    params = json.loads((own / "params.json").read_text())
    said = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    (own / "params.json").write_text(json.dumps(params | {"quantization": said}))
    vendor.canonical(own, tmp_path / "zoo")
    given = export(tmp_path / "zoo", tmp_path / "again")
    assert vendor.read_config(given)["quantization_config"]["quant_method"] == "fp8"
    ids = tiny.tokens("ministral3")
    with torch.inference_mode():
        ours = load(tmp_path / "zoo", dtype=torch.float32)(ids)
    assert (ours - tiny.logits(tiny.upstream(given), ids)).abs().max() <= 5e-5

    (own / "params.json").write_text(json.dumps(params | {"quantization": {"qformat_weight": "nvfp4"}}))
    with pytest.raises(ZooError, match=r"params.json: weights quantised as 'nvfp4' are not supported"):
        open_checkpoint(own)


def dequantised_hf(hf: Path, own: Path, dst: Path) -> Path:
    """The Hugging Face layout with the values that the fp8 file holds."""
    dst.mkdir()
    (dst / "config.json").write_bytes((hf / "config.json").read_bytes())
    config, theirs = vendor.read_config(hf), load_file(own / "consolidated.safetensors")
    out = {}
    for name, t in vendor.read_tensors(hf).items():
        new, _ = vendor._meta_name(name, 0)
        w = theirs[new].float()
        if (scale := theirs.get(new.removesuffix("weight") + "qscale_weight")) is not None:
            w = w * scale
        for part, heads in (("wq", "num_attention_heads"), ("wk", "num_key_value_heads")):
            if f"attention.{part}." in new:  # back to half-split order
                n = config[heads]
                w = w.view(n, w.shape[0] // n // 2, 2, -1).transpose(1, 2).reshape(w.shape)
        out[name] = w.reshape(t.shape).contiguous()
    save_file(out, dst / "model.safetensors", metadata={"format": "pt"})
    return dst


def test_large3s_released_params_give_its_architecture() -> None:
    params = json.loads((CONFIGS / "mistral-large-3-675b.params.json").read_text())
    data = json.loads((CONFIGS / "mistral-large-3-675b.config.json").read_text())
    ours = families.spec_of(in_hf_terms(params))
    theirs = families.spec_of(data)
    assert replace(ours, dtype=None, context_length=0) == replace(theirs, dtype=None, context_length=0)


def test_a_folder_that_holds_both_layouts_is_read_by_hugging_faces(tmp_path: Path) -> None:
    hf = tiny.make("mistral", tmp_path / "both")
    own = vendor.to_mistral(hf, tmp_path / "own")
    for file in own.iterdir():
        (hf / file.name).write_bytes(file.read_bytes())
    assert open_checkpoint(hf).format == "safetensors"


def test_a_first_generation_pickle_is_read_with_mistrals_params(tmp_path: Path) -> None:
    hf = tiny.make("mistral", tmp_path / "hf")
    own = vendor.to_mistral(hf, tmp_path / "own")
    weights = own / "consolidated.safetensors"
    torch.save(load_file(weights), own / "consolidated.00.pth")
    weights.unlink()
    vendor.same(vendor.canonical(own, tmp_path / "b"), vendor.canonical(hf, tmp_path / "a"))


def test_experts_with_a_pattern_of_windows_are_refused(tmp_path: Path) -> None:
    own = vendor.to_mistral(tiny.make("mistral", tmp_path / "hf"), tmp_path / "own")
    params = json.loads((own / "params.json").read_text())
    moe = {"num_experts": 8, "num_experts_per_tok": 2}
    (own / "params.json").write_text(json.dumps(params | {"moe": moe, "sliding_window": [None, 16]}))
    with pytest.raises(ZooError, match=r"sliding_window is \[None, 16\]; with experts one for all layers"):
        open_checkpoint(own)


DENSE = {
    "dim": 40, "n_layers": 4, "n_heads": 4, "head_dim": 10, "hidden_dim": 44, "vocab_size": 131, "norm_eps": 1e-5,
    "max_position_embeddings": 32768,
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", {"type": "linear", "factor": 4}), ("logit_softcap", 30.0), ("partial_rotary_factor", 0.5),
        ("activation", "gelu"), ("causal", False), ("use_qk_norm", True), ("biases", True), ("embedding_scale", 2.0),
        ("norm_type", "layernorm"), ("model_type", "mamba"),
    ],
)  # fmt: skip
def test_a_field_that_would_change_the_numbers_is_refused_by_name(field: str, value: object) -> None:
    neutral = {"activation": "silu", "causal": True, "model_type": "transformer", "rope_scaling": None}
    assert in_hf_terms(DENSE | neutral) == in_hf_terms(DENSE)
    with pytest.raises(ZooError, match=rf"^params\.json: {field} is "):
        in_hf_terms(DENSE | {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_layers", 4_000_000_000), ("n_heads", 0), ("dim", "abc"), ("rope_theta", []), ("sliding_window", [])],
)
def test_a_value_that_makes_no_model_is_an_error_that_names_the_file(field: str, value: object) -> None:
    with pytest.raises(ZooError, match=r"^params\.json: "):
        in_hf_terms(DENSE | {field: value})


@pytest.mark.parametrize("field", ["sliding_window", "_sliding_window"])
@pytest.mark.parametrize(
    ("window", "kinds"),
    [
        (None, [None] * 4),
        (4096, [4096] * 4),
        ([None, 16], [None, 16, None, 16]),
        ([999_999, 16], [None, 16, None, 16]),
    ],
)
def test_windows_are_one_for_all_layers_or_a_pattern(
    field: str, window: object, kinds: list[int | None]
) -> None:
    spec = families.spec_of(in_hf_terms(DENSE | {field: window}))
    assert [layer.mixer.window for layer in spec.layers] == kinds  # type: ignore[union-attr]


def test_large3_in_fp8_blocks_has_the_logits_of_upstream_on_the_same_values(tmp_path: Path) -> None:
    """As released: `weight_scale` per block, the block size in params.json, some projections left in bf16."""
    block = (7, 5)
    own = make_mistral_format("mistral_large3", tmp_path / "own")
    plain = make_mistral_format("mistral_large3", tmp_path / "plain")
    out, values = {}, {}
    for name, t in load_file(own / "consolidated.safetensors").items():
        quantised = (
            t.ndim == 2 and "layers." in name and not re.search(r"wkv_a_with_mqa|wq_a\.|\.gate\.", name)
        )
        out[name], values[name] = t, t
        if quantised:
            codes, scale = vendor.fp8_block(t, block)
            spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[
                : t.shape[0], : t.shape[1]
            ]
            out[name], out[name + "_scale"], values[name] = codes, scale, codes.float() * spread
    save_file(out, own / "consolidated.safetensors")
    save_file(values, plain / "consolidated.safetensors")
    params = json.loads((own / "params.json").read_text())
    weights = {"strategy": "block", "block_structure": list(block), "num_bits": 8, "type": "float"}
    group = {"format": "float-quantized", "targets": ["Linear"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "config_groups": {"FP8_BLOCK": group}}
    (own / "params.json").write_text(json.dumps(params | {"quantization_config": config}))
    vendor.canonical(own, tmp_path / "carried")
    vendor.canonical(own, tmp_path / "fp32", dtype="fp32")
    ids = tiny.tokens("mistral_large3")
    with torch.inference_mode():
        carried, dequantised = (
            load(tmp_path / "carried", dtype=torch.float32)(ids),
            load(tmp_path / "fp32")(ids),
        )
    assert torch.equal(carried, dequantised)
    assert (dequantised - tiny.logits(upstream_mistral_format(plain), ids)).abs().max() <= 5e-5
