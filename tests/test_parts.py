"""A conversion in parts: the folder's bytes are those of one process, whoever is killed, and when."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from machine import Machine

from zoo.cli import cli
from zoo.cli._common import run
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.formats.safetensors import INDEX
from zoo.mapping import parts
from zoo.mapping.execute import Execution, convert, sheet_of
from zoo.mapping.folder import STATE
from zoo.mapping.parts import WHOLE, Part, of_process, parse, shares
from zoo.mapping.plan import Plan, make_plan

ROOT = Path(__file__).parents[1]
SHARD = 9_000  # bytes; more files than parts


def plan_of(path: Path, dtype: str | None = None) -> Plan:
    return make_plan(open_checkpoint(path), dtype=dtype)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def together(k: int, n: int) -> Part:
    return Part(k, n, together=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts that are stacked, and extras."""
    at = tmp_path_factory.mktemp("source")
    return tiny.make("deepseek_v3_mtp", at, dtype="bfloat16", max_shard_size=40_000)


@pytest.fixture(scope="module")
def want(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    dst = tmp_path_factory.mktemp("want") / "c"
    return hashes(convert(plan_of(source), dst, shard_size=SHARD))


# --- who does what ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1000), max_size=12), st.integers(1, 6))
def test_the_largest_share_is_as_small_as_it_can_be_and_neighbours_stay_together(
    sizes: list[int], n: int
) -> None:
    named = {f"f{i:02}": size for i, size in enumerate(sizes)}
    cut = shares(named, n)
    assert len(cut) == n and [f for share in cut for f in share] == list(named)
    best = [0.0, *[float("inf")] * len(sizes)]  # of the first i files, by one part more each time
    for _ in range(n):
        best = [min(max(best[j], sum(sizes[j:i])) for j in range(i + 1)) for i in range(len(sizes) + 1)]
    assert max(sum(named[f] for f in share) for share in cut) == best[-1]


def test_files_alike_are_shared_evenly() -> None:
    assert [len(s) for s in shares(dict.fromkeys("abcdefghi", 5), 4)] == [2, 2, 3, 2]


def test_the_launchers_variables_say_which_part_this_is() -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "8"}
    assert of_process(torchrun) == (Part(2, 8), "RANK=1, WORLD_SIZE=8")
    assert of_process(torchrun | {"LOCAL_WORLD_SIZE": "8"}) == (together(2, 8), "RANK=1, WORLD_SIZE=8")
    srun = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
    assert of_process(srun) == (Part(1, 4), "SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=4")
    alone: list[dict[str, str]] = [
        {},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # the batch script, of which there is one
    ]
    assert [of_process(e) for e in alone] == [None] * 4
    for rank, world in (("8", "8"), ("-1", "8"), ("x", "2"), ("0", "")):
        with pytest.raises(ZooError, match=f"RANK={rank}, WORLD_SIZE={world}: expected a rank"):
            of_process({"RANK": rank, "WORLD_SIZE": world})


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/", "1/0", "1/99999999", "-1/2", "1/2/3"])
def test_a_part_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(ZooError, match="part"):
        parse(text)


# --- the bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 40])
def test_the_folder_is_that_of_one_process_and_appears_with_the_last_part(
    n: int, source: Path, want: dict[str, str], tmp_path: Path
) -> None:
    plan, dst = plan_of(source), tmp_path / "c"
    order = list(range(1, n + 1))
    random.Random(n).shuffle(order)
    for left, k in zip(range(n - 1, -1, -1), order):
        assert not dst.exists()
        with Execution(plan, dst, shard_size=SHARD, part=together(k, n)) as run:
            run.feed_here()
            run.finish()
            assert run.folder.published == (left == 0)
    assert hashes(dst) == want
    assert [p.name for p in tmp_path.iterdir()] == ["c"], "nothing is left beside it"


def test_each_writes_only_its_own_files_and_every_byte_once(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source)
    moved = 0
    for k in (1, 2, 3):
        with Execution(plan, tmp_path / "c", shard_size=SHARD, part=Part(k, 3)) as run:
            before = {p: p.read_bytes() for p in (tmp_path / "c.partial" / WHOLE).iterdir()}
            mine = set(run.folder.sizes)
            run.feed_here()
            assert all(p.read_bytes() == data for p, data in before.items() if p.name not in mine)
            moved += run.mover.n_done
            assert run.mover.n_done == run.nbytes > 0
            run.finish()
    sheet = sheet_of(plan, SHARD)
    assert moved == sum(sheet.sizes.values()) - sum(map(len, sheet.headers.values()))


