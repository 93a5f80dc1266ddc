"""GGUFs decoded on a CPU by zoo, from the blocks as they lie, and by llama.cpp (llama-cpp-python), taken in turn.

    PYTHONPATH=build/llama-cpp python benchmarks/gguf_speed.py [--threads 2] [--pairs 5] [--json FILE] [FILE.gguf ...]

Without files: Gemma 3 270M as its package has it (Q4_K_M), SmolLM2 135M of its package's values in Q8_0, and random models of one shape in
Q8_0, Q4_K and Q6_K, whose every matrix is of that type. Each side is a process of its own that holds the model; asked, it decodes NEW tokens after a prompt of 8, one at a
time, and says how long that took. Medians of pairs; the ratio is the median of the pairs' ratios. Beside it zoo's rate from the same values
dequantised to fp32. Build llama-cpp-python for the machine first: `make llama-cpp` has the flags for any.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from about import machine

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PROMPT, NEW = [2, 818, 5279, 529, 7001, 563, 3041, 1018], 32
SHAPE = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 4, "head_dim": 128, "num_attention_heads": 16,
         "num_key_value_heads": 8, "vocab_size": 32768}  # fmt: skip


def ours(path: str, threads: int) -> Callable[[], float]:
    import torch

    import zoo
    from zoo.model.generate import stream

    torch.set_num_threads(threads)
    model = zoo.load(path)

    def run() -> float:
        tokens = stream(model, torch.tensor([PROMPT]), NEW + 1)
        next(tokens)
        began = time.perf_counter()
        for _ in tokens:
            pass
        return time.perf_counter() - began

    return run


def theirs(path: str, threads: int) -> Callable[[], float]:
    from llama_cpp import Llama

    model = Llama(path, n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run() -> float:
        model.reset()
        model.eval(PROMPT)
        began = time.perf_counter()
        for _ in range(NEW):
            model.eval([model.sample(temp=0.0)])
        return time.perf_counter() - began

    return run


class Side:
    """One of the two in a process of its own."""

    def __init__(self, which: str, path: Path, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--side", which, "--threads", str(threads), str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.rate()

    def rate(self) -> float:
        """Tokens in a second, of one run."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        return NEW / float(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measured(file: Path, work: Path, pairs: int, threads: int) -> dict[str, Any]:
    import zoo

    canon = zoo.convert(file, work / "carried")
    plain = zoo.convert(file, work / "plain", dtype="fp32")
    sides = [Side("ours", canon, threads), Side("theirs", file, threads), Side("ours", plain, threads)]
    found = [[side.rate() for side in sides] for _ in range(pairs)]
    for side in sides:
        side.close()
    mine, other, wide = zip(*found, strict=True)
    return {
        "types": zoo_types(canon),
        "bytes": file.stat().st_size,
        "zoo, tokens/s": round(statistics.median(mine), 1),
        "llama.cpp, tokens/s": round(statistics.median(other), 1),
        "share": round(statistics.median(a / b for a, b in zip(mine, other, strict=True)), 3),
        "zoo from fp32, tokens/s": round(statistics.median(wide), 1),
    }


def zoo_types(canon: Path) -> dict[str, int]:
    from zoo.formats.canonical import read

    counts: dict[str, int] = {}
    for how in read(canon).quant.values():
        counts[how] = counts.get(how, 0) + 1
    return counts


def files(work: Path) -> dict[str, Path]:
    """The files to measure, made or put together in a folder."""
    import tiny
    from gguf_out import released

    import zoo
    from zoo.testing import gguf as testing_gguf

    out: dict[str, Path] = {}
    if (gemma := released("gemma3-270m", work)) is not None:
        out["Gemma 3 270M, Q4_K_M"] = gemma
    if (small := released("smollm2-135m", work)) is not None:
        values = zoo.convert(small, work / "smollm2", dtype="fp32")
        out["SmolLM2 135M, Q8_0"] = zoo.export(values, work / "smollm2-q8_0.gguf", format="gguf", type="q8_0")
    case = tiny.CASES["qwen3"]
    for kind in ("Q8_0", "Q4_K", "Q6_K"):
        folder, _ = testing_gguf.make(case, case.gguf[0], work / kind, **SHAPE)
        out[f"random, 4 layers of 2048, {kind}"] = testing_gguf.write(
            folder,
            work / f"{kind}.gguf",
            case.gguf[0],
            types=lambda _, kind=kind: kind,
            **{"tokenizer.ggml.model": "no_vocab"},
        )
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
            print(run(), flush=True)
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
