"""Two ranks on one machine beside one process with two threads: the same conversion, and a pull from a server on this machine.

    python benchmarks/parts.py [dense|moe|pull ...] [--gb 3.05] [--rounds 5] [--tmp DIR] [--json FILE]

Every round runs both, one after the other in an order that alternates, each from a warm page cache with nothing left to
write. A figure is the median of the rounds' ratios, ranks over one process; the goal is at most 1. Both write the same bytes,
which is checked. Start-up is included: of two interpreters for the ranks, which is what a user waits for.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from about import machine
from convert import dense, moe, touch_memory, warm, write

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
N = 2  # ranks, and threads of the one process
RUN = """
import sys
from zoo.formats import open_checkpoint
from zoo.mapping.execute import convert
from zoo.mapping.parts import Part
from zoo.mapping.plan import make_plan
k, n, threads = map(int, sys.argv[3:])
part = Part(k, n, together=True) if n > 1 else None
convert(make_plan(open_checkpoint(sys.argv[1])), sys.argv[2], threads=threads, part=part)
"""
MAKERS = {"dense": dense, "moe": moe, "pull": dense}


def together(commands: list[list[str]], environments: list[dict[str, str]]) -> float:
    """Seconds until all of these, started at once, have ended."""
    os.sync()
    began = time.perf_counter()
    running = [
        subprocess.Popen(c, env=e, stdout=subprocess.DEVNULL)
        for c, e in zip(commands, environments, strict=True)
    ]
    codes = [p.wait() for p in running]
    if any(codes):
        raise SystemExit(f"failed: {' '.join(commands[0])[:200]}")
    return time.perf_counter() - began


def converting(source: Path, dst: Path, ranks: int, tmp: Path) -> float:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = [
        [sys.executable, "-c", RUN, str(source), str(dst), str(k), str(ranks), str(N // ranks)]
        for k in range(1, ranks + 1)
    ]
    return together(commands, [env] * ranks)


def pulling(source: Path, dst: Path, ranks: int, tmp: Path) -> float:
    """Each rank with a cache of its own, empty."""
    from hub_client import environment
    from hub_server import HubServer

    with HubServer() as server:
        server.repo("org/model").commit(source)
        homes = [tmp / f"home{k}" for k in range(ranks)]
        commands = [
            [sys.executable, "-m", "zoo", "pull", "org/model", "--to", str(dst), "--part", f"{k + 1}/{ranks}"]
            for k in range(ranks)
        ]
        seconds = together(
            commands, [environment(server, home) | {"PYTHONPATH": str(ROOT)} for home in homes]
        )
    for home in homes:
        shutil.rmtree(home)
    return seconds


def measure(case: str, tmp: Path, gb: float, rounds: int) -> dict[str, Any]:
    source = tmp / "source"
    write(source, *MAKERS[case](gb))
    how = pulling if case == "pull" else converting
    places = {ranks: tmp / f"of{ranks}" for ranks in (1, N)}
    seconds: dict[int, list[float]] = {1: [], N: []}
    for n in range(rounds):
        for ranks in (1, N) if n % 2 else (N, 1):
            shutil.rmtree(places[ranks], ignore_errors=True)
            warm(source)
            seconds[ranks].append(how(source, places[ranks], ranks, tmp))
        # zoo.json names the cache that the pull was converted from, which is the publishing rank's
        names = sorted(p.name for p in places[1].iterdir() if case != "pull" or p.name != "zoo.json")
        _, other, wrong = filecmp.cmpfiles(places[1], places[N], names, shallow=False)
        if other or wrong or not all((places[N] / name).exists() for name in names):
            raise SystemExit(f"{case}: the ranks wrote other bytes: {[*other, *wrong]}")
    ratios = [b / a for a, b in zip(seconds[1], seconds[N], strict=True)]
    shutil.rmtree(source)
    for place in places.values():
        shutil.rmtree(place)
    return {
        "case": case,
        "gb": gb,
        "ranks": N,
        "seconds": {"one process": seconds[1], "ranks": seconds[N]},
        "ratio": statistics.median(ratios),
        "goal": 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=list(MAKERS), metavar="CASE")
    parser.add_argument("--gb", type=float, default=3.05)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tmp", type=Path, help="a folder on the file system to measure")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := set(args.cases) - set(MAKERS):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(MAKERS)}")
    touch_memory()
    results = []
    for case in args.cases:
        with tempfile.TemporaryDirectory(prefix="zoo-parts-", dir=args.tmp) as tmp:
            found = measure(case, Path(tmp), args.gb, args.rounds)
        results.append(found)
        one, ranks = (statistics.median(s) for s in found["seconds"].values())
        print(
            f"{case}: one process {one:.2f} s, {N} ranks {ranks:.2f} s; {found['ratio']:.2f} (goal <= 1)",
            flush=True,
        )
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine("parts.py"), "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
