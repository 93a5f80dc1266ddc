"""What was trained becomes a canonical folder: from a model, a dict, shards or a trainer's checkpoint, under any of its names."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
import verified
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_in_memory_names import by_transformers
from test_quant_models import fp8_blocks, quantised

import zoo
from zoo.cli import cli
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.formats.canonical import read
from zoo.mapping import values as made

State = dict[str, torch.Tensor]


def held(folder: Path) -> State:
    return {k: t for f in read(folder).files for k, t in load_file(folder / f).items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


def trained(name: str) -> State:
    """The variant's canonical tensors, every one changed."""
    state = zoo.load(verified.canonical(name)).state_dict()
    return {k: t + 0.25 for k, t in state.items()}


def refused(state: Any, like: Path, tmp_path: Path) -> str:
    with pytest.raises(ZooError) as e:
        zoo.save(state, like, tmp_path / "new")
    assert not list(tmp_path.glob("new*")), "something was written"
    return str(e.value)


def inspected(folder: Path) -> dict[str, Any]:
    return dict(json.loads(CliRunner().invoke(cli, ["inspect", str(folder), "--json"]).stdout))


def test_a_model_that_was_trained_is_the_folder_that_has_its_values_and_says_so(tmp_path: Path) -> None:
    like = verified.canonical("llama")
    model = zoo.load(like)
    model.load_state_dict(trained("llama"))
    new = zoo.save(model, like, tmp_path / "new")
    assert same(held(new), trained("llama"))
    assert read(new).spec == read(like).spec
    ids = torch.arange(6)[None]
    assert torch.equal(zoo.load(new)(ids), model(ids))

    about = inspected(new)
    assert about["values"].startswith("not a release's: zoo.save, of a state that was trained; from ")
    assert about["verified"].startswith("no;")
    with pytest.raises(
        ZooError, match="its values are no release's .* name what they should equal with --against"
    ):
        zoo.verify(new, level="logits")


@pytest.mark.parametrize("name", ["llama_tied", "laguna", "qwen3_5_moe"])
@pytest.mark.parametrize("wrapped", ["{}", "_orig_mod.{}"])
def test_what_a_trainer_saves_of_upstreams_model_gets_the_releases_names_back(
    name: str, wrapped: str, tmp_path: Path
) -> None:
    """Experts that transformers packs, a tied head that it lists twice, what the text model does not use."""
    like = verified.canonical(name)
    release = verified.ROOT / f"{name}-float32-source"
    state = {wrapped.format(k): t for k, t in tiny.upstream(release).state_dict().items()}
    flat = torch.cat(
        [t.flatten() for t in state.values()]
    )  # as FSDP1 and DeepSpeed hold them: views of one buffer
    pieces = flat.split([t.numel() for t in state.values()])
    state = {k: piece.view(t.shape) for (k, t), piece in zip(state.items(), pieces)}
    new = zoo.save(state, like, tmp_path / "new")
    assert same(held(new), held(like))
    back = zoo.export(new, tmp_path / "back")
    released = {k: t for f in release.glob("*.safetensors") for k, t in load_file(f).items()}
    assert same(load_file(back / "model.safetensors"), released)


def test_a_tower_under_names_in_memory_is_the_folders_or_refused(tmp_path: Path) -> None:
    """It was there twice, with old values under the release's names and the trained ones under the others."""
    like = verified.canonical("gemma3_vision")
    state = tiny.upstream(verified.ROOT / "gemma3_vision-float32-source").state_dict()
    trained = {k: t + 1 if "multi_modal_projector" in k else t for k, t in state.items()}
    new, expected = held(zoo.save(trained, like, tmp_path / "a")), held(like)
    assert new.keys() == expected.keys()
    assert all(torch.equal(new[k], t + ("multi_modal" in k)) for k, t in expected.items())

    like = verified.canonical("kimi_k25")
    state = tiny.upstream(verified.ROOT / "kimi_k25-float32-source").state_dict()
    said = refused(state, like, tmp_path)
    assert "21 tensors of the state (model.vision_tower." in said and "leave them out of the state" in said
    new_kimi = zoo.save({k: t for k, t in state.items() if "vision_tower" not in k}, like, tmp_path / "b")
    assert same(held(new_kimi), held(like)), "the projector is only called otherwise"