def test_two_that_finish_at_once_publish_once(
    source: Path, want: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[int] = []
    real = parts.put

    def put(*a: object, **k: object) -> None:
        published.append(1)
        time.sleep(0.02)
        real(*a, **k)  # type: ignore[arg-type]

    monkeypatch.setattr(parts, "put", put)
    for trial in range(5):
        dst, gate, errors = tmp_path / f"c{trial}", threading.Barrier(4), list[BaseException]()

        def work(k: int) -> None:
            try:
                with Execution(plan_of(source), dst, shard_size=SHARD, part=together(k, 4)) as run:  # noqa: B023
                    run.feed_here()
                    gate.wait(30)  # noqa: B023
                    run.finish()
            except BaseException as e:
                errors.append(e)  # noqa: B023

        threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2, 3, 4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert errors == [] and len(published) == trial + 1
        assert hashes(dst) == want
    assert len(list(tmp_path.iterdir())) == 5


def test_what_a_killed_part_found_is_told_by_the_one_that_publishes(tmp_path: Path) -> None:
    source = tiny.make("deepseek_v3", tmp_path / "s", dtype="bfloat16", max_shard_size=40_000)
    plan = plan_of(source)
    want = hashes(convert(plan, tmp_path / "want", shard_size=SHARD))
    for n in (1, 2):  # alone, and in parts
        how = {"part": None if n == 1 else together(1, 2)}
        with Execution(plan, tmp_path / f"c{n}", shard_size=SHARD, **how) as run:  # type: ignore[arg-type]
            run._warn("z: a scale is zero")
            run.feed(run.wanted[0])
            run._warn("lost with the process, and found again")
        for k in range(n, 0, -1):
            how = {"part": None if n == 1 else together(k, 2)}
            convert(plan, tmp_path / f"c{n}", shard_size=SHARD, **how)  # type: ignore[arg-type]
        got = hashes(tmp_path / f"c{n}")
        told = json.loads((tmp_path / f"c{n}" / "zoo.json").read_text())
        assert told["warnings"] == ["z: a scale is zero"]
        assert {f for f in want if got[f] != want[f]} == {"zoo.json"}


# --- killed ----------------------------------------------------------------------------------------------------------

SLOWLY = """
import os, sys, time
from zoo.formats import open_checkpoint
from zoo.mapping import execute, folder, parts
from zoo.mapping.plan import make_plan
def slowly(where, name):
    real = getattr(where, name)
    def call(*a, **k):
        time.sleep(0.0005); out = real(*a, **k); time.sleep(0.0005)
        return out
    setattr(where, name, call)
slowly(execute, "copy"), slowly(parts.Shared, "_append"), slowly(folder.Folder, "write")
slowly(os, "rename"), slowly(os, "unlink")
plan = make_plan(open_checkpoint(sys.argv[1]))
def run(dst, k):
    part = parts.Part(int(k), 3, together=True)
    execute.convert(plan, dst, shard_size=int(sys.argv[2]), part=part, threads=1)
"""


def test_parts_killed_at_any_moment_and_started_again_end_with_the_same_bytes(
    source: Path, want: dict[str, str], tmp_path: Path
) -> None:
    draw, killed = random.Random(28), 0
    with Machine(SLOWLY, source, SHARD, errors=tmp_path / "errors") as machine:
        for name in ("the interpreter starts", "timed"):
            began = time.monotonic()
            pids = [machine.start(tmp_path / name.split()[0], k) for k in (1, 2, 3)]
            assert [machine.wait(p) for p in pids] == [0, 0, 0]
        length = time.monotonic() - began
        for n in range(8):
            dst = tmp_path / f"c{n}"
            running = {k: machine.start(dst, k) for k in (1, 2, 3)}
            while running:
                time.sleep(draw.uniform(0, length * 0.8))
                for k in draw.sample(sorted(running), draw.randint(0, len(running))):
                    os.kill(running[k], signal.SIGKILL)
                for k, pid in list(running.items()):
                    if machine.wait(pid) == 0:
                        del running[k]
                    else:
                        killed += 1
                        running[k] = machine.start(dst, k)
            assert hashes(dst) == want
            assert not dst.with_name(f"c{n}.partial").exists()
    assert killed > 0, "the kills came too late to mean anything"


def test_a_part_goes_on_where_it_was_and_one_of_another_machine_believes_what_was_synced(
    source: Path, want: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, dst = plan_of(source), tmp_path / "c"
    for part in (together(1, 2), Part(2, 2)):
        with Execution(plan, dst, shard_size=SHARD, part=part) as run:
            first, *rest = run.wanted
            run.feed(first)
        with Execution(plan, dst, shard_size=SHARD, part=part) as run:
            assert run.wanted == rest
    convert(plan, dst, shard_size=SHARD, part=Part(2, 2))
    with monkeypatch.context() as m:
        m.setattr(parts, "boot", lambda: "another machine")
        with Execution(plan, dst, shard_size=SHARD, part=Part(2, 2)) as run:
            assert run.wanted[0] == first, "what was in memory may be lost"
            run.feed_here()
            run.finish()
    convert(plan, dst, shard_size=SHARD, part=Part(1, 2))
    assert hashes(dst) == want


def test_a_part_that_is_started_again_after_all_is_done_finds_it_done(
    source: Path, want: dict[str, str], tmp_path: Path
) -> None:
    plan, dst = plan_of(source), tmp_path / "c"
    for k in (1, 2):
        convert(plan, dst, shard_size=SHARD, part=together(k, 2))
    inode = (dst / INDEX).stat().st_ino
    dst.with_name("c.partial").mkdir()  # as a kill before the end of tidying leaves it
    (dst.with_name("c.partial") / parts.TURN).touch()
    with Execution(plan, dst, shard_size=SHARD, part=together(1, 2)) as run:
        assert run.wanted == [] and run.folder.published
    assert (dst / INDEX).stat().st_ino == inode and hashes(dst) == want
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(ZooError, match="exists already"):
        convert(plan_of(source, "fp32"), dst, part=together(1, 2))


def test_with_force_the_last_part_replaces_what_was_there(
    source: Path, want: dict[str, str], tmp_path: Path
) -> None:
    dst = convert(plan_of(source, "fp32"), tmp_path / "c")
    before = hashes(dst)
    for k in (1, 2):
        assert hashes(dst) == before
        convert(plan_of(source), dst, shard_size=SHARD, part=together(k, 2), force=True)
    assert hashes(dst) == want and [p.name for p in tmp_path.iterdir()] == ["c"]


# --- refused ---------------------------------------------------------------------------------------------------------


def test_a_part_of_another_conversion_is_refused_and_what_is_there_is_kept(
    source: Path, want: dict[str, str], tmp_path: Path
) -> None:
    plan, dst = plan_of(source), tmp_path / "c"
    convert(plan, dst, shard_size=SHARD, part=together(1, 2))
    refused = [
        (plan_of(source, "fp32"), Part(2, 2), f"the plan is {plan.digest}, that of part 2 of 2 "),
        (plan, Part(2, 3), "parts is 2, that of part 2 of 3 3"),
        (plan_of(tiny.make("llama", tmp_path / "other")), Part(2, 2), f"the source is {source}"),
    ]
    for other, part, says in refused:
        with pytest.raises(ZooError, match=f"c.partial: other parts convert something else: .*{says}"):
            convert(other, dst, shard_size=SHARD, part=part)
    file = source / next(iter(plan.checkpoint.files))
    times = file.stat()
    os.utime(file)
    try:
        with pytest.raises(ZooError, match="the source's files"):
            convert(plan, dst, shard_size=SHARD, part=Part(2, 2))
    finally:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ZooError, match="begun by a conversion in parts"):
        convert(plan, dst, shard_size=SHARD)
    convert(plan, dst, shard_size=SHARD, part=together(2, 2))
    assert hashes(dst) == want


def test_parts_do_not_join_a_conversion_by_one_process(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source)
    with Execution(plan, tmp_path / "c") as run:
        run.feed(run.wanted[0])
        with pytest.raises(ZooError, match="another process is writing it"):
            convert(plan, tmp_path / "c", part=Part(1, 2))
    with pytest.raises(ZooError, match="not in parts: let it finish, or remove it"):
        convert(plan, tmp_path / "c", part=Part(1, 2))
    convert(plan, tmp_path / "c")


def test_one_part_is_done_by_one_process_at_a_time(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source)
    with Execution(plan, tmp_path / "c", part=Part(1, 2)):
        with pytest.raises(ZooError, match="another process is writing part 1 of 2"):
            convert(plan, tmp_path / "c", part=Part(1, 2))
        with pytest.raises(ZooError, match="another process is writing it"):
            convert(plan, tmp_path / "c")
        convert(plan, tmp_path / "c", part=Part(2, 2))


@pytest.mark.parametrize("wrote", [OSError(28, "No space left on device"), 3])
def test_a_part_whose_notes_do_not_fit_on_the_disk_says_so(
    wrote: OSError | int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(fd: int, data: bytes) -> int:
        if isinstance(wrote, OSError):
            raise wrote
        return wrote

    monkeypatch.setattr("zoo.mapping.parts.os.write", write)
    with pytest.raises(ZooError, match=r"cannot be written: (No space left|no space left)"):
        convert(make_plan(open_checkpoint(source)), tmp_path / "c", part=Part(1, 2))


def test_a_file_that_lost_bytes_is_not_published(source: Path, tmp_path: Path) -> None:
    plan, dst = plan_of(source), tmp_path / "c"
    convert(plan, dst, part=together(1, 2))
    victim = next(p for p in (tmp_path / "c.partial" / WHOLE).iterdir() if p.stat().st_size)
    os.truncate(victim, 100)
    with pytest.raises(ZooError, match=f"{victim.name} has 100 bytes"):
        convert(plan, dst, part=together(2, 2))
    assert not dst.exists()
    convert(plan, dst, part=together(1, 2))
    assert hashes(dst) == hashes(convert(plan, tmp_path / "want"))


@pytest.mark.parametrize("planted", ["partial", "whole", "file", "journal", "turn", "state"])
def test_a_link_in_what_the_parts_share_is_not_followed(planted: str, source: Path, tmp_path: Path) -> None:
    plan, dst = plan_of(source), tmp_path / "c"
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "keep").write_text("keep")
    partial = tmp_path / "c.partial"
    if planted == "partial":
        partial.symlink_to(theirs)
    else:
        with Execution(plan, dst, part=Part(1, 2)) as run:
            mine = next(iter(run.folder.sizes))
        at = partial / {
            "whole": WHOLE, "file": f"{WHOLE}/{mine}", "journal": ".zoo-part-1-of-2.jsonl", "turn": parts.TURN,
            "state": STATE,
        }[planted]  # fmt: skip
        if at.is_dir():
            for p in at.iterdir():
                p.unlink()
            at.rmdir()
        else:
            at.unlink()
        at.symlink_to(theirs if planted == "whole" else theirs / "keep")
    with pytest.raises(ZooError):
        convert(plan, dst, part=Part(1, 2))
    assert [p.name for p in theirs.iterdir()] == ["keep"] and (theirs / "keep").read_text() == "keep"


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_aloud_which_part_it_does_and_when_the_folder_appears(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = str(tmp_path / "c")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(cli, ["convert", str(source), dst]) == 0
    told = capsys.readouterr()
    assert "part 2 of 2, since RANK=1, WORLD_SIZE=2" in told.err
    assert f"part 2 of 2 is finished; {dst} appears when these are, too: 1" in told.err and told.out == ""
    assert run(cli, ["convert", str(source), dst, "--part", "2/2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"part": "2/2", "appears_later": dst}
    monkeypatch.setenv("RANK", "0")
    assert run(cli, ["convert", str(source), dst]) == 0
    assert f"converted to {dst}" in capsys.readouterr().out
    assert run(cli, ["convert", str(source), str(tmp_path / "alone"), "--part", "1/1"]) == 0
    assert hashes(tmp_path / "alone") == hashes(tmp_path / "c")
    assert run(cli, ["convert", str(source), dst, "--verify", "bytes"]) == 1
    assert "verified when all are finished" in capsys.readouterr().err
    assert run(cli, ["convert", str(source), dst, "--part", "3/2"]) == 2
