"""What `zoo pull`'s transport costs and survives, measured against a Hub on loopback.

    python benchmarks/pull.py speed [--gb 3] [--shards 4] [--rounds 3]
        download + hash, beside `snapshot_download`, `sha256sum` and `cp -r` of the same files
    python benchmarks/pull.py kills [--points 30] [--mb 200]
        a pull killed with SIGKILL at random points, run again, compared by hash; bytes fetched again

Each run is a process of its own with an empty cache; the server is another. `--json FILE` keeps the figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hub_server import HubServer

REPO = "org/bench"
LIBRARY = f"""
from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars
disable_progress_bars()
print(snapshot_download({REPO!r}, max_workers=WORKERS))
"""
ZOO = f"""
from zoo import hub
snapshot = hub.resolve({REPO!r})
print(hub.download(snapshot, [f.path for f in snapshot.files], workers=WORKERS))
"""


def make(folder: Path, total: int, shards: int) -> None:
    """`shards` files of random bytes, `total` in all, and a config."""
    folder.mkdir()
    block = os.urandom(1 << 20)
    for i in range(shards):
        with open(folder / f"model-{i + 1:05}-of-{shards:05}.safetensors", "wb") as f:
            f.writelines(
                hashlib.sha256(f"{i} {at}".encode()).digest() + block[32 : total // shards - at]
                for at in range(0, total // shards, len(block))
            )
    (folder / "config.json").write_text("{}")


def environment(url: str, home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    ours = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
    return kept | ours


def timed(command: list[str], env: dict[str, str] | None = None) -> dict[str, float]:
    """Wall and CPU seconds of a command, with nothing left to write from the one before."""
    os.sync()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def speed(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    source, total = work / "source", int(args.gb * 1e9)
    make(source, total, args.shards)
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "hub_server.py"), f"{REPO}={source}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    shards = [str(p) for p in sorted(source.glob("*.safetensors"))]
    runs: dict[str, list[dict[str, float]]] = {}
    try:
        for _ in range(args.rounds):
            for name, code in (("snapshot_download", LIBRARY), ("zoo.hub", ZOO)):
                home = work / "home"
                command = [sys.executable, "-c", code.replace("WORKERS", str(args.workers))]
                runs.setdefault(name, []).append(timed(command, environment(url, home)))
                shutil.rmtree(home)
            runs.setdefault("sha256sum", []).append(timed(["sha256sum", *shards]))
            runs.setdefault("cp -r", []).append(timed(["cp", "-r", str(source), str(work / "copy")]))
            shutil.rmtree(work / "copy")
    finally:
        server.kill()
        server.wait()
    median = {name: statistics.median(r["wall"] for r in rs) for name, rs in runs.items()}
    cpu = {name: statistics.median(r["cpu"] for r in rs) for name, rs in runs.items()}
    print(f"{total / 1e9:.1f} GB in {args.shards} shards, {args.workers} workers, median of {args.rounds}")
    for name, seconds in median.items():
        print(f"  {name:18} {seconds:6.2f} s  {total / seconds / 1e6:6.0f} MB/s   {cpu[name]:6.2f} s CPU")
    reference = median["snapshot_download"] + median["sha256sum"] + median["cp -r"]
    print(
        f"  the three others together: {reference:.2f} s; zoo.hub, verified, takes {median['zoo.hub'] / reference:.2f} of it"
    )
    print(f"  left for converting within 1.3 of them: {1.3 * reference - median['zoo.hub']:.2f} s")
    return {
        "bytes": total,
        "shards": args.shards,
        "workers": args.workers,
        "wall_s": median,
        "cpu_s": cpu,
        "runs": runs,
    }


def kills(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    source, total, chance = work / "source", int(args.mb * 1e6), random.Random(args.seed)
    make(source, total, 4)
    expected = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in source.iterdir()}
    home, again, wrong, tried, peak = work / "home", [], 0, 0, 0
    command = [sys.executable, "-c", ZOO.replace("WORKERS", "4")]
    with HubServer() as server:
        server.repo(REPO).commit(source)
        server.rate = total / 4 / 1.5  # a shard takes 1.5 s
        while tried < args.points:  # rounds of up to five kills, each ended by a run that may finish
            shutil.rmtree(home, ignore_errors=True)
            server.forget()
            for _ in range(min(5, args.points - tried)):
                target = server.body_bytes() + chance.randrange(total // 5)
                process = subprocess.Popen(
                    command, env=environment(server.url, home), stdout=subprocess.DEVNULL
                )
                while server.body_bytes() < target and process.poll() is None:
                    time.sleep(0.001)
                time.sleep(chance.random() * 0.01)
                tried += process.poll() is None
                process.kill()
                process.wait()
            out = subprocess.run(
                command, env=environment(server.url, home), check=True, stdout=subprocess.PIPE, text=True
            )
            folder = Path(out.stdout.strip())
            found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
            wrong += found != expected
            again.append(server.body_bytes() - sum(p.stat().st_size for p in source.iterdir()))
            peak = max(
                peak, sum(p.stat().st_size for p in home.rglob("*") if p.is_file() and not p.is_symlink())
            )
    print(f"{tried} kills of a pull of {total / 1e6:.0f} MB: {wrong} results differ")
    print(f"  fetched again: {sum(again)} bytes in all, {sum(again) / max(1, tried) / 1e3:.0f} kB per kill")
    return {
        "kills": tried,
        "different": wrong,
        "fetched_again": sum(again),
        "bytes": total,
        "cache_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "kills"])
    parser.add_argument("--gb", type=float, default=3.0)
    parser.add_argument("--mb", type=float, default=200.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        figures = {"speed": speed, "kills": kills}[args.what](args, Path(work))
    figures["machine"] = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