def test_a_state_that_does_not_fit_is_refused_whole_by_pattern(tmp_path: Path) -> None:
    like, state = verified.canonical("llama"), trained("llama")
    for i in range(3):
        del state[f"layers.{i}.mlp.down.weight"]
        state[f"layers.{i}.attn.out.weight"] = torch.ones(3, 5)
    state["student.weight"] = torch.ones(2)
    state["norm.weight"] = torch.ones(36, dtype=torch.int64)
    said = refused(state, like, tmp_path)
    assert "layers.{0-2}.mlp.down.weight (3 tensors)" in said
    assert "layers.{0-2}.attn.out.weight (3 tensors): shape [3, 5], expected [36, 60]" in said
    assert "student.weight [2] in memory" in said
    assert "norm.weight in memory: I64 without scales is no weight" in said
    assert "a dict: expected tensors only" in refused({"model": trained("llama")}, like, tmp_path)
    lora = trained("llama") | {"layers.0.attn.qkv.lora_A.default.weight": torch.ones(2, 36)}
    assert "an adapter's that was not merged" in refused(lora, like, tmp_path)
    meta = trained("llama") | {"norm.weight": torch.empty(36, device="meta")}
    assert "norm.weight of the state is on the device meta" in refused(meta, like, tmp_path)
    sparse = trained("llama") | {"norm.weight": torch.ones(36).to_sparse()}
    assert "norm.weight of the state lies in memory as torch.sparse_coo" in refused(sparse, like, tmp_path)
    inside = {
        f"student.{k}": t
        for k, t in load_file(verified.ROOT / "llama-float32-source/model.safetensors").items()
    }
    assert "names of tensors begin with 'student.', without which they fit" in refused(inside, like, tmp_path)
    odd = trained("llama_tied") | {"head.weight": torch.zeros(131, 36)}
    said = refused(odd, verified.canonical("llama_tied"), tmp_path)
    assert "head.weight differs from embed.weight, but the Spec ties them" in said
    assert "a list to save; expected a model, tensors by name" in refused([torch.ones(2)], like, tmp_path)
    assert "a tensor called 0" in refused({0: torch.ones(2)}, like, tmp_path)
    assert "holds '', a int" in refused({"": 1}, like, tmp_path)
    part = verified.copy(like, tmp_path / "part")
    told = json.loads((part / "zoo.json").read_text()) | {"layers": [0, 1]}
    (part / "zoo.json").write_text(json.dumps(told))
    assert "2 of 3 layers" in refused(trained("llama"), part, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_no_numbers_are_saved_with_a_note(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {k: t.to(dtype) for k, t in trained("llama").items()}
    state["norm.weight"][:2] = float("nan")
    state["layers.1.attn.out.weight"][0, 0] = float("-inf")
    new = zoo.save(state, verified.canonical("llama"), tmp_path / "new")
    note = "NaN or infinite: 3 elements in 2 tensors, the first layers.1.attn.out.weight (1)"
    assert read(new).json["notes"][-1] == note and caplog.messages == [f"{new}: {note}"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint8])
def test_elements_of_a_byte_are_looked_at_too(dtype: torch.dtype) -> None:
    held = torch.tensor([[0, 1], [0xFF, 2]], dtype=torch.uint8).view(dtype)
    assert made.not_finite(held) == (0 if dtype == torch.uint8 else 1)


def test_values_keep_their_dtype_unless_another_is_asked_for(tmp_path: Path) -> None:
    like, state = verified.canonical("llama", "bfloat16"), trained("llama")
    assert same(held(zoo.save(state, like, tmp_path / "fp32")), state)
    narrow = zoo.save(state, like, tmp_path / "bf16", dtype="bf16")
    assert same(held(narrow), {k: t.bfloat16() for k, t in state.items()})
    for folder, dtype in ((tmp_path / "fp32", "float32"), (narrow, "bfloat16")):
        back = zoo.export(folder, folder.with_suffix(".hf"))
        config = json.loads((back / "config.json").read_text())
        assert (config.get("dtype") or config["torch_dtype"]) == dtype


def test_a_quantised_weight_stays_one_if_it_is_given_as_codes_and_is_plain_if_given_plain(
    tmp_path: Path,
) -> None:
    like = zoo.convert(quantised("qwen3", {}, fp8_blocks, tmp_path / "hf"), tmp_path / "canon")
    state = zoo.load(like).state_dict()
    assert same(held(zoo.save(state, like, tmp_path / "codes")), held(like))
    plain = zoo.convert(tmp_path / "hf", tmp_path / "plain", dtype="fp32")
    new = zoo.save(zoo.load(plain), like, tmp_path / "values")
    assert same(held(new), held(plain)) and not read(new).quant
    config = json.loads((zoo.export(new, tmp_path / "back") / "config.json").read_text())
    assert "quantization_config" not in config


def test_a_disk_that_fills_up_leaves_nothing_and_an_interrupted_save_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    like, state = verified.canonical("llama"), trained("llama")
    n = iter(range(3))

    def full(*_: Any) -> int:
        if next(n, None) is None:
            raise OSError(28, "No space left on device")
        return 1

    with monkeypatch.context() as patch:
        patch.setattr(made.os, "pwrite", full)
        assert "No space left on device" in refused(state, like, tmp_path)
    partial = tmp_path / "new.partial"
    partial.mkdir()
    (partial / ".zoo-state.json").write_text('{"job": "of a process that was killed", "boot": ""}')
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"half")
    assert same(held(zoo.save(state, like, tmp_path / "new")), state)
    with pytest.raises(ZooError, match="exists already"):
        zoo.save(state, like, tmp_path / "new")


