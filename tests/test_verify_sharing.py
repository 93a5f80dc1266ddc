"""Ranks that stream one model together give the certificate of one process, to the bit, and each reads its part."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import together
from torch.distributed.device_mesh import init_device_mesh
from verified import broken, canonical

import zoo
from zoo.errors import ZooError
from zoo.verify import reading, sharing
from zoo.verify.certificate import Certificate
from zoo.verify.sharing import Sharing
from zoo.verify.stream import StreamedTransformers

N = 2


class Parts:
    """In place of what carries layers to a GPU: each rank reads its part of a weight, and they are put together."""

    def __init__(self, among: Sharing, log: Counter[str]) -> None:
        self.among, self.log = among, log
        self.coming: dict[reading.Range, torch.Tensor] = {}

    def ask(self, ranges: Iterable[reading.Range]) -> Iterable[reading.Range]:
        wanted = list(ranges)
        assert all(said == len(wanted) for said in self.among.all(len(wanted)))
        for path, offset, nbytes in wanted:
            own = self.among.own(nbytes)
            whole = torch.empty(self.among.room_for(nbytes), dtype=torch.uint8)
            whole[own] = reading.mapped_range(path, offset + own.start, own.stop - own.start)
            self.among.complete(whole, nbytes)
            self.coming[path, offset, nbytes] = whole[:nbytes]
            self.log["read"] += own.stop - own.start
            self.log["of"] += nbytes
        return list(self.coming)

    def take(self) -> dict[reading.Range, torch.Tensor]:
        taken, self.coming = self.coming, {}
        return taken

    def close(self) -> None:
        self.coming = {}


def shared_by(n: int, work: Path, runs: list[tuple[Path, str, str | None]], monkeypatch: Any) -> list[Any]:
    """What each of `n` ranks gets of verifying each (folder, dtype, source); and how much of the weights it read."""
    monkeypatch.setattr(sharing, "WHOLE", 1 << 10)
    work.mkdir(parents=True)

    def one(rank: int) -> int:
        torch.set_num_threads(1)
        mesh, log = None, Counter[str]()
        if n > 1:
            dist.init_process_group("gloo", init_method=f"file://{work}/meeting", rank=rank, world_size=n)
            mesh = init_device_mesh("cpu", (n,))
            with pytest.raises(ZooError, match="ranks stream where upstream reads the weights"):
                zoo.verify(runs[0][0], SimpleNamespace(describe=dict), stream=True, mesh=mesh)
        monkeypatch.setattr(
            StreamedTransformers,
            "_ahead",
            lambda _self, _batches, among: None if among is None else Parts(among, log),
        )
        said = [
            zoo.verify(folder, source, level="logits", dtype=dtype, stream=True, mesh=mesh, write=False)
            for folder, dtype, source in runs
        ]
        (work / f"{rank}.json").write_text(json.dumps([[told(c) for c in said], dict(log)]))
        if n > 1:
            dist.destroy_process_group()
        return 0

    assert together(n, one)
    return [json.loads((work / f"{rank}.json").read_text()) for rank in range(n)]


def told(cert: Certificate) -> dict[str, Any]:
    """All of it but when, how long, and by how many ranks."""
    out = cert.to_json()
    for level in out["levels"].values():
        del level["seconds"]
    ranks = out["device"].pop("ranks", 1)
    return {k: v for k, v in out.items() if k not in ("created", "timing", "need")} | {"of ranks": ranks}


def check(runs: list[tuple[Path, str, str | None]], work: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The certificates of ranks are those of one process, and each has read its part; these."""
    (first, read), (second, other) = shared_by(N, work / "several", runs, monkeypatch)
    ((alone, _),) = shared_by(
        1, work / "one", runs, monkeypatch
    )  # in a fork, too: there torch computes, not numba
    assert first == second
    for one, of_ranks in zip(alone, first, strict=True):
        assert (one.pop("of ranks"), of_ranks.pop("of ranks")) == (1, N)
        assert of_ranks == one
    assert read["of"] == other["of"]
    assert all(0.45 * x["of"] < x["read"] < 0.6 * x["of"] for x in (read, other))
    return first  # type: ignore[no-any-return]


def test_ranks_that_stream_have_the_certificate_of_one_process_and_each_reads_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = check([(canonical("qwen3_moe"), "fp32", None)], tmp_path / "ranks", monkeypatch)
    assert found["verdict"] == "passed"


def test_ranks_of_a_program_may_stream_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "WHOLE", 1 << 10)

    def one(rank: int) -> int:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=N)
        mesh = init_device_mesh("cpu", (N,))
        for k in range(3):
            among, whole = Sharing(mesh), torch.zeros(1 << 12, dtype=torch.uint8)
            whole[among.own(len(whole))] = k + rank
            among.complete(whole, len(whole))
            assert among.all(k) == [k] * N and sorted(set(whole.tolist())) == [k, k + 1]
        dist.destroy_process_group()
        return 0

    assert together(N, one)


@pytest.mark.proof
def test_so_they_have_where_something_departs_and_in_lower_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = json.loads((canonical("llama") / "zoo.json").read_text())["source"]["path"]
    wrong = broken("llama", "norm_eps", tmp_path / "wrong")
    runs = [(canonical("gpt_oss", "bfloat16"), "bf16", None), (wrong, "fp32", source)]
    passed, failed = check(runs, tmp_path / "ranks", monkeypatch)
    assert (passed["verdict"], failed["verdict"]) == ("passed", "failed")
    assert failed["diagnosis"]["layer"] == 0
