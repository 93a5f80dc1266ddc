"""Converting: the canonical bytes are those of an independent assembly; the folder appears whole or not at all;
whatever interrupts it, running again ends with the same bytes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.formats.canonical import read
from zoo.mapping import decode, execute, moves, ways
from zoo.mapping.execute import Execution, convert
from zoo.mapping.folder import STATE, Folder
from zoo.mapping.plan import Plan, make_plan
from zoo.system import libc
from zoo.testing.assemble import assemble

ROOT = Path(__file__).parents[1]


def plan_of(path: Path, dtype: str | None = None) -> Plan:
    return make_plan(open_checkpoint(path), dtype=dtype)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for f in read(folder).files:
        out |= load_file(folder / f)
    return out


def raw(t: torch.Tensor) -> torch.Tensor:
    """Bits, so that NaN equals itself."""
    return t.contiguous().view(torch.uint8) if t.ndim else t.reshape(1).view(torch.uint8)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert sorted(a) == sorted(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(raw(a[name]), raw(b[name])), name


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("llama"), dtype="bfloat16", max_shard_size=20_000)


# --- the bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next", "gpt2", "nemotron_h", "llama4"])
def test_the_way_through_memory_gives_the_same_bytes_in_pieces_of_any_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.make(name, tmp_path / "source", dtype="bfloat16")
    convert(plan_of(source), tmp_path / "whole")
    monkeypatch.setattr(execute, "in_kernel", lambda loop, itemsize: False)
    monkeypatch.setattr(decode, "_MAPPED", 1)
    for chunk in (700, 9_000):
        monkeypatch.setattr(decode, "MAPPED", chunk)
        convert(plan_of(source), tmp_path / f"pieces{chunk}")
        assert_same(weights(tmp_path / "whole"), weights(tmp_path / f"pieces{chunk}"))


def test_bytes_are_the_same_while_every_way_is_tried(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    convert(plan_of(llama), tmp_path / "a")
    used: set[str] = set()
    for name, way in ways.WAYS.items():
        monkeypatch.setitem(ways.WAYS, name, lambda name=name, way=way: used.add(name) or way())
    for module in (moves, execute):
        monkeypatch.setattr(module, "COPY", 64)
    monkeypatch.setattr(ways, "BUFFER", ways.PAGE + 48)
    monkeypatch.setattr(ways, "TRIAL", 64)
    with caplog.at_level("DEBUG", "zoo"):
        convert(plan_of(llama), tmp_path / "b", threads=2)
    assert used == set(ways.WAYS)
    assert re.search(r"copying [a-z ]+, [12] threads?: \d+\.\d GB/s \(", caplog.text)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


@pytest.mark.parametrize("page", [1, 1 << 30], ids=["alike in their pages", "otherwise"])
def test_a_kernel_that_cannot_copy_is_done_without(
    page: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def unsupported(*_: object) -> int:
        asked.append(1)
        raise OSError(18, "Invalid cross-device link")

    convert(plan_of(llama), tmp_path / "a")
    monkeypatch.setattr(moves, "PAGE", page)
    for module in (moves, execute):
        monkeypatch.setattr(module, "COPY", 64)
    monkeypatch.setattr(ways, "TRIAL", 64)
    monkeypatch.setattr(os, "copy_file_range", unsupported)
    convert(plan_of(llama), tmp_path / "b", threads=2)
    assert 1 <= len(asked) <= 2  # at most once by each thread
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_the_number_of_threads_does_not_show(llama: Path, tmp_path: Path) -> None:
    for n in (1, 3):
        convert(plan_of(llama), tmp_path / f"t{n}", threads=n)
    assert hashes(tmp_path / "t1") == hashes(tmp_path / "t3")


def test_tensors_are_aligned_to_their_elements(tmp_path: Path) -> None:
    source = tiny.make("deepseek_v3", tmp_path / "s", dtype="bfloat16")  # selection biases are fp32
    convert(plan_of(source), tmp_path / "c")
    c = read(tmp_path / "c")
    assert {t.dtype for t in c.tensors.values()} == {"BF16", "F32"}
    for t in c.tensors.values():
        assert t.offset % (4 if t.dtype == "F32" else 2) == 0


def test_a_shard_ends_before_it_grows_over_its_size(llama: Path, tmp_path: Path) -> None:
    convert(plan_of(llama), tmp_path / "c", shard_size=10_000)
    c = read(tmp_path / "c")
    sizes: dict[str, list[int]] = {}
    for t in c.tensors.values():
        sizes.setdefault(t.file, []).append(t.nbytes)
    assert len(sizes) > 2
    assert all(sum(s) <= 10_000 or len(s) == 1 for s in sizes.values())
    assert all(re.fullmatch(rf"model-\d{{5}}-of-{len(sizes):05}\.safetensors", f) for f in sizes)


# --- casts ----------------------------------------------------------------------------------------------------------

NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("to", list(NAMES))
@pytest.mark.parametrize("given_dtype", ["float32", "bfloat16", "float16"])
def test_a_cast_is_torchs(given_dtype: str, to: str, tmp_path: Path) -> None:
    source = tiny.make("gpt_oss", tmp_path / "s", dtype=given_dtype)
    convert(plan_of(source, to), tmp_path / "c")
    assert_same(weights(tmp_path / "c"), {n: t.to(NAMES[to]) for n, t in assemble(source).items()})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_fp32_to_bf16_rounds_to_nearest_even_for_any_bits(bits: list[int]) -> None:
    import numpy as np

    from zoo.quant.floats import from_float

    x = np.array(bits, np.uint32).view(np.float32)
    want = torch.from_numpy(x.copy()).to(torch.bfloat16)
    got = torch.from_numpy(from_float(x, "BF16", "x").view(np.int16)).view(torch.bfloat16)
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int16), want[~nan].view(torch.int16))


def test_a_value_beyond_fp16_is_refused_with_the_tensors_name(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for f in open_checkpoint(llama).files:
        tensors |= load_file(llama / f)
    tensors["model.norm.weight"][3:5] = torch.tensor(
        [1e6, torch.inf]
    )  # an infinity beside it changes nothing
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(ZooError, match=r"model.norm.weight: .*beyond fp16.*bf16"):
        convert(plan_of(source, "fp16"), tmp_path / "c")
    assert not (tmp_path / "c").exists()


# --- what lies beside the tensors --------------------------------------------------------------------------------------


def test_the_folder_says_where_it_comes_from(llama: Path, tmp_path: Path) -> None:
    (llama / "modeling_llama.py").write_text("raise SystemExit")
    (llama / "tokenizer.json").write_text("{}")
    try:
        plan = plan_of(llama)
        convert(plan, tmp_path / "c", source={"origin": "elsewhere"})
    finally:
        (llama / "modeling_llama.py").unlink()
        (llama / "tokenizer.json").unlink()
    j = json.loads((tmp_path / "c" / "zoo.json").read_text())
    assert (
        j["layout_version"] == 1 and j["source"]["family"] == "llama" and j["source"]["origin"] == "elsewhere"
    )
    assert j["source"]["files"] == {f: (llama / f).stat().st_size for f in plan.checkpoint.files}
    assert (tmp_path / "c" / "config.released.json").read_bytes() == (llama / "config.json").read_bytes()
    assert (tmp_path / "c" / "tokenizer.json").exists()
    assert not list((tmp_path / "c").glob("*.py")), "code is never carried"


def test_what_it_leaves_is_a_folder_that_any_reader_of_safetensors_opens(llama: Path, tmp_path: Path) -> None:
    convert(plan_of(llama), tmp_path / "c")
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "c" / file)
    assert not list(tmp_path.glob("*.partial"))


def test_transformers_fails_at_once_on_what_it_leaves_and_loads_what_is_exported(
    llama: Path, tmp_path: Path
) -> None:
    """With the release's config.json in it, it would load: random weights, with a report."""
    from transformers import AutoModelForCausalLM

    from zoo.mapping.export import export

    convert(plan_of(llama), tmp_path / "c")
    with pytest.raises((OSError, ValueError), match=r"config\.json|Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    export(tmp_path / "c", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (llama / "config.json").read_bytes()
    assert not (tmp_path / "back" / "config.released.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_extras_keep_their_reasons(tmp_path: Path) -> None:
    source = tiny.make("deepseek_v3_mtp", tmp_path / "s")
    convert(plan_of(source), tmp_path / "c")
    c = read(tmp_path / "c")
    assert sorted(c.extras) == sorted(c.extra_tensors) and len(c.extras) > 10
    assert all("multi-token" in reason for reason in c.extras.values())


def test_some_layers_can_be_converted_alone(tmp_path: Path) -> None:
    source = tiny.make("qwen3", tmp_path / "s")
    convert(plan_of(source).restrict([0, 2]), tmp_path / "c")
    c = read(tmp_path / "c")
    assert c.layers == (0, 2)
    assert {n.split(".")[1] for n in c.tensors if n.startswith("layers.")} == {"0", "2"}


# --- file by file ------------------------------------------------------------------------------------------------------


def test_files_may_come_in_any_order_and_are_not_needed_any_more_once_consumed(
    llama: Path, tmp_path: Path
) -> None:
    convert(plan_of(llama), tmp_path / "want")
    plan = plan_of(llama)
    with Execution(plan, tmp_path / "got") as run:
        order = run.wanted
        random.Random(0).shuffle(order)
        assert len(order) > 3
        for n, file in enumerate(order):
            away = tmp_path / f"arrived-{n}"  # it lies elsewhere, and is gone afterwards
            away.write_bytes((llama / file).read_bytes())
            assert file in run.feed(file, away)
            away.unlink()
        run.finish()
    assert hashes(tmp_path / "got") == hashes(tmp_path / "want")


def test_it_is_not_finished_before_every_file_was_fed(llama: Path, tmp_path: Path) -> None:
    with Execution(plan_of(llama), tmp_path / "c") as run:
        run.feed(run.wanted[0])
        with pytest.raises(ZooError, match="not complete"):
            run.finish()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("durable", [False, True])
def test_an_interrupted_run_goes_on_and_does_not_want_what_it_has(
    llama: Path, tmp_path: Path, durable: bool
) -> None:
    convert(plan_of(llama), tmp_path / "want")
    with Execution(plan_of(llama), tmp_path / "got", durable=durable) as run:
        first, *rest = run.wanted
        run.feed(first)
    with Execution(plan_of(llama), tmp_path / "got", durable=durable) as run:
        assert run.wanted == rest
        assert run.feed(first) == [first]
        for file in rest:
            run.feed(file)
        run.finish()
    assert hashes(tmp_path / "got") == hashes(tmp_path / "want")


def test_after_a_crash_of_the_machine_only_what_was_synced_is_believed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.mapping import folder

    for durable, believed in ((False, 0), (True, 1)):
        dst = tmp_path / f"c{durable}"
        with Execution(plan_of(llama), dst, durable=durable) as run:
            everything = run.wanted
            run.feed(everything[0])
        with monkeypatch.context() as m:
            m.setattr(folder, "boot", lambda: "another boot")
            with Execution(plan_of(llama), dst, durable=durable) as run:
                assert run.wanted == everything[believed:]


def test_another_job_does_not_go_on_with_what_this_one_left(llama: Path, tmp_path: Path) -> None:
    with Execution(plan_of(llama), tmp_path / "c") as run:
        everything = run.wanted
        run.feed(everything[0])
    with Execution(plan_of(llama, "fp32"), tmp_path / "c") as run:
        assert run.wanted == everything
    os.utime(llama / everything[0])
    with Execution(plan_of(llama), tmp_path / "c") as run:
        assert run.wanted == everything, "the source has been written since"


# --- interruptions -------------------------------------------------------------------------------------------------------

SLOWLY = """
import sys, time
from zoo.formats import open_checkpoint
from zoo.mapping import execute, folder, moves
from zoo.mapping.plan import make_plan
real_copy, real_mark, real_write = execute.copy, folder.Folder.mark, folder.Folder.write
def copy(*a):
    time.sleep(0.004); real_copy(*a)
def mark(self, *a):
    time.sleep(0.004); real_mark(self, *a); time.sleep(0.004)
def write(self, name, data):
    time.sleep(0.004); real_write(self, name, data); time.sleep(0.004)
execute.copy, folder.Folder.mark, folder.Folder.write = copy, mark, write
real_rename = folder.os.rename
def rename(a, b, **k):
    time.sleep(0.01); real_rename(a, b, **k); time.sleep(0.01)
folder.os.rename = rename
plan = make_plan(open_checkpoint(sys.argv[1]))
print("go", flush=True)
execute.convert(plan, sys.argv[2], force=len(sys.argv) > 3)
"""


def start(source: Path, dst: Path, *more: str) -> subprocess.Popen[str]:
    p = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, str(source), str(dst), *more],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert p.stdout is not None and p.stdout.readline() == "go\n"
    return p


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_killed_at_any_moment_the_folder_is_complete_or_absent_and_running_again_succeeds(
    how: signal.Signals, llama: Path, tmp_path: Path
) -> None:
    plan = plan_of(llama)
    convert(plan, tmp_path / "want")
    want = hashes(tmp_path / "want")
    began = time.monotonic()
    assert start(llama, tmp_path / "timed").wait() == 0
    length = time.monotonic() - began
    draw = random.Random(how)
    killed = 0
    for n in range(12):
        dst = tmp_path / f"c{n}"
        p = start(llama, dst)
        time.sleep(draw.uniform(0, length * 0.5))
        p.send_signal(how)
        killed += p.wait() != 0
        if dst.exists():
            assert hashes(dst) == want
        else:
            convert(plan, dst)
            assert hashes(dst) == want
        assert not dst.with_name(f"c{n}.partial").exists()
    assert killed > 3, "the kills came too late to mean anything"


def test_killed_while_replacing_a_folder_the_old_or_the_new_one_is_there_or_comes_back(
    llama: Path, tmp_path: Path
) -> None:
    other = tiny.make("qwen3", tmp_path / "other")
    convert(plan_of(other), tmp_path / "old")
    convert(plan_of(llama), tmp_path / "new")
    old, new = hashes(tmp_path / "old"), hashes(tmp_path / "new")
    draw = random.Random(1)
    for n in range(8):
        dst = tmp_path / f"c{n}"
        convert(plan_of(other), dst)
        p = start(llama, dst, "--force")
        time.sleep(draw.uniform(0.05, 0.6))
        p.kill()
        p.wait()
        if dst.exists():
            assert hashes(dst) in (old, new)
        convert(plan_of(llama), dst, force=True)
        assert hashes(dst) == new
        assert sorted(tmp_path.glob(f"c{n}*")) == [dst], "nothing stale is left"


# --- destinations ------------------------------------------------------------------------------------------------------


def test_an_existing_destination_is_refused_and_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine").write_text("x")
    with pytest.raises(ZooError, match=r"exists already.*--force"):
        convert(plan_of(llama), tmp_path / "c")
    with pytest.raises(ZooError, match="holds what zoo did not write"):
        convert(plan_of(llama), tmp_path / "c", force=True)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["mine"]
    assert not (tmp_path / "c.partial").exists()


def test_with_force_what_somebody_put_beside_the_weights_is_not_lost(llama: Path, tmp_path: Path) -> None:
    dst = convert(make_plan(open_checkpoint(llama)), tmp_path / "c")
    (dst / "parity.json").write_text("{}")
    (dst / "notes.txt").write_text("mine")
    with pytest.raises(ZooError, match="holds what zoo did not write"):
        convert(make_plan(open_checkpoint(llama)), dst, force=True)
    assert (dst / "notes.txt").read_text() == "mine"
    (dst / "notes.txt").unlink()
    convert(make_plan(open_checkpoint(llama)), dst, force=True)
    assert not (dst / "parity.json").exists()


def test_with_force_a_canonical_folder_is_replaced_at_the_end(llama: Path, tmp_path: Path) -> None:
    convert(plan_of(tiny.make("qwen3", tmp_path / "other")), tmp_path / "c")
    before = hashes(tmp_path / "c")
    with Execution(plan_of(llama), tmp_path / "c", force=True) as run:
        for file in run.wanted:
            run.feed(file)
        assert hashes(tmp_path / "c") == before
        run.finish()
    assert read(tmp_path / "c").source["family"] == "llama"


def test_a_destination_that_holds_the_source_is_refused(llama: Path) -> None:
    with pytest.raises(ZooError, match="holds the source"):
        convert(plan_of(llama), llama, force=True)
    with pytest.raises(ZooError, match="holds the source"):
        convert(plan_of(llama), llama.parent, force=True)


def test_a_destination_that_cannot_be_written_is_named(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for dst in (Path("/proc/zoo/c"), tmp_path / "file" / "c"):
        with pytest.raises(ZooError, match=f"{re.escape(str(dst))}: cannot be written"):
            convert(plan_of(llama), dst)


def test_a_disk_that_is_too_small_is_noticed_before_the_first_byte(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstatvfs

    def small(fd: int) -> os.statvfs_result:
        s = list(real(fd))
        s[4] = 3  # f_bavail
        return os.statvfs_result(s)

    monkeypatch.setattr(os, "fstatvfs", small)
    with pytest.raises(ZooError, match=r"needs [\d,]+ bytes, its disk has [\d,]+ free"):
        convert(plan_of(llama), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_blocks_are_reserved_when_a_file_is_first_written_or_done_without(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Execution(plan_of(llama), tmp_path / "c")
    with run:
        probe = os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT)
        if libc.reserve(probe, 1 << 20):  # not every file system can
            assert os.fstat(probe).st_blocks * 512 >= 1 << 20
            for name, size in run.sheet.sizes.items():
                assert os.fstat(run.folder.fd(name)).st_blocks * 512 >= size
        os.close(probe)
        run.feed_here()
        run.finish()
    assert_same(weights(tmp_path / "c"), assemble(llama))
    monkeypatch.setattr(libc, "_libc", lambda: None)  # another system
    convert(plan_of(llama), tmp_path / "d")
    assert_same(weights(tmp_path / "d"), assemble(llama))


def test_a_disk_that_has_no_blocks_to_reserve_is_one_message_and_running_again_goes_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, size: int) -> bool:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(libc, "reserve", full)
        with pytest.raises(ZooError, match="No space left on device; what is written so far is kept"):
            convert(plan_of(llama), tmp_path / "c")
    assert not (tmp_path / "c").exists()
    convert(plan_of(llama), tmp_path / "c")
    assert_same(weights(tmp_path / "c"), assemble(llama))


def test_a_disk_that_fills_up_midway_is_one_message_and_running_again_goes_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., None] = execute.copy
    calls = iter(range(1000))

    def full(*args: object) -> None:
        if next(calls) == 6:
            raise OSError(28, "No space left on device")
        real(*args)

    with monkeypatch.context() as m:
        m.setattr(execute, "copy", full)
        with pytest.raises(ZooError, match="No space left on device; what is written so far is kept"):
            convert(plan_of(llama), tmp_path / "c", threads=1)
    assert not (tmp_path / "c").exists()
    convert(plan_of(llama), tmp_path / "c")
    assert_same(weights(tmp_path / "c"), assemble(llama))


def test_two_at_once_do_not_write_one_folder(llama: Path, tmp_path: Path) -> None:
    with (
        Execution(plan_of(llama), tmp_path / "c"),
        pytest.raises(ZooError, match="another process is writing it"),
    ):
        convert(plan_of(llama), tmp_path / "c")
    convert(plan_of(llama), tmp_path / "c")


def test_the_lock_goes_with_the_process(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "c.partial").mkdir()
    fd = os.open(tmp_path / "c.partial", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(ZooError, match="another process"):
        convert(plan_of(llama), tmp_path / "c")
    os.close(fd)
    convert(plan_of(llama), tmp_path / "c")


@pytest.mark.parametrize("there", ["a folder", "a link to one"])
def test_a_partial_folder_that_zoo_did_not_begin_is_not_touched(
    there: str, llama: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "c.partial" if there == "a folder" else tmp_path / "elsewhere"
    theirs.mkdir()
    (theirs / "notes").write_text("keep")
    if there != "a folder":
        (tmp_path / "c.partial").symlink_to(theirs)
    with pytest.raises(ZooError, match=re.escape("c.partial: is in the way")):
        convert(plan_of(llama), tmp_path / "c")
    assert [p.name for p in theirs.iterdir()] == ["notes"] and not (tmp_path / "c").exists()


def test_neighbours_with_likely_names_are_not_touched(llama: Path, tmp_path: Path) -> None:
    plan = plan_of(llama)
    convert(plan, tmp_path / "c.old")  # a user put it aside
    before = hashes(tmp_path / "c.old")
    convert(plan, tmp_path / "c")
    convert(plan, tmp_path / "c", force=True)
    assert hashes(tmp_path / "c.old") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c.old"]


def test_a_folder_that_waits_for_its_new_name_is_ours(llama: Path, tmp_path: Path) -> None:
    convert(plan_of(llama), tmp_path / "c.partial")  # as a kill between the last two steps leaves it
    convert(plan_of(llama), tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_partial_is_ours_from_its_first_file_to_its_last(llama: Path, tmp_path: Path) -> None:
    """Killed while it is begun or thrown away, it must not be taken for somebody else's."""
    with Execution(plan_of(llama), tmp_path / "c"):
        pass
    names = sorted(p.name for p in (tmp_path / "c.partial").iterdir())
    assert STATE in names and len(names) > 1
    unlinked: list[str] = []
    real = os.unlink
    with Execution(plan_of(llama), tmp_path / "c") as again, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", lambda p, *a, **k: (unlinked.append(Path(p).name), real(p, *a, **k)))
        again.folder.discard()
    assert sorted(unlinked) == names and unlinked[-1] == STATE


def test_a_file_that_would_lie_outside_is_refused(tmp_path: Path) -> None:
    for name in ("../x", "/tmp/x", "a/../../x", ""):
        with pytest.raises(ZooError, match="outside"):
            Folder(tmp_path / "c", {name: 1}, "job")
        with Folder(tmp_path / "c", {}, "job") as folder, pytest.raises(ZooError, match="outside"):
            folder.write(name, b"x")


# --- what it costs ------------------------------------------------------------------------------------------------------

LEAN = """
import sys
from zoo.formats import open_checkpoint
from zoo.mapping.execute import convert
from zoo.mapping.plan import make_plan
convert(make_plan(open_checkpoint(sys.argv[1])), sys.argv[2])
assert not {"torch", "numpy"} & set(sys.modules), "moving bytes needs no tensor library"
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_moving_bytes_takes_no_tensor_library_and_little_memory(tmp_path: Path) -> None:
    source = tmp_path / "s"
    tiny.make("llama", source, dtype="bfloat16")
    config = json.loads((source / "config.json").read_text())
    config |= {"vocab_size": 200_000, "hidden_size": 512, "num_attention_heads": 8, "head_dim": 64}
    config |= {"num_key_value_heads": 4, "intermediate_size": 4096}
    (source / "config.json").write_text(json.dumps(config))
    shapes = {
        "input_layernorm": (512,), "post_attention_layernorm": (512,), "self_attn.q_proj": (512, 512),
        "self_attn.k_proj": (256, 512), "self_attn.v_proj": (256, 512), "self_attn.o_proj": (512, 512),
        "mlp.gate_proj": (4096, 512), "mlp.up_proj": (4096, 512), "mlp.down_proj": (512, 4096),
    }  # fmt: skip
    big = {
        "model.embed_tokens.weight": (200_000, 512),
        "lm_head.weight": (200_000, 512),
        "model.norm.weight": (512,),
    }
    big |= {f"model.layers.{i}.{n}.weight": s for i in range(3) for n, s in shapes.items()}
    save_file({n: torch.empty(s, dtype=torch.bfloat16) for n, s in big.items()}, source / "model.safetensors")
    assert (source / "model.safetensors").stat().st_size > 400 << 20
    done = subprocess.run(
        [sys.executable, "-c", LEAN, str(source), str(tmp_path / "c")],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) / 1024 < 64, "MiB of peak RSS"
