"""A folder with several sets of weights: the one that transformers takes is read, the others are named, and a proof
reads what upstream would open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import zoo
from zoo.cli.convert import command
from zoo.cli.inspect import command as inspect
from zoo.errors import ZooError
from zoo.formats import open_checkpoint, safetensors, sets
from zoo.verify.oracle import from_pretrained_files

INDEX = "model.safetensors.index.json"


def shards(root: Path, factor: float) -> None:
    """The tensors of `model.safetensors` times a factor, as two shards and their index."""
    tensors = {k: t * factor for k, t in load_file(root / "model.safetensors").items()}
    names = sorted(tensors)
    weight_map = {}
    for n, part in enumerate((names[::2], names[1::2])):
        file = f"model-{n + 1:05d}-of-00002.safetensors"
        save_file({k: tensors[k].contiguous() for k in part}, root / file)
        weight_map |= dict.fromkeys(part, file)
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A checkpoint, and beside it an older save in shards with other values."""
    root = tiny.make("llama", tmp_path / "two")
    shards(root, 1.25)
    return root


def test_the_single_file_is_taken_before_an_index_and_the_note_names_the_other(two: Path) -> None:
    ckpt = open_checkpoint(two)
    assert set(ckpt.files) == {"model.safetensors"}
    assert ckpt.notes == (
        f"weights: model.safetensors, which transformers' from_pretrained takes; also here and not read: {INDEX}; "
        "to take one of them, name it with --file",
    )


