"""Verification of what upstream cannot simply load: quantised releases, and formats it has no reader for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
import tiny
import torch
import vendor
from families.mistral_large3 import make_mistral_format
from safetensors.torch import load_file, save_file
from test_quant_models import MLA, MODELS, Quantiser, Tensors, fp8_channels, linear, quantised
from verified import canonical as canonical_of

import zoo
from zoo.errors import ZooError
from zoo.formats import canonical
from zoo.testing import FamilyCase, Gguf, gguf
from zoo.testing.build import read_config, write_config
from zoo.verify import gguf_parsed, recording
from zoo.verify.gguf_parsed import metadata_once
from zoo.verify.oracle import placeholder_ids

CHANNELS = {
    "qwen3 channels": ("qwen3", {}, fp8_channels, "fp8-channel"),
    "glm4_moe channels": ("glm4_moe_air", {"num_nextn_predict_layers": 0}, fp8_channels, "fp8-channel"),
}
RELEASES = MODELS | CHANNELS


def converted(key: str, tmp_path: Path, dtype: str | None = None) -> Path:
    name, settings, quantise, _ = RELEASES[key]
    release = quantised(name, settings, quantise, tmp_path / "release")
    return zoo.convert(release, tmp_path / "canonical", dtype=dtype)


def in_bf16(quantise: Quantiser) -> Quantiser:
    """As releases are: what is not quantised, and the scales of compressed-tensors, in bf16."""

    def made(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        out, config = quantise(tensors)
        return {k: t if t.itemsize == 1 or k.endswith("_inv") or not t.is_floating_point() else t.bfloat16()
                for k, t in out.items()}, config  # fmt: skip

    return made


@pytest.mark.parametrize("key", RELEASES)
def test_a_quantised_release_agrees_with_upstreams_own_dequantisation_and_its_faults_are_caught(
    key: str, tmp_path: Path
) -> None:
    cert = zoo.verify(converted(key, tmp_path), level="logits", self_test=True, write=False)
    assert cert.passed and not cert.not_checked
    assert cert.faults is not None
    in_scales = {r["fault"]: r["level"] for r in cert.faults["results"] if r["fault"].startswith("scale_")}
    assert {"scale_block_off", "scale_ignored"} <= set(in_scales)
    assert set(in_scales.values()) == {"layers"}


@pytest.mark.parametrize("key", RELEASES)
def test_a_quantised_release_streams_to_the_same_numbers(key: str, tmp_path: Path) -> None:
    folder = converted(key, tmp_path)
    streamed, whole = (
        zoo.verify(folder, level="logits", stream=s, write=False).level("logits") for s in (True, False)
    )
    assert streamed is not None and whole is not None
    assert streamed.verdict == "passed"
    assert streamed.figures["error"] == whole.figures["error"]


@pytest.mark.parametrize("key", ["qwen3 fp8", "deepseek_v3 fp8", "kimi_k2 int4", "qwen3 channels"])
def test_a_release_whose_other_tensors_are_bf16_agrees_in_fp32_and_in_bf16(key: str, tmp_path: Path) -> None:
    name, settings, quantise, _ = RELEASES[key]
    release = quantised(name, settings, in_bf16(quantise), tmp_path / "release")
    write_config(release, read_config(release) | {"dtype": "bfloat16"})
    carried = zoo.convert(release, tmp_path / "carried")
    expanded = zoo.convert(release, tmp_path / "expanded", dtype="fp32")
    cases = [
        (carried, "fp32", False),
        (carried, "fp32", True),
        (carried, "bf16", False),
        (expanded, "fp32", False),
    ]
    for folder, dtype, stream in cases:
        cert = zoo.verify(folder, level="logits", dtype=dtype, stream=stream, write=False)
        assert cert.passed and not cert.not_checked


@pytest.mark.parametrize("key", ["qwen3 fp8", "gpt_oss mxfp4", "kimi_k2 int4", "qwen3 channels"])
def test_a_dequantised_conversion_is_verified_against_the_release(key: str, tmp_path: Path) -> None:
    cert = zoo.verify(converted(key, tmp_path, "fp32"), level="logits", write=False)
    assert cert.passed and cert.level("plan").verdict == cert.level("bytes").verdict == "passed"


@pytest.mark.parametrize("stream", [False, True])
def test_blocks_that_are_not_whole_are_verified(stream: bool, tmp_path: Path) -> None:
    """DeepSeek's own: 576 rows in blocks of 128. Of 20 rows in blocks of 16 upstream would make blocks of 10."""

    def quantise(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        out: Tensors = {}
        for key, t in tensors.items():
            if linear(key, t):
                out[key], out[key + "_scale_inv"] = vendor.fp8_block(t, (16, 16))
            else:
                out[key] = t
        return out, {"quant_method": "fp8", "weight_block_size": [16, 16]}

    folder = zoo.convert(
        quantised("deepseek_v3", MLA, quantise, tmp_path / "release"), tmp_path / "canonical"
    )
    cert = zoo.verify(folder, level="logits", stream=stream, write=False)
    assert cert.passed and not cert.not_checked


def test_experts_with_one_scale_each_are_compared_through_a_dequantised_export(tmp_path: Path) -> None:
    """Mistral Small 4 as transformers' convert_mistral4_weight_to_hf.py writes it, which 5.23 loads without those scales."""

    def quantise(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        out: Tensors = {}
        for key, t in tensors.items():
            if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
                codes, scales = zip(*map(vendor.fp8_tensor, t), strict=True)
                out[key], out[key + "_scale_inv"] = torch.stack(codes), torch.stack(scales).view(-1, 1, 1)
                out[key + "_activation_scale"] = torch.full((len(t),), 0.01)
            elif linear(key, t):
                out[key], out[key + "_scale_inv"] = vendor.fp8_tensor(t)
                out[key.removesuffix("weight") + "activation_scale"] = torch.tensor(0.01)
            else:
                out[key] = t
        settings = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
        return out, settings | {"modules_to_not_convert": ["lm_head", "mlp.gate"]}

    release = quantised("mistral4", {"hidden_size": 256}, quantise, tmp_path / "release")
    carried = zoo.convert(release, tmp_path / "canonical")
    assert set(canonical.read(carried).quant.values()) == {"fp8-tensor"}
    cert = zoo.verify(carried, level="logits", write=False)
    assert cert.passed and not cert.not_checked
    assert (
        "is loaded without its scales" in cert.oracle["note"] and "dequantised to fp32" in cert.oracle["note"]
    )
    plain = zoo.convert(release, tmp_path / "plain", dtype="fp32")
    ids = tiny.tokens("mistral4")
    with torch.inference_mode():
        assert torch.equal(zoo.load(carried, dtype="fp32")(ids), zoo.load(plain)(ids))
    again = zoo.export(carried, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (release / "model.safetensors").read_bytes()


def test_a_release_that_upstream_fails_to_load_is_given_to_it_dequantised_and_streamed_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("not divisible")

    monkeypatch.setattr(Fp8Dequantize, "_dequantize_one", fails)
    folder = converted("qwen3 fp8", tmp_path)
    cert = zoo.verify(folder, level="logits", write=False)
    assert cert.passed and not cert.not_checked
    assert re.search(
        "upstream cannot load this: .*Error: .*, so it was given the source, converted again and dequantised",
        cert.oracle["note"],
    )
    with pytest.raises(ZooError, match=r"release: upstream cannot load this: \w+Error"):
        zoo.verify(folder, level="logits", stream=True, write=False)
    cert = zoo.verify(folder, stream=True, write=False)
    assert cert.passed and cert.level("logits") is None
    assert cert.not_checked[-1].startswith("layers, logits, decode: ")
    assert "upstream cannot load this" in cert.not_checked[-1]


def test_activations_are_not_rounded_and_the_certificate_says_so(tmp_path: Path) -> None:
    cert = zoo.verify(converted("qwen3 channels", tmp_path), level="logits", write=False)
    assert "not to round activations" in cert.oracle["note"]
    assert cert.oracle["note"] in cert.level("layers").notes


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_rounded_copy_that_fails_in_fp32_is_told_to_be_verified_in_its_dtype(
    dtype: str, tmp_path: Path
) -> None:
    folder = converted("qwen3 fp8", tmp_path, dtype)
    cert = zoo.verify(folder, level="logits", write=False)
    assert not cert.passed and cert.diagnosis is not None
    assert f"verify with --dtype {dtype}" in cert.diagnosis["suggestions"][0]
    assert zoo.verify(folder, level="logits", dtype=dtype, write=False).passed


def test_faults_are_seeded_where_a_scale_is_one_number(tmp_path: Path) -> None:
    def quantise(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        out: Tensors = {}
        for key, t in tensors.items():
            if linear(key, t):
                out[key], out[key + "_scale_inv"] = vendor.fp8_tensor(t)
                out[key.removesuffix("weight") + "activation_scale"] = torch.tensor(0.01)
            else:
                out[key] = t
        return out, {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}

    folder = zoo.convert(quantised("qwen3", {}, quantise, tmp_path / "release"), tmp_path / "canonical")
    assert set(canonical.read(folder).quant.values()) == {"fp8-tensor"}
    cert = zoo.verify(folder, level="logits", self_test=True, write=False)
    assert cert.passed and cert.faults is not None and cert.faults["caught"] == cert.faults["applicable"] > 0


def test_weights_quantised_otherwise_than_the_release_fail_the_plan(tmp_path: Path) -> None:
    folder = converted("qwen3 fp8", tmp_path)
    description = json.loads((folder / "zoo.json").read_text())
    slot = next(iter(description["quant"]))
    description["quant"][slot] = "fp8-block-5x4"
    (folder / "zoo.json").write_text(json.dumps(description))
    with pytest.raises(ZooError, match=rf"{slot}.* has shape .*, fp8-block-5x4 of .* needs"):
        zoo.verify(folder, level="plan", write=False)


def test_fp8_in_mistrals_format_is_compared_through_a_dequantised_export(tmp_path: Path) -> None:
    """As Mistral Large 3: upstream knows no quantisation of that form."""
    settings = {
        "hidden_size": 256, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64,
        "v_head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2,
    }  # fmt: skip
    with vendor.variant("large", "mistral_large3", **settings) as name:
        source = make_mistral_format(tiny.VARIANTS[name], tmp_path / "release")
    tensors = load_file(source / "consolidated.safetensors")
    for key, t in list(tensors.items()):
        if t.ndim == 2 and key.startswith("layers.") and not re.search(r"norm|\.gate\.|wq_a|wkv_a", key):
            tensors[key], tensors[key + "_scale"] = vendor.fp8_block(t, (128, 128))
    save_file({k: t.contiguous() for k, t in tensors.items()}, source / "consolidated.safetensors")
    params = json.loads((source / "params.json").read_text())
    manifest = Path(__file__).parents[1] / "manifests/configs/mistral-large-3-675b.params.json"
    quantisation = json.loads(manifest.read_text())["quantization_config"]
    (source / "params.json").write_text(json.dumps(params | {"quantization_config": quantisation}))
    folder = zoo.convert(source, tmp_path / "canonical")
    assert set(canonical.read(folder).quant.values()) == {"fp8-block"}
    cert = zoo.verify(folder, level="logits", write=False)
    assert cert.passed and not cert.not_checked
    assert "converted again and dequantised to fp32" in cert.oracle["note"]


def test_a_format_upstream_cannot_read_is_compared_through_an_export_and_the_certificate_says_so(
    tmp_path: Path,
) -> None:
    source = make_mistral_format("mistral_large3", tmp_path / "release")
    cert = zoo.verify(zoo.convert(source, tmp_path / "canonical"), level="logits", write=False)
    assert cert.passed
    assert "a mistake that import and export share would not show" in cert.oracle["note"]
    assert cert.rules is not None and cert.rules["naming"] == "mistral"


def test_upstream_is_shown_what_gguf_py_reads_of_a_file(tmp_path: Path) -> None:
    parsed = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    file, some = tmp_path / "all.gguf", gguf_py.GGUFWriter(tmp_path / "all.gguf", "llama")
    lists = {
        "texts": ["a", "", "\u2581b\u00e9", "long" * 99], "whole": [1, -2, 3], "real": [0.1, -1e30], "true": [True, False]
    }  # fmt: skip
    for name, values in lists.items():
        some.add_array(name, values)
    some.add_array("one number", [7])
    some.add_string("one", "text"), some.add_float32("real number", 0.1), some.add_uint64("number", 1 << 40)
    some.add_tensor("t", np.arange(6, dtype=np.float32))
    for write in (some.write_header_to_file, some.write_kv_data_to_file, some.write_tensors_to_file):
        write()
    some.close()

    def seen() -> dict[str, Any]:
        """As `load_gguf_checkpoint` reads a field."""
        reader, found = gguf_py.GGUFReader(file), {}
        for name, f in reader.fields.items():
            value = [parsed._gguf_parse_value(f.parts[i], f.types) for i in f.data]
            found[name] = value[0] if len(value) == 1 else value
        return found | {t.name: (t.data.tolist(), t.data_offset) for t in reader.tensors}

    plain = seen()
    with metadata_once():
        assert json.dumps(seen()) == json.dumps(plain)
        assert gguf_py.GGUFReader(file) is gguf_py.GGUFReader(file)
    assert all(plain[name] == pytest.approx(values) for name, values in lists.items() if name != "texts")
    assert plain["texts"] == lists["texts"] and plain["one number"] == 7
    assert gguf_py.GGUFReader.__module__.startswith("gguf")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K", "BF16", "IQ4_XS", "MXFP4"])
def test_upstream_dequantises_a_gguf_by_all_cores_to_the_same_values(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = gguf_py.GGMLQuantizationType[kind]
    size = gguf_py.GGML_QUANT_SIZES[of][1]
    raw = np.random.default_rng(0).integers(0, 64, (3, 11, 2 * size), np.uint8)  # finite scales
    plain = gguf_py.dequantize(raw, of)
    monkeypatch.setattr(gguf_parsed, "NUMBERS", 4 * plain.shape[-1])
    with metadata_once():
        made = gguf_py.dequantize(raw, of)
    assert made.shape == plain.shape and made.dtype == plain.dtype
    assert np.array_equal(made.view(np.uint32), plain.view(np.uint32))


def ggufs_that_upstream_does_not_load() -> list[tuple[FamilyCase, Gguf]]:
    known = pytest.importorskip("transformers.modeling_gguf_pytorch_utils").GGUF_SUPPORTED_ARCHITECTURES
    return [
        (case, case.gguf[0]) for case in tiny.CASES.values() if case.gguf and case.gguf[0].arch not in known
    ]


@pytest.mark.parametrize(
    ("case", "of"), [pytest.param(*x, id=x[1].arch) for x in ggufs_that_upstream_does_not_load()[:3]]
)
def test_a_gguf_that_upstream_fails_to_load_is_compared_through_an_export(
    case: FamilyCase, of: Gguf, tmp_path: Path
) -> None:
    _, source = gguf.make(case, of, tmp_path)
    cert = zoo.verify(zoo.convert(source, tmp_path / "canonical"), level="logits", write=False)
    assert cert.passed and not cert.not_checked
    assert re.search(
        r"w.gguf: upstream cannot load this: \w+Error: .*[^.], so it was given the canonical weights under its own names: "
        "a mistake that import and export share would not show",
        cert.oracle["note"],
    )


def test_a_gguf_that_upstream_fails_to_load_and_that_has_no_export_is_judged_by_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ZooError("family deepseek has no Hugging Face names")

    monkeypatch.setattr("zoo.mapping.export.export", fails)
    case, of = ggufs_that_upstream_does_not_load()[0]
    _, source = gguf.make(case, of, tmp_path)
    folder = zoo.convert(source, tmp_path / "canonical")
    cert = zoo.verify(folder, write=False)
    assert cert.passed and [x.name for x in cert.levels] == ["plan", "bytes"]
    why = (
        f"{source}: upstream cannot load this: ValueError: GGUF model with architecture {of.arch} is not supported yet, "
        "and it cannot be given an export: family deepseek has no Hugging Face names"
    )
    assert cert.not_checked == [f"layers, logits, decode: {why}"]
    with pytest.raises(ZooError, match="logits can't be judged: .* and it cannot be given an export"):
        zoo.verify(folder, level="logits", write=False)


def test_ids_that_a_wrapper_looks_up_in_its_towers_are_not_asked_for() -> None:
    from transformers import Gemma3nConfig

    found = placeholder_ids(Gemma3nConfig())
    assert (
        set(range(262_144, 262_400)) <= found
    )  # of images and sounds: the last 256 rows of the text's own table
    assert 262_143 not in found and len(found) < 300


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_in_upstreams_own_code_is_not_judged_and_called_so(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSeek V4's in fp16: a weight that its class keeps in fp32 meets numbers that are not."""
    from transformers.models.llama import modeling_llama

    theirs = {"__name__": modeling_llama.__name__, "linear": torch.nn.functional.linear}
    exec("def forward(self, x): return linear(x.half(), self.down_proj.weight)", theirs)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", theirs["forward"])
    cert = zoo.verify(canonical_of("llama"), stream=stream, write=False)
    said = "upstream's LlamaForCausalLM fails in fp32: RuntimeError: .*verify in another --dtype"
    with pytest.raises(ZooError, match=said):
        zoo.verify(canonical_of("llama"), stream=stream, level="logits", write=False)
    assert cert.level("logits") is None and any(
        "LlamaForCausalLM fails in fp32" in x for x in cert.not_checked
    )


def test_where_upstream_fails_with_a_cache_alone_the_rest_is_judged_and_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers.models.llama import modeling_llama

    theirs = {"__name__": modeling_llama.__name__, "forward": modeling_llama.LlamaMLP.forward}
    exec("def one(self, x): return forward(self, x) if x.shape[1] > 1 else x.no_such_thing", theirs)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", theirs["one"])
    cert = zoo.verify(canonical_of("llama"), write=False)
    assert cert.passed and [x.name for x in cert.levels] == ["plan", "bytes", "layers", "logits", "decode"]
    decode = cert.level("decode")
    assert decode is not None and [c.name for c in decode.checks] == [
        "cached against uncached |logit error| max"
    ]
    said = "LlamaForCausalLM fails in fp32 with a cache: AttributeError"
    assert any(x.startswith("the greedy continuation was not compared: ") and said in x for x in decode.notes)
    golden = tmp_path / "golden.safetensors"
    about = recording.record(canonical_of("llama"), golden, "fp32", 64)
    assert said in about["notes"][0]
    assert zoo.verify(canonical_of("llama"), against=golden, write=False).passed


def test_what_fails_in_ours_while_upstream_runs_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> Any:
        raise RuntimeError("of ours")

    monkeypatch.setattr("zoo.model.ffn.FeedForward.forward", wrong)
    with pytest.raises(RuntimeError, match="^of ours$"):
        zoo.verify(canonical_of("llama"), write=False)


@pytest.mark.parametrize(
    "short", [MemoryError("no"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_short_memory_in_upstreams_code_is_no_failure_of_its_own(
    short: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    theirs = {"__name__": modeling_llama.__name__, "short": short}
    exec("def forward(self, x): raise short", theirs)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", theirs["forward"])
    with pytest.raises(type(short), match=re.escape(str(short))):
        zoo.verify(canonical_of("llama"), write=False)