# ------------------------------------------------------------------ shards


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_tensors_are_gathered_one_at_a_time(
    tmp_path: Path, mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    state, asked = trained("llama"), []
    gather = DTensor.full_tensor

    def counted(self: Any, **how: Any) -> torch.Tensor:
        asked.append(self.shape)
        return gather(self, **how)

    monkeypatch.setattr(DTensor, "full_tensor", counted)
    sharded = {k: distribute_tensor(t, mesh, [Shard(0)]) for k, t in state.items()}
    new = zoo.save(sharded, verified.canonical("llama"), tmp_path / "new")
    assert same(held(new), state) and len(asked) == len(state)


def _rank(rank: int, like: Path, root: Path) -> None:
    """Two ranks: FSDP2 of zoo's own decoder, then a state that doesn't fit and a destination that exists, which both hear of."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = zoo.load(like)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.25)
    zoo.save(model, like, root / "new")
    dcp.save({"model": model.state_dict(), "step": 3}, checkpoint_id=str(root / "dcp"))
    said = []
    whole = model.state_dict()
    less = {k: t for k, t in whole.items() if k != "norm.weight"}
    for state in (whole, less, less if rank == 1 else whole):
        with pytest.raises(ZooError) as e:
            zoo.save(state, like, root / "new")
        said.append(str(e.value))
    (root / f"said{rank}").write_text("\n".join(said))
    torch.distributed.destroy_process_group()


@pytest.mark.proof
def test_every_rank_of_fsdp_saves_one_folder_and_hears_of_what_is_refused(tmp_path: Path) -> None:
    like = verified.canonical("llama")
    torch.multiprocessing.spawn(_rank, (like, tmp_path), nprocs=2)
    assert same(held(tmp_path / "new"), trained("llama"))
    assert same(held(zoo.save(tmp_path / "dcp", like, tmp_path / "of_dcp")), trained("llama"))
    for rank in range(2):
        said = (tmp_path / f"said{rank}").read_text()
        assert "exists already" in said and "norm.weight" in said


# ------------------------------------------------------------------ torch.distributed.checkpoint


def test_a_trainers_checkpoint_is_converted_beside_a_folder_that_says_what_it_is(tmp_path: Path) -> None:
    like, state = verified.canonical("llama"), trained("llama")
    app = {"model": state, "optimizer": {"state": {k: {"exp_avg": t} for k, t in state.items()}}, "step": 3}
    dcp.save(app, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    args = ["convert", str(tmp_path / "dcp"), str(tmp_path / "new")]
    with pytest.raises(ZooError, match="--like CANON"):
        open_checkpoint(tmp_path / "dcp")
    assert CliRunner().invoke(cli, [*args, "--like", str(like), "--strict"]).exit_code == 2
    done = CliRunner().invoke(cli, [*args, "--like", str(like), "--dtype", "bf16"])
    assert "its values are no release's" in done.output, done.output
    assert same(held(tmp_path / "new"), {k: t.bfloat16() for k, t in state.items()})
    (note,) = inspected(tmp_path / "new")["notes"]
    assert note == f"left out: {len(state) + 1} entries of dcp that are not the model's (optimizer, step)"

    outermost = {**state, **{k: t for k, t in app.items() if k != "model"}, "train_state": torch.ones(1)}
    dcp.save(outermost, checkpoint_id=str(tmp_path / "outermost"), no_dist=True)  # as torchtitan has it
    assert same(held(zoo.save(tmp_path / "outermost", like, tmp_path / "again")), state)
    (note,) = read(tmp_path / "again").json["notes"]
    assert note.startswith(f"left out: {len(state) + 2} entries") and note.endswith(
        "(optimizer, step, train_state)"
    )

    both = {"model": state, "ema": state}
    dcp.save(both, checkpoint_id=str(tmp_path / "two"), no_dist=True)
    assert "holds several models ('ema.', 'model.')" in refused(tmp_path / "two", like, tmp_path / "x")
    dcp.save({"w": torch.ones(2)}, checkpoint_id=str(tmp_path / "none"), no_dist=True)
    assert "holds no tensor called embed.weight or" in refused(tmp_path / "none", like, tmp_path / "x")


@pytest.mark.parametrize("name", ["gpt2_release", pytest.param("gemma3_vision", marks=pytest.mark.proof)])
def test_files_that_a_trainer_wrote_get_the_names_of_the_folder_that_was_trained(
    name: str, tmp_path: Path
) -> None:
    """With a config beside them or without, in a file of a trainer's own name, under names in memory or those of save_pretrained."""
    like = verified.canonical(name)
    source = verified.ROOT / f"{name}-float32-source"
    state = tiny.upstream(source).state_dict()
    state = {k: t for k, t in state.items() if k != "lm_head.weight"}  # tied: one tensor twice
    by_transformers(name, tmp_path / "saved")
    (tmp_path / "alone").mkdir()
    save_file(state, tmp_path / "alone" / "model.safetensors")
    torch.save({"model": {f"module.{k}": t for k, t in state.items()}, "step": 3}, tmp_path / "last.pt")
    lightning = {"state_dict": {f"model.{k}": t for k, t in state.items()}, "hyper_parameters": {"lr": 0.1}}
    torch.save(lightning, tmp_path / "last.ckpt")
    released = {k: t for f in source.glob("*.safetensors") for k, t in load_file(f).items()}
    for i, written in enumerate(("saved", "alone", "last.pt", "last.ckpt")):
        args = ["convert", str(tmp_path / written), str(tmp_path / f"{i}"), "--like", str(like)]
        done = CliRunner().invoke(cli, args)
        assert done.exit_code == 0, done.output
        back = zoo.export(tmp_path / f"{i}", tmp_path / f"hf{i}")
        assert same({k: t for f in back.glob("*.safetensors") for k, t in load_file(f).items()}, released)
    said = refused(tmp_path / "saved", verified.canonical("llama"), tmp_path)
    assert "its config.json (family " in said and "is of another model than" in said
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    assert "is DeepSpeed's; python zero_to_fp32.py" in refused(tmp_path / "step", like, tmp_path)
    assert "not what a trainer writes" in refused(tmp_path / "x.gguf", like, tmp_path)
    assert "no such file" in refused(tmp_path / "nothing", like, tmp_path)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_nothing_in_a_trainers_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    like, state = verified.canonical("llama"), trained("llama")
    folder = tmp_path / "dcp"
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    pieces = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(pieces[: len(pieces) // 2])
    assert "truncated" in refused(folder, like, tmp_path)
    (folder / "__0_0.distcp").unlink()
    assert "no such file" in refused(folder, like, tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert "which is no part of such a file: not run" in refused(folder, like, tmp_path)
    (folder / ".metadata").write_bytes(b"")
    assert "cannot be read" in refused(folder, like, tmp_path)
    assert not (tmp_path / "ran").exists()
