"""Fuzz zoo's readers along their branches: `make fuzz-guided SECONDS=600`, or `python fuzz/guided.py --seconds 60`.

Atheris (libFuzzer) keeps each input that reaches lines of zoo which none reached before, and goes on from there; half
of its mutations replace parts of JSON, as fuzz/run.py does. A target runs in a process of its own, which an input that
takes 5 s or 1 GiB ends. What is found is kept in fuzz/found/; the inputs that reach new lines in build/fuzz/, where the
next run begins. Counts go to the file that -o names.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
CORPUS = ROOT.parent / "build" / "fuzz"
FOUND = ROOT / "found"
LONGEST = 1 << 14  # bytes of an input
BASE = 600  # MiB that torch and zoo take before anything is read


def one(name: str, arguments: list[str]) -> None:
    """Be the process of one target: ends by itself, with libFuzzer's exit code."""
    import atheris  # type: ignore[import-not-found,unused-ignore]

    with atheris.instrument_imports(include=["zoo"], enable_loader_override=False):
        import targets
    from run import mutated

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if data and rng.random() < 0.5:
            return mutated(data, rng)[:longest]
        return bytes(atheris.Mutate(data, longest))

    for n, data in enumerate(targets.seeds(name)):
        (CORPUS / name / f"seed-{n}").write_bytes(data)
    atheris.Setup([name, *arguments], lambda data: targets.judged(name, data), custom_mutator=mutate)
    atheris.Fuzz()


def run(name: str, seconds: float, seed: int) -> dict[str, Any]:
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    FOUND.mkdir(exist_ok=True)
    options = [
        f"-max_total_time={max(1, round(seconds))}", f"-seed={seed}", f"-max_len={LONGEST}", "-timeout=5", "-len_control=0",
        f"-rss_limit_mb={BASE + 1024}", f"-artifact_prefix={FOUND}/{name}-", "-print_final_stats=1", str(CORPUS / name),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, "--one", name, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    )  # fmt: skip
    said = {k: int(v) for k, v in re.findall(r"stat::(\w+): +(\d+)", done.stdout)}
    reached = re.findall(r"cov: (\d+)", done.stdout)
    result: dict[str, Any] = {
        "executions": said.get("number_of_executed_units", 0),
        "branches": int(reached[-1]) if reached else 0,
        "slowest_s": said.get("slowest_unit_time_sec", 0),
        "found": [],
    }
    if done.returncode:
        kept = re.findall(r"Test unit written to (\S+)", done.stdout)
        why = re.findall(r"(?m)^(?:Uncaught|ERROR|==\d+== ?ERROR|\w+(?:Error|Exception)\b).*", done.stdout)
        result["found"] = [{"input": [Path(k).name for k in kept], "why": why[-3:] or done.stdout[-300:]}]
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3:])
    from run import command

    sys.exit(command(__doc__, "fuzz-guided", run))
