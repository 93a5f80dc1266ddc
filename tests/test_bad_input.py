"""Bad input: one clear error that names the file, the tensor, what was expected and what was found; and nothing is
left under the destination's name. (What a Hub, a pickle or a GGUF can do wrong is tested beside their readers;
destinations and interruptions in `test_convert.py`.)"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.formats.canonical import read
from zoo.mapping.execute import Execution, convert
from zoo.mapping.plan import make_plan

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("llama"), dtype="bfloat16", max_shard_size=20_000)


@pytest.fixture
def source(released: Path, tmp_path: Path) -> Path:
    """A checkpoint of several shards, to be spoiled."""
    dst = tmp_path / "source"
    dst.mkdir()
    for p in released.iterdir():
        (dst / p.name).write_bytes(p.read_bytes())
    return dst


def refused(source: Path, *words: str) -> None:
    """Converting is refused with a message of all these words, and leaves nothing."""
    dst = source.parent / "canon"
    with pytest.raises(ZooError) as e:
        convert(make_plan(open_checkpoint(source)), dst)
    text = str(e.value)
    for word in words:
        assert re.search(word, text), f"{word!r} is not in: {text}"
    assert not dst.exists() and not dst.with_name("canon.partial").exists()


def shards(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def respell(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a file's header; the data stay."""
    raw = file.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    out = change(header)
    text = out if isinstance(out, bytes) else json.dumps(header if out is None else out).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(v for k, v in header.items() if k != "__metadata__")  # type: ignore[no-any-return]


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_missing_shard(source: Path) -> None:
    gone = shards(source)[1]
    gone.unlink()
    refused(source, gone.name, "no such file", "is the download complete")


def test_a_truncated_file(source: Path) -> None:
    file = shards(source)[1]
    os.truncate(file, file.stat().st_size - 10)
    refused(source, file.name, "ends at byte", "truncated")


def test_a_file_cut_within_its_header(source: Path) -> None:
    file = shards(source)[1]
    os.truncate(file, 100)
    refused(source, file.name, "claims a header", "truncated")


def test_an_empty_file(source: Path) -> None:
    file = shards(source)[0]
    file.write_bytes(b"")
    refused(source, file.name, "too short")


def test_bytes_too_many(source: Path) -> None:
    file = shards(source)[0]
    file.write_bytes(file.read_bytes() + b"more")
    refused(source, file.name, "4 bytes too many")


def test_a_file_that_changes_between_plan_and_copy(source: Path, tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(source))
    file = shards(source)[0]
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(ZooError, match=f"{file.name}: has .* changed or is truncated"):
        convert(plan, tmp_path / "canon")
    assert not (tmp_path / "canon").exists()


def test_a_shard_without_an_index(source: Path) -> None:
    (source / INDEX).unlink()
    refused(source, INDEX, "is the download complete")


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    refused(tmp_path / "source", "no checkpoint found")
    refused(tmp_path / "nowhere", "no such file or folder")


# --- headers ----------------------------------------------------------------------------------------------------------


def test_a_header_longer_than_the_file(source: Path) -> None:
    file = shards(source)[0]
    raw = file.read_bytes()
    file.write_bytes((len(raw) + 1).to_bytes(8, "little") + raw[8:])
    refused(source, file.name, f"claims a header of {len(raw) + 1} bytes")


def test_a_header_of_terabytes(source: Path) -> None:
    file = shards(source)[0]
    file.write_bytes((1 << 43).to_bytes(8, "little") + file.read_bytes()[8:])
    refused(source, file.name, "claims a header of 8796093022208 bytes")


@pytest.mark.parametrize("text", [b"not json", b'{"a": ', b"[1, 2]", b"\xff\xfe", b"[" * 100_000])
def test_a_header_that_is_not_a_json_object(text: bytes, source: Path) -> None:
    respell(shards(source)[0], lambda _: text)
    refused(source, shards(source)[0].name, "not (valid JSON|a JSON object)")


def test_overlapping_tensors(source: Path) -> None:
    def overlap(h: dict[str, Any]) -> None:
        a, b = [v for k, v in h.items() if k != "__metadata__"][:2]
        n = b["data_offsets"][1] - b["data_offsets"][0]
        b["data_offsets"] = [a["data_offsets"][0], a["data_offsets"][0] + n]

    respell(shards(source)[0], overlap)
    refused(source, shards(source)[0].name, "overlaps another")


def test_offsets_out_of_range(source: Path) -> None:
    def beyond(h: dict[str, Any]) -> None:
        first(h)["data_offsets"] = [x + (1 << 40) for x in first(h)["data_offsets"]]

    respell(shards(source)[0], beyond)
    refused(source, shards(source)[0].name, "ends at byte", "truncated")


