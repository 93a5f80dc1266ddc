"""The benchmarks that need several GPUs run on a CPU, too: so that they still run when there are some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.proof
@pytest.mark.parametrize(
    ("script", "last"), [("mesh.py", "70B: decode ms"), ("stream_ranks.py", "loading: seconds")]
)
def test_what_is_measured_on_several_gpus_runs_on_a_cpu(script: str, last: str, tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "benchmarks" / script),
         "--tiny", "--tmp", str(tmp_path)],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-3000:]
    found = [json.loads(line) for line in said.stdout.splitlines() if line.startswith("{")]
    assert any(last in line for line in found)


@pytest.mark.proof
def test_a_folder_of_random_weights_that_is_measured_is_one_that_zoo_reads(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from gpu import zoo_json
    finally:
        sys.path.pop(0)
    import tiny

    import zoo
    from zoo.formats import canonical

    folder = zoo.convert(tiny.make("llama", tmp_path / "source"), tmp_path / "canonical")
    (folder / "zoo.json").write_text(json.dumps(zoo_json(zoo.spec(folder))))
    assert canonical.read(folder).source["family"] == "llama"
