"""What `zoo pull` costs and survives, measured against a Hub on loopback.

    python benchmarks/pull.py speed [--gb 3] [--shards 4] [--rounds 3]
        fetch, hash, convert, beside `snapshot_download` + `sha256sum` + `cp -r` of the same files; and the
        transport alone
    python benchmarks/pull.py kills [--points 30] [--mb 200]
        pulls killed with SIGKILL at random points and run again, compared by hash with an undisturbed one; bytes
        fetched again; in each way of fetching
    python benchmarks/pull.py disk [--gb 3] [--shards 8]
        the most that `zoo pull --stream` has on disk at once, beside canonical size + 2 shards

Each run is a process of its own with an empty cache; the server is another. `--json FILE` keeps the figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from about import machine
from convert import dense, write
from hub_server import HubServer

REPO = "org/bench"
LIBRARY = f"""
from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars
disable_progress_bars()
print(snapshot_download({REPO!r}, max_workers=WORKERS))
"""
TRANSPORT = f"""
from zoo import hub
snapshot = hub.resolve({REPO!r})
print(hub.download(snapshot, [f.path for f in snapshot.files], workers=WORKERS))
"""
WAYS = {"files": [], "stream": ["--stream"], "layers": ["--layers", "0-1"]}


def make(folder: Path, gb: float, shards: int) -> int:
    """A dense bf16 release of about `gb`; its bytes."""
    write(folder, *dense(gb), shard=gb * 1e9 / shards)
    return size_of(folder)


def size_of(folder: Path) -> int:
    """Bytes on disk below a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for at, _, files in os.walk(folder):
        for name in files:
            try:
                stat = os.lstat(os.path.join(at, name))
            except FileNotFoundError:
                continue
            total += min(stat.st_size, stat.st_blocks * 512)
    return total