@pytest.mark.parametrize("offsets", [[-4, 4], [8, 0], "no", [1.5, 3], [0], None])
def test_offsets_that_are_none(offsets: Any, source: Path) -> None:
    respell(shards(source)[0], lambda h: first(h).update(data_offsets=offsets))
    refused(source, shards(source)[0].name, "expected dtype, shape and data_offsets|its offsets")


def test_a_shape_that_does_not_fit_its_bytes(source: Path) -> None:
    respell(shards(source)[0], lambda h: first(h).update(shape=[3, 5]))
    refused(source, shards(source)[0].name, r"\[3, 5\] needs 30 bytes, its offsets")


def test_a_shape_beyond_all_numbers(source: Path) -> None:
    respell(shards(source)[0], lambda h: first(h).update(shape=[1 << 62, 1 << 62]))
    refused(source, shards(source)[0].name, "needs")


def test_an_unknown_dtype(source: Path) -> None:
    respell(shards(source)[0], lambda h: first(h).update(dtype="F4_E2M1_X"))
    refused(source, shards(source)[0].name, "dtype 'F4_E2M1_X'", "known: .*BF16")


@pytest.mark.parametrize(
    "field, value", [("dtype", ["F32"]), ("dtype", None), ("shape", 7), ("shape", [True, 2])]
)
def test_a_tensor_that_is_not_described_as_one(field: str, value: Any, source: Path) -> None:
    respell(shards(source)[0], lambda h: first(h).update({field: value}))
    refused(source, shards(source)[0].name, "expected dtype, shape and data_offsets")


def test_a_name_twice_in_a_header(source: Path) -> None:
    def twice(h: dict[str, Any]) -> bytes:
        name = next(k for k in h if k != "__metadata__")
        return (
            b"{"
            + json.dumps(name).encode()
            + b":"
            + json.dumps(h[name]).encode()
            + b","
            + json.dumps(h).encode()[1:]
        )

    respell(shards(source)[0], twice)
    refused(source, shards(source)[0].name, "names '.*' twice")


def test_a_name_in_two_files(source: Path) -> None:
    a, b = shards(source)[:2]
    name = next(iter(load_file(a)))
    save_file(load_file(b) | {name: load_file(a)[name]}, b)
    refused(source, name, a.name, "which one is meant")


# --- the index --------------------------------------------------------------------------------------------------------


def remap(source: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((source / INDEX).read_text())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "..\\x", ""])
def test_an_index_that_points_outside_the_folder(file: str, source: Path) -> None:
    (source.parent / "x.safetensors").write_bytes(shards(source)[0].read_bytes())
    remap(source, lambda m: m.update({next(iter(m)): file}))
    refused(source, INDEX, re.escape(repr(file)), "outside the checkpoint's folder")


def test_an_index_that_names_what_no_file_can_be_called(source: Path) -> None:
    remap(source, lambda m: m.update({next(iter(m)): "x" * 5000}))
    refused(source, INDEX, "can't be opened: File name too long")


def test_an_index_that_points_at_a_symlink_out_of_the_folder(source: Path) -> None:
    file = shards(source)[0]
    file.rename(source.parent / "elsewhere.safetensors")
    file.symlink_to(source.parent / "elsewhere.safetensors")
    refused(source, file.name, "symlink", "outside the checkpoint's folder")


def test_an_index_that_points_at_a_file_that_lacks_the_tensor(source: Path) -> None:
    a, b = shards(source)[:2]
    name = next(iter(load_file(a)))
    remap(source, lambda m: m.update({name: b.name}))
    refused(source, INDEX, re.escape(repr(name)), f"in {b.name}", f"it is in {a.name}")


def test_an_index_that_names_a_tensor_that_is_nowhere(source: Path) -> None:
    file = shards(source)[0].name
    remap(source, lambda m: m.update({"model.ghost.weight": file}))
    refused(source, INDEX, "model.ghost.weight", "does not have it")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
def test_an_index_that_is_none(text: str, source: Path) -> None:
    (source / INDEX).write_text(text)
    refused(source, INDEX)


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\udcff", "[" * 100_000, '{"vocab_size": %s}' % ("9" * 6000)], ids=range(6)
)
def test_a_config_that_is_none(text: str, source: Path) -> None:
    (source / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(source, "config.json")


def test_no_config(source: Path) -> None:
    (source / "config.json").unlink()
    refused(source, "config.json", "missing")


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"])
def test_a_config_without_a_needed_field(field: str, source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    del config[field]
    (source / "config.json").write_text(json.dumps(config))
    refused(source, "config.json", f"'{field}' is missing")


def test_a_config_of_an_unknown_family(source: Path) -> None:
    (source / "config.json").write_text('{"architectures": ["NovelForCausalLM"], "model_type": "novel"}')
    refused(source, "config.json", "NovelForCausalLM", "LlamaForCausalLM")


def test_a_config_whose_sizes_are_not_those_of_the_tensors(source: Path) -> None:
    config = json.loads((source / "config.json").read_text()) | {"intermediate_size": 53}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, r"mlp\.(gate|up)_proj\.weight", r"shape \[52, 36\], expected \[53, 36\]")


def test_a_config_with_more_layers_than_the_files(source: Path) -> None:
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 5}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, r"missing \(18\)", r"model\.layers\.\{3-4\}\.mlp\.down_proj\.weight")


