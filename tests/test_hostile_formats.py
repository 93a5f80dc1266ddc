"""What stands beside quantised weights, lists of files and names of classes that once did harm: each test builds one."""

from __future__ import annotations

import json
import math
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoo import families
from zoo.errors import ZooError
from zoo.formats import (
    around,
    base,
    canonical,
    gguf,
    gguf_tokenizer,
    gguf_vocab,
    open_checkpoint,
    safetensors,
    sets,
)
from zoo.formats import pickle as weights
from zoo.formats.base import TensorRef
from zoo.mapping.execute import convert
from zoo.mapping.plan import make_plan
from zoo.quant import compressed, packed, schemes
from zoo.quant.base import MAX_SHAPES
from zoo.spec import RopeScaling, _from_json
from zoo.text import tokenizer, worker
from zoo.verify import golden

O_PROJ = "model.layers.0.self_attn.o_proj"
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I32": 4, "I64": 8, "F8_E4M3": 1}
Shapes = dict[str, tuple[str, list[int]]]


def write(path: Path, tensors: Shapes) -> None:
    """A safetensors file of ones in every byte."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        n = math.prod(shape) * BYTES[dtype]
        header[name], at = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n]}, at + n
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\1" * at)


D, WIDE, KV, VOCAB = 64, 128, 32, 256
LLAMA = {
    "model_type": "llama", "hidden_act": "silu", "architectures": ["LlamaForCausalLM"], "hidden_size": D, "intermediate_size": WIDE,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 512,
}  # fmt: skip
IN_LAYER = {
    "self_attn.q_proj": [D, D], "self_attn.k_proj": [KV, D], "self_attn.v_proj": [KV, D], "mlp.gate_proj": [WIDE, D], "mlp.up_proj": [WIDE, D],
    "mlp.down_proj": [D, WIDE], "input_layernorm": [D], "post_attention_layernorm": [D],
}  # fmt: skip


def quantised(root: Path, config: dict[str, Any], beside: Shapes, layers: int = 1) -> Path:
    """A release of a Llama with one weight [64, 64] of each layer quantised."""
    root.mkdir()
    said = {"quantization_config": config, "num_hidden_layers": layers}
    (root / "config.json").write_text(json.dumps(LLAMA | said))
    tensors: Shapes = {f"{n}.weight": ("F32", [VOCAB, D]) for n in ("model.embed_tokens", "lm_head")}
    tensors["model.norm.weight"] = ("F32", [D])
    for i in range(layers):
        tensors |= {f"model.layers.{i}.{n}.weight": ("F32", shape) for n, shape in IN_LAYER.items()}
        tensors |= {f"{O_PROJ.replace('0', str(i))}.{n}": x for n, x in beside.items()}
    write(root / "model.safetensors", tensors)
    return root


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
WORDS: Shapes = {"qweight": ("I32", [8, 64]), "qzeros": ("I32", [2, 8]), "scales": ("F16", [2, 64])}
PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}},
}  # fmt: skip
CODES: Shapes = {"weight_packed": ("I32", [64, 8]), "weight_scale": ("BF16", [64, 2])}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
FLOATS: Shapes = {
    "weight": ("U8", [64, 32]),
    "weight_scale": ("F8_E4M3", [64, 4]),
    "weight_scale_2": ("F32", []),
}


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize(
    ("config", "beside", "says"),
    [
        (GPTQ, WORDS | {"g_idx": ("I32", [7])}, "expected a number for each of"),
        (GPTQ, WORDS | {"g_idx": ("I32", [0])}, "which holds nothing"),
        (GPTQ, WORDS | {"g_idx": ("I32", [])}, "expected a number for each of"),
        (PACKED, CODES | {"weight_shape": ("I64", [0])}, "which holds nothing"),
        (PACKED, CODES | {"weight_shape": ("I64", [3])}, "expected rows and columns"),
        (PACKED, CODES | {"weight_shape": ("I64", [MAX_SHAPES + 2])}, "expected rows and columns"),
        (NVFP4, FLOATS | {"weight_scale_2": ("F32", [0])}, "which holds nothing"),
        (NVFP4, FLOATS | {"weight_scale_2": ("F32", [64])}, "expected one number"),
        (NVFP4, FLOATS | {"input_scale": ("F32", [0])}, "which holds nothing"),
    ],
)  # fmt: skip
def test_a_constant_beside_codes_has_a_number_for_what_it_is_of(
    tmp_path: Path, config: dict[str, Any], beside: Shapes, says: str, dtype: str | None
) -> None:
    with pytest.raises(ZooError, match=says) as e:
        make_plan(open_checkpoint(quantised(tmp_path / "source", config, beside, layers=2)), dtype=dtype)
    (told,) = str(e.value).splitlines()[1:]  # each once, by the tensor's own name
    assert told.startswith(f"{O_PROJ}.") and told.endswith("(and 1 more like it)")


def test_such_a_constant_is_refused_in_a_canonical_folder_too(tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(quantised(tmp_path / "source", NVFP4, FLOATS)))
    canon = convert(plan, tmp_path / "canon")
    canonical.read(canon)
    file = canon / canonical.read(canon).tensors["layers.0.attn.out.global_scale"].file
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    told = next(t for n, t in header.items() if n == "layers.0.attn.out.global_scale")
    assert told["shape"] in ([], [1])
    shapes = {n: (t["dtype"], t["shape"]) for n, t in header.items() if n != "__metadata__"}
    write(file, shapes | {"layers.0.attn.out.global_scale": ("F32", [3])})
    with pytest.raises(ZooError, match=r"global_scale.*has the shape \[3\], expected one number"):
        canonical.read(canon)


def test_inputs_are_put_into_groups_by_a_number_each() -> None:
    codes, scale = np.zeros((2, 8), np.uint8), np.ones((2, 2), np.float32)
    for n in (0, 7, 16):
        with pytest.raises(ZooError, match=f"by {n} numbers"):
            packed.affine(codes, 1, scale, 4, 1, order=np.zeros(n, np.int32))


@pytest.mark.parametrize("block", ["9" * 4400 + "x1", [10**7, 3], "0x1", "\u0663x1"])
def test_a_block_that_no_scheme_is_called_by_is_refused(block: Any) -> None:
    tensors = {
        n: TensorRef(n, d, (64, 64), "f", 0, 0)
        for n, d in (("w.weight", "F8_E4M3"), ("w.weight_scale_inv", "F32"))
    }
    with pytest.raises(ZooError, match="block size"):
        schemes.detect(
            "w.weight", tensors, {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
        )


def test_a_mode_that_is_no_text_is_refused() -> None:
    tensors = {
        f"w.{n}": TensorRef(f"w.{n}", d, (64, 8), "f", 0, 0)
        for n, d in (("weight", "U32"), ("scales", "F16"), ("biases", "F16"))
    }
    with pytest.raises(ZooError, match="mode"):
        schemes.detect("w.weight", tensors, {"quantization": {"bits": 4, "group_size": 32, "mode": ["a"]}})


def test_a_config_names_few_classes() -> None:
    began = time.process_time()
    with pytest.raises(ZooError, match="1000000 architectures"):
        families.spec_of({"architectures": ["a"] * 1_000_000, "model_type": "x"})
    assert time.process_time() - began < 1  # it took 10 s


def test_an_index_names_no_more_files_than_a_release_has(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"w{n}": f"{n}.safetensors" for n in range(10_001)}}))
    with pytest.raises(ZooError, match="names 10001 files"):
        sets.weight_map(index)


# ---- tokenizers


def test_a_version_of_thousands_of_digits_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"fast_tokenizer_files": [f"tokenizer.{'9' * 5000}.json"]})
    )
    with pytest.raises(ZooError, match="names no version"):
        tokenizer.file_of(tmp_path)


@pytest.mark.parametrize(("times", "refused"), [(1, False), (3, False), (4, True), (1000, True)])
def test_a_tokenizer_makes_no_novel_of_a_text(tmp_path: Path, times: int, refused: bool) -> None:
    """A post-processor may repeat the text, and a model reads all that it makes."""
    whole = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}] * times,
        "pair": [],
        "special_tokens": {},
    }
    told = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior":
        "Isolated", "invert": False}, "post_processor": whole, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    made = worker._Worker(tmp_path)
    if refused:
        with pytest.raises(ZooError, match="its tokenizer makes .* tokens of 300 characters"):
            made.encode("a" * 300, True)
    else:
        assert len(made.encode("a" * 300, True)) == 300 * times


def test_a_letter_that_stands_for_many_is_no_repetition(tmp_path: Path) -> None:
    """U+FDFA is three bytes, and 33 once it is normalised."""
    told = {
        "version": "1.0", "added_tokens": [], "normalizer": {"type": "NFKC"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False,
        "trim_offsets": True, "use_regex": False}, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": {chr(c): n for n, c in enumerate(tokenizer.byte_spelling().values())}, "merges": []},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    assert len(worker._Worker(tmp_path).encode("\ufdfa" * 100, True)) == 3300


# ---- few bytes that take long


def test_no_list_of_a_config_is_gone_over_by_every_family() -> None:
    config = {
        "model_type": "nobody's",
        "rope_scaling": {"rope_type": "longrope", "long_factor": [1.5] * 400_000},
    }
    began = time.process_time()
    with pytest.raises(ZooError, match="400000 entries in a list"):
        families.find(config)
    with pytest.raises(ZooError, match="20000 fields"):
        families.find({"model_type": "llama", "rope_scaling": {f"k{n}": 0 for n in range(20_000)}})
    with pytest.raises(ZooError, match="100001 with those before"):
        families.find({"lists": [[0] * 9999 for _ in range(10)]})
    with pytest.raises(ZooError, match="name has 4000 characters"):
        families.find({"model_type": "llama", "_" * 4000: 0})
    with pytest.raises(ZooError, match="400000 entries in a list"):
        families.own_config("mistral", {"moe": [0] * 400_000}, (), "params.json")
    assert time.process_time() - began < 1  # the first took minutes


def test_a_folder_of_files_without_end_is_not_gone_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "MAX_BESIDE", 2)
    for n in range(3):
        (tmp_path / f"{n}").touch()
    with pytest.raises(ZooError, match="more than 2 files"):
        open_checkpoint(tmp_path)
    (tmp_path / "2").rename(tmp_path / "zoo.json")
    with pytest.raises(ZooError, match="more than 2 files"):
        canonical.read(tmp_path)


def test_what_a_config_says_of_quantised_weights_may_name_each() -> None:
    listed = [f"model.layers.{n}" for n in range(200_000)]
    families._refuse_many({"text_config": {"quantization_config": {"ignore": listed}}}, "x")
    with pytest.raises(ZooError, match="300000 entries"):
        families._refuse_many({"quantization": {"ignore": [0] * 300_000}}, "x")


def test_no_weight_is_held_against_groups_without_end() -> None:
    groups = {f"g{n}": {"weights": {"num_bits": 8, "type": "float"}} for n in range(65)}
    with pytest.raises(ZooError, match="65 groups"):
        compressed.weights({"quantization_config": {"config_groups": groups}}, "float")


def test_an_index_without_a_map_beside_one_file_is_refused_by_openais_reader(tmp_path: Path) -> None:
    told = {"num_experts": 2, "experts_per_token": 1, "initial_context_length": 9, "rope_ntk_beta": 1}
    (tmp_path / "config.json").write_text(json.dumps(told))
    write(tmp_path / "model.safetensors", {"a": ("U8", [1])})
    for index in ({}, {"weight_map": ["a"]}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ZooError, match="expected an object 'weight_map'"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "m-00000-TP-common.safetensors"])
def test_all_readers_of_safetensors_have_one_budget(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in ("params.json", "config.json"):
        (tmp_path / config).write_text("{}")
    write(tmp_path / name, {"a" * 50: ("U8", [1]), "b": ("U8", [1])})
    with monkeypatch.context() as m, pytest.raises(ZooError, match=r"the files have 2 tensors \(limit 1\)"):
        m.setattr(base, "MAX_TENSORS", 1)
        open_checkpoint(tmp_path)
    monkeypatch.setattr(safetensors, "MAX_HEADERS", 100)
    with pytest.raises(ZooError, match=r"bytes of headers \(limit 100\)"):
        open_checkpoint(tmp_path)


def test_pieces_whose_every_cut_is_two_pieces_make_no_tokenizer() -> None:
    tokens = ["a" * i + "b" * j for i in range(160) for j in range(160) if 0 < i + j <= 256]
    began = time.process_time()
    made, notes = gguf_tokenizer.files(
        {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens}, "x"
    )
    assert not made and "pairs of tokens make a token" in notes[0]
    long = [f"{n:06}" + "x" * 250 for n in range(17_000)]
    made, notes = gguf_tokenizer.files({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": long}, "x")
    assert not made and "4352000 characters" in notes[0]
    assert time.process_time() - began < 4


def test_the_arrays_of_a_split_gguf_have_one_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_VALUES", 5)
    key = struct.pack("<Q1sIIQ", 1, b"x", 9, 0, 3) + bytes(3)
    for n in (1, 2):
        head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key
        (tmp_path / f"x-0000{n}-of-00002.gguf").write_bytes(head + bytes(64))
    with pytest.raises(ZooError, match="its arrays have more than 5 values"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("text", "says"), [(b"\xff", "not UTF-8"), (b"", "truncated")])
def test_a_text_in_a_list_of_a_gguf_that_is_none_is_refused(tmp_path: Path, text: bytes, says: str) -> None:
    listed = struct.pack("<Q1sIIQ", 1, b"x", 9, 8, 2) + struct.pack("<Q", 1) + b"a"
    listed += struct.pack("<Q", 1 if text else 1 << 40) + text
    (tmp_path / "x.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + listed + bytes(64))
    with pytest.raises(ZooError, match=says):
        gguf.read_header(tmp_path / "x.gguf", "x.gguf")


def test_what_stands_beside_an_entry_of_an_archive_is_short(tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("archive/data.pkl")
    entry.extra = struct.pack("<HH", 0x7777, 0) * 16_000
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as z:
        z.writestr(entry, b"\x80\x02}.")
    with pytest.raises(ZooError, match="64000 bytes beside it"):
        weights.read_pickle(tmp_path / "x.bin", "x.bin")


def test_a_headers_length_is_not_taken_for_a_text(tmp_path: Path) -> None:
    """15,392 is " <" in two bytes, as a web page may begin."""
    raw = b"{}".ljust(0x3C20)
    (file := tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    assert safetensors.read_header(file) == raw


def test_a_list_in_a_spec_is_no_longer_than_a_model_is_deep(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="expected at most 1024"):
        _from_json(RopeScaling, {"kind": "longrope", "factor": 2.0, "short": [1.0] * 1025}, "scaling")


def test_a_recording_has_a_short_header(tmp_path: Path) -> None:
    (file := tmp_path / "g.safetensors").write_bytes((golden.MAX_HEADER + 8).to_bytes(8, "little") + b"{")
    began = time.process_time()
    assert not golden.is_golden(file)
    with pytest.raises(ZooError, match="which no recording has"):
        golden.Golden(file)
    assert time.process_time() - began < 0.5


def test_what_lay_around_tensors_is_in_pieces_that_hold_something() -> None:
    """A table of millions of empty ones is packed to some kilobytes."""
    good = struct.pack("<QQQ", 1, 4, 2) + b"ab"
    assert around.Hollow(good, 10, "x").pieces == [(4, b"ab")]
    for bad in (
        struct.pack("<Q", 1 << 20) + bytes(16 << 20),
        struct.pack("<QQQQQ", 2, 0, 2, 2, 0) + b"ab" + bytes(9),
        struct.pack("<QQQ", 1, 9, 2) + b"ab",
    ):
        with pytest.raises(ZooError, match="not as zoo writes it"):
            around.Hollow(bad, 10, "x")


def test_an_embedding_without_end_is_no_vocabulary() -> None:
    with pytest.raises(ZooError, match="50000000 rows"):
        gguf_vocab.fields({"tokenizer.json": b"{}"}, 50_000_000, "x")


def test_of_indices_that_are_not_read_some_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3):
        write(tmp_path / f"{n}.safetensors", {f"w{n}": ("U8", [1])})
        index = tmp_path / f"m{n}.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {f"w{n}": f"{n}.safetensors"}}))
    assert [s.name for s in sets.here(tmp_path)] == [f"m{n}.safetensors.index.json" for n in range(3)]
    monkeypatch.setattr(sets, "MAX_INDICES", 2 * index.stat().st_size)
    assert next(s.name for s in sets.here(tmp_path)) == "2.safetensors"