def environment(url: str, home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    ours = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
    return kept | ours


def pull(dst: Path, way: str = "files", workers: int = 4) -> list[str]:
    return [
        sys.executable,
        "-m",
        "zoo",
        "pull",
        REPO,
        "--to",
        str(dst),
        "--workers",
        str(workers),
        *WAYS[way],
    ]


def serve(source: Path) -> tuple[subprocess.Popen[str], str]:
    """The Hub in a process of its own, and its address."""
    command = [sys.executable, str(ROOT / "tests" / "hub_server.py"), f"{REPO}={source}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, server.stdout.readline().strip()


def timed(command: list[str], env: dict[str, str] | None = None) -> dict[str, float]:
    """Wall and CPU seconds of a command, with nothing left to write from the one before."""
    os.sync()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def hashes(folder: Path) -> dict[str, str]:
    """All files of a canonical folder but zoo.json, which says from where and when."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "zoo.json"
    }


def speed(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    source, home, dst = work / "source", work / "home", work / "canon"
    total = make(source, args.gb, args.shards)
    server, url = serve(source)
    shards = [str(p) for p in sorted(source.glob("*.safetensors"))]
    runs: dict[str, list[dict[str, float]]] = {}
    fetches = {
        "snapshot_download": [sys.executable, "-c", LIBRARY.replace("WORKERS", str(args.workers))],
        "zoo.hub alone": [sys.executable, "-c", TRANSPORT.replace("WORKERS", str(args.workers))],
        "zoo pull": pull(dst, workers=args.workers),
        "zoo pull --stream": pull(dst, "stream"),
    }
    try:
        for _ in range(args.rounds):
            for name, command in fetches.items():
                runs.setdefault(name, []).append(timed(command, environment(url, home)))
                shutil.rmtree(home)
                shutil.rmtree(dst, ignore_errors=True)
            runs.setdefault("sha256sum", []).append(timed(["sha256sum", *shards]))
            runs.setdefault("cp -r", []).append(timed(["cp", "-r", str(source), str(work / "copy")]))
            shutil.rmtree(work / "copy")
    finally:
        server.kill()
        server.wait()
    median = {name: statistics.median(r["wall"] for r in rs) for name, rs in runs.items()}
    cpu = {name: statistics.median(r["cpu"] for r in rs) for name, rs in runs.items()}
    print(f"{total / 1e9:.1f} GB in {len(shards)} shards, {args.workers} workers, median of {args.rounds}")
    for name, seconds in median.items():
        print(f"  {name:18} {seconds:6.2f} s  {total / seconds / 1e6:6.0f} MB/s   {cpu[name]:6.2f} s CPU")
    parts = ("snapshot_download", "sha256sum", "cp -r")
    rounds = [
        runs["zoo pull"][n]["wall"] / sum(runs[part][n]["wall"] for part in parts) for n in range(args.rounds)
    ]
    ratio = statistics.median(rounds)
    print(f"  zoo pull / (snapshot_download + sha256sum + cp -r): {ratio:.2f}, median of the rounds' ratios")
    return {
        "bytes": total,
        "shards": len(shards),
        "ratio": ratio,
        "wall_s": median,
        "cpu_s": cpu,
        "runs": runs,
    }


def kills(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    source, chance = work / "source", random.Random(args.seed)
    total = make(source, args.mb / 1000, 4)
    weights = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    figures: dict[str, Any] = {"bytes": total}
    for way in args.ways or WAYS:
        home, dst, again, wrong, tried, shown = work / "home", work / "canon", [], 0, 0, 0
        with HubServer() as server:
            server.repo(REPO).commit(source)
            env = environment(server.url, home)
            subprocess.run(pull(work / "undisturbed", way), env=env, check=True, stdout=subprocess.DEVNULL)
            expected, sent = hashes(work / "undisturbed"), server.body_bytes("*.safetensors")
            server.rate = weights / 4 / 1.5  # a shard takes 1.5 s
            while tried < args.points:  # rounds of up to five kills, each ended by a run that may finish
                shutil.rmtree(home, ignore_errors=True)
                shutil.rmtree(dst, ignore_errors=True)
                server.forget()
                for _ in range(min(5, args.points - tried)):
                    process = subprocess.Popen(pull(dst, way), env=env, stdout=subprocess.DEVNULL)
                    # Half of the points by time (start-up, headers), half by bytes (transfer, conversion).
                    until, target = (
                        time.monotonic() + 60,
                        server.body_bytes("*.safetensors") + chance.randrange(sent // 4),
                    )
                    if chance.random() < 0.5:
                        until = time.monotonic() + 0.2 + 2.5 * chance.random()
                        target = sent * 100
                    while time.monotonic() < until and server.body_bytes("*.safetensors") < target:
                        if process.poll() is not None:
                            break
                        time.sleep(0.001)
                    tried += process.poll() is None
                    process.kill()
                    process.wait()
                    shown += dst.exists() and hashes(dst) != expected
                subprocess.run(pull(dst, way), env=env, check=True, stdout=subprocess.DEVNULL)
                wrong += hashes(dst) != expected
                again.append(server.body_bytes("*.safetensors") - sent)
        for folder in (work / "undisturbed", dst, home):
            shutil.rmtree(folder, ignore_errors=True)
        print(
            f"{way}: {tried} kills of a pull of {total / 1e6:.0f} MB: {wrong} results differ, {shown} half-made folders"
        )
        print(
            f"  fetched again: {sum(again)} bytes in all, {sum(again) / max(1, tried) / 1e3:.0f} kB per kill"
        )
        figures[way] = {"kills": tried, "different": wrong, "half_made": shown, "fetched_again": sum(again)}
    return figures


def disk(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    source, home, dst = work / "source", work / "home", work / "out" / "canon"
    make(source, args.gb, args.shards)
    largest = sorted(p.stat().st_size for p in source.glob("*.safetensors"))[-2:]
    figures: dict[str, Any] = {"two_shards": sum(largest)}
    server, url = serve(source)
    try:
        for way in ("stream", "files"):
            peak, stop = [0], threading.Event()

            def watch(peak: list[int] = peak, stop: threading.Event = stop) -> None:
                while not stop.is_set():
                    peak[0] = max(peak[0], size_of(dst.parent) + size_of(home))
                    time.sleep(0.005)

            watcher = threading.Thread(target=watch)
            watcher.start()
            subprocess.run(pull(dst, way), env=environment(url, home), check=True, stdout=subprocess.DEVNULL)
            stop.set()
            watcher.join()
            canonical = size_of(dst)
            over = (peak[0] - canonical) / 1e6
            print(
                f"{way}: canonical {canonical / 1e6:.0f} MB, at most {peak[0] / 1e6:.0f} MB on disk at once: {over:.0f} MB over"
            )
            figures |= {way: peak[0], "canonical": canonical}
            shutil.rmtree(home)
            shutil.rmtree(dst)
    finally:
        server.kill()
        server.wait()
    print(f"two shards are {sum(largest) / 1e6:.0f} MB")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "kills", "disk"])
    parser.add_argument("--gb", type=float, default=3.0)
    parser.add_argument("--mb", type=float, default=200.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", type=int, default=30)
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), help="kills: only these ways of fetching")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        figures = {"speed": speed, "kills": kills, "disk": disk}[args.what](args, Path(work))
    figures["machine"] = machine("pull.py")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
