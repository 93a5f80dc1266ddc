"""How long the command line takes to start, beside `python -c "import click"`.

    python benchmarks/startup.py [--rounds 15] [--json FILE]

Medians of interleaved runs, in the interpreter that runs this file. And how long `zoo plan` takes of a checkpoint
with the 92,000 headers of DeepSeek-V3's release, over holes (needs tests/ beside this folder, and torch).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from about import machine

ROOT = Path(__file__).resolve().parents[1]
CLICK = [sys.executable, "-c", "import click"]
ZOO = [sys.executable, "-c", "from zoo.cli import main; main()"]  # what the installed script runs
COMMANDS = {
    "import click": CLICK,
    "zoo --help": [*ZOO, "--help"],
    "zoo list": [*ZOO, "list"],
    "zoo show qwen3-8b": [*ZOO, "show", "qwen3-8b"],
    "zoo show qwen3-8b llama-3.1-8b": [*ZOO, "show", "qwen3-8b", "llama-3.1-8b"],
}


def measure(rounds: int) -> dict[str, Any]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for n in range(rounds + 1):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
            if n:  # the first round fills caches
                seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    return {name: {"ms": 1000 * s, "times_click": s / median["import click"]} for name, s in median.items()}


def plan(rounds: int) -> dict[str, Any]:
    """Median seconds of `zoo plan`, start-up included."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import tiny

    from zoo.testing.names import holes

    config = json.loads((ROOT / "manifests/configs/deepseek-v3.config.json").read_text())
    env, taken = os.environ | {"PYTHONPATH": str(ROOT)}, []
    with tempfile.TemporaryDirectory() as tmp:
        tensors = tiny.released_tensors(config, mtp=1, quantised=True)
        source = holes(Path(tmp), config, tensors)
        for _ in range(rounds):
            began = time.perf_counter()
            subprocess.run([*ZOO, "plan", str(source)], env=env, check=True, stdout=subprocess.DEVNULL)
            taken.append(time.perf_counter() - began)
    return {"tensors": len(tensors), "seconds": statistics.median(taken), "goal": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = measure(args.rounds)
    for name, f in figures.items():
        print(f"{name:32} {f['ms']:6.0f} ms  {f['times_click']:.2f}x")
    planned = plan(max(3, args.rounds // 3))
    print(f"zoo plan, {planned['tensors']:,} tensors: {planned['seconds']:.2f} s")
    if args.json:
        about = {"figures": figures, "plan": planned, "machine": machine("startup.py")}
        args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