def test_a_config_with_fewer_layers_than_the_files_of_a_family_that_has_layers_to_spare(
    tmp_path: Path,
) -> None:
    """The last one is no layer of multi-token prediction only because it comes after those that the config counts."""
    source = tiny.make("deepseek_v3", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    n = config["num_hidden_layers"]
    config["num_hidden_layers"] = n - 1
    (source / "config.json").write_text(json.dumps(config))
    refused(source, f"model.layers.{n - 1}.self_attn", "unexpected")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("is_causal", False, "is_causal is False"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": -1.0}, "betas of YaRN"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                             "original_max_position_embeddings": 0}, "original context of scaled RoPE is 0"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                             "original_max_position_embeddings": 1.5}, "1.5; expected a whole number"),
    ],
)  # fmt: skip
def test_a_config_of_what_cannot_be_computed_with(field: str, value: Any, says: str, source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {field: value}))
    refused(source, says)


def test_a_config_of_more_experts_than_there_can_be(tmp_path: Path) -> None:
    source = tiny.make("qwen3_moe", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"num_experts": 1 << 31, "num_local_experts": 1 << 31})
    )
    refused(source, "2147483648 experts are more than")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_pipe_or_a_device_in_place_of_a_small_file(name: str, source: Path) -> None:
    (source / name).unlink()
    os.mkfifo(source / name)
    refused(source, f"{name}: no file of JSON|no config")
    (source / name).unlink()
    (source / name).symlink_to("/dev/zero")
    refused(source, name)


def test_a_shard_that_is_a_link_to_itself(source: Path) -> None:
    shard = shards(source)[0]
    shard.unlink()
    shard.symlink_to(shard.name)
    refused(source, shard.name)