def test_the_copy_is_what_upstream_computes_and_its_export_is_that_set_alone(
    two: Path, tmp_path: Path
) -> None:
    folder = zoo.convert(two, tmp_path / "c")
    ids = tiny.tokens("llama")
    with torch.inference_mode():
        assert torch.allclose(zoo.load(folder)(ids), tiny.logits(tiny.upstream(two), ids), atol=1e-4)
    back = zoo.export(folder, tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert not (back / INDEX).exists()


@pytest.mark.parametrize(
    "how", [{"level": "bytes"}, {"level": "logits"}, {"level": "logits", "stream": True}]
)
def test_a_proof_fails_where_zoo_reads_another_set_than_upstream(
    how: dict[str, object], two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sets, "ORDER", (INDEX, *sets.ORDER))
        patch.setattr(sets, "taken", lambda root, config=None: INDEX)
        folder = zoo.convert(two, tmp_path / "c")
        cert = zoo.verify(folder, write=False, **how)  # type: ignore[arg-type]
    assert not cert.passed
    plan = cert.level("plan")
    assert plan is not None and [c.name for c in plan.checks if not c.passed] == [
        "files read by zoo or upstream alone"
    ]
    if how["level"] == "logits":
        assert cert.level("logits").verdict == "failed"


@pytest.mark.parametrize("stream", [False, True])
def test_the_other_set_can_be_named_and_is_proven_by_itself(stream: bool, two: Path, tmp_path: Path) -> None:
    folder = zoo.convert(two, tmp_path / "c", file=INDEX)
    cert = zoo.verify(folder, level="logits", stream=stream, write=False)
    assert cert.passed
    assert f"upstream was given {INDEX} alone" in cert.oracle["note"]
    assert not torch.equal(
        *(zoo.load(f).embed.weight for f in (folder, zoo.convert(two, tmp_path / "other")))
    )


def test_a_variant_can_be_named(two: Path, tmp_path: Path) -> None:
    (two / INDEX).unlink()
    for shard in two.glob("model-*"):
        shard.unlink()
    half = {k: t.half() for k, t in load_file(two / "model.safetensors").items()}
    save_file(half, two / "model.fp16.safetensors")
    assert "also here and not read: model.fp16.safetensors" in open_checkpoint(two).notes[0]
    result = CliRunner().invoke(
        command, [str(two), str(tmp_path / "c"), "--file", "model.fp16.safetensors"], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert zoo.load(tmp_path / "c").embed.weight.dtype == torch.float16
    assert zoo.verify(tmp_path / "c", level="bytes", write=False).passed


def test_two_variants_without_a_plain_set_are_refused_with_the_way_to_say_which(two: Path) -> None:
    shutil.copy(two / "model.safetensors", two / "model.fp16.safetensors")
    for name in [INDEX, *(p.name for p in two.glob("model-*"))]:
        (two / name).unlink()
    (two / "model.safetensors").rename(two / "model.fp32.safetensors")
    with pytest.raises(ZooError, match="which one is meant\\? Say it with --file"):
        open_checkpoint(two)


def test_a_pickle_under_its_own_name_comes_before_safetensors_of_another_name(two: Path) -> None:
    torch.save(load_file(two / "model.safetensors"), two / "pytorch_model.bin")
    for name in [INDEX, *(p.name for p in two.glob("model-*"))]:
        (two / name).unlink()
    (two / "model.safetensors").rename(two / "consolidated.safetensors")
    (two / "params.json").write_text("{}")
    ckpt = open_checkpoint(two)
    assert set(ckpt.files) == {"pytorch_model.bin"}
    assert "also here and not read: consolidated.safetensors" in ckpt.notes[-1]


def test_what_the_config_names_comes_first(two: Path) -> None:
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(config | {"transformers_weights": INDEX}))
    assert len(open_checkpoint(two).files) == 2
    (two / "config.json").write_text(json.dumps(config | {"transformers_weights": "../x.safetensors"}))
    with pytest.raises(ZooError, match="outside the checkpoint's folder"):
        open_checkpoint(two)


def test_weights_below_a_folder_are_listed_and_can_be_named(two: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    two.rename(outer / "fp32")
    with pytest.raises(ZooError, match=r"name one below it with --file: .*fp32/model\.safetensors"):
        zoo.convert(outer, tmp_path / "c")
    assert zoo.convert(outer, tmp_path / "c", file="fp32/model.safetensors").is_dir()
    with pytest.raises(ZooError, match="outside the checkpoint's folder"):
        zoo.convert(outer, tmp_path / "d", file="../two/model.safetensors")


NAMES = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


@pytest.mark.parametrize("there", range(16))
def test_both_readings_of_from_pretraineds_order_are_upstreams(there: int, tmp_path: Path) -> None:
    modeling = pytest.importorskip("transformers.modeling_utils")
    names = [n for k, n in enumerate(NAMES) if there >> k & 1]
    (tmp_path / "config.json").write_text("{}")
    for name in names:
        shard = name.split(".")[0] + "-00001-of-00001." + name.split(".")[1]
        text = json.dumps({"metadata": {}, "weight_map": {"x": shard}}) if name.endswith("json") else ""
        (tmp_path / name).write_text(text)
        (tmp_path / shard).write_text("")
    if not names:
        assert from_pretrained_files(tmp_path) is None and sets.taken(tmp_path) is None
        return
    theirs, _ = modeling._get_resolved_checkpoint_files(str(tmp_path), None, None, None, None, False)
    expected = tuple(Path(f).name for f in theirs)
    assert from_pretrained_files(tmp_path) == expected
    taken = sets.taken(tmp_path)
    assert taken is not None and tuple(sets.members(tmp_path, taken)) == expected


def test_an_index_of_the_single_file_is_no_other_set(two: Path) -> None:
    names = [t.name for t in open_checkpoint(two).tensors.values()]
    for shard in two.glob("model-*"):
        shard.unlink()
    (two / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert open_checkpoint(two).notes == ()
    assert INDEX in open_checkpoint(two).carried
    assert safetensors.weight_files(two) == ["model.safetensors"]


def test_inspect_lists_the_sets_that_can_be_named_also_where_none_is_taken(two: Path, tmp_path: Path) -> None:
    (two / "Q4").mkdir()
    for name in ("m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf", "m.UD-IQ2_XXS.gguf"):
        (two / "Q4" / name).write_bytes(b"GGUF")
    about = json.loads(CliRunner().invoke(inspect, [str(two), "--json"], catch_exceptions=False).stdout)
    sets = {s["name"]: (s["files"], s.get("quantisation")) for s in about["sets"]}
    assert sets == {
        "model.safetensors": (1, None), INDEX: (2, None),
        "Q4/m-Q4_K_M-00001-of-00002.gguf": (2, "Q4_K_M"), "Q4/m.UD-IQ2_XXS.gguf": (1, "UD-IQ2_XXS"),
    }  # fmt: skip
    (two / "Q4").rename(tmp_path / "Q4")
    shown = CliRunner().invoke(inspect, [str(tmp_path / "Q4")], catch_exceptions=False)
    assert shown.exit_code == 0
    text = " ".join(shown.stdout.split())
    assert "2 sets of weights; say with --file" in text and "m.UD-IQ2_XXS.gguf 1 4 B UD-IQ2_XXS" in text
    with pytest.raises(
        ZooError, match=r"no weights called 'm' \(--file\); its sets: m-Q4_K_M-00001-of-00002\.gguf \(8 B"
    ):
        zoo.convert(tmp_path / "Q4", tmp_path / "c", file="m")


def test_the_sets_of_a_repository_are_those_that_open_together() -> None:
    files = {
        "original/consolidated.00.pth": 3, "original/consolidated.01.pth": 4, "original/params.json": 1,
        "model-00001-of-00002.safetensors": 5, "model-00002-of-00002.safetensors": 6, INDEX: 1,
        "optimizer.bin": 9, "mmproj-f16.gguf": 7, "adapter_model.safetensors": 2,
    }  # fmt: skip
    found = {s.name: s.nbytes for s in sets.listed(files)}
    assert found == {"original": 7, INDEX: 11}