def test_code_in_a_config_is_never_run(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_evil.py").write_text("raise SystemExit('ran')")
    convert(make_plan(open_checkpoint(source)), source.parent / "canon")
    assert not list((source.parent / "canon").glob("*.py"))


# --- quantised weights ------------------------------------------------------------------------------------------------


def fp8(source: Path, spoil: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The checkpoint with layer 0's MLP in fp8 blocks of 16, spoiled."""
    tensors: dict[str, torch.Tensor] = {}
    for f in shards(source):
        tensors |= load_file(f)
        f.unlink()
    (source / INDEX).unlink()
    for n in ("gate", "up", "down"):
        name = f"model.layers.0.mlp.{n}_proj.weight"
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(-(-rows // 16), -(-columns // 16))
    spoil(tensors)
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (source / "config.json").write_text(json.dumps(config))
    return source


UP = "model.layers.0.mlp.up_proj.weight"


def test_scales_of_another_shape(source: Path) -> None:
    fp8(source, lambda t: t.update({f"{UP}_scale_inv": torch.ones(3, 4)}))
    refused(source, f"{re.escape(UP)}_scale_inv", r"shape \[3, 4\], expected \[4, 3\]")


def test_codes_without_scales(source: Path) -> None:
    fp8(source, lambda t: t.pop(f"{UP}_scale_inv"))
    refused(source, r"missing \(1\)", f"{re.escape(UP)}_scale_inv")


def test_codes_without_any_scale_name_what_was_looked_for(source: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    fp8(source, lambda t: t.pop(f"{name}_scale_inv"))
    refused(source, re.escape(name), "without a scale", "looked for", f"{re.escape(name)}_scale_inv")


def test_scales_without_a_weight(source: Path) -> None:
    fp8(source, lambda t: t.pop(UP))
    refused(source, r"missing \(1\)", re.escape(UP))


def test_scales_of_a_weight_that_is_not_quantised(source: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    fp8(source, lambda t: t.update({f"{name}_scale_inv": torch.ones(4, 3)}))
    refused(source, r"unexpected \(1\)", f"{re.escape(name)}_scale_inv")


def test_parts_of_one_canonical_tensor_of_which_some_are_quantised(source: Path) -> None:
    def plain(t: dict[str, torch.Tensor]) -> None:
        t[UP] = t[UP].to(torch.bfloat16)

    fp8(source, plain)
    refused(
        source,
        r"layers\.0\.mlp\.gate_up\.weight: its parts are stored in several ways",
        rf"{re.escape(UP)}_scale_inv",
    )


@pytest.mark.parametrize(
    "value, word", [(math.nan, "NaN or infinite"), (math.inf, "NaN or infinite"), (0.0, "zero")]
)
def test_scales_that_are_not_sound_are_a_warning_and_with_strict_an_error(
    value: float, word: str, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(t: dict[str, torch.Tensor]) -> None:
        t[f"{UP}_scale_inv"][1, 2] = value

    plan = make_plan(open_checkpoint(fp8(source, spoil)))
    with pytest.raises(
        ZooError, match=rf"{re.escape(UP)}_scale_inv in model.safetensors: its scales are {word}.*strict"
    ):
        convert(plan, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()
    convert(plan, tmp_path / "canon")
    assert any(f"{UP}_scale_inv" in r.message for r in caplog.records)
    assert f"{UP}_scale_inv" in json.loads((tmp_path / "canon" / "zoo.json").read_text())["warnings"][0]


def test_an_odd_number_of_blocks(tmp_path: Path) -> None:
    source = tiny.make("gpt_oss", tmp_path / "source", dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        n_experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.zeros(n_experts, rows, columns // 32 + 1, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.zeros(n_experts, rows, columns // 32 + 1, dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors")
    refused(source, r"rows of \d+ elements do not divide into blocks of 32")


# --- canonical folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def canon(released: Path, tmp_path: Path) -> Path:
    return convert(make_plan(open_checkpoint(released)), tmp_path / "canon", shard_size=20_000)


def test_a_canonical_folder_of_a_newer_zoo(canon: Path) -> None:
    j = json.loads((canon / "zoo.json").read_text()) | {"layout_version": 2}
    (canon / "zoo.json").write_text(json.dumps(j))
    with pytest.raises(ZooError, match=r"zoo\.json: layout version 2, this zoo reads 1"):
        read(canon)


@pytest.mark.parametrize("field", ["d_model", "layers", "norm"])
def test_a_spec_without_a_field(field: str, canon: Path) -> None:
    j = json.loads((canon / "zoo.json").read_text())
    del j["spec"][field]
    (canon / "zoo.json").write_text(json.dumps(j))
    with pytest.raises(ZooError, match=r"zoo\.json"):
        read(canon)


def test_a_canonical_folder_that_lacks_a_tensor(canon: Path) -> None:
    file = canon / read(canon).tensors["layers.1.mlp.down.weight"].file
    tensors = load_file(file)
    tensors.pop("layers.1.mlp.down.weight")
    save_file(tensors, file)
    index = json.loads((canon / INDEX).read_text())
    del index["weight_map"]["layers.1.mlp.down.weight"]
    (canon / INDEX).write_text(json.dumps(index))
    with pytest.raises(ZooError, match=r"layers\.1\.mlp\.down\.weight' is missing"):
        read(canon)


def test_a_canonical_tensor_of_another_shape(canon: Path) -> None:
    file = canon / read(canon).tensors["norm.weight"].file
    save_file(load_file(file) | {"norm.weight": torch.ones(7)}, file)
    with pytest.raises(ZooError, match=r"norm\.weight has shape \[7\], its Spec needs \[36\]"):
        read(canon)


def test_a_canonical_tensor_that_its_spec_does_not_have(canon: Path) -> None:
    file = canon / read(canon).tensors["norm.weight"].file
    save_file(load_file(file) | {"layers.9.attn_norm.weight": torch.ones(7)}, file)
    with pytest.raises(ZooError, match=r"'layers\.9\.attn_norm\.weight' is not one of its Spec"):
        read(canon)


def test_an_error_while_files_are_fed_leaves_the_final_name_free(source: Path, tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(source))
    with pytest.raises(RuntimeError), Execution(plan, tmp_path / "c") as run:
        run.feed(run.wanted[0])
        raise RuntimeError("the network")
    assert not (tmp_path / "c").exists()


def described(canon: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads((canon / "zoo.json").read_text())
    change(data)
    (canon / "zoo.json").write_text(json.dumps(data))
    return canon


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["spec"]["norm"].update(eps=float("nan")), "zoo.json: eps comes to nan"),
        (lambda d: d["quant"].update({"layers.0.attn.qkv": 1.5}), "quant says 'layers.0.attn.qkv' is 1.5"),
        (lambda d: d["quant"].update({"nothing": "fp8-block"}), "quant says 'nothing'"),
        (lambda d: d["quant"].update({"layers.0.attn.qkv": "fp9"}), "unknown quantisation scheme 'fp9'"),
    ],
)
def test_a_canonical_folder_whose_description_cannot_be_computed_with(
    change: Callable[[dict[str, Any]], object], says: str, canon: Path
) -> None:
    with pytest.raises(ZooError, match=re.escape(says)):
        read(described(canon, change))
